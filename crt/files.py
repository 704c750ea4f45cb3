"""Folders where a user asked for them, files that are whole or not there, checksums."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from crt.errors import UserError
from crt.system_errors import REMEDIES

NUMPY_ERRORS = (ValueError, EOFError, tokenize.TokenError, zipfile.BadZipFile, zlib.error)
"""What NumPy raises where a .npy or .npz file is damaged, beside the system's errors."""
# After which a file may still be there, and sound.
_UNREADABLE = (
    *(errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE),
    *(errno.EMFILE, errno.ENFILE, errno.ENOMEM),
)


def make_folder(folder: Path) -> None:
    """Make a folder, and those above it, unless it is there.

    Raises:
        UserError: something that is not a folder lies there, or its place takes none, such as /proc.
        OSError: the disk's own, which the command line explains.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise UserError(f"{folder}: is not a folder: move it away, or choose another place") from None
    except FileNotFoundError:
        above = next(parent for parent in folder.absolute().parents if parent.exists())
        raise UserError(f"{above}: no folder can be made in it: choose another place than {folder}") from None


def refuse_files_as_folders(folders: Iterable[Path]) -> None:
    """Tell of something else in the place of a folder that is to be made.

    Raises:
        UserError: a file has the name of one of them, or of one above it.
    """
    for place in sorted({place for folder in folders for place in (folder, *folder.parents)}):
        if place.exists() and not place.is_dir():
            raise UserError(f"{place}: is not a folder: move it away, or choose another place")


@contextmanager
def replacing(path: Path, temporary: Path | None = None) -> Iterator[Path]:
    """Write a file under a temporary name, force it onto the disk, and rename: a reader sees all of it or none.

    An error leaves the old file as it was. A kill leaves the temporary one, which the next attempt overwrites.

    Args:
        path: of the file.
        temporary: where to write first, on the same file system; PATH.tmp unless given. Give another where a folder
            must never show one, and one of the process's own where several may write the same file.

    Yields:
        The temporary name, to be written and closed.
    """
    temporary = path.with_name(path.name + ".tmp") if temporary is None else temporary
    try:
        yield temporary
        _share(temporary)
        flush(temporary)
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def _share(path: Path) -> None:
    """Let those read a file whom the user's mask lets: safetensors makes its own for their owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    if stat.S_IMODE(path.stat().st_mode) == 0o600 != 0o666 & ~mask:
        path.chmod(0o666 & ~mask)


def refuse_unreadable(path: str | Path, error: BaseException) -> None:
    """Call before a file that cannot be read is called missing or damaged, and deleted for it: it may be sound.

    Raises:
        UserError: the system did not let it be read.
    """
    number = getattr(error, "errno", None)
    if number in _UNREADABLE:
        raise UserError(f"{path}: cannot be read ({os.strerror(number)}): {REMEDIES[number]}") from None


def flush(path: Path) -> None:
    """Force a closed file onto the disk, or a node that goes down leaves an empty one under the name it gets next."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def write_json(path: str | Path, value: Any) -> None:
    """Write JSON as a file that is whole or not there."""
    with replacing(Path(path)) as temporary, open(temporary, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=2, ensure_ascii=False, allow_nan=False)
        file.write("\n")


def is_undamaged_archive(path: str | Path) -> bool:
    """Whether a zip archive, as torch.save writes, holds what was put into it, by the checksums in it.

    torch itself does not look at them: a few wrong bytes on a disk would silently become wrong weights.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, NotImplementedError):
        return False


def sha256_file(path: str | Path, report: Callable[[int], None] = lambda count: None) -> str:
    """SHA-256 of a file's bytes, as hexadecimal digits; `report` is told of each piece's length as it is read."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(2**20))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            report(count)
    return digest.hexdigest()
