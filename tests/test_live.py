"""The curves of a run: their points, stopped and continued, and where they cannot be written."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer.record_writer import RecordWriter

from crt.errors import UserError
from crt.live import Live, live_folder
from tests.conftest import dvclive_curve


def points(folder: Path, name: str) -> list[tuple[int, float]]:
    """A curve as TensorBoard draws it."""
    events = EventAccumulator(str(folder), {"scalars": 0}).Reload()
    return [(point.step, point.value) for point in events.Scalars(name)]


def run_to(folder: Path, last: int, first_step: int = 0, steps: int = 10) -> None:
    """Steps after `first_step`, each with its number as its loss."""
    live = Live(folder, steps, first_step)
    for step in range(first_step + 1, last + 1):
        live.training(step, {"loss": float(step)})
    live.close()


@pytest.mark.parametrize("saved", [3, 5, 6])
def test_a_continued_run_has_each_point_once(tmp_path, saved):
    """From its checkpoint's step on. Oracle: a run in one go."""
    run_to(tmp_path / "ar.live", 6)
    run_to(tmp_path / "ar.live", 10, first_step=saved)
    expected = [(step, float(step)) for step in range(1, 11)]
    assert list(dvclive_curve(tmp_path / "ar.live", "loss").items()) == expected
    assert points(tmp_path / "ar.live", "loss") == expected
    assert json.loads((tmp_path / "ar.live/dvclive/metrics.json").read_text()) == {"loss": 10.0, "step": 10}


def test_a_run_from_the_start_has_nothing_of_an_earlier_one(tmp_path):
    run_to(tmp_path / "ar.live", 6)
    run_to(tmp_path / "ar.live", 2)
    assert list(dvclive_curve(tmp_path / "ar.live", "loss")) == [1, 2]
    assert points(tmp_path / "ar.live", "loss") == [(1, 1.0), (2, 2.0)]


@pytest.mark.parametrize("dvc", [False, True])
@pytest.mark.parametrize("commits", [0, 1])
def test_curves_leave_a_git_repository_as_it_is(tmp_path, monkeypatch, commits, dvc):
    """Whether it is DVC's as well or not: somebody's own project, or an archive put under Git a minute ago."""
    monkeypatch.chdir(tmp_path)
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c"]
    subprocess.run([*git, "init", "-q"], check=True)
    if dvc:
        subprocess.run([sys.executable, "-m", "dvc", "init", "-q"], check=True)
        subprocess.run([*git, "add", "."], check=True)
    for _ in range(commits):
        subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "first"], check=True)
    status = [*git, "status", "--short", "--untracked-files"]
    before = subprocess.run(status, capture_output=True, text=True, check=True).stdout
    run_to(Path("out/ar.live"), 3)
    assert list(dvclive_curve(Path("out/ar.live"), "loss")) == [1, 2, 3]
    after = subprocess.run(status, capture_output=True, text=True, check=True).stdout
    assert [line for line in after.splitlines() if "out/ar.live" not in line] == before.splitlines()


@pytest.mark.parametrize(("steps", "kept"), [(4, [1, 2, 3, 4]), (5, [2, 4]), (9, [3, 6, 9]), (11, [3, 6, 9])])
def test_long_curves_are_thinned(tmp_path, monkeypatch, steps, kept):
    monkeypatch.setattr("crt.live._POINTS", 4)
    run_to(tmp_path / "ar.live", steps, steps=steps)
    assert list(dvclive_curve(tmp_path / "ar.live", "loss")) == kept


def test_steps_that_are_looked_at_seldom_are_all_drawn(tmp_path, monkeypatch):
    """As on a GPU: every fifth step, of which every third would be drawn."""
    monkeypatch.setattr("crt.live._POINTS", 4)
    live = Live(tmp_path / "ar.live", 12, 0)
    for step in (5, 10, 12):
        live.training(step, {"loss": 1.0})
        assert json.loads((tmp_path / "ar.live/dvclive/metrics.json").read_text())["step"] == step
    live.close()
    assert list(dvclive_curve(tmp_path / "ar.live", "loss")) == [5, 10, 12]


def test_losses_by_position_and_pictures_belong_to_their_step(tmp_path):
    live, pixels = Live(tmp_path / "ar.live", 10, 0), np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    for step in (5, 10):
        live.positions(step, np.array([3.0, 2.0, 1.0]) + step)
        live.picture(step, "samples", Image.fromarray(pixels + step))
    live.close()
    events = EventAccumulator(str(tmp_path / "ar.live"), {"images": 0}).Reload()
    assert [image.step for image in events.Images("samples")] == [5, 10]
    for step in (5, 10):
        losses = points(tmp_path / "ar.live", f"loss_per_position/step_{step:08}")
        assert losses == [(0, 3.0 + step), (1, 2.0 + step), (2, 1.0 + step)]
        with Image.open(tmp_path / f"ar.live/samples/step_{step:08}.png") as image:
            np.testing.assert_array_equal(np.asarray(image), pixels + step)


def test_runs_side_by_side_have_folders_of_their_own():
    folders = [live_folder(SimpleNamespace(out=Path("out") / name)) for name in ("ar", "ar.0", "ar.1")]
    assert [str(folder) for folder in folders] == ["out/ar.live", "out/ar.0.live", "out/ar.1.live"]


def test_a_full_disk_is_met_by_the_run_and_not_by_a_thread(tmp_path, monkeypatch, capfd):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    met_by_threads = []
    monkeypatch.setattr(threading, "excepthook", met_by_threads.append)
    live = Live(tmp_path / "ar.live", 10, 0)
    live.log(1, {"loss": 1.0})
    monkeypatch.setattr(RecordWriter, "write", full)
    with pytest.raises(OSError, match="No space left"):
        for step in range(2, 100):
            live.log(step, {"loss": 1.0})
            time.sleep(0.01)
    assert not met_by_threads
    assert "Traceback" not in capfd.readouterr().err


def test_a_folder_that_tensorboard_cannot_name_is_refused_in_one_line(tmp_path):
    folder = tmp_path / os.fsdecode(b"caf\xe9") / "ar.live"
    with pytest.raises(UserError, match=r"ar\.live: TensorBoard writes into no folder whose name is not UTF-8"):
        Live(folder, 10, 0)
