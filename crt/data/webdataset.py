"""Tar shards in WebDataset's layout: members `KEY.jpg` and `KEY.cls` beside each other make one sample.

The shards are read where they lie. A folder holds them, below folders or not; a shard belongs to the split that its
path names (`imagenet1k-train-0000.tar`, `val/000.tar`). Labels are `.cls` members, an integer or a class's name, or
`label` in `.json` members; samples without any are one class.
"""

from __future__ import annotations

import json
import os
import posixpath
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from crt import interrupt
from crt.data.archives import tar_members
from crt.data.class_folders import EXTENSIONS, ONE_CLASS, check_val_classes
from crt.data.listing import PLACE, Container, printable, sorted_listing
from crt.data.source import Source
from crt.data.synsets import class_names
from crt.data.tree import folder_tree
from crt.errors import UserError
from crt.progress import Progress

_SPLITS = {
    "train": re.compile(r"(?<![a-z])(train|training)(?![a-z])"),
    "val": re.compile(r"(?<![a-z])(val|valid|validation)(?![a-z])"),
    "test": re.compile(r"(?<![a-z])(test|testing)(?![a-z])"),
}


@dataclass(slots=True)  # a data set has millions
class _Sample:
    id: str = ""
    """Path of the image: that of the shard, and that in it; empty without an image."""
    offset: int = 0
    size: int = 0
    label: str | None = None


def open_webdataset(folder: Path) -> Source:
    """The shards of a folder.

    Raises:
        UserError: there is none, one is damaged, or only some samples have labels.
    """
    if not folder.is_dir():
        state = "is no folder" if folder.exists() else "not found"
        raise UserError(f"{folder}: {state}: set prepare_data.path to the folder of the .tar shards")
    shards = [name for name in folder_tree(folder).files if name.endswith(".tar")]
    if not shards:
        raise UserError(f"{folder}: holds no .tar shards (compressed ones are not read): give the folder that does")
    notes: list[str] = []
    split_of = _splits(folder, shards, notes)
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
    classes = _classes(folder, samples, notes)
    index = {name: label for label, name in enumerate(classes)}
    listings = {}
    for split, found in samples.items():
        if not found:
            which = "shards" if split == "all" else f"shards of {split}"
            raise UserError(
                f"{folder}: the {which} hold no images (KEY.jpg, KEY.png, ..., no dot in KEY): give other shards"
            )
        labels = np.array([index[_class_of(sample)] for _, sample in found], np.int64)
        places = np.array([(number, sample.offset, sample.size, -1, 0) for number, sample in found], PLACE)
        listings[split] = sorted_listing([sample.id for _, sample in found], labels, places)
    containers = [Container(str(folder / shard), "tar") for shard in used]
    return Source(classes, class_names(classes), containers, listings, notes)


def _splits(folder: Path, shards: list[str], notes: list[str]) -> dict[str, str]:
    """The split of each shard: "train" and "val", or "all", or "" for those that are not used."""
    named = {shard: _split_in(shard) for shard in shards}
    present = set(named.values())
    held_out = next((split for split in ("val", "test") if split in present), None)
    if "train" not in present or held_out is None:
        if present != {""}:
            names = ", ".join(sorted(split or "no split" for split in present))
            notes.append(f"{folder}: shards of {names} only: validation images are set aside from all of them")
        return dict.fromkeys(shards, "all")
    strange = next((shard for shard, split in named.items() if not split), None)
    if strange is not None:
        raise UserError(
            f"{folder}: {printable(strange)} names no split, other shards do: name it after train or val, or move it"
        )
    if held_out == "val" and "test" in present:
        notes.append(f"{folder}: the shards of test are not used, validation images are those of val")
    roles = {"train": "train", held_out: "val"}
    return {shard: roles.get(split, "") for shard, split in named.items()}


def _split_in(shard: str) -> str:
    """The split that a path names last, which says it most closely, or ""."""
    ends = {split: [found.end() for found in name.finditer(shard.lower())] for split, name in _SPLITS.items()}
    return max((split for split in ends if ends[split]), key=lambda split: ends[split][-1], default="")


def _read_shard(path: Path, shard: str) -> Iterator[_Sample]:
    """The samples of one shard.

    Raises:
        UserError: it cannot be read, is damaged, or a sample in it is not as it must be.
    """
    samples: dict[str, _Sample] = {}
    fields: dict[str, tuple[int, int]] = {}
    places: dict[str, tuple[int, int]] = {}
    where = printable(str(path))
    try:
        file, other = open(path, "rb"), open(path, "rb")  # noqa: SIM115
    except OSError as error:
        raise UserError(f"{where}: cannot be read ({error.strerror}): mend that and run again") from None
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
            elif extension == ".cls":
                sample.label = _read(other, *place).decode("utf-8-sig", "replace").strip()
                if not sample.label:
                    raise UserError(f"{where}: {shown} is empty: it must hold the label of its image")
            elif extension == ".json":
                fields[key] = place
        for key, place in fields.items():
            if samples[key].label is None:
                samples[key].label = _label_in(_read(other, *place), f"{where}: {printable(key)}.json")
    yield from samples.values()


def _read(file: IO[bytes], offset: int, size: int) -> bytes:
    file.seek(offset)
    return file.read(size)


def _label_in(content: bytes, name: str) -> str | None:
    try:
        values = json.loads(content)
    except (ValueError, RecursionError):
        raise UserError(f"{name} is no JSON: fetch the shard again") from None
    label = values.get("label") if isinstance(values, dict) else None
    return (str(label).strip() or None) if isinstance(label, int | str) else None


def _class_of(sample: _Sample) -> str:
    return ONE_CLASS if sample.label is None else sample.label


def _classes(folder: Path, samples: dict[str, list[tuple[int, _Sample]]], notes: list[str]) -> list[str]:
    """Class ids in the order of their indices: integers by size, names by the alphabet."""
    found = {split: {sample.label for _, sample in some} for split, some in samples.items()}
    everywhere = set().union(*found.values())
    if None in everywhere and len(everywhere) > 1:
        name = next(s.id for some in samples.values() for _, s in some if s.label is None)
        raise UserError(
            f"{folder}: {printable(name)} has no label (.cls or label in .json), others do: add it, or remove the image"
        )
    if None in everywhere:
        notes.append(f"{folder}: samples have no labels: the images are one class")
        return [ONE_CLASS]
    labels = [label for label in found.get("train", everywhere) if label is not None]
    numbers = all(re.fullmatch(r"-?[0-9]{1,18}", label) for label in labels)
    classes = sorted(labels, key=lambda label: (int(label) if numbers else 0, label))
    if "val" in found:
        check_val_classes(str(folder), classes, sorted(label for label in found["val"] if label is not None), notes)
    return classes
