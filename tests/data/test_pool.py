"""Oracle: the built-in `map`, and processes that are signalled and killed for real."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import pytest

from crt.data.pool import _cpu_quota, available_cpus, ordered_map
from crt.errors import UserError

ROOT = Path(__file__).resolve().parent.parent.parent


def square(value: int) -> int:
    time.sleep(0.002 * (value % 3))  # out of order on purpose
    return value * value


def signal_oneself(signum: int) -> int:
    if signum:
        os.kill(os.getpid(), signum)
        time.sleep(0.05)
    return os.getpid()


def fail(value: int) -> int:
    if value == 3:
        raise UserError("three: is refused")
    return value


@pytest.mark.parametrize("workers", [1, 3])
def test_results_come_in_order(workers):
    assert list(ordered_map(square, range(40), workers)) == [value * value for value in range(40)]


@pytest.mark.parametrize("workers", [1, 2])
def test_tasks_are_read_as_they_are_worked_off(workers):
    read = []

    def tasks():
        for value in range(1000):
            read.append(value)
            yield value

    results = ordered_map(square, tasks(), workers)
    assert list(islice(results, 5)) == [0, 1, 4, 9, 16]
    assert len(read) <= 5 + 2 * workers
    results.close()
    assert not [child for child in multiprocessing.active_children() if child.name.startswith("SpawnProcess")]


def test_errors_reach_the_caller():
    with pytest.raises(UserError, match="three: is refused"):
        list(ordered_map(fail, range(9), 2))


def test_workers_leave_signals_of_the_job_to_their_parent():
    signals = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, 0, 0, 0]
    workers = set(ordered_map(signal_oneself, signals * 2, 1 + 1))
    assert len(workers) <= 2 and os.getpid() not in workers


def test_a_killed_worker_is_reported_and_its_fellows_do_not_hang():
    started = time.monotonic()
    with pytest.raises(UserError, match="a worker process was killed"):
        list(ordered_map(signal_oneself, [0, 0, signal.SIGKILL, 0, 0, 0, 0, 0], 2))
    assert time.monotonic() - started < 30


def test_workers_do_not_outlive_a_killed_parent(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(
        "import os, sys, time\n"
        "from crt.data.pool import ordered_map\n"
        "def work(value):\n"
        "    open(sys.argv[1] + f'/{os.getpid()}', 'w').close()\n"
        "    time.sleep(0.2)\n"
        "    return value\n"
        "if __name__ == '__main__':\n"
        "    list(ordered_map(work, range(10000), 2))\n"
    )
    found = tmp_path / "found"
    found.mkdir()
    parent = subprocess.Popen([sys.executable, str(script), str(found)], cwd=ROOT)
    while len(list(found.iterdir())) < 2:
        assert parent.poll() is None
        time.sleep(0.01)
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 20
    while workers := [path.name for path in found.iterdir() if is_running(int(path.name))]:
        assert time.monotonic() < deadline, workers
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_the_cpus_are_those_that_may_be_used():
    assert 1 <= available_cpus() <= len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("own", "quotas", "expected"),
    [
        ("0::/\n", {"": "250000 100000"}, 3),  # a container sees its own group as the root
        ("1:cpu:/\n0::/a/b\n", {"a": "400000 100000", "a/b": "max 100000"}, 4),  # the tightest of all above counts
        ("0::/a\n", {"a": "20000 100000"}, 1),
        ("0::/a\n", {}, 2**16),
        ("1:cpu:/\n", {"": "100000 100000"}, 2**16),  # version 1 has no such file
        (None, {}, 2**16),
    ],
)
def test_a_containers_quota_of_time_counts_as_so_many_cpus(tmp_path, own, quotas, expected):
    for folder, quota in quotas.items():
        (tmp_path / "cgroup" / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / "cgroup" / folder / "cpu.max").write_text(f"{quota}\n")
    if own is not None:
        (tmp_path / "own").write_text(own)
    assert _cpu_quota(tmp_path / "cgroup", tmp_path / "own") == expected
