"""Which images a source holds and where their bytes are."""

from __future__ import annotations

import errno
import os
import weakref
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Literal

import numpy as np

from crt.data.decode import Undecodable
from crt.errors import UserError

if TYPE_CHECKING:
    import lmdb

# Where one image lies: which container, the first byte and the number of bytes, and a zip member's checksum. Of a
# folder's file the size, and of files and archives when they were last changed (ns), tell one that has changed.
PLACE = np.dtype([("container", "<i4"), ("offset", "<i8"), ("size", "<i8"), ("crc", "<i8"), ("modified", "<i8")])
_ZIP_HEADER_BYTES = 30
_DEFLATED = 8
_MOST_BYTES = 2**30  # of an image file: uncompressed pixels of as many as are decoded take less


@dataclass(frozen=True)
class Container:
    """A file that holds images at known offsets, or a folder of image files.

    Layouts: "folder" (an image's id is its path in it); "tar" (image files, whole, in a tar or a TFRecord
    file); "zip" (image files behind a local header, as they are or deflated); "lmdb" (image files by key,
    which is an image's id from character `offset` on); "raw" (uint8 RGB pixels of one `shape`).
    """

    path: str
    layout: Literal["folder", "tar", "zip", "lmdb", "raw"]
    shape: tuple[int, int] = (0, 0)
    """(height, width) of raw pixels."""


@dataclass(frozen=True)
class Listing:
    """Images of one split in storage order: by class, then by id."""

    ids: list[str]
    labels: np.ndarray
    """(n,) int64 class indices."""
    places: np.ndarray
    """(n,) of type PLACE."""

    def __len__(self) -> int:
        return len(self.ids)

    def select(self, rows: np.ndarray) -> Listing:
        """The images at `rows`, in that order."""
        return Listing([self.ids[row] for row in rows], self.labels[rows], self.places[rows])


def sorted_listing(ids: Sequence[str], labels: np.ndarray, places: np.ndarray) -> Listing:
    """A listing in storage order."""
    order = np.array(sorted(range(len(ids)), key=lambda row: (labels[row], ids[row])), np.int64)
    return Listing(list(ids), labels, places).select(order)


def read_entry(containers: Sequence[Container], name: str, place: np.void) -> bytes | np.ndarray:
    """The bytes of one image file, or (H, W, 3) uint8 pixels from a container of raw pixels.

    Raises:
        Undecodable: the file has vanished, is a link that leads nowhere, or its part of an archive is damaged.
        UserError: the file system refuses to read it.
    """
    container = containers[int(place["container"])]
    path = os.path.join(container.path, name) if container.layout == "folder" else container.path
    try:
        if container.layout == "folder":
            with open(path, "rb") as file:
                return file.read()
        if container.layout == "lmdb":
            return _value(path, name[int(place["offset"]) :])
        container_file = _opened(path)  # named, or another thread may have it closed
        data = _read_at(container_file.descriptor, int(place["offset"]), int(place["size"]), container.layout == "zip")
    except (FileNotFoundError, NotADirectoryError):
        raise Undecodable("file not found (a broken link?)") from None
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise Undecodable("a loop of links") from None
        raise UserError(f"{path}: cannot be read ({error.strerror}): fix that and run again") from None
    if container.layout == "zip":
        return _unzipped(data, int(place["crc"]))
    if container.layout == "tar":
        return data
    return np.frombuffer(data, np.uint8).reshape(*container.shape, 3)


def printable(text: str) -> str:
    """A name on one line of a message: line breaks and whatever else cannot be printed become backslash escapes."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def first_three(names: Sequence[str]) -> str:
    """Some of many names, for messages."""
    return ", ".join(printable(name) for name in names[:3]) + (", ..." if len(names) > 3 else "")


class _Opened:
    """A container's file, open as long as this object is in use."""

    def __init__(self, path: str) -> None:
        self.descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self.descriptor)


@lru_cache(maxsize=64)
def _opened(path: str) -> _Opened:
    """A container's file; those that were used last stay open."""
    return _Opened(path)


@cache  # LMDB wants a file opened once in a process
def open_lmdb(path: str) -> lmdb.Environment:
    """An LMDB file to read from.

    Raises:
        lmdb.Error: it is none, is cut short or cannot be read.
    """
    import lmdb

    environment = lmdb.open(path, subdir=False, readonly=True, lock=False, readahead=False)
    used = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
    if os.path.getsize(path) < used:  # LMDB maps the file to memory: what is missing would kill the process
        raise lmdb.CorruptedError(f"{used} bytes are needed")
    return environment


def _value(path: str, key: str) -> bytes:
    with open_lmdb(path).begin() as transaction:
        value = transaction.get(key.encode())
    if value is None:
        raise Undecodable("no longer in the file")
    return bytes(value)


def _read_at(file: int, offset: int, size: int, zip_member: bool) -> bytes:
    if zip_member:
        # The local header's own lengths count: its extra field may differ from the central directory's.
        header = os.pread(file, _ZIP_HEADER_BYTES, offset)
        if len(header) < _ZIP_HEADER_BYTES or header[:4] != b"PK\x03\x04":
            raise Undecodable("damaged zip header")
        skip = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        method = header[8:10]
        return method + _read_fully(file, offset + _ZIP_HEADER_BYTES + skip, size)
    return _read_fully(file, offset, size)


def _read_fully(file: int, offset: int, size: int) -> bytes:
    parts = []
    while size:
        part = os.pread(file, size, offset)
        if not part:
            raise Undecodable("archive ends inside the file")
        parts.append(part)
        offset, size = offset + len(part), size - len(part)
    return b"".join(parts)


def _unzipped(data: bytes, crc: int) -> bytes:
    """Content of a zip member from its method (2 bytes) and stored bytes."""
    method, content = int.from_bytes(data[:2], "little"), data[2:]
    try:
        if method == _DEFLATED:
            content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(content, _MOST_BYTES + 1)
            if len(content) > _MOST_BYTES:
                raise Undecodable(f"more than {_MOST_BYTES} bytes")
    except zlib.error as error:
        raise Undecodable(f"corrupt in the archive: {error}") from None
    if zlib.crc32(content) != crc:
        raise Undecodable("corrupt in the archive: wrong checksum")
    return content
