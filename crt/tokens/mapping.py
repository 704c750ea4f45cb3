"""Parts of many files as one range of memory, so that one indexing operation reads rows of any of them."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from crt.errors import UserError

# The same number on Linux and macOS; Python's mmap module does not offer it.
_MAP_FIXED = 0x10


def map_end_to_end(parts: Sequence[tuple[Path, int, int]]) -> np.ndarray:
    """Map parts of files, read-only, one right behind the other.

    NumPy can index only what lies in one piece. A range of addresses of the whole size is reserved first, then
    each file's part is mapped over its place in it: reading costs what reading one memory-mapped file costs,
    however many shards there are. The range is given back when the last array that shows it goes.

    Args:
        parts: (file, offset, bytes) each. Offsets, and bytes of all but the last part, are multiples of the
            page size.

    Returns:
        uint8, all parts.

    Raises:
        UserError: a file is missing or too short.
    """
    total = sum(length for _, _, length in parts)
    reserved = mmap.mmap(-1, total, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=mmap.PROT_READ)
    array = np.frombuffer(reserved, np.uint8)
    place = array.ctypes.data
    system_mmap = ctypes.CDLL(None, use_errno=True).mmap
    system_mmap.restype = ctypes.c_void_p
    system_mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    for path, offset, length in parts:
        if offset % mmap.PAGESIZE or place % mmap.PAGESIZE:
            raise ValueError(f"{path}: offset {offset} is not a multiple of the page size {mmap.PAGESIZE}")
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}): is it being replaced?") from None
        try:
            if os.fstat(descriptor).st_size < offset + length:
                raise UserError(f"{path}: shorter than when it was opened: is it being replaced?")
            flags = mmap.MAP_SHARED | _MAP_FIXED
            if system_mmap(place, length, mmap.PROT_READ, flags, descriptor, offset) != place:
                code = ctypes.get_errno()
                raise OSError(code, os.strerror(code), str(path))
        finally:
            os.close(descriptor)
        place += length
    return array


def announce(array: np.ndarray, starts: np.ndarray, length: int) -> None:
    """Tell the system which parts of a mapping are read next, so that the disk fetches them all at once.

    Without it every touched page that is not in memory is waited for, and the system reads hundreds of KiB around
    it on the guess that its neighbours follow: at random places of a file larger than memory, a hundred times the
    work for nothing.

    Args:
        array: uint8, from `map_end_to_end`.
        starts: (B,) offsets in it.
        length: bytes from each of them.
    """
    owner: Any = array.base
    mapping: Any = owner.obj if isinstance(owner, memoryview) else owner
    ends = starts + length
    firsts = starts - starts % mmap.PAGESIZE
    for first, end in zip(firsts.tolist(), ends.tolist(), strict=True):
        mapping.madvise(mmap.MADV_WILLNEED, first, end - first)
