"""One process does what others of the machine, or of a shared file system, would do as well; they wait for it.

A lock goes with a process that is killed, so the next one takes over.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from crt.files import make_folder
from crt.interrupt import raise_if_stopped, stop_requested
from crt.launch import environment_rank
from crt.progress import logger

_POLL_SECONDS = 0.5


@contextmanager
def exclusively(path: Path, alone: bool = True) -> Iterator[None]:
    """Hold a thing's lock, waiting for a process that is making it.

    Args:
        path: of the thing.
        alone: whether no other process follows this one's lead; if some do, a signal ends the waiting only, and the
            next collective check stops them all.

    Raises:
        Stopped: a signal arrived meanwhile, and it is alone.
    """
    make_folder(path.parent)
    lock = FileLock(path.with_name(path.name + ".lock"))
    waiting = False
    while True:
        if alone:
            raise_if_stopped()
        elif stop_requested():
            break
        try:
            lock.acquire(timeout=_POLL_SECONDS)
            break
        except Timeout:
            if not waiting:
                logger.info("waits for another process that is making %s", path)
            waiting = True
    try:
        yield
    finally:
        lock.release()


@contextmanager
def fetching(path: Path) -> Iterator[bool]:
    """For a file from the network that processes and runs of a machine share: one fetches it while the others wait.

    Args:
        path: where it will lie, whole or absent.

    Yields:
        Whether it is still to be fetched.

    Raises:
        Stopped: a signal arrived while this process, the only one of its run, waited for another.
    """
    if path.is_file():
        yield False
        return
    alone = environment_rank()[1] == 1
    with exclusively(path, alone):
        yield not path.is_file()
