"""Images whose labels stand in a file beside them: a table with their names, or `dataset.json` of StyleGAN's tool.

The table is a .csv or .tsv file with a line of column names, or .jsonl, as Kaggle and the Hugging Face Hub's image
folders have it. Images lie in the file's folder or below, and are called by their path from there, or by name alone,
with their ending or without. Those that the file does not name are left out.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from crt.data.class_folders import is_image, listing_of
from crt.data.listing import first_three, printable
from crt.data.no_classes import LABEL_FILES, STYLEGAN_LABELS
from crt.data.shards import LABEL_NAMES, classes_of_labels
from crt.data.source import Source
from crt.data.synsets import class_names
from crt.data.tree import Tree, folder_tree
from crt.errors import UserError

_IMAGE_NAMES = ("file_name", "filename", "file", "filepath", "path", "image", "image_id", "image_name", "img", "id")
_NO_LABELS = ("text", "caption", "prompt", "url")


def is_label_file(path: Path) -> bool:
    """Whether a path is a file that may have labels, by its name."""
    return (path.suffix.lower() in LABEL_FILES or path.name == STYLEGAN_LABELS) and os.path.isfile(path)


def open_label_file(path: Path) -> Source:
    """The images that a file of labels names.

    Raises:
        UserError: it cannot be read, does not say which column is what, or names an image that is not there or twice.
    """
    labels = _read(path)
    if not labels:
        raise UserError(f"{path}: names no images: fix it or get it again")
    tree, notes = folder_tree(path.parent), list[str]()
    places = _rows_by_name(tree)
    found: dict[int, str | None] = {}
    missing = []
    for name, label in labels:
        rows = places.get(name.removeprefix("./"), [])
        if len(rows) > 1:
            raise UserError(
                f"{path}: {printable(name)} may be {first_three([tree.files[row] for row in rows])}: write its path "
                f"from {path.parent}"
            )
        if not rows:
            missing.append(name)
        elif found.setdefault(rows[0], label) != label:
            raise UserError(f"{path}: gives {printable(name)} two labels, {found[rows[0]]} and {label}: leave one")
    if missing:
        raise UserError(
            f"{path}: names {len(missing)} images that do not lie in {path.parent} or below: {first_three(missing)}: "
            "put the file beside the folder of its images, or remove these lines"
        )
    if left := sum(map(is_image, tree.files)) - len(found):
        notes.append(f"{path}: {left} images that it does not name are left out")
    samples = [(tree.files[row], label) for row, label in found.items()]
    classes = classes_of_labels(path, {"all": samples}, f"column {' or '.join(LABEL_NAMES)}", notes)
    index = {name: number for number, name in enumerate(classes)}
    listing = listing_of(tree, list(found), [index[label] if label is not None else 0 for _, label in samples])
    return Source(classes, class_names(classes), [tree.container], {"all": listing}, notes)


def _rows_by_name(tree: Tree) -> dict[str, list[int]]:
    """Rows of images by all that they may be called; a whole path is that of one image only."""
    found: dict[str, list[int]] = {}
    images = {name: row for row, name in enumerate(tree.files) if is_image(name)}
    for name, row in images.items():
        path = PurePosixPath(name)
        for called in {path.name, path.stem, str(path.with_suffix(""))}:
            found.setdefault(called, []).append(row)
    return found | {name: [row] for name, row in images.items()}


def _read(path: Path) -> list[tuple[str, str | None]]:
    """(name, label) of each image.

    Raises:
        UserError: as of `open_label_file`.
    """
    try:
        if path.name == STYLEGAN_LABELS:
            labels = json.loads(path.read_text(encoding="utf-8"))["labels"]
            if labels is None:
                images = folder_tree(path.parent).files
                return [(name, None) for name in images if is_image(name)]
            return [(str(name), str(int(label))) for name, label in labels]
        with open(path, encoding="utf-8-sig", newline="") as file:
            if path.suffix.lower() == ".jsonl":
                lines = [json.loads(line) for line in file if line.strip()]
                names = list(lines[0]) if lines else []
            else:
                table = csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
                lines, names = list(table), list(table.fieldnames or [])
            image, label = _columns(path, names)
            return [(str(line[image]).strip(), _text(line.get(label))) for line in lines]
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
        raise UserError(
            f"{path}: columns are {first_three([str(name) for name in names])}: the first line must name them, that of "
            f"images {_IMAGE_NAMES[1]}, that of labels {LABEL_NAMES[0]}"
        )
    return image, label


def _text(label: Any) -> str | None:
    if isinstance(label, float | bool | list | dict):
        raise TypeError  # of JSON: labels are integers or text
    return (str(label).strip() or None) if label is not None else None
