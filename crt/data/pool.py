"""Work spread over processes, with results in order and bounded memory."""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from multiprocessing.connection import wait
from pathlib import Path
from typing import TypeVar

from crt import interrupt
from crt.errors import UserError
from crt.system_errors import RUN_AGAIN

_NO_QUOTA = 2**16
WORKER_KILLED = "a worker process was killed, most likely out of memory: free some" + RUN_AGAIN

Task = TypeVar("Task")
Result = TypeVar("Result")


def ordered_map(
    function: Callable[[Task], Result], tasks: Iterable[Task], workers: int
) -> Generator[Result, None, None]:
    """`map` over worker processes: results in the order of the tasks, a few tasks per worker in flight.

    Args:
        function: importable, as are tasks and results; its exceptions reach the caller.
        tasks: read only as fast as they are worked off.
        workers: processes; with 1 the work is done in this process.

    Raises:
        UserError: a worker died.
    """
    if workers == 1:
        yield from map(function, tasks)
        return
    # Spawned, not forked: the caller may run threads. The work given out is self-contained.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_start_worker)
    waiting: deque[Future[Result]] = deque()
    try:
        for task in tasks:
            waiting.append(pool.submit(function, task))
            if len(waiting) >= 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise UserError(WORKER_KILLED) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def available_cpus() -> int:
    """CPUs that this process may use, which on a shared node or in a container are fewer than there are."""
    return max(1, min(len(os.sched_getaffinity(0)), _cpu_quota()))


def _cpu_quota(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """CPUs whose time the control groups of this process may use, rounded up; a container is limited so."""
    try:
        # The line of version 2 of control groups: 0::/path. In a container the path is mostly /.
        path = next(line[3:] for line in own.read_text().splitlines() if line.startswith("0::"))
    except (OSError, StopIteration):
        return _NO_QUOTA
    group = root / path.lstrip("/")
    quotas = [_NO_QUOTA]
    for folder in (group, *group.parents):
        with suppress(OSError, ValueError):
            most, period = (folder / "cpu.max").read_text().split()
            if most != "max":
                quotas.append(math.ceil(int(most) / int(period)))
        if folder == root:
            break
    return min(quotas)


def heed_only_parent() -> None:
    """Called in a worker process: it ends when its parent says so, and at no other signal.

    A scheduler signals every process of a job at once; the workers must not be gone while the parent finishes
    and saves its step.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None
    for signum in interrupt.SIGNALS:
        signal.signal(signum, signal.SIG_IGN if signum != signal.SIGTERM else signal.SIG_DFL)
    # Blocked here and taken by a thread that sees who sent it.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def obey() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent.pid:
            pass
        os._exit(1)

    threading.Thread(target=obey, daemon=True).start()


def _start_worker() -> None:
    """Heed the parent alone, and do not outlive it, even if it is killed."""
    heed_only_parent()
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
