"""The arrays in a file, by the file's format, for `crt.data.arrays`, which tells images and labels among them.

NumPy's .npy and .npz, HDF5, MATLAB's .mat, MNIST's idx, and the records of CIFAR-100 (`train.bin` beside
`fine_label_names.txt`) and STL-10 (`train_X.bin`, `train_y.bin`). Nothing is unpickled.
"""

from __future__ import annotations

import errno
import gzip
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import h5py
import numpy as np

from crt.data.matlab import matlab_arrays
from crt.errors import UserError
from crt.files import NUMPY_ERRORS

ALONE = (".npz", ".npy", ".h5", ".hdf5", ".mat")
"""Endings of files that may be the path by themselves."""
IDX_IMAGES = re.compile(r".*images[-.]idx3-ubyte(\.gz)?", re.IGNORECASE)
"""Files of MNIST's images, beside which those of its labels lie."""
_CIFAR100 = re.compile(r"(.*/)?(train|test)\.bin")
_CIFAR100_NAMES = "fine_label_names.txt"
_STL10 = re.compile(r"(.*/)?(train|test|unlabeled)_(X|y)\.bin")
_STL10_NAMES = "class_names.txt"
_CIFAR100_RECORD = np.dtype([("coarse", "u1"), ("fine", "u1"), ("image", "u1", (3, 32, 32))])
_STL10_RECORD = np.dtype([("image", "u1", (3, 96, 96))])  # each channel column by column
SVHN_EXTRA = "extra_32x32.mat"
"""SVHN's further images, which it calls neither training nor test images."""
_SVHN = re.compile(r"(train|test|extra)_32x32\.mat", re.IGNORECASE)
_DOWNSAMPLED = re.compile(r"(train_data(_batch_\d+)?|val_data)\.npz")  # ImageNet's downsampled versions
_IDX_HEADER_BYTES = {b"\0\0\x08\x03": 16, b"\0\0\x08\x01": 8}  # of uint8 with three axes, or with one
# How HDF5 says that it looked for a plugin.
_NO_FILTER = re.compile(r"can't open directory|required filter|filter '")


@dataclass(frozen=True)
class Array:
    """An array that has not been read yet."""

    file: str
    name: str
    """Of the file and, if it holds several, of the array in it: tells the split."""
    key: str
    """What the array itself is called."""
    read: Callable[[], Any]
    """Gives it as an ndarray or h5py.Dataset."""


def array_files(files: Sequence[str]) -> list[str]:
    """Those of a folder's files that hold arrays, by their names; of MNIST's labels the images stand for them."""
    return [
        name
        for name in files
        if name.lower().endswith(ALONE)
        or IDX_IMAGES.fullmatch(name)
        or _STL10.fullmatch(name)
        or (_CIFAR100.fullmatch(name) and str(PurePosixPath(name).with_name(_CIFAR100_NAMES)) in files)
    ]


def arrays_in(folder: Path, file: str, opened: ExitStack) -> Iterator[Array]:
    """All arrays of one file that is no idx file.

    Args:
        opened: keeps it open if it is read in pieces.
    """
    path, ending = folder / file, file.lower()
    if ending.endswith(".npy"):
        yield Array(file, file, path.stem, partial(np.load, path, mmap_mode="r", allow_pickle=False))
    elif ending.endswith(".npz"):
        archive = opened.enter_context(np.load(path, allow_pickle=False))
        for key in archive.files:
            get = partial(archive.__getitem__, key)
            is_planar = key == "data" and _DOWNSAMPLED.fullmatch(path.name)
            yield Array(file, f"{file}/{key}", key, partial(_planar, get) if is_planar else get)
    elif ending.endswith(".mat") and not h5py.is_hdf5(path):
        for key, read in matlab_arrays(path):
            yield Array(file, f"{file}/{key}", key, partial(_matlab, path, key, read))
    elif _STL10.fullmatch(file):
        yield Array(file, file, path.stem, partial(_stl10, path))
    elif _CIFAR100.fullmatch(file):
        for key in ("images", "labels"):
            yield Array(file, f"{file}/{key}", key, partial(_cifar100, path, key))
    else:
        data = opened.enter_context(h5py.File(path, "r"))
        found: list[str | bytes] = []
        data.visititems(lambda key, item: found.append(key) if isinstance(item, h5py.Dataset) else None)
        for key in found:
            text = os.fsdecode(key)  # bytes where it is no UTF-8
            get = partial(data.__getitem__, key)
            if not ending.endswith(".mat"):
                yield Array(file, f"{file}/{text}", text, get)
            elif not text.startswith("#"):  # where the contents of cells are
                yield Array(file, f"{file}/{text}", text, partial(_matlab, path, text, partial(_reversed, get)))


def idx_pair(folder: Path, file: str) -> tuple[Array, Array]:
    """MNIST's images, and the labels that must lie beside them."""
    labels_file = re.sub("images([-.])idx3", r"labels\1idx1", file, flags=re.IGNORECASE)
    if not (folder / labels_file).exists():
        raise UserError(f"{folder / labels_file}: not found: put it beside the images that it labels")
    images, labels = (
        Array(name, name.replace("t10k", "test"), name, partial(_idx, folder / name)) for name in (file, labels_file)
    )
    return images, labels


def _idx(path: Path) -> np.ndarray:
    """The array of an idx file.

    Raises:
        ValueError: it is none of uint8 with one axis or three, or not whole.
    """
    with gzip.open(path) if path.suffix.lower() == ".gz" else open(path, "rb") as file:
        data = file.read()
    start = _IDX_HEADER_BYTES.get(data[:4])
    if start is None:
        raise ValueError
    array = np.frombuffer(data, np.uint8, offset=start).reshape(np.frombuffer(data[4:start], ">u4"))
    # EMNIST, which was written from MATLAB, has each image column by column.
    return array.swapaxes(1, 2) if array.ndim == 3 and path.name.lower().startswith("emnist") else array


def _reversed(get: Callable[[], h5py.Dataset]) -> np.ndarray:
    """An array of a .mat file that is HDF5, where all axes are in reverse."""
    return np.asarray(get()[()]).T


def _planar(get: Callable[[], np.ndarray]) -> np.ndarray:
    """Square images (n, 3, side, side) of which each is stored as one row."""
    rows = get()
    side = math.isqrt(rows[0].size // 3) if rows.ndim == 2 and len(rows) else 0
    return rows.reshape(-1, 3, side, side) if rows.shape[1:] == (3 * side * side,) else rows


def _matlab(path: Path, key: str, get: Callable[[], np.ndarray]) -> np.ndarray:
    """An array of a .mat file as other formats have it: images along the first axis, integers as such, labels (n,)."""
    array = get()
    if array.dtype.kind == "f" and array.size and np.array_equal(array, np.rint(array)):
        # MATLAB's numbers are of 64 bits and floating unless asked otherwise.
        array = array.astype(np.uint8 if array.min() >= 0 and array.max() <= 255 else np.int64)
    if array.ndim == 4 and array.shape[2] in (1, 3):
        return np.moveaxis(array, -1, 0)
    if array.ndim == 3 and (array.shape[0] == array.shape[1] or array.shape[1] != array.shape[2]):
        return np.moveaxis(array, -1, 0)  # where the other axes are no square
    if array.ndim == 2 and 1 in array.shape:
        array = array.reshape(-1)
        if key == "y" and _SVHN.fullmatch(path.name):
            return array % 10  # 10 is the digit 0
    return array


def _cifar100(path: Path, key: str) -> np.ndarray:
    """Images (n, 3, 32, 32), or the names of their fine labels (n,)."""
    records = np.memmap(path, _CIFAR100_RECORD, "r")
    return records["image"] if key == "images" else _named(records["fine"], path.with_name(_CIFAR100_NAMES))


def _stl10(path: Path) -> np.ndarray:
    """Images (n, 3, 96, 96), or the names of labels (n,), which count from 1."""
    if path.stem.endswith("X"):
        return np.memmap(path, _STL10_RECORD, "r")["image"].swapaxes(2, 3)
    labels = np.fromfile(path, np.uint8)
    names = path.with_name(_STL10_NAMES)
    if labels.min() < 1:
        raise ValueError
    return _named(labels - 1, names) if names.exists() else labels


def _named(labels: np.ndarray, path: Path) -> np.ndarray:
    """The name of each label, by the lines of a file.

    Raises:
        ValueError: a label has no line.
    """
    names = np.array(path.read_text(encoding="utf-8").split())
    if labels.max() >= len(names):
        raise ValueError
    return names[labels]


@contextmanager
def reading(where: str) -> Iterator[None]:
    """Turn what reading a file raises into one line."""
    try:
        yield
    except OSError as error:
        if error.errno not in (None, errno.EINVAL):  # that is what seeking to a wrong place ends with
            raise UserError(f"{where}: cannot be read ({error.strerror}): fix that and run again") from None
        if _NO_FILTER.search(str(error)):
            raise UserError(
                f"{where}: packed by a filter that is no part of HDF5: write it anew, "
                "h5repack -f GZIP=1 FILE NEW_FILE, where it can be read"
            ) from None
        raise _damaged(where) from None  # gzip's, and HDF5's of what it does not know
    except (KeyError, RuntimeError, *NUMPY_ERRORS):
        raise _damaged(where) from None


def _damaged(where: str) -> UserError:
    return UserError(f"{where}: damaged, or holds Python objects, which are not read: get it again")
