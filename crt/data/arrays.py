"""Arrays of images: .npz, .npy and HDF5 files, as MedMNIST, Keras, ADM and PCam have them, and MNIST's idx files.

Images are an array called images, imgs, x, data or arr_0, and labels the one called labels, y or arr_1 beside it, with
a split's name before or behind (`train_images`, `x_train`) or in the file's name. "Called" is a .npy file's own name,
and an array's name inside the others. One file may hold the labels of another (`train_x.h5` and `train_y.h5`; arr_0 of
KMNIST's `train-imgs.npz` and of `train-labels.npz`). idx files are `train-images-idx3-ubyte`, `train-labels-idx1-ubyte`
and the same of t10k, also gzipped. Nothing is unpickled.
Pixels are first copied to the stage's working folder, since those in archives cannot be read singly.
"""

from __future__ import annotations

import errno
import gzip
import math
import os
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import h5py
import numpy as np

from crt import interrupt
from crt.data.class_folders import ONE_CLASS
from crt.data.listing import first_three, printable, sorted_listing
from crt.data.shards import classes_of_labels, splits_of_shards
from crt.data.source import Source, raw_container
from crt.data.synsets import class_names
from crt.data.tree import folder_tree
from crt.errors import UserError
from crt.files import NUMPY_ERRORS
from crt.progress import Progress

_HDF5 = (".h5", ".hdf5")
# What may be the path by itself.
_ALONE = (".npz", ".npy", *_HDF5)
_FILES = re.compile(r".*(\.npz|\.npy|\.h5|\.hdf5|images[-.]idx3-ubyte(\.gz)?)")
_WORDS = {"images": "labels", "imgs": "labels", "x": "y", "data": "labels", "arr_0": "arr_1"}
_IDX_HEADER_BYTES = {b"\0\0\x08\x03": 16, b"\0\0\x08\x01": 8}  # of uint8 with three axes, or with one
_SPLIT = re.compile("train(ing)?|val(id(ation)?)?|test(ing)?|t10k")
# How HDF5 says that it looked for a plugin.
_NO_FILTER = re.compile(r"can't open directory|required filter|filter '")
_PART_BYTES = 2**26  # copied at once


@dataclass(frozen=True)
class _Array:
    """An array that has not been read yet."""

    file: str
    name: str
    """Of the file and, if it holds several, of the array in it: tells the split."""
    key: str
    """What the array itself is called."""
    read: Callable[[], Any]
    """Gives it as an ndarray or h5py.Dataset."""


def open_arrays(path: Path, work: Path) -> Source:
    """The arrays of a folder, or of one file.

    Raises:
        UserError: there are none, one is damaged or of another shape or type, or they are of several data sets.
    """
    folder, files = _files(path)
    notes: list[str] = []
    copies = work / "arrays"
    copies.mkdir(exist_ok=True)
    containers, places, labels = [], dict[str, np.ndarray](), dict[str, list[str | None]]()
    with ExitStack() as opened:
        for number, (images, of_images) in enumerate(_image_arrays(path, folder, files, opened, notes)):
            name, where = images.name, printable(f"{folder}/{images.name}")
            with _reading(where):
                pixels, texts = images.read(), None if of_images is None else of_images.read()
            channels_first = _channels_first(pixels, where)
            labels[name] = _texts(texts, len(pixels), where)
            container, places[name] = raw_container(copies / f"{number:05d}.rgb", _parts(pixels, channels_first, where))
            places[name]["container"], places[name]["modified"] = number, (folder / images.file).stat().st_mtime_ns
            containers.append(container)
    split_of = splits_of_shards(folder, list(places), notes)
    samples = {
        split: [
            (f"{name}/{row:06d}", label)
            for name in places
            if split_of[name] == split
            for row, label in enumerate(labels[name])
        ]
        for split in sorted(set(split_of.values()) - {""})
    }
    classes = classes_of_labels(folder, samples, f"an array {', '.join(sorted(set(_WORDS.values())))}", notes)
    index = {label: number for number, label in enumerate(classes)}
    listings = {}
    for split, found in samples.items():
        of_split = np.concatenate([places[name] for name in places if split_of[name] == split])
        numbers = np.array([index[label or ONE_CLASS] for _, label in found], np.int64)
        listings[split] = sorted_listing([name for name, _ in found], numbers, of_split)
    return Source(classes, class_names(classes), containers, listings, notes)


def _files(path: Path) -> tuple[Path, list[str]]:
    """The folder of the arrays, and the files in it that may hold some."""
    if os.path.isfile(path) and path.suffix.lower() in _ALONE:
        return path.parent, [path.name]
    if not os.path.isdir(path):
        state = f"is neither a folder nor a file {', '.join(_ALONE)}" if os.path.exists(path) else "not found"
        raise UserError(f"{path}: {state}: set prepare_data.path to such a file, or to the folder of MNIST's idx files")
    found = [name for name in folder_tree(path).files if _FILES.fullmatch(name.lower())]
    files = [name for name in found if (twin := _twin(name)) == name or twin not in found]
    if not files:
        raise UserError(f"{path}: holds no files {', '.join(_ALONE)} or *-images-idx3-ubyte: give the folder that does")
    return path, files


def _twin(name: str) -> str:
    """Where downloads have a file once more: unpacked, or in Kaggle's MNIST outside the folder called like it."""
    return re.sub(r"([^/]+)-(idx3-ubyte)/\1-\2$", r"\1.\2", name.removesuffix(".gz"))


def _image_arrays(
    path: Path, folder: Path, files: list[str], opened: ExitStack, notes: list[str]
) -> Iterator[tuple[_Array, _Array | None]]:
    """The arrays of images, each with that of its labels if there is one.

    Args:
        path: as the user gave it, for messages.
        folder: of the files.
        files: that may hold arrays.
        opened: keeps files open that are read in pieces.
        notes: gets a line on arrays that may be labels, where some images have none.

    Raises:
        UserError: a file cannot be read, holds neither images nor labels of some, or is of another data set.
    """
    arrays: dict[str, _Array] = {}
    pairs: list[tuple[_Array, _Array | None]] = []
    for file in files:
        if file.lower().endswith(_ALONE):
            with _reading(printable(f"{folder}/{file}")):
                arrays |= {array.name: array for array in _arrays(folder, file, opened)}
        else:
            pairs.append(_idx_pair(folder, file))
    for array in arrays.values():
        if (word := _image_word(array.key)) and not _is_labels_alone(array, arrays):
            pairs.append((array, _labels_of(array, word, arrays)))
    paired = [array for pair in pairs for array in pair if array is not None]
    used = {array.file for array in paired}
    for file in files:
        if file not in used:
            keys = ", ".join(printable(array.key) for array in arrays.values() if array.file == file)
            raise UserError(
                f"{printable(f'{folder}/{file}')}: holds the arrays {keys}: call that of images {', '.join(_WORDS)}, "
                f"that of labels {', '.join(dict.fromkeys(_WORDS.values()))}, or move the file away"
            )
    others = sorted(arrays.keys() - {array.name for array in paired})
    if others and any(labels is None for _, labels in pairs):
        notes.append(
            f"{path}: arrays {first_three(others)} are not read: if one holds the labels, call it "
            f"{' or '.join(dict.fromkeys(_WORDS.values()))}"
        )
    kinds = {_data_set(images.file): images.file for images, _ in pairs}
    if len(kinds) > 1:
        raise UserError(
            f"{path}: {' and '.join(map(printable, list(kinds.values())[:2]))} look like two data sets: set "
            "prepare_data.path to one file, or to a folder with the files of one data set"
        )
    yield from sorted(pairs, key=lambda pair: files.index(pair[0].file))


def _data_set(file: str) -> tuple[str, ...]:
    """What files of one data set have in common: their path without the splits' names, and without their numbers."""
    *folders, name = PurePosixPath(file.lower()).parts
    return (*filter(None, (_SPLIT.sub("", part) for part in folders)), re.sub("[^a-z]", "", _SPLIT.sub("", name)))


def _arrays(folder: Path, file: str, opened: ExitStack) -> Iterator[_Array]:
    """All arrays of one file that is no idx file."""
    path = folder / file
    if file.lower().endswith(".npy"):
        yield _Array(file, file, path.stem, partial(np.load, path, mmap_mode="r", allow_pickle=False))
    elif file.lower().endswith(".npz"):
        archive = opened.enter_context(np.load(path, allow_pickle=False))
        for key in archive.files:
            yield _Array(file, f"{file}/{key}", key, partial(archive.__getitem__, key))
    else:
        data = opened.enter_context(h5py.File(path, "r"))
        found: list[str | bytes] = []
        data.visititems(lambda key, item: found.append(key) if isinstance(item, h5py.Dataset) else None)
        for key in found:
            text = os.fsdecode(key)  # bytes where it is no UTF-8
            yield _Array(file, f"{file}/{text}", text, partial(data.__getitem__, key))


def _idx_pair(folder: Path, file: str) -> tuple[_Array, _Array]:
    """MNIST's images, and the labels that must lie beside them."""
    labels_file = re.sub("images([-.])idx3", r"labels\1idx1", file, flags=re.IGNORECASE)
    if not (folder / labels_file).exists():
        raise UserError(f"{folder / labels_file}: not found: put it beside the images that it labels")
    images, labels = (
        _Array(name, name.replace("t10k", "test"), name, partial(_idx, folder / name)) for name in (file, labels_file)
    )
    return images, labels


def _image_word(key: str) -> str | None:
    """The word by which an array's name tells that it holds images."""
    if _tells_labels(key):
        return None
    return next((images for images in _WORDS if _word(images).search(key)), None)


def _tells_labels(name: str) -> bool:
    return any(_word(labels).search(name) for labels in _WORDS.values())


def _is_labels_alone(array: _Array, arrays: dict[str, _Array]) -> bool:
    """Whether an array without a name of its own, alone in its file, is called labels by that file's name."""
    alone = array.key == "arr_0" and f"{array.file}/arr_1" not in arrays
    return alone and _tells_labels(PurePosixPath(array.file).name)


def _labels_of(images: _Array, word: str, arrays: dict[str, _Array]) -> _Array | None:
    """The array whose name has the word for labels instead, in upper case or lower: the nearest one first."""
    path, swapped = PurePosixPath(images.file), partial(_word(word).sub, _WORDS[word])
    if images.name == images.file:
        names = [str(path.with_name(swapped(path.name))), swapped(images.file)]
    else:
        names = [f"{file}/{swapped(images.key)}" for file in (images.file, swapped(images.file))]
    if images.key == "arr_0":
        beside = [str(path.with_name(_word(words).sub(_WORDS[words], path.name))) for words in _WORDS]
        names += [f"{file}/{images.key}" for file in beside if file != images.file]
    found = {name.lower(): array for name, array in arrays.items()}
    return next((found[name.lower()] for name in names if name.lower() in found), None)


def _word(word: str) -> re.Pattern[str]:
    return re.compile(f"(?<![a-z]){word}(?![a-z])", re.IGNORECASE)


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
    return np.frombuffer(data, np.uint8, offset=start).reshape(np.frombuffer(data[4:start], ">u4"))


@contextmanager
def _reading(where: str) -> Iterator[None]:
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


def _channels_first(images: Any, where: str) -> bool:
    """Whether the colours come before height and width.

    Raises:
        UserError: the array cannot be one of images.
    """
    sized = images.dtype == np.uint8 and 0 not in images.shape
    if sized and (images.ndim == 3 or (images.ndim == 4 and images.shape[-1] in (1, 3))):
        return False
    if sized and images.ndim == 4 and images.shape[1] in (1, 3):
        return True
    raise UserError(
        f"{where}: is {_shape(images)}: images are uint8 of (n, height, width), (n, height, width, 3) or "
        "(n, 3, height, width): write them so"
    )


def _shape(array: Any) -> str:
    return f"{array.dtype} ({', '.join(map(str, array.shape))})"


def _parts(images: Any, channels_first: bool, where: str) -> Iterator[np.ndarray]:
    """The images in turn, some at once: (n, height, width, 3) uint8.

    Raises:
        UserError: they cannot be read, or are of two values that nobody could see.
    """
    progress = Progress(f"copy {where}", len(images), "images")
    rows, highest = max(1, _PART_BYTES // math.prod(images.shape[1:])), 0
    for start in range(0, len(images), rows):
        interrupt.raise_if_stopped()
        with _reading(where):
            part = images[start : start + rows]
        highest = max(highest, int(part.max()))
        if part.ndim == 3:
            part = part[..., None]
        elif channels_first:
            part = part.transpose(0, 2, 3, 1)
        yield np.repeat(part, 3, axis=-1) if part.shape[-1] == 1 else part
        progress.update(start + len(part))
    if highest == 1:
        raise UserError(f"{where}: holds zeros and ones alone, which would all be black: write it times 255")


def _texts(labels: Any, num_images: int, where: str) -> list[str | None]:
    """The label of each image, as text."""
    if labels is None:
        return [None] * num_images
    if isinstance(labels, h5py.Dataset):
        with _reading(where):
            labels = labels.asstr()[()] if h5py.check_string_dtype(labels.dtype) else labels[()]
    kind = "U" if labels.dtype == object else labels.dtype.kind
    if kind not in "iuU" or labels.size != num_images or len(labels) != num_images:
        raise UserError(
            f"{where}: {num_images} images, their labels are {_shape(labels)}: they must be one integer or "
            "text per image: write them so"
        )
    return [str(label) for label in labels.reshape(-1).tolist()]
