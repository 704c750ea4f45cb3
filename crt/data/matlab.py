"""Arrays of numbers in MATLAB's .mat files of version 5, which MATLAB saves unless told otherwise.

The format is that of MathWorks' "MAT-File Format". SciPy's reader crashes the process at some damaged files, and reads
cells, structs and objects too, of which images have no need. Files of version 7.3 are HDF5.
"""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np

from crt.errors import UserError

_HEADER_BYTES = 128
_ORDERS = {b"IM": "<", b"MI": ">"}  # of bytes, by the header's end
_COMPRESSED = 15
_NUMBERS = range(6, 16)  # classes of arrays: double, single, and integers of 8 to 64 bits
# By the type that an element's values are stored with, which for whole numbers may be shorter than their class.
_TYPES = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
_START_BYTES = 4096  # in which class, shape and name of a variable lie


def matlab_arrays(path: Path) -> Iterator[tuple[str, Callable[[], np.ndarray]]]:
    """(name, how to read it) of each variable. What is read has the shape that MATLAB shows.

    Raises:
        UserError: the file is of another version, or what is to be read holds no numbers.
        ValueError, zlib.error: it is damaged or cut short.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        header = file.read(_HEADER_BYTES)
        order = _ORDERS.get(header[126:])
        if order is None:
            raise UserError(f"{path}: is no .mat file of version 5 or later: save it with -v7, or get it again")
        start = _HEADER_BYTES
        while start < size:
            file.seek(start)
            kind, length = np.frombuffer(file.read(8), f"{order}u4", 2).tolist()
            if start + 8 + length > size:
                raise ValueError
            content = file.read(min(length, _START_BYTES))
            if kind == _COMPRESSED:
                content = zlib.decompressobj().decompress(content, _START_BYTES)[8:]
            _, _, name, _ = _head(content, order)
            if name:  # MATLAB's own data has none
                yield name, partial(_read, path, start + 8, length, kind == _COMPRESSED, order)
            start += 8 + length


def _read(path: Path, start: int, length: int, is_compressed: bool, order: str) -> np.ndarray:
    """The values of the variable whose element lies in the file at `start`."""
    with open(path, "rb") as file:
        file.seek(start)
        content = file.read(length)
    if is_compressed:
        stream = zlib.decompressobj()
        tag = stream.decompress(content, 8)
        length = int(np.frombuffer(tag, f"{order}u4", 1, 4)[0])
        content = stream.decompress(stream.unconsumed_tail, length + 1)  # one more, and the checksum behind is held too
    array_class, shape, name, at = _head(content, order)
    if array_class not in _NUMBERS:
        raise UserError(f"{path}: {name} is no array of numbers, as alone are read: write it as one")
    kind, data, length, _ = _element(content, at, order)
    if kind not in _TYPES:
        raise ValueError
    dtype = np.dtype(order + _TYPES[kind])
    if length != math.prod(shape) * dtype.itemsize:  # Python's integers do not overflow
        raise ValueError
    return np.frombuffer(content, dtype, math.prod(shape), data).reshape(shape, order="F")


def _head(content: bytes, order: str) -> tuple[int, list[int], str, int]:
    """Class, shape and name of a variable, and where the element of its values begins."""
    _, flags, _, at = _element(content, 0, order)
    _, dimensions, length, at = _element(content, at, order)
    _, name, name_length, at = _element(content, at, order)
    array_class = int(np.frombuffer(content, f"{order}u4", 1, flags)[0]) & 0xFF
    shape = np.frombuffer(content, f"{order}i4", length // 4, dimensions).tolist()
    if min(shape) < 0:
        raise ValueError
    return array_class, shape, content[name : name + name_length].decode("latin-1"), at


def _element(content: bytes, at: int, order: str) -> tuple[int, int, int, int]:
    """Type of the element at a place, where its data begins and how long it is, and where the next one begins."""
    kind, length = np.frombuffer(content, f"{order}u4", 2, at).tolist()
    if kind >> 16:  # up to four bytes stand in the place of their length
        return kind & 0xFFFF, at + 4, kind >> 16, at + 8
    return kind, at + 8, length, at + 8 + -(-length // 8) * 8
