"""Images whose labels stand in a file beside them: a table or list with their names, in a format of `label_lists`.

Images lie in the file's folder or below, or, where that has none or is called like annotations, in the folder above or
below. They are called by their path or its end, or by name alone, with their ending or without. Those that the file
does not name are left out. Splits are those that a column names, or the folders that the images lie in, or that files
of one name lie in: train/metadata.csv and val/metadata.csv.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from crt.data.label_lists import Line, NoColumns, read_lines
from crt.data.listing import PLACE, first_three, printable
from crt.data.no_classes import LABEL_FILES, is_annotation, pictures
from crt.data.shards import LABEL_NAMES, listings_by_label, splits_of_shards
from crt.data.source import Source
from crt.data.split_folders import TRAIN_FOLDERS, VAL_FOLDERS
from crt.data.synsets import class_names
from crt.data.tree import Tree, folder_tree, is_image
from crt.errors import UserError


def is_label_file(path: Path) -> bool:
    """Whether a path is a file that may have labels, by its name."""
    return path.suffix.lower() in LABEL_FILES and os.path.isfile(path)


class _Table(NamedTuple):
    """Images of a folder, by a file that lies in it."""

    path: Path
    tree: Tree
    lines: dict[int, Line]
    """By the tree's rows."""


def open_label_file(path: Path) -> Source:
    """The images that a file of labels names, and for a file in train/ those that one of its name in val/ names.

    Raises:
        UserError: it cannot be read, does not say which column is what, or names an image that is not there or twice.
    """
    notes: list[str] = []
    tables = [_read_table(path, notes)]
    if any(line.split for line in tables[0].lines.values()):
        splits = [{row: line.split for row, line in tables[0].lines.items()}]
    elif beside := _tables_beside(path, notes):
        tables += beside
        splits = [dict.fromkeys(table.lines, table.path.absolute().parent.name) for table in tables]
    else:
        splits = [_split_folders(path, tables[0].tree, list(tables[0].lines), notes)]
    named = sorted({split for of_rows in splits for split in of_rows.values()} - {""})
    split_of = splits_of_shards(path, named, notes) if named else {"": "all"}
    rows_of: dict[str, list[tuple[int, int]]] = {split: [] for split in sorted(set(split_of.values()) - {""})}
    for number, of_rows in enumerate(splits):
        for row, name in of_rows.items():
            if split := split_of[name]:
                rows_of[split].append((number, row))
    samples = {
        split: [(tables[number].tree.files[row], tables[number].lines[row].label) for number, row in rows]
        for split, rows in rows_of.items()
    }
    places = {}
    for split, rows in rows_of.items():
        of_split = np.array([tables[number].tree.places[row] for number, row in rows], PLACE)
        of_split["container"] = [number for number, _ in rows]
        places[split] = [of_split]
    classes, listings = listings_by_label(path, samples, places, f"column {' or '.join(LABEL_NAMES)}", notes)
    return Source(classes, class_names(classes), [table.tree.container for table in tables], listings, notes)


def _read_table(path: Path, notes: list[str]) -> _Table:
    """The images that a file of labels names, found in its folder, or in the one above if that has none.

    Raises:
        UserError: as of `open_label_file`.
    """
    tree, is_among_annotations = folder_tree(path.parent), is_annotation(f"{path.absolute().parent.name}/{path.name}")
    if is_among_annotations or not any(map(is_image, tree.files)):
        tree = folder_tree(path.absolute().parent.parent)
        notes.append(f"{path}: its images are looked for in {tree.name} and below")
    images = pictures(tree)
    rows_of = _Names(tree, images).rows
    lines = read_lines(path, [tree.files[row] for row in images], lambda name: bool(rows_of(name)), notes)
    if not lines:
        raise UserError(f"{path}: names no images: fix it or get it again")
    found: dict[int, Line] = {}
    missing = []
    for line in lines:
        rows = rows_of(line.image)
        if len(rows) > 1:
            raise UserError(
                f"{path}: {printable(line.image)} may be {first_three([tree.files[row] for row in rows])}: write its "
                f"path from {tree.name}, or move the others out of it"
            )
        if not rows:
            missing.append(line.image)
            continue
        first = found.setdefault(rows[0], line)
        for what, one, other in (("labels", first.label, line.label), ("splits", first.split, line.split)):
            if one != other:
                raise UserError(f"{path}: gives {printable(line.image)} two {what}, {one} and {other}: leave one")
    if missing:
        raise UserError(
            f"{path}: names {len(missing)} images that do not lie in {tree.name} or below: {first_three(missing)}: "
            "put the file beside the folder of its images, or remove these lines"
        )
    if left := len(images) - len(found):
        notes.append(f"{path}: {left} images that it does not name are left out")
    return _Table(path, tree, found)


def _tables_beside(path: Path, notes: list[str]) -> list[_Table]:
    """The files of the same name in the folders of other splits, for a file in that of training images."""
    folder = path.parent.absolute()
    if folder.name.lower() not in TRAIN_FOLDERS:
        return []
    found = []
    for other in sorted(folder.parent.iterdir()):
        if other.name.lower() in VAL_FOLDERS and (other / path.name).is_file():
            try:
                found.append(_read_table(other / path.name, notes))
            except NoColumns as error:
                notes.append(
                    f"{str(error).partition(': the first line')[0]}: not read, since labels are not among them"
                )
    if found:
        names = ", ".join(table.path.parent.name for table in found)
        notes.append(f"{path}: beside it {path.name} of {names} is read: splits are those of the folders")
    return found


def _split_folders(path: Path, tree: Tree, rows: Sequence[int], notes: list[str]) -> dict[int, str]:
    """The split whose folder each image lies in or below; empty for all where some lie elsewhere or all in one."""
    folders = {row: tree.files[row].partition("/")[0] for row in rows}
    names = sorted(set(folders.values()))
    if len(names) < 2 or not all(name.lower() in (*TRAIN_FOLDERS, *VAL_FOLDERS) for name in names):
        return dict.fromkeys(rows, "")
    notes.append(f"{path}: splits are those of the images' folders, {', '.join(names)}")
    return folders


class _Names:
    """What images may be called: by their path, its end from a folder on, or name, with their ending or without."""

    def __init__(self, tree: Tree, images: Sequence[int]) -> None:
        self._rows: dict[str, list[int]] = {}
        by_path = {tree.files[row]: row for row in images}
        for name, row in by_path.items():
            path = PurePosixPath(name)
            for called in {path.name, path.stem, str(path.with_suffix(""))}:
                self._rows.setdefault(called, []).append(row)
        self._rows |= {name: [row] for name, row in by_path.items()}  # a whole path is that of one image only
        self._folders: dict[str, str | None] = {}
        for folder in tree.folders:
            end = folder
            while end := end.partition("/")[2]:
                self._folders[end] = None if end in self._folders else folder
        here = Path(tree.name).absolute()
        self._roots = [f"{root}/" for root in (here, here.resolve(), here.name)]

    def rows(self, name: str) -> list[int]:
        """Rows of the images that a file may mean by a name."""
        return next((self._rows[called] for called in self._calls(name) if called in self._rows), [])

    def _calls(self, name: str) -> Iterator[str]:
        """What an image may be called in `_rows`, the likeliest first."""
        for path in (name, name.replace("\\", "/")):  # as Windows writes it
            yield path.removeprefix("./")
            yield from (path.removeprefix(root) for root in self._roots if path.startswith(root))
        inner, _, image = path.removeprefix("./").strip("/").rpartition("/")
        if inner:
            yield f"{inner}/{image}"  # without the slash that Places365 begins with
            if folder := self._folders.get(inner):
                yield f"{folder}/{image}"
