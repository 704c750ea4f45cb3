"""Tar shards in WebDataset's layout: members `KEY.jpg` and `KEY.cls` beside each other make one sample.

The shards are read where they lie. A folder holds them, below folders or not; a shard belongs to the split that its
path names (`imagenet1k-train-0000.tar`, `val/000.tar`). Labels are `.cls` members, an integer or a class's name, or
one of `LABEL_NAMES` in `.json` members; samples without any are one class.
"""

from __future__ import annotations

import json
import os
import posixpath
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from crt import interrupt
from crt.data.archives import archive_kind, tar_members
from crt.data.listing import PLACE, Container, printable
from crt.data.shards import LABEL_NAMES, list_shards, listings_by_label, splits_of_shards
from crt.data.source import Source
from crt.data.synsets import class_names
from crt.data.tree import EXTENSIONS
from crt.errors import UserError
from crt.progress import Progress


@dataclass(slots=True)  # a data set has millions
class _Sample:
    id: str = ""
    """Path of the image: that of the shard, and that in it; empty without an image."""
    offset: int = 0
    size: int = 0
    label: str | None = None


def open_webdataset(path: Path) -> Source:
    """The shards of a folder, or one alone.

    Raises:
        UserError: there is none, one is damaged, or only some samples have labels.
    """
    notes: list[str] = []
    if path.is_file():
        if archive_kind(path) != "tar":
            raise UserError(f"{path}: compressed: a shard is read where it lies: decompress it to a .tar file")
        folder, shards = path.parent, [path.name]
    else:
        folder, shards = path, list_shards(path, ".tar", notes, " (compressed ones are not read)")
    split_of = splits_of_shards(folder, shards, notes)
    used = [shard for shard in shards if split_of[shard]]
    samples: dict[str, list[tuple[int, _Sample]]] = {split: [] for split in sorted(set(split_of.values()) - {""})}
    progress = Progress("reading shards", len(used), "shards")
    without_image = 0
    for number, shard in enumerate(used):
        for sample in _read_shard(folder / shard, shard):
            without_image += not sample.id
            if sample.id:
                samples[split_of[shard]].append((number, sample))
        progress.update(number + 1)
    if without_image:
        notes.append(f"{folder}: {without_image} samples have no image: left out")
    labels_of = {split: [(sample.id, sample.label) for _, sample in found] for split, found in samples.items()}
    modified = [(folder / shard).stat().st_mtime_ns for shard in used]
    places = {
        split: [np.array([(n, sample.offset, sample.size, -1, modified[n]) for n, sample in found], PLACE)]
        for split, found in samples.items()
    }
    looked_for = f".cls, or {' or '.join(LABEL_NAMES)} in .json"
    classes, listings = listings_by_label(folder, labels_of, places, looked_for, notes)
    for split, found in samples.items():
        if not found:
            which = "shards" if split == "all" else f"shards of {split}"
            raise UserError(
                f"{folder}: the {which} hold no images (KEY.jpg, KEY.png, ..., no dot in KEY): give other shards"
            )
    containers = [Container(str(folder / shard), "tar") for shard in used]
    return Source(classes, class_names(classes), containers, listings, notes)


def _read_shard(path: Path, shard: str) -> Iterator[_Sample]:
    """The samples of one shard.

    Raises:
        UserError: it cannot be read, is damaged, or a sample in it is not as it must be.
    """
    samples: dict[str, _Sample] = {}
    fields: dict[str, tuple[int, int]] = {}
    places: dict[str, tuple[int, int]] = {}
    dotted: dict[str, str] = {}  # by key the last member whose name ends like an image's, behind a further dot
    where = printable(str(path))
    try:
        file, other = open(path, "rb"), open(path, "rb")  # noqa: SIM115
    except OSError as error:
        raise UserError(f"{where}: cannot be read ({error.strerror}): fix that and run again") from None
    with file, other:
        for member in tar_members(file, 0, os.fstat(file.fileno()).st_size, where):
            interrupt.raise_if_stopped()
            inside = posixpath.normpath(member.name)
            folder, name = posixpath.split(inside)
            stem, dot, extension = name.partition(".")
            if not stem or not dot:
                continue
            shown, key, extension = printable(inside), posixpath.join(folder, stem), f".{extension.lower()}"
            if member.issparse():
                raise UserError(f"{where}: {shown} is stored as a sparse file: pack the shard without --sparse")
            if member.isreg():
                places[inside] = member.offset_data, member.size
            elif member.islnk() or member.issym():
                # A hard link is to an earlier member, by its path from the root.
                target = posixpath.normpath(posixpath.join(folder if member.issym() else "", member.linkname))
                if target not in places:
                    raise UserError(
                        f"{where}: {shown} is a link to no file before it: pack the shard with the files themselves"
                    )
                places[inside] = places[target]
            else:
                continue
            sample, place = samples.setdefault(key, _Sample()), places[inside]
            if extension in EXTENSIONS:
                if sample.id:
                    raise UserError(f"{where}: sample {printable(key)} has two images: keep one of them in the shard")
                sample.id, (sample.offset, sample.size) = f"{shard}/{inside}", place
            elif extension.endswith(EXTENSIONS):
                dotted[key] = shown
            elif extension == ".cls":
                sample.label = _read(other, *place).decode("utf-8-sig", "replace").strip()
                if not sample.label:
                    raise UserError(f"{where}: {shown} is empty: it must hold the label of its image")
            elif extension == ".json":
                fields[key] = place
        for key, member_name in dotted.items():
            if not samples[key].id:
                raise UserError(
                    f"{where}: {member_name} is not an image of its own, since a key ends at the first dot of a name: "
                    f"sample {printable(key)} has none: rename its members, without dots in the key"
                )
        for key, place in fields.items():
            if samples[key].label is None:
                samples[key].label = _label_in(_read(other, *place), f"{where}: {printable(key)}.json")
    yield from samples.values()


def _read(file: IO[bytes], offset: int, size: int) -> bytes:
    file.seek(offset)
    return file.read(size)


def _label_in(content: bytes, name: str) -> str | None:
    """The label among the values of a JSON file, if it has one.

    Raises:
        UserError: the file is not JSON, or its label neither integer nor text.
    """
    try:
        values = json.loads(content)
    except (ValueError, RecursionError):
        raise UserError(f"{name} is not JSON: fetch the shard again") from None
    values = values if isinstance(values, dict) else {}
    key = next((key for key in LABEL_NAMES if values.get(key) is not None), None)
    if key is None:
        return None
    if not isinstance(values[key], int | str) or isinstance(values[key], bool):
        shown = json.dumps(values[key])
        raise UserError(
            f"{name}: {key} is {shown if len(shown) <= 40 else shown[:40] + '...'}: labels are integers or text, one "
            "per image: write it as one"
        )
    return str(values[key]).strip() or None
