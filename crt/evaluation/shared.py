"""What evaluations of the same data have in common, made once: the classifier, features of real images, and those of a
tokenizer's reconstructions.

Each thing lies in the shared folder under a fingerprint of all that it depends on, so that it is never stale and runs,
studies and restarts find each other's. One process makes it while the others wait; the lock goes with a process that
is killed, and what that one had finished is kept. Deleting the folder costs time only. Weights from the network are
fetched behind the same lock.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from crt.files import make_folder
from crt.interrupt import raise_if_stopped, stop_requested
from crt.launch import environment_rank
from crt.pipeline import canonical_json
from crt.progress import logger

# Raised when the code changes what is kept.
VERSION = 3
_POLL_SECONDS = 0.5


def shared_path(folder: Path, kind: str, recipe: Any) -> Path:
    """Where a thing lies: KIND-FINGERPRINT in the shared folder, which need not exist yet.

    Args:
        folder: the shared folder.
        kind: such as "classifier".
        recipe: all that the thing depends on, as plain values.
    """
    key = hashlib.sha256(canonical_json([VERSION, kind, recipe]).encode()).hexdigest()
    return folder / f"{kind}-{key[:16]}"


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
