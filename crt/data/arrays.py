"""Arrays of images: NumPy's .npz files, as MedMNIST, Keras and ADM have them, and MNIST's idx files, also gzipped.

In an .npz file images are an array called images, x, data or arr_0, and labels the one called labels, y or
arr_1 beside it, with a split's name before or behind (`train_images`, `x_train`) or in the file's name; idx files are
`train-images-idx3-ubyte`, `train-labels-idx1-ubyte` and the same of t10k. Nothing is unpickled. Pixels are first
copied to the stage's working folder, an array at a time, since those in archives cannot be read singly.
"""

from __future__ import annotations

import gzip
import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from crt import interrupt
from crt.data.class_folders import ONE_CLASS
from crt.data.listing import printable, sorted_listing
from crt.data.shards import classes_of_labels, splits_of_shards
from crt.data.source import Source, raw_container
from crt.data.synsets import class_names
from crt.data.tree import folder_tree
from crt.errors import UserError

_FILES = re.compile(r".*(\.npz|images-idx3-ubyte(\.gz)?)")
_WORDS = {"images": "labels", "x": "y", "data": "labels", "arr_0": "arr_1"}
_IDX_HEADER_BYTES = {b"\0\0\x08\x03": 16, b"\0\0\x08\x01": 8}  # of uint8 with three axes, or with one
_SPLITS_AND_NUMBERS = re.compile("train(ing)?|val(id(ation)?)?|test|t10k|[^a-z]")


def open_arrays(path: Path, work: Path) -> Source:
    """The arrays of a folder, or of one .npz file.

    Raises:
        UserError: there are none, one is damaged or of another shape or type, or they are of several data sets.
    """
    folder, files = _files(path)
    notes: list[str] = []
    copies = work / "arrays"
    copies.mkdir(exist_ok=True)
    containers, places, labels = [], dict[str, np.ndarray](), dict[str, list[str | None]]()
    for number, (file, name, images, of_images) in enumerate(_arrays(folder, files)):
        container, places[name] = raw_container(copies / f"{number:05d}.rgb", _pixels(images, f"{folder}/{name}"))
        places[name]["container"], places[name]["modified"] = number, (folder / file).stat().st_mtime_ns
        containers.append(container)
        labels[name] = _texts(of_images, len(images), f"{folder}/{name}")
        interrupt.raise_if_stopped()
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
    """The folder of the arrays, and the files in it that hold images."""
    if os.path.isfile(path) and path.suffix.lower() == ".npz":
        return path.parent, [path.name]
    if not os.path.isdir(path):
        state = "is neither a folder nor an .npz file" if os.path.exists(path) else "not found"
        raise UserError(
            f"{path}: {state}: set prepare_data.path to an .npz file, or to the folder of MNIST's idx files"
        )
    found = [name for name in folder_tree(path).files if _FILES.fullmatch(name.lower())]
    files = [name for name in found if name.removesuffix(".gz") == name or name.removesuffix(".gz") not in found]
    if not files:
        raise UserError(f"{path}: holds no .npz files and no *-images-idx3-ubyte: give the folder that does")
    kinds = {(Path(name).parent, _SPLITS_AND_NUMBERS.sub("", name.rpartition("/")[2].lower())): name for name in files}
    if len(kinds) > 1:
        raise UserError(
            f"{path}: {' and '.join(map(printable, list(kinds.values())[:2]))} look like two data sets: set "
            "prepare_data.path to one .npz file, or to a folder with the files of one data set"
        )
    return path, files


def _arrays(folder: Path, files: list[str]) -> Iterator[tuple[str, str, np.ndarray, np.ndarray | None]]:
    """(file, name, images, labels) of each array of images; the name tells the split.

    Raises:
        UserError: a file cannot be read, or holds no such array.
    """
    for file in files:
        where = printable(str(folder / file))
        try:
            if not file.lower().endswith(".npz"):
                labels_file = folder / re.sub("images-idx3", "labels-idx1", file, flags=re.IGNORECASE)
                if not labels_file.exists():
                    raise UserError(f"{labels_file}: not found: put it beside the images that it labels")
                yield file, file.replace("t10k", "test"), _idx(folder / file), _idx(labels_file)
                continue
            with np.load(folder / file, allow_pickle=False) as stored:
                pairs = list(_pairs(stored.files))
                if not pairs:
                    raise UserError(
                        f"{where}: holds the arrays {', '.join(map(printable, stored.files))}: call that of images "
                        f"{', '.join(_WORDS)}, that of labels {', '.join(dict.fromkeys(_WORDS.values()))}"
                    )
                for images, labels in pairs:
                    yield file, f"{file}/{images}", stored[images], stored[labels] if labels else None
        except (ValueError, EOFError, BadZipFile, gzip.BadGzipFile, zlib.error):
            raise UserError(f"{where}: damaged, or holds Python objects, which are not read: get it again") from None
        except OSError as error:
            raise UserError(f"{where}: cannot be read ({error.strerror}): fix that and run again") from None


def _pairs(keys: list[str]) -> Iterator[tuple[str, str | None]]:
    """The names of arrays of images, each with that of its labels if there is one."""
    for key in keys:
        for images, labels in _WORDS.items():
            word = re.compile(f"(?<![a-z]){images}(?![a-z])", re.IGNORECASE)
            if word.search(key):
                called = word.sub(labels, key)
                yield key, called if called in keys else None


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


def _pixels(images: np.ndarray, where: str) -> np.ndarray:
    """(n, height, width, 3) uint8."""
    images = images[..., None] if images.ndim == 3 else images
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3) or not images.size:
        shape = ", ".join(map(str, images.shape))
        raise UserError(
            f"{where}: is {images.dtype} ({shape}): images are uint8 of (n, height, width) or (n, height, width, 3): "
            "write them so"
        )
    return np.repeat(images, 3, axis=-1) if images.shape[-1] == 1 else images


def _texts(labels: np.ndarray | None, num_images: int, where: str) -> list[str | None]:
    """The label of each image, as text."""
    if labels is None:
        return [None] * num_images
    if labels.dtype.kind not in "iuU" or labels.size != num_images or len(labels) != num_images:
        shape = ", ".join(map(str, labels.shape))
        raise UserError(
            f"{where}: {num_images} images, their labels are {labels.dtype} ({shape}): they must be one integer or "
            "text per image: write them so"
        )
    return [str(label) for label in labels.reshape(-1).tolist()]
