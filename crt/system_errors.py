"""What a user can do about errors of the system: full disks, exhausted memory, limits, lost processes.

Libraries tell them in many ways, with and without the system's number; here is one line for each.
"""

from __future__ import annotations

import errno
import os
import re
import resource
import tempfile
from contextlib import suppress
from pathlib import Path

from crt.launch import environment_rank

REMEDIES = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some of your quota",
    errno.EROFS: "choose a folder that can be written",
    errno.EACCES: "change its permissions, or choose another folder",
    errno.EPERM: "change its permissions, or choose another folder",
    errno.EBUSY: "end what uses it, or choose another folder",
    errno.EIO: "check its disk or network",
    errno.ESTALE: "check its network file system",
    errno.ENOLCK: "choose a folder on a file system with locks",
    errno.EMFILE: "raise the limit (`ulimit -n`)",
    errno.ENFILE: "end what has so many files open",
    errno.EFBIG: "raise the limit (`ulimit -f`), or choose a file system that takes larger files",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOTDIR: "move the file away that stands in place of a folder",
    errno.EISDIR: "move the folder away that stands in place of a file",
    errno.ENOMEM: "free some memory, or raise its limit (`ulimit -v`, the job's)",
    errno.EAGAIN: "raise the limit of processes (`ulimit -u`)",
    # Not ENOENT or EEXIST: those may as well be errors of the program, whose traceback tells more.
}
"""What to do about an error of the system's, by its number."""
NO_SHARED_MEMORY = "a worker process found no room in shared memory (/dev/shm): enlarge that"
RUN_AGAIN = " and run the same command again; finished work is kept"
_OUT_OF_MEMORY = "out of memory: free some, or raise its limit (`ulimit -v`, the job's)"
# By what libraries say, in their own words, of errors that have no number, or another's.
_SAID = {
    "DefaultCPUAllocator: can't allocate memory|failed to map segment from shared object": _OUT_OF_MEMORY,
    # In a worker process, whose tensors go through it.
    "unable to allocate shared memory|(object|file) </torch_.*No space left on device": NO_SHARED_MEMORY,
    # Where Matplotlib says it in its own words, this is what it met.
    "No usable temporary directory": (
        "no folder for temporary files can be written: free some space in /tmp, or set TMPDIR to another,"
    ),
}
# What gloo and NCCL say where the process at the other end is gone.
_PEER_GONE = "Connection (closed|reset) by (remote )?peer|ncclRemoteError"


def system_message(error: BaseException, out: Path | None) -> str | None:
    """One line for an error of the system, whichever library met it; None for other errors.

    Args:
        error: as it was raised.
        out: the output folder, named where the error names no file.
    """
    said = _said(error)
    if said is None:
        number = _number(error, out)
        if number not in REMEDIES:
            return None
        # The second is where something was copied or renamed to.
        where = getattr(error, "filename2", None) or getattr(error, "filename", None)
        if where is None and number == errno.ENOSPC and _is_shared_memory_full():
            where = "/dev/shm"
        said = f"{where or out or 'output'}: {os.strerror(number)}: {REMEDIES[number]}"
    return said + RUN_AGAIN


def _said(error: BaseException) -> str | None:
    """What to say of an error whose number, if any, does not tell what happened."""
    if isinstance(error, MemoryError):
        return _OUT_OF_MEMORY
    text = f"{error} {error.__context__ or ''}"
    if environment_rank()[1] > 1 and re.search(_PEER_GONE, text):
        return "another process of this stage has ended: do what its own message says"
    return next((remedy for pattern, remedy in _SAID.items() if re.search(pattern, text)), None)


def _number(error: BaseException, out: Path | None) -> int | None:
    """The system's number of an error."""
    # torch raises anew, without a number, while it closes the file that could not be written.
    number = getattr(error, "errno", None) or getattr(error.__context__, "errno", None)
    if number is not None:
        return int(number)
    text = str(error)
    # A pool that could not start its thread fails a second time while it is shut down.
    if "can't start new thread" in (text, str(error.__context__)):
        return errno.EAGAIN
    # h5py, safetensors and torch put the number only into their text.
    match = re.search(r"(?:errno = |os error |Errno )(\d+)", text)
    if match:
        return int(match.group(1))
    if out is not None and re.search("PytorchStreamWriter|inline_container|iostream error", text):
        return _write_error(out.parent)
    return None


def _write_error(folder: Path) -> int | None:
    """The number of the error that writing a file in `folder` ends with at the moment; None if it succeeds.

    Not that of a limit of sizes, which only a large file meets: where there is one it is taken to be the cause.
    """
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(2**20))
    except OSError as error:
        return error.errno
    return errno.EFBIG if resource.getrlimit(resource.RLIMIT_FSIZE)[0] != resource.RLIM_INFINITY else None


def _is_shared_memory_full() -> bool:
    """Whether it has no page left, as the semaphores of worker processes need."""
    with suppress(OSError):
        state = os.statvfs("/dev/shm")
        return state.f_bavail == 0 or (state.f_files > 0 and state.f_ffree == 0)
    return False
