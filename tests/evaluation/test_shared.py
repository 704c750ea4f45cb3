"""What evaluations share: made once, by one of many, whoever is killed. Oracle: a count of who made it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from crt import interrupt
from crt.evaluation.shared import exclusively, shared_path
from crt.interrupt import Stopped
from tests.conftest import ROOT

# Makes the thing if it is not there: notes its start, works, notes its end, and shows it by a rename.
MAKER = """
import os, sys, time
from pathlib import Path
from crt.evaluation.shared import exclusively
path, notes = Path(sys.argv[1]), Path(sys.argv[2])
with exclusively(path):
    if not path.exists():
        with open(notes, "a") as file: file.write(f"start {os.getpid()}\\n")
        time.sleep(float(sys.argv[3]))
        with open(notes, "a") as file: file.write(f"end {os.getpid()}\\n")
        path.with_suffix(".tmp").write_text("made")
        os.replace(path.with_suffix(".tmp"), path)
assert path.read_text() == "made"
"""


def start(path: Path, notes: Path, seconds: float) -> subprocess.Popen:
    command = [sys.executable, "-c", MAKER, str(path), str(notes), str(seconds)]
    return subprocess.Popen(command, cwd=ROOT)


def test_of_many_one_makes_it(tmp_path):
    path, notes = tmp_path / "thing", tmp_path / "notes"
    makers = [start(path, notes, 1) for _ in range(3)]
    assert [maker.wait(60) for maker in makers] == [0, 0, 0]
    assert [line.split()[0] for line in notes.read_text().splitlines()] == ["start", "end"]


def test_a_killed_one_leaves_the_lock_to_the_next(tmp_path):
    path, notes = tmp_path / "thing", tmp_path / "notes"
    first = start(path, notes, 600)
    while not notes.exists():
        time.sleep(0.05)
    second = start(path, notes, 0)
    time.sleep(1)
    assert second.poll() is None  # it waits
    os.kill(first.pid, signal.SIGKILL)
    first.wait(10)
    assert second.wait(60) == 0
    assert [line.split()[0] for line in notes.read_text().splitlines()] == ["start", "start", "end"]


def test_a_signal_ends_the_waiting(tmp_path, monkeypatch):
    path = tmp_path / "thing"
    holder = start(path, tmp_path / "notes", 600)
    try:
        while not (tmp_path / "notes").exists():
            time.sleep(0.05)
        monkeypatch.setattr(interrupt, "_received", [signal.SIGTERM])
        with pytest.raises(Stopped), exclusively(path):
            pass
        with exclusively(path, alone=False):
            pass  # others follow: the collective check after it stops them all
    finally:
        holder.kill()
        holder.wait()


def test_a_place_depends_on_the_whole_recipe():
    places = {
        shared_path(Path("x"), kind, recipe)
        for kind in ("classifier", "features")
        for recipe in ({"a": 1, "b": [1, 2]}, {"a": 1, "b": [2, 1]}, {"a": 2, "b": [1, 2]})
    }
    assert len(places) == 6
    assert shared_path(Path("x"), "k", {"a": 1, "b": 2}) == shared_path(Path("x"), "k", {"b": 2, "a": 1})
