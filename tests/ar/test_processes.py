"""Several processes against one: the same losses, the same images, one line for a mistake; kills at any moment."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from crt.__main__ import main
from crt.history import read_history
from crt.stages import train_ar
from tests.ar import ranks
from tests.conftest import ROOT

Make = Callable[..., list[str]]
# Dropout's draws belong to the process; all others to the global batch.
PLAIN: dict[str, Any] = {"train_ar__model__dropout": 0.0}


def torchrun(processes: int) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]


def in_processes(folder: Path, jobs: list[tuple[list[str], int | None]], processes: int = 2) -> tuple[Any, str]:
    """Exit status by process and job, and what all of them wrote to stderr."""
    jobs_file, results = folder / "jobs.json", folder / "results.json"
    jobs_file.write_text(json.dumps([{"command": command, "fail_at": fail_at} for command, fail_at in jobs]))
    command = [*torchrun(processes), "-m", "tests.ar.ranks", str(jobs_file), str(results)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(results.read_text()), done.stderr


def fail_alone(monkeypatch: pytest.MonkeyPatch, command: list[str], at: int) -> None:
    """Let a run of this process end in its middle."""
    with monkeypatch.context() as patch:
        patch.setattr(train_ar, "Progress", ranks.Failing)
        patch.setattr(ranks.Failing, "at", at)
        assert main(command) == 1


def out_of(command: list[str]) -> Path:
    return Path(command[command.index("--out") + 1])


def curve(command: list[str]) -> np.ndarray:
    return np.array([row["loss"] for row in read_history(out_of(command) / "train.csv")])


def final_loss(command: list[str]) -> float:
    return read_history(out_of(command) / "validation.csv")[-1]["loss"]


def test_two_processes_train_as_one(small_run: Make, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Oracle: one process, at the same global batch. Also their checkpoints' sizes, and what they say of mistakes."""
    one = small_run(tmp_path / "one", **PLAIN)
    assert main(one) == 0
    jobs: list[tuple[list[str], int | None]] = [
        (small_run(tmp_path / f"zero{stage}", train_ar__zero_stage=stage, **PLAIN), None) for stage in range(4)
    ]
    accumulating = small_run(tmp_path / "micro", train_ar__zero_stage=2, train_ar__micro_batch_size=4, **PLAIN)
    torn = small_run(tmp_path / "torn", train_ar__zero_stage=1)
    indivisible = small_run(tmp_path / "indivisible", train_ar__batch_size=15)
    diverging = small_run(
        tmp_path / "diverging", train_ar__optimizer__learning_rate=1e30, train_ar__optimizer__warmup_steps=0
    )
    whole = small_run(tmp_path / "whole", train_ar__zero_stage=1)
    jobs += [(accumulating, None), (torn, 6), (torn, None), (whole, None), (indivisible, None), (diverging, None)]
    split = [
        small_run(tmp_path / f"split{stage}", train_ar__zero_stage=stage, train_ar__model__width=128)
        for stage in (1, 3)
    ]
    statuses, stderr = in_processes(tmp_path, [*jobs, *((command, 6) for command in split)])

    for by_rank in zip(*statuses, strict=True):
        assert len(set(by_rank)) == 1
    assert statuses[0] == [0, 0, 0, 0, 0, 1, 0, 0, 2, 2, 1, 1]
    for command, _ in jobs[:5]:
        np.testing.assert_allclose(curve(command), curve(one), atol=2e-6)
        assert final_loss(command) == pytest.approx(final_loss(one), abs=2e-6)
    # Dropout is on here: bit for bit at the same number of processes.
    for name in ("model.safetensors", "train.csv", "validation.csv", "loss_per_position.csv"):
        assert (out_of(torn) / name).read_bytes() == (out_of(whole) / name).read_bytes()
    for message in ("batch_size 15 does not divide among 2 processes", "the run diverged"):
        assert stderr.count(message) == 1
    # 12 bytes per parameter (float32 weights and Adam's two moments), half of it in each process's file.
    parameters = 2 * 32 * 128 + 6 * 128 + 2 * (4 * 128**2 + 3 * 128 * 352 + 2 * 128) + 128
    for command in split:
        (folder,) = (out_of(command).parent / ".work").glob("ar-*/checkpoints/step_00000004/state")
        sizes = [path.stat().st_size for path in folder.glob("*optim_states.pt")]
        assert sizes == pytest.approx([12 * parameters / 2] * 2, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_a_run_goes_on_with_another_number_of_processes(
    small_run: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zero_stage: int
) -> None:
    """Oracle: the uninterrupted run of one process; one to two processes and two to one."""
    changes = PLAIN | {"train_ar__zero_stage": zero_stage}
    one, growing, shrinking = (small_run(tmp_path / n, **changes) for n in ("one", "growing", "shrinking"))
    assert main(one) == 0
    fail_alone(monkeypatch, growing, at=6)
    statuses, _ = in_processes(tmp_path, [(growing, None), (shrinking, 6)])
    assert statuses == [[0, 1], [0, 1]]
    assert main(shrinking) == 0
    for command in (growing, shrinking):
        np.testing.assert_allclose(curve(command), curve(one), atol=2e-6)
        assert final_loss(command) == pytest.approx(final_loss(one), abs=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_kills_at_random_moments_leave_no_trace(small_run: Make, tmp_path: Path, processes: int) -> None:
    """Oracle: the uninterrupted run. Kills fall into starts, steps, validations, checkpoints and the final files."""
    changes = {"train_ar__steps": 160, "train_ar__checkpoint_every": 5, "train_ar__validate_every": 7}
    whole, killed = small_run(tmp_path / "whole", **changes), small_run(tmp_path / "killed", **changes)
    subprocess.run([*launcher(processes), "-m", "crt", *whole], cwd=ROOT, check=True, capture_output=True)

    def rows() -> int:
        return sum(len(path.read_bytes().splitlines()) for path in out_of(killed).parent.glob(".work/*/*/train.csv"))

    kill_and_repeat([*launcher(processes), "-m", "crt", *killed], rows, 40, random.Random(processes))
    for name in ("config.json", "model.safetensors", "train.csv", "validation.csv", "loss_per_position.csv"):
        assert (out_of(killed) / name).read_bytes() == (out_of(whole) / name).read_bytes()


def launcher(processes: int) -> list[str]:
    return torchrun(processes) if processes > 1 else [sys.executable]


def kill_and_repeat(
    command: list[str], progress: Callable[[], int], stride: int, rng: random.Random, kills: int = 10, end: int = 0
) -> int:
    """Start a command and SIGKILL one of its processes, or all, until it has had so many chances to finish.

    Args:
        command: what to start, in a new process each time.
        progress: how far the work is.
        stride: a kill comes at most so much progress after the start, and sometimes before any.
        rng: draws the moments and the victims.
        kills: number of starts that are to be killed.
        end: the progress at which the last three kills come; 0: at random moments like the others.

    Returns:
        Number of kills that came before the command had ended by itself.
    """
    struck = 0
    for index in range(kills):
        target = progress() + rng.choice([0, rng.randint(1, stride), rng.randint(1, stride)])
        if end and index >= kills - 3:
            target = end
        struck += _kill_at(command, progress, target, rng)
    subprocess.run(command, cwd=ROOT, check=True, stderr=subprocess.DEVNULL)
    return struck


def _kill_at(command: list[str], progress: Callable[[], int], target: int, rng: random.Random) -> bool:
    """Start a command and kill it shortly after a moment; whether it was still running then."""
    started = progress()
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL) as running:
        if target == started:
            time.sleep(rng.uniform(0, 4))
        while running.poll() is None and progress() < target:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.1))
        alive, family = running.poll() is None, descendants(running.pid)
        one = bool(family) and rng.random() < 0.5
        for victim in [rng.choice(family)] if one else [running.pid, *family]:
            with suppress(ProcessLookupError):
                os.kill(victim, signal.SIGKILL)
        running.wait(timeout=120)
    return alive


def descendants(pid: int) -> list[int]:
    """Processes that a process has started, directly or not."""
    try:
        children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []
    return [pid for child in children for pid in (child, *descendants(child))]
