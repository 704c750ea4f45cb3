"""Work of our own on several threads of one process, which torch's threads do not get in the way of."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Result = TypeVar("Result")


def share_among_threads(work: Callable[[int, int], None], size: int, unit: int) -> None:
    """Call work(first, last) for ranges that make up `size`, cut at multiples of `unit`, in torch's number of threads.

    For what leaves Python's lock, such as Numba's kernels, whose own threads would be a second OpenMP that spins beside
    torch's. In each of these threads torch works alone.
    """
    threads = torch.get_num_threads()
    if threads == 1 or size <= unit:
        work(0, size)
        return
    share = -(-size // (threads * unit)) * unit
    cuts = [*range(0, size, share), size]
    for _ in _pool(os.getpid(), threads).map(work, cuts, cuts[1:]):
        pass


def alone(work: Callable[[], Result]) -> Result:
    """work() in a thread in which torch works alone: after each use of several its threads spin, in the way of ours."""
    threads = torch.get_num_threads()
    return work() if threads == 1 else _pool(os.getpid(), threads).submit(work).result()


@functools.lru_cache(maxsize=1)
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """Threads that multiply matrices alone. `process`: a fork has none of its parent's threads."""
    del process
    pool = ThreadPoolExecutor(threads, "crt", initializer=_work_alone)
    # The setting is the thread's own and the default of threads to come: put that back once all of these are there.
    together = threading.Barrier(threads)
    list(pool.map(lambda _: together.wait(), range(threads)))
    torch.set_num_threads(threads)
    return pool


def _work_alone() -> None:
    # A thread's first look at the setting sets it to the default: after that the thread keeps its own.
    torch.get_num_threads()
    torch.set_num_threads(1)
