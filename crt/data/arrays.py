"""Arrays of images: .npz, .npy, HDF5 and .mat files, as MedMNIST, Keras, ADM, PCam and SVHN have them, MNIST's idx
files, and the binary files of CIFAR-100 and STL-10.

Images are an array called images, imgs, x, data or arr_0, and labels the one called labels, y or arr_1 beside it, with
a split's name before or behind (`train_images`, `x_train`) or in the file's name. "Called" is a .npy file's own name,
and an array's name inside the others. One file may hold the labels of another (`train_x.h5` and `train_y.h5`; arr_0 of
KMNIST's `train-imgs.npz` and of `train-labels.npz`). Square gray images may be rows of pixels; several .npy files of
such, as QuickDraw's, are a class each. idx files are `train-images-idx3-ubyte`, `train-labels-idx1-ubyte` and the same
of t10k, also gzipped. The formats are those of `crt.data.array_files`.
Pixels are first copied to the stage's working folder, since those in archives cannot be read singly.
"""

from __future__ import annotations

import math
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import h5py
import numpy as np

from crt import interrupt
from crt.data.array_files import ALONE, IDX_IMAGES, SVHN_EXTRA, Array, array_files, arrays_in, idx_pair, reading
from crt.data.listing import first_three, printable
from crt.data.other_kinds import ARCHIVES, read_otherwise
from crt.data.shards import listings_by_label, splits_of_shards
from crt.data.source import Source, raw_container
from crt.data.synsets import class_names
from crt.data.tree import folder_tree
from crt.errors import UserError
from crt.progress import Progress, human_bytes

_WORDS = {"images": "labels", "imgs": "labels", "x": "y", "data": "labels", "arr_0": "arr_1"}
# Of files of one data set. SVHN and STL-10 have such others beside these two, and ImageNet's downsampled versions have
# their training images in batches.
_SPLIT = re.compile("train(ing)?|val(id(ation)?)?|test(ing)?|t10k|_batch(?=_[0-9])|extra(?=_32x32)|unlabeled(?=_x)")
_PART_BYTES = 2**26  # copied at once
_LEAST_PIXELS = 64  # in an image that is a row of an array


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
            with reading(where):
                pixels, texts = _squares(images.read()), None if of_images is None else of_images.read()
            channels_first = _channels_first(pixels, where)
            labels[name] = _texts(texts, len(pixels), where)
            _refuse_more_than_fits(pixels, copies, where)
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
    of_split = {split: [places[name] for name in places if split_of[name] == split] for split in samples}
    looked_for = f"an array {', '.join(sorted(set(_WORDS.values())))}"
    classes, listings = listings_by_label(folder, samples, of_split, looked_for, notes)
    return Source(classes, class_names(classes), containers, listings, notes)


def _files(path: Path) -> tuple[Path, list[str]]:
    """The folder of the arrays, and the files in it that may hold some."""
    if os.path.isfile(path) and path.suffix.lower() in ALONE:
        return path.parent, [path.name]
    if not os.path.isdir(path):
        state = f"is neither a folder nor a file {', '.join(ALONE)}" if os.path.exists(path) else "not found"
        first = "unpack it and " if path.name.lower().endswith(ARCHIVES) else ""
        raise UserError(
            f"{path}: {state}: {first}set prepare_data.path to such a file, or to the folder of MNIST's idx files"
        )
    everything = folder_tree(path).files
    found = array_files(everything)
    files = [name for name in found if (twin := _twin(name)) == name or twin not in found]
    if not files:
        other = read_otherwise(everything)
        raise UserError(
            f"{path}: holds no files {', '.join(ALONE)} or *-images-idx3-ubyte: give the folder that does"
            f"{other and f', or {other}'}"
        )
    return path, files


def _twin(name: str) -> str:
    """Where downloads have a file once more: unpacked, or in Kaggle's MNIST outside the folder called like it."""
    return re.sub(r"([^/]+)-(idx3-ubyte)/\1-\2$", r"\1.\2", name.removesuffix(".gz"))


def _image_arrays(
    path: Path, folder: Path, files: list[str], opened: ExitStack, notes: list[str]
) -> Iterator[tuple[Array, Array | None]]:
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
    arrays: dict[str, Array] = {}
    pairs: list[tuple[Array, Array | None]] = []
    for file in files:
        if IDX_IMAGES.fullmatch(file):
            pairs.append(idx_pair(folder, file))
        else:
            with reading(printable(f"{folder}/{file}")):
                arrays |= {array.name: array for array in arrays_in(folder, file, opened)}
    for array in arrays.values():
        if (word := _image_word(array.key)) and not _is_labels_alone(array, arrays):
            pairs.append((array, _labels_of(array, word, arrays)))
    if not pairs and len(arrays) > 1 and all(_may_be_a_class(folder, array) for array in arrays.values()):
        notes.append(f"{path}: each file holds images of one class, which is called like it")
        yield from ((array, _class_of_file(array)) for array in arrays.values())
        return
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
    without = [images.file for images, labels in pairs if labels is None and "unlabeled" in images.file.lower()]
    if len(without) < len(pairs):
        pairs = [pair for pair in pairs if pair[0].file not in without]
        for file in without:
            notes.append(f"{path}: {file} is not used: to have it, set prepare_data.path to a folder of it alone")
    for place, (images, labels) in enumerate(pairs):
        if PurePosixPath(images.file).name == SVHN_EXTRA:
            notes.append(f"{path}: images of {images.file} are training images too: move it away to do without")
            pairs[place] = replace(images, name=f"train/{images.name}"), labels
    yield from sorted(pairs, key=lambda pair: files.index(pair[0].file))


def _may_be_a_class(folder: Path, array: Array) -> bool:
    """Whether an array is a file of nothing but images, in the rows of pixels that QuickDraw has them in."""
    if not array.file.lower().endswith(".npy") or _tells_labels(array.key):
        return False
    with reading(printable(f"{folder}/{array.file}")):
        return _side(array.read()) > 0


def _class_of_file(array: Array) -> Array:
    """The labels of a file's images, which are all called like it."""
    return replace(array, key="labels", read=lambda: np.full(len(array.read()), array.key))


def _side(pixels: Any) -> int:
    """Of square gray images whose pixels are one row each, or 0 of other arrays."""
    if pixels.ndim != 2 or pixels.dtype != np.uint8 or pixels.shape[1] < _LEAST_PIXELS:
        return 0
    side = math.isqrt(pixels.shape[1])
    return side if side**2 == pixels.shape[1] else 0


def _squares(pixels: Any) -> Any:
    """Images (n, side, side) of which each may be stored as one row."""
    side = _side(pixels)
    return np.asarray(pixels).reshape(-1, side, side) if side else pixels


def _data_set(file: str) -> tuple[str, ...]:
    """What files of one data set have in common: their path without the splits' names, and without their numbers."""
    *folders, name = PurePosixPath(file.lower()).parts
    return (*filter(None, (_SPLIT.sub("", part) for part in folders)), re.sub("[^a-z]", "", _SPLIT.sub("", name)))


def _image_word(key: str) -> str | None:
    """The word by which an array's name tells that it holds images."""
    if _tells_labels(key):
        return None
    return next((images for images in _WORDS if _word(images).search(key)), None)


def _tells_labels(name: str) -> bool:
    return any(_word(labels).search(name) for labels in _WORDS.values())


def _is_labels_alone(array: Array, arrays: dict[str, Array]) -> bool:
    """Whether an array without a name of its own, alone in its file, is called labels by that file's name."""
    alone = array.key == "arr_0" and f"{array.file}/arr_1" not in arrays
    return alone and _tells_labels(PurePosixPath(array.file).name)


def _labels_of(images: Array, word: str, arrays: dict[str, Array]) -> Array | None:
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


def _refuse_more_than_fits(images: Any, folder: Path, where: str) -> None:
    """Tell that a disk has no room for the copy of all images before it is full: in their file they may be packed.

    Raises:
        UserError: as said.
    """
    needed = math.prod(images.shape) * (1 if images.ndim == 4 and 3 in (images.shape[1], images.shape[-1]) else 3)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"{where}: {_shape(images)} takes {human_bytes(needed)} in {folder}, where {human_bytes(free)} are free: "
            "free some space, or make it smaller"
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
        with reading(where):
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
        with reading(where):
            labels = labels.asstr()[()] if h5py.check_string_dtype(labels.dtype) else labels[()]
    elif labels.dtype.kind == "S":
        with reading(where):
            labels = np.char.decode(labels, "utf-8")
    kind = "U" if labels.dtype == object else labels.dtype.kind
    if kind not in "iuU" or labels.size != num_images or len(labels) != num_images:
        raise UserError(
            f"{where}: {num_images} images, their labels are {_shape(labels)}: they must be one integer or "
            "text per image: write them so"
        )
    return [str(label) for label in labels.reshape(-1).tolist()]
