"""Processes of one machine, as a user and a scheduler treat them. The stage is a real training of two processes."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from crt import interrupt, processes
from crt.launch import local_command
from tests.conftest import ROOT
from tests.tokenizer.conftest import digits, runs  # noqa: F401 - fixtures

LONG = {"steps": 100_000, "checkpoint_every": 100_000, "validate_every": 100_000}


def start(arguments: list[str]) -> subprocess.Popen[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(local_command(2, arguments), cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def alive(pid: int) -> bool:
    try:
        return not re.search(r"^State:\s+Z", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_for(condition: Callable[[], object], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture
def training(runs):  # noqa: F811
    """A training of two processes that has made steps: the parent, its children, and the output folder."""
    parent = start(runs.arguments("run", **LONG))
    log = runs.out("run").with_name("tokenizer.log")
    wait_for(lambda: parent.poll() is not None or (log.exists() and re.search(r" \d+/100000 steps", log.read_text())))
    children = children_of(parent.pid)
    assert len(children) == 2
    yield parent, children, runs.out("run")
    for pid in (parent.pid, *children):
        if alive(pid):
            os.kill(pid, signal.SIGKILL)
    parent.communicate()


def child(seconds: float, status: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen(["sh", "-c", f"sleep {seconds}; exit {status}"])


@pytest.mark.parametrize(
    ("ends", "status"),
    [
        ([(0.0, 0), (0.3, 0)], 0),
        ([(0.5, 4), (0.0, 3)], 3),  # the first that failed
    ],
)
def test_the_status_is_that_of_the_first_that_failed(monkeypatch, ends, status):
    """Each child ends after some seconds, with a status of its own."""
    monkeypatch.setattr(processes, "_GRACE_SECONDS", 0.5)
    assert processes._wait([child(*end) for end in ends]) == status


def test_those_that_stop_on_request_wait_for_the_first_one_to_save(monkeypatch):
    monkeypatch.setattr(processes, "_GRACE_SECONDS", 0.2)
    children = [child(1.0, 143), child(0.0, 143)]
    assert processes._wait(children) == 143
    assert [process.returncode for process in children] == [143, 143]


def test_nobody_is_waited_for_long_once_the_first_is_gone(monkeypatch, capfd):
    monkeypatch.setattr(processes, "_GRACE_SECONDS", 0.2)
    assert processes._wait([child(0.0, 0), child(5.0, 0)]) == 128 + signal.SIGKILL
    said = capfd.readouterr().err
    assert said.startswith("error: process 1 of 2 did not end when the first one was done: run the same command again")


def test_one_that_was_killed_is_the_reason_why_others_failed(capfd):
    children = [child(0.0, 1), subprocess.Popen(["sh", "-c", "kill -KILL $$"])]
    for process in children:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # both are seen to end at once
    assert processes._wait(children) == 128 + signal.SIGKILL
    assert "error: process 1 of 2 was ended by SIGKILL" in capfd.readouterr().err


def test_a_mistake_is_one_line_and_status_2(runs):  # noqa: F811
    parent = start(runs.arguments("run", batch_size=9))
    said = parent.communicate(timeout=120)[1]
    assert parent.returncode == 2
    assert [line for line in said.splitlines() if "rror" in line] == [
        line for line in said.splitlines() if line.startswith("error: batch_size 9 does not divide among 2 processes")
    ]
    assert said.count("error: ") == 1 and "Traceback" not in said


def test_a_signal_before_all_of_them_listen_stops_all_soon_after(runs, tmp_path, monkeypatch):  # noqa: F811
    """One that died of it would leave the others waiting for it to join them."""
    (tmp_path / "late").mkdir()
    (tmp_path / "late/sitecustomize.py").write_text(
        "import os, time\nif os.environ.get('RANK') == '1':\n    time.sleep(6)\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'late'}:{ROOT}")
    parent = start(runs.arguments("run", **LONG))
    wait_for(lambda: len(children_of(parent.pid)) == 2)
    time.sleep(3)
    parent.send_signal(signal.SIGTERM)
    said = parent.communicate(timeout=120)[1]
    assert parent.returncode == 128 + signal.SIGTERM
    assert "run the same command to continue" in said and "Traceback" not in said


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_all_of_them_is_one_request_to_save_and_stop(training, signum):
    """As a scheduler sends it to every process of a job step, and a terminal to every one in the foreground."""
    parent, children, out = training
    for pid in (parent.pid, *children):
        os.kill(pid, signum)
    said = parent.communicate(timeout=120)[1]
    assert parent.returncode == 128 + signum
    assert "run the same command to continue" in said and "Traceback" not in said and "error" not in said
    assert list(out.parent.glob(".work/*/checkpoint.pt"))


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_each_signal_asks_to_stop_and_only_ctrl_c_again_is_urgent(signum):
    """SIGUSR1 is what Slurm sends ahead of the time limit."""
    code = (
        "import os, sys; from crt import interrupt\n"
        f"interrupt._ONE_REQUEST_SECONDS = {60 if signum == signal.SIGINT else 0}\n"
        "interrupt.listen(); interrupt.raise_if_stopped()\n"
        f"for _ in range(2): os.kill(os.getpid(), {int(signum)})\n"
        "try: interrupt.raise_if_stopped()\n"
        "except interrupt.Stopped as stopped: print(stopped); sys.exit(stopped.exit_status)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (
        128 + signum,
        f"stopped by {signum.name}: run the same command to continue\n",
    )


def test_a_second_ctrl_c_ends_a_process_at_once_and_an_echo_of_the_first_does_not():
    code = (
        "import os, signal, sys, time; from crt import interrupt\n"
        "interrupt.listen()\n"
        "for _ in range(2): os.kill(os.getpid(), signal.SIGINT)\n"
        "print(interrupt.stop_requested(), flush=True); time.sleep(1.1)\n"
        "os.kill(os.getpid(), signal.SIGINT); time.sleep(5); print('still here')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (-signal.SIGINT, "2\n")


def test_if_one_is_killed_the_others_end_and_it_is_said(training):
    parent, children, _ = training
    os.kill(children[1], signal.SIGKILL)
    said = parent.communicate(timeout=120)[1]
    assert parent.returncode == 128 + signal.SIGKILL
    assert "error: process 1 of 2 was ended by SIGKILL, most likely out of memory" in said
    assert not any(map(alive, children))


def test_if_the_parent_is_killed_they_save_and_stop(training):
    parent, children, out = training
    parent.kill()
    wait_for(lambda: not any(map(alive, children)))
    assert list(out.parent.glob(".work/*/checkpoint.pt"))


def test_a_process_that_cannot_be_started_ends_the_others(monkeypatch, capfd):
    """As under `ulimit -u`, which root does not heed."""
    started, start_really = [], subprocess.Popen

    def start(command, **kwargs):
        if len(started) == 2:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        started.append(start_really([sys.executable, "-c", "import time; time.sleep(600)"], **kwargs))
        return started[-1]

    handlers = {signum: signal.getsignal(signum) for signum in interrupt.SIGNALS}
    monkeypatch.setattr(subprocess, "Popen", start)
    try:
        assert processes.run_together(3, ["plan"]) == 2
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
    assert capfd.readouterr().err == (
        "error: process 2 of 3 cannot be started: Resource temporarily unavailable: raise the limit of processes "
        "(`ulimit -u`) and run the same command again; finished work is kept\n"
    )
    assert [process.poll() for process in started] == [-signal.SIGKILL] * 2
