"""HDF5 files too large for memory, without HDF5 ever meeting a disk's errors.

Where HDF5 cannot write, on a full disk, it crashes the process or writes tracebacks while the objects of that file are
destroyed. So it lays a file out in memory, with holes in place of large arrays, and what it laid out is copied.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py

# Copied at once; Linux reads 2 GiB at most, and gives no error for what is missing.
_PIECE_BYTES = 2**24


@contextmanager
def hdf5_frame(path: Path, least_bytes: int, **options: Any) -> Iterator[h5py.File]:
    """Write an HDF5 file all but its large arrays, whose places stay unwritten until the caller fills them.

    Args:
        path: of the file.
        least_bytes: that the file will have: a limit of sizes shows before HDF5 can meet it.
        options: for `h5py.File`.

    Yields:
        The file, open for writing. An array that was created or begun has its final offset.

    Raises:
        OSError: the disk's own.
    """
    with open(path, "wb") as target:
        target.truncate(least_bytes)
        if sys.platform != "linux":  # no files in memory that have holes
            with h5py.File(path, "w", **options) as file:
                yield file
            return
        memory = os.memfd_create(path.name)
        try:
            with h5py.File(f"/proc/self/fd/{memory}", "w", driver="stdio", **options) as file:
                yield file
            size = os.fstat(memory).st_size
            target.truncate(size)
            for start, end in _written(memory, size):
                target.seek(start)
                target.write(os.pread(memory, end - start, start))
        finally:
            os.close(memory)


def _written(file: int, size: int) -> Iterator[tuple[int, int]]:
    """The ranges of a file that are no holes, in pieces of which the system reads each at once."""
    end = 0
    while end < size:
        try:
            start = os.lseek(file, end, os.SEEK_DATA)
        except OSError:  # a hole up to the end
            return
        end = min(os.lseek(file, start, os.SEEK_HOLE), start + _PIECE_BYTES)
        yield start, end
