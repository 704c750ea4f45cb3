"""What sources of sharded files share: the shards of a folder, which split each belongs to, and classes from labels."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from crt.data.class_folders import ONE_CLASS, check_val_classes
from crt.data.listing import Listing, printable, sorted_listing
from crt.data.other_kinds import read_otherwise
from crt.data.tree import folder_tree
from crt.errors import UserError

LABEL_NAMES = ("label", "labels", "cls", "class")
"""What a label's column or key may be called; of several the first counts."""
# Endings of packed files, which stand behind that of what is packed.
_PACKED = (".gz", ".bz2", ".xz", ".zst", ".zip")
_SPLITS = {
    "train": re.compile(r"(?<![a-z])(train|training)(?![a-z])"),
    "val": re.compile(r"(?<![a-z])(val|valid|validation)(?![a-z])"),
    "test": re.compile(r"(?<![a-z])(test|testing)(?![a-z])"),
}


def list_shards(folder: Path, ending: str, notes: list[str], hint: str = "") -> list[str]:
    """Paths in a folder of the files with an ending, in upper case or lower, below folders or not.

    Args:
        notes: gets a line on other files, if there are any.
        hint: what else to tell if there are none.

    Raises:
        UserError: there is no such folder, or it holds none.
    """
    if not folder.is_dir():
        state = "is not a folder" if folder.exists() else "not found"
        raise UserError(f"{folder}: {state}: set prepare_data.path to the folder of the {ending} shards")
    files = folder_tree(folder).files
    shards = [name for name in files if name.lower().endswith(ending)]
    ignored = Counter(_ending(name) for name in files if not name.lower().endswith(ending))
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(ignored.items()))
    if not shards:
        held, other = f", but {kinds}" if kinds else "", read_otherwise(files)
        raise UserError(
            f"{folder}: holds no {ending} shards{hint}{held}: give the folder that does{other and f', or {other}'}"
        )
    if kinds:
        notes.append(f"{folder}: files that are not {ending} shards by their names are ignored: {kinds}")
    return shards


def _ending(name: str) -> str:
    """The ending of a file's name in lower case, .tar.gz as a whole."""
    inner, last = PurePosixPath(PurePosixPath(name.lower()).stem), PurePosixPath(name.lower()).suffix
    return (inner.suffix + last if last in _PACKED else last) or "no extension"


def splits_of_shards(folder: Path, shards: list[str], notes: list[str]) -> dict[str, str]:
    """The split that each shard's path names: "train" and "val", or "all", or "" for those that are not used.

    Raises:
        UserError: some shards name a split, and others none.
    """
    named = {shard: names_split(shard) for shard in shards}
    present = set(named.values())
    held_out = next((split for split in ("val", "test") if split in present), None)
    if "train" not in present or held_out is None:
        if present != {""}:
            names = ", ".join(sorted(split or "no split" for split in present))
            notes.append(f"{folder}: images of {names} only: validation images are set aside from all of them")
        return dict.fromkeys(shards, "all")
    strange = next((shard for shard, split in named.items() if not split), None)
    if strange is not None:
        raise UserError(
            f"{folder}: {printable(strange)} names no split, other shards do: name it after train or val, or move it"
        )
    if held_out == "val" and "test" in present:
        notes.append(f"{folder}: the images of test are not used, validation images are those of val")
    roles = {"train": "train", held_out: "val"}
    return {shard: roles.get(split, "") for shard, split in named.items()}


def names_split(shard: str) -> str:
    """The split that a path, or another text, names last, which says it most closely, or ""."""
    ends = {split: [found.end() for found in name.finditer(shard.lower())] for split, name in _SPLITS.items()}
    return max((split for split in ends if ends[split]), key=lambda split: ends[split][-1], default="")


def listings_by_label(
    folder: Path,
    samples: Mapping[str, Sequence[tuple[str, str | None]]],
    places: Mapping[str, Sequence[np.ndarray]],
    where: str,
    notes: list[str],
) -> tuple[list[str], dict[str, Listing]]:
    """`classes_of_labels`, and the listing of each split.

    Args:
        samples: by split, the (id, label) of each image.
        places: by split, where they lie, in parts of dtype `PLACE`.
    """
    classes = classes_of_labels(folder, samples, where, notes)
    index = {label: number for number, label in enumerate(classes)}
    listings = {}
    for split, found in samples.items():
        labels = np.array([index[label or ONE_CLASS] for _, label in found], np.int64)
        listings[split] = sorted_listing([name for name, _ in found], labels, np.concatenate(places[split]))
    return classes, listings


def classes_of_labels(
    folder: Path, samples: Mapping[str, Iterable[tuple[str, str | None]]], where: str, notes: list[str]
) -> list[str]:
    """Class ids in the order of their indices: integers by size, names by the alphabet.

    Args:
        folder: the source, for messages.
        samples: by split, the (path, label) of each image; a label of None is none.
        where: what was looked for, for messages.

    Raises:
        UserError: only some samples have labels, or validation has a class that training has not.
    """
    found = {split: {label for _, label in some} for split, some in samples.items()}
    everywhere = set().union(*found.values())
    if None in everywhere and len(everywhere) > 1:
        name = next(path for some in samples.values() for path, label in some if label is None)
        raise UserError(f"{folder}: {printable(name)} has no label ({where}), others do: add it, or remove the image")
    if None in everywhere:
        notes.append(f"{folder}: samples have no labels ({where}): the images are one class")
        return [ONE_CLASS]
    labels = [label for label in found.get("train", everywhere) if label is not None]
    numbers = all(re.fullmatch(r"-?[0-9]{1,18}", label) for label in labels)
    classes = sorted(labels, key=lambda label: (int(label) if numbers else 0, label))
    if "val" in found:
        check_val_classes(str(folder), classes, sorted(label for label in found["val"] if label is not None), notes)
    return classes
