"""TFRecord files whose records are `tf.train.Example`s of an image file and a label, as TensorFlow Datasets has them.

Images are the feature image/encoded or image, labels image/class/synset, image/class/label or one of `LABEL_NAMES`. A
file's path tells its split (`train-00000-of-01024`, `mnist-test.tfrecord-00000-of-00001`). Images are read in place.

A record is its length (8 bytes), a checksum of that, the data, and a checksum of that, which is not looked at: image
formats have their own. The data is a protocol buffer: fields, each a tag (number and wire type) and a value.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from crt import interrupt
from crt.data.listing import PLACE, Container, first_three, printable
from crt.data.other_kinds import read_otherwise
from crt.data.shards import LABEL_NAMES, listings_by_label, splits_of_shards
from crt.data.source import Source
from crt.data.synsets import class_names
from crt.data.tree import folder_tree
from crt.errors import UserError
from crt.progress import Progress

_FILE = re.compile(r".*\.(tfrecords?|tfrec)(-\d+-of-\d+)?|.*-\d{5}-of-\d{5}", re.IGNORECASE)
_SPLIT = re.compile("train(ing)?|val(id(ation)?)?|test(ing)?", re.IGNORECASE)  # in the name of a folder
_IMAGES = ("image/encoded", "image")
_LABELS = ("image/class/synset", "image/class/label", *LABEL_NAMES)
_HEADER_BYTES, _FOOTER_BYTES = 12, 4
_VARINT, _BYTES = 0, 2  # wire types; the others are numbers of
_FIXED_BYTES = {1: 8, 5: 4}
_BYTES_LIST, _INT64_LIST = 1, 3  # fields of a Feature


class _Sample(NamedTuple):
    id: str
    offset: int
    size: int
    label: str | None


def open_tfrecords(path: Path) -> Source:
    """The TFRecord files of a folder, or one alone.

    Raises:
        UserError: there is none, one is damaged or holds other records, or only some records have labels.
    """
    notes: list[str] = []
    folder, files = _files(path)
    split_of = splits_of_shards(folder, files, notes)
    used = [name for name in files if split_of[name]]
    samples: dict[str, list[_Sample]] = {split: [] for split in sorted(set(split_of.values()) - {""})}
    places: dict[str, list[np.ndarray]] = {split: [] for split in samples}
    progress = Progress("reading TFRecord files", len(used), "files")
    for number, name in enumerate(used):
        found = list(_samples(folder / name, name))
        samples[split_of[name]] += found
        of_file = np.zeros(len(found), PLACE)
        of_file["container"], of_file["crc"] = number, -1
        of_file["offset"], of_file["size"] = ([getattr(sample, key) for sample in found] for key in ("offset", "size"))
        of_file["modified"] = os.stat(folder / name).st_mtime_ns
        places[split_of[name]].append(of_file)
        progress.update(number + 1)
    labels_of = {split: [(sample.id, sample.label) for sample in found] for split, found in samples.items()}
    classes, listings = listings_by_label(folder, labels_of, places, f"feature {' or '.join(_LABELS)}", notes)
    containers = [Container(str(folder / name), "tar") for name in used]
    return Source(classes, class_names(classes), containers, listings, notes)


def _files(path: Path) -> tuple[Path, list[str]]:
    """A folder, and the TFRecord files in it."""
    if path.is_file():
        return path.parent, [path.name]
    if not path.is_dir():
        raise UserError(f"{path}: not found: set prepare_data.path to a TFRecord file, or to the folder of some")
    files = folder_tree(path).files
    found = [name for name in files if _FILE.fullmatch(name)]
    if not found:
        other = read_otherwise(files)
        raise UserError(
            f"{path}: holds no TFRecord files (NAME.tfrecord, NAME-00000-of-00001): give the folder that does"
            f"{other and f', or {other}'}"
        )
    sets = {
        tuple(filter(None, (_SPLIT.sub("", part) for part in PurePosixPath(name).parts[:-1]))): name for name in found
    }
    if len(sets) > 1:
        raise UserError(
            f"{path}: {' and '.join(map(printable, list(sets.values())[:2]))} look like two data sets, or versions of "
            "one: set prepare_data.path to the folder of one"
        )
    return path, found


def _samples(path: Path, name: str) -> Iterator[_Sample]:
    """The samples of one file.

    Raises:
        UserError: it cannot be read, is damaged, or holds other records.
    """
    where = printable(str(path))
    try:
        with open(path, "rb") as file:
            size, start = os.fstat(file.fileno()).st_size, 0
            if not size:
                raise UserError(f"{where}: empty: get it again, or move it away")
            row = 0
            while start < size:
                interrupt.raise_if_stopped()
                header = file.read(_HEADER_BYTES)
                length = int.from_bytes(header[:8], "little")
                if int.from_bytes(header[8:], "little") != masked_crc32c(header[:8]) or len(header) < _HEADER_BYTES:
                    raise UserError(f"{where}: no TFRecord file, compressed as a whole, or damaged at byte {start}")
                if start + _HEADER_BYTES + length + _FOOTER_BYTES > size:
                    raise UserError(f"{where}: cut short in record {row}: get it again")
                data = file.read(length)
                file.seek(_FOOTER_BYTES, os.SEEK_CUR)
                try:
                    features = _features(data)
                    image, label = _image(features), _label(data, features)
                except ValueError as error:
                    raise UserError(f"{where}: record {row} {error}") from None
                begin, end = image
                yield _Sample(f"{name}/{row:06d}", start + _HEADER_BYTES + begin, end - begin, label)
                start += _HEADER_BYTES + length + _FOOTER_BYTES
                row += 1
    except OSError as error:
        raise UserError(f"{where}: cannot be read ({error.strerror}): fix that and run again") from None


# Of a feature: the field of its list (`_BYTES_LIST`, ...), and where each value lies; of numbers, where some lie.
_Feature = tuple[int, list[tuple[int, int]]]


def _features(data: bytes) -> dict[str, _Feature]:
    """The features of an Example by name.

    Raises:
        ValueError: it is none.
    """
    found: dict[str, _Feature] = {}
    for _, start, end in _fields(data, 0, len(data), 1):
        for _, entry_start, entry_end in _fields(data, start, end, 1):
            parts = {number: (at, to) for number, at, to in _fields(data, entry_start, entry_end)}
            name_start, name_end = parts.get(1, (0, 0))
            name = data[name_start:name_end].decode("utf-8", "replace")
            for kind, list_start, list_end in _fields(data, *parts.get(2, (0, 0))):
                found[name] = kind, [(at, to) for _, at, to in _fields(data, list_start, list_end, 1)]
    if not found:
        raise ValueError("is no tf.train.Example: write the images as files into class folders")
    return found


def _fields(data: bytes, start: int, end: int, only: int | None = None) -> Iterator[tuple[int, int, int]]:
    """(number, where it begins, where it ends) of each field between two places, or of those of one number."""
    while start < end:
        tag, start = _varint(data, start)
        number, wire = tag >> 3, tag & 7
        begin = start
        if wire == _VARINT:
            _, start = _varint(data, start)
        elif wire == _BYTES:
            length, begin = _varint(data, start)
            start = begin + length
        elif wire in _FIXED_BYTES:
            start += _FIXED_BYTES[wire]
        else:
            raise ValueError("is damaged: get the file again")
        if start > end:
            raise ValueError("is damaged: get the file again")
        if only in (None, number):
            yield number, begin, start


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """An integer of seven bits in each byte, the lowest first, and the place behind it."""
    value = shift = 0
    while True:
        if at >= len(data) or shift > 63:
            raise ValueError("is damaged: get the file again")
        value |= (data[at] & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if data[at - 1] < 0x80:
            return value, at


def _image(features: dict[str, _Feature]) -> tuple[int, int]:
    name = next((name for name in _IMAGES if name in features), None)
    if name is None:
        shown = first_three([printable(name) for name in sorted(features)])
        raise ValueError(f"has no feature {' or '.join(_IMAGES)}, but {shown}: write it anew with image files as such")
    kind, values = features[name]
    if kind != _BYTES_LIST or len(values) != 1:
        raise ValueError(f"has no image file as its feature {name}: write it anew with one image file as such")
    return values[0]


def _label(data: bytes, features: dict[str, _Feature]) -> str | None:
    name = next((name for name in _LABELS if name in features and features[name][1]), None)
    if name is None:
        return None
    kind, places = features[name]
    if kind == _BYTES_LIST:
        texts = [data[start:end].decode("utf-8", "replace").strip() for start, end in places]
    elif kind == _INT64_LIST:
        texts = []
        for at, end in places:  # of one number, or of all, packed
            while at < end:
                value, at = _varint(data, at)  # noqa: PLW2901
                texts.append(str(value - (value >> 63 << 64)))
    else:
        texts = []
    if len(texts) != 1:
        raise ValueError(f"has as its feature {name} not one integer or text, as labels are: write it anew")
    return texts[0] or None


def _crc32c_table() -> list[int]:
    table = list(range(256))
    for _ in range(8):
        table = [value >> 1 ^ (0x82F63B78 if value & 1 else 0) for value in table]
    return table


_CRC32C = _crc32c_table()


def masked_crc32c(data: bytes) -> int:
    """The checksum of TFRecord files: CRC-32C, rotated by 15 bits, plus a constant."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ _CRC32C[(crc ^ byte) & 0xFF]
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
