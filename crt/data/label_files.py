"""Images whose labels stand in a file beside them: a table with their names, or `dataset.json` of StyleGAN's tool.

The table is a .csv or .tsv file with a line of column names, or .jsonl, as Kaggle and the Hugging Face Hub's image
folders have it. Images lie in the file's folder or below, and are called by their path, or by name alone, with their
ending or without. Those that the file does not name are left out. Splits are those that a column names, or the folders
that the images lie in, or that files of one name lie in: train/metadata.csv and val/metadata.csv.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from crt.data.class_folders import TRAIN_FOLDERS, VAL_FOLDERS, is_image
from crt.data.listing import PLACE, first_three, printable
from crt.data.no_classes import LABEL_FILES, STYLEGAN_LABELS
from crt.data.shards import LABEL_NAMES, listings_by_label, names_split, splits_of_shards
from crt.data.source import Source
from crt.data.synsets import class_names
from crt.data.tree import Tree, folder_tree
from crt.errors import UserError

_IMAGE_NAMES = ("file_name", "filename", "file", "filepath", "path", "image", "image_id", "image_name", "img", "id")
_SPLIT_NAMES = ("split", "subset", "partition", "usage", "fold", "is_valid")
_NO_LABELS = ("text", "caption", "prompt", "url", *_SPLIT_NAMES)
_SEPARATORS = ",;\t"  # of .csv files: spreadsheets write semicolons where the comma is for decimals


class _Line(NamedTuple):
    image: str
    label: str | None
    split: str = ""
    """As the file has it; empty if it has none."""


def is_label_file(path: Path) -> bool:
    """Whether a path is a file that may have labels, by its name."""
    return (path.suffix.lower() in LABEL_FILES or path.name == STYLEGAN_LABELS) and os.path.isfile(path)


class _Table(NamedTuple):
    """Images of a folder, by a file that lies in it."""

    path: Path
    tree: Tree
    lines: dict[int, _Line]
    """By the tree's rows."""


class _NoColumns(UserError):
    """A file whose columns do not tell images and labels."""


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
    """The images that a file of labels names, found in its folder.

    Raises:
        UserError: as of `open_label_file`.
    """
    lines = _read(path, notes)
    if not lines:
        raise UserError(f"{path}: names no images: fix it or get it again")
    tree = folder_tree(path.parent)
    places = _rows_by_name(tree)
    here = path.parent.absolute()
    roots = [f"{root}/" for root in (here, here.resolve(), here.name)]
    found: dict[int, _Line] = {}
    missing = []
    for line in lines:
        rows = next((places[name] for name in _calls(line.image, roots) if name in places), [])
        if len(rows) > 1:
            raise UserError(
                f"{path}: {printable(line.image)} may be {first_three([tree.files[row] for row in rows])}: write its "
                f"path from {path.parent}, or move the others out of it"
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
            f"{path}: names {len(missing)} images that do not lie in {path.parent} or below: {first_three(missing)}: "
            "put the file beside the folder of its images, or remove these lines"
        )
    if left := sum(map(is_image, tree.files)) - len(found):
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
            except _NoColumns as error:
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


def _calls(name: str, roots: Sequence[str]) -> Iterator[str]:
    """What an image may be called in `_rows_by_name`, the likeliest first.

    Args:
        name: what the file calls it.
        roots: how paths may begin that are not from the file's own folder.
    """
    for path in (name, name.replace("\\", "/")):  # as Windows writes it
        yield path.removeprefix("./")
        yield from (path.removeprefix(root) for root in roots if path.startswith(root))


def _rows_by_name(tree: Tree) -> dict[str, list[int]]:
    """Rows of images by all that they may be called; a whole path is that of one image only."""
    found: dict[str, list[int]] = {}
    images = {name: row for row, name in enumerate(tree.files) if is_image(name)}
    for name, row in images.items():
        path = PurePosixPath(name)
        for called in {path.name, path.stem, str(path.with_suffix(""))}:
            found.setdefault(called, []).append(row)
    return found | {name: [row] for name, row in images.items()}


def _read(path: Path, notes: list[str]) -> list[_Line]:
    """What the file says of each image.

    Raises:
        UserError: as of `open_label_file`.
    """
    try:
        if path.name == STYLEGAN_LABELS:
            labels = json.loads(path.read_text(encoding="utf-8"))["labels"]
            if labels is None:
                images = folder_tree(path.parent).files
                return [_Line(name, None) for name in images if is_image(name)]
            return [_Line(str(name), str(int(label))) for name, label in labels]
        with open(path, encoding="utf-8-sig", newline="") as file:
            if path.suffix.lower() == ".jsonl":
                lines = [json.loads(line) for line in file if line.strip()]
                names = list(lines[0]) if lines else []
            else:
                first = file.readline()
                file.seek(0)
                is_tsv = path.suffix.lower() == ".tsv"
                table = csv.DictReader(file, delimiter="\t" if is_tsv else max(_SEPARATORS, key=first.count))
                lines, names = list(table), list(table.fieldnames or [])
            image, label = _columns(path, names)
            splits = _splits(path, names, lines, notes)
            return [
                _Line(str(line[image]).strip(), _text(line.get(label)), split)
                for line, split in zip(lines, splits, strict=True)
            ]
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not UTF-8 text: save it as UTF-8") from None
    except (ValueError, LookupError, TypeError, AttributeError, csv.Error, RecursionError):
        raise UserError(f"{path}: cannot be read as a list of images and labels: fix it or get it again") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): fix that and run again") from None


def _columns(path: Path, names: Sequence[str]) -> tuple[str, str]:
    """The columns of images and of labels: those that are called so; of two columns the other one is the label's."""
    by_name = {str(name).strip().lower(): name for name in names}
    image = next((by_name[name] for name in _IMAGE_NAMES if name in by_name), None)
    label = next((by_name[name] for name in LABEL_NAMES if name in by_name), None)
    others = [name for name in names if name not in (image, label) and name.strip().lower() not in _NO_LABELS]
    if len(names) == 2 and len(others) == 1:
        image, label = image or others[0], label or others[0]
    if image is None or label is None:
        raise _NoColumns(
            f"{path}: columns are {first_three([str(name) for name in names])}: the first line must name them, that of "
            f"images {_IMAGE_NAMES[1]}, that of labels {LABEL_NAMES[0]}"
        )
    return image, label


def _splits(path: Path, names: Sequence[str], lines: Sequence[dict[str, Any]], notes: list[str]) -> list[str]:
    """The split that each line names in its column of splits; empty for all where one does not."""
    column = next((name for name in names if str(name).strip().lower() in _SPLIT_NAMES), None)
    if column is None:
        return [""] * len(lines)
    splits = [str(line.get(column) or "").strip() for line in lines]
    strange = next((split for split in dict.fromkeys(splits) if not names_split(split)), None)
    if strange is None:
        return splits
    notes.append(
        f"{path}: column {printable(column.strip())} is not read, for {printable(strange)!r} is none of train, val "
        "and test: write those to have its splits"
    )
    return [""] * len(lines)


def _text(label: Any) -> str | None:
    if isinstance(label, float | bool | list | dict):
        raise TypeError  # of JSON: labels are integers or text
    return (str(label).strip() or None) if label is not None else None
