"""What a file says of the labels of images, by the file's format.

- .csv, .tsv and .jsonl, and a list of objects in .json: a table whose columns have names. The column of images is the
  one that is called so and has names of images, or any that has; classes may be columns of which each line has one 1.
- .txt and .lst, and .csv without names of columns: a line for each image, its name first or last.
- Labels alone, one a line or in a vector of a MATLAB file: those of images that are numbered from 0 or 1 on.
- .json: COCO's annotations, {image: label}, {label: images}, or what StyleGAN's tool writes.
"""

from __future__ import annotations

import csv
import json
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from crt.data.listing import first_three, printable
from crt.data.matlab import matlab_arrays
from crt.data.no_classes import stylegan_labels
from crt.data.other_kinds import read_otherwise
from crt.data.shards import LABEL_NAMES, names_split
from crt.data.tree import is_image
from crt.errors import UserError

_IMAGE_NAMES = ("file_name", "filename", "file", "filepath", "path", "image", "image_id", "image_name", "img", "id")
_LABEL_NAMES = (*LABEL_NAMES, "class_name", "classname", "class_id", "classid", "category", "category_id", "target")
_SPLIT_NAMES = ("split", "subset", "partition", "usage", "fold", "is_valid")
_NO_LABELS = ("text", "caption", "prompt", "url", *_SPLIT_NAMES)
_SEPARATORS = ",;\t"  # of .csv files: spreadsheets write semicolons where the comma is for decimals
_LIST_SEPARATORS = ("\t", ",", ";", None)  # None: blanks
_HEAD_LINES = 3  # of which one must name an image; CelebA's lists begin with a count and names of columns


class Line(NamedTuple):
    """What a file says of one image."""

    image: str
    label: str | None
    split: str = ""
    """As the file has it; empty if it has none."""


class NoColumns(UserError):
    """A file whose columns do not tell images and labels."""


def read_lines(path: Path, images: Sequence[str], is_known: Callable[[str], bool], notes: list[str]) -> list[Line]:
    """What the file says of each image.

    Args:
        path: the file.
        images: paths of those that are there.
        is_known: whether a name is that of an image there.
        notes: gets a line on what is assumed.

    Raises:
        UserError: it cannot be read, or does not say what is what.
    """
    try:
        ending = path.suffix.lower()
        if ending == ".mat":
            return _of_matlab(path, images, notes)
        with open(path, encoding="utf-8-sig", newline="") as file:
            if ending == ".json":
                return _of_json(path, json.load(file), images, is_known, notes)
            if ending == ".jsonl":
                return _of_table(path, [json.loads(line) for line in file if line.strip()], is_known, notes)
            if ending in (".csv", ".tsv"):
                first = file.readline()
                file.seek(0)
                separator = "\t" if ending == ".tsv" else max(_SEPARATORS, key=first.count)
                if not any(is_known(field.strip()) for field in next(csv.reader([first], delimiter=separator), [])):
                    table = csv.DictReader(file, delimiter=separator)
                    return _of_table(path, list(table), is_known, notes, table.fieldnames)
            return _of_list(path, file.read().splitlines(), images, is_known, notes)
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not UTF-8 text: save it as UTF-8") from None
    except (ValueError, LookupError, TypeError, AttributeError, csv.Error, RecursionError):
        raise UserError(f"{path}: cannot be read as a list of images and labels: fix it or get it again") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): fix that and run again") from None


def _of_table(
    path: Path,
    lines: Sequence[Mapping[str, Any]],
    is_known: Callable[[str], bool],
    notes: list[str],
    names: Sequence[str] | None = None,
) -> list[Line]:
    """The lines of a table; its columns are called `names`, or as in the first line."""
    names = list(lines[0]) if names is None and lines else list(names or [])
    if any(re.fullmatch(r"pixels|pixel_?\d+|\d+x\d+", _plain(name)) for name in names):
        raise UserError(f"{path}: holds the pixels of images, which are not read from tables: get the images as files")
    image = _image_column(path, names, lines, is_known)
    label = _label_column(path, names, image, lines)
    splits = _splits(path, names, lines, notes)
    found = []
    for line, split in zip(lines, splits, strict=True):
        of_line = _text(line.get(label)) if isinstance(label, str) else _one_of(path, line, image, label)
        found.append(Line(str(line[image]).strip(), of_line, split))
    return found


def _image_column(
    path: Path, names: Sequence[str], lines: Sequence[Mapping[str, Any]], is_known: Callable[[str], bool]
) -> str:
    """The column of images: one that is called so, if it names any; else any that names them, or is called so."""
    by_name = _by_name(names)
    called = [by_name[name] for name in _IMAGE_NAMES if name in by_name]
    others = [name for name in names if _plain(name) not in (*_IMAGE_NAMES, *_LABEL_NAMES, *_NO_LABELS)]
    first = lines[0] if lines else {}
    naming = (name for name in (*called, *others) if is_known(str(first.get(name, "")).strip()))
    image = next(naming, next(iter(called), None))
    if image is None:
        labels = [name for name in names if _plain(name) in _LABEL_NAMES]
        if len(names) == 2 and len(others) == 1 and labels:
            return others[0]
        raise _no_columns(path, names)
    return image


def _label_column(
    path: Path, names: Sequence[str], image: str, lines: Sequence[Mapping[str, Any]]
) -> str | Sequence[str]:
    """The column of labels: the one that is called so, or the only other; or the columns of classes."""
    by_name = _by_name([name for name in names if name != image])
    label = next((by_name[name] for name in _LABEL_NAMES if name in by_name), None)
    others = [name for name in names if name != image and _plain(name) not in _NO_LABELS]
    if label is not None:
        return label
    if len(names) == 2 and len(others) == 1:
        return others[0]
    if len(others) > 1 and all(str(line.get(name)).strip() in _BITS for line in lines for name in others):
        return others
    raise _no_columns(path, names)


_BITS = {"0": False, "1": True, "0.0": False, "1.0": True}  # in columns of classes


def _one_of(path: Path, line: Mapping[str, Any], image: str, classes: Sequence[str]) -> str:
    """The class whose column has a 1."""
    found = [name.strip() for name in classes if _BITS[str(line[name]).strip()]]
    if len(found) != 1:
        raise UserError(
            f"{path}: {printable(str(line[image]))} has a 1 in {len(found)} of {len(classes)} columns, and images have "
            f"one class each: write a .csv file with the columns {_IMAGE_NAMES[1]} and {LABEL_NAMES[0]}"
        )
    return found[0]


def _by_name(names: Sequence[str]) -> dict[str, str]:
    return {_plain(name): name for name in names}


def _plain(name: str) -> str:
    return str(name).strip().lower().replace(" ", "_")


def _no_columns(path: Path, names: Sequence[str]) -> NoColumns:
    return NoColumns(
        f"{path}: columns are {first_three([str(name) for name in names])}: the first line must name them, that of "
        f"images {_IMAGE_NAMES[1]}, that of labels {LABEL_NAMES[0]}"
    )


def _splits(path: Path, names: Sequence[str], lines: Sequence[Mapping[str, Any]], notes: list[str]) -> list[str]:
    """The split that each line names in its column of splits; empty for all where one does not."""
    column = next((name for name in names if str(name).strip().lower() in _SPLIT_NAMES), None)
    if column is None:
        return [""] * len(lines)
    splits = [str(line.get(column) or "").strip() for line in lines]
    if _plain(column) == "is_valid" and set(splits) <= {"True", "False"}:  # as fastai has it
        return ["val" if split == "True" else "train" for split in splits]
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


def _of_list(
    path: Path, text: Sequence[str], images: Sequence[str], is_known: Callable[[str], bool], notes: list[str]
) -> list[Line]:
    """Lines of an image and its label, or of labels alone; those that begin with # are none."""
    lines = [line.strip() for line in text if line.strip() and not line.lstrip().startswith("#")]
    found = next(
        (
            (row, separator)
            for row, line in enumerate(lines[:_HEAD_LINES])
            for separator in _LIST_SEPARATORS
            if any(map(is_known, _fields(line, separator))) or (separator is None and is_known(line.rpartition(" ")[0]))
        ),
        None,
    )
    if lines and all(len(line.split()) == 1 for line in lines) and (found is None or len(set(lines)) < len(lines)):
        return _numbered(path, lines, images, notes)
    if found is None:
        raise UserError(
            f"{path}: none of its first lines names an image that lies with it: put it beside the folder of "
            "its images, or write a .csv file with the columns filename and label"
        )
    if re.search("partition|split", path.stem.lower()):
        raise UserError(f"{path}: tells splits, by its name, not labels: give the file of labels")
    start, separator = found
    rows = [_fields(line, separator) for line in lines]
    if start:
        names, rows = rows[start - 1], rows[start:]
        names = [_IMAGE_NAMES[0], *names] if len(names) == len(rows[0]) - 1 else names
        if len(names) != len(rows[0]) or any(map(is_image, names)):
            raise UserError(f"{path}: {printable(lines[0])} names no image that lies with it: remove what is no label")
        return _of_table(path, [dict(zip(names, row, strict=True)) for row in rows], is_known, notes, names)
    if all(len(row) == 1 for row in rows):
        raise UserError(
            f"{path}: names images alone: give a file that has their labels too, or set prepare_data.path to the "
            "folder that holds their class folders"
        )
    image, labels = _parted(rows, is_known)
    if separator is None and not all(re.fullmatch(r"[-+.\de]+", field) for row in labels for field in row):
        labels = [[" ".join(row)] for row in labels]  # of several words
    if any(len(row) > 1 for row in labels):
        classes = {row[0] for row in labels}
        if len(classes) != len(set(map(tuple, labels))) or 2 * len(classes) > len(labels):
            raise UserError(
                f"{path}: has several columns and no line that names them: write one that calls that of images "
                f"{_IMAGE_NAMES[1]} and that of labels {LABEL_NAMES[0]}, and save it as .csv"
            )
        notes.append(f"{path}: labels are its first column beside the images, which tells what the others are")
    if len(labels) > 2 and len({row[0] for row in labels if row}) == len(labels):
        raise UserError(f"{path}: gives each image a label of its own, so they are no classes: give another file")
    return [Line(name, row[0] or None if row else None) for name, row in zip(image, labels, strict=True)]


def _fields(line: str, separator: str | None) -> list[str]:
    fields = line.split() if separator is None else next(csv.reader([line], delimiter=separator), [""])
    return [field.strip() for field in fields]


def _parted(rows: Sequence[Sequence[str]], is_known: Callable[[str], bool]) -> tuple[list[str], list[Sequence[str]]]:
    """Names of images and what stands beside them: the name is first, last, or all but the last with its blanks."""
    ways = [
        ([row[0] for row in rows], [row[1:] for row in rows]),
        ([row[-1] for row in rows], [row[:-1] for row in rows]),
        ([" ".join(row[:-1]) for row in rows], [row[-1:] for row in rows]),
    ]
    # A label may be called like an image without its ending.
    return max(ways, key=lambda way: (sum(map(is_known, way[0])), is_image(way[0][0])))


def _numbered(path: Path, labels: Sequence[str], images: Sequence[str], notes: list[str]) -> list[Line]:
    """Labels in the order of the images' numbers.

    Raises:
        UserError: the images are not numbered so, or not as many.
    """
    ends = [re.findall("[0-9]{1,18}", PurePosixPath(name).stem)[-1:] for name in images]
    by_number = {int(end[0]): name for end, name in zip(ends, images, strict=True) if end}
    first = min(by_number, default=0)
    if not (len(labels) == len(images) == len(by_number) and first in (0, 1) and max(by_number) - first < len(images)):
        raise UserError(
            f"{path}: holds {len(labels)} labels and names no images, and the {len(images)} images with it are not "
            "numbered likewise: write a .csv file with the columns filename and label"
        )
    in_order = [by_number[number] for number in sorted(by_number)]
    notes.append(f"{path}: its labels are those of the images by their numbers, {first_three(in_order)}")
    return [Line(name, label) for name, label in zip(in_order, labels, strict=True)]


def _of_matlab(path: Path, images: Sequence[str], notes: list[str]) -> list[Line]:
    """The one vector of whole numbers that has as many as there are images."""
    count = len(images)
    if not count:
        raise UserError(f"{path}: no folder or archive of image files: {read_otherwise([path.name])}")
    vectors = []
    try:
        for name, read in matlab_arrays(path):
            try:
                values = read()
            except UserError:  # no array of numbers
                continue
            with np.errstate(invalid="ignore"):
                if values.size == count and count in values.shape and (values == values.astype(int)).all():
                    vectors.append((name, values))
    except zlib.error:
        raise UserError(f"{path}: damaged or cut short: fetch it again") from None
    if len(vectors) != 1:
        raise UserError(
            f"{path}: holds {len(vectors) or 'no'} vectors of labels for the {count} images with it: write a .csv file "
            f"with the columns filename and label; or, for arrays of images, {read_otherwise([path.name])}"
        )
    return _numbered(path, [str(int(value)) for value in vectors[0][1].ravel()], images, notes)


def _of_json(
    path: Path, content: Any, images: Sequence[str], is_known: Callable[[str], bool], notes: list[str]
) -> list[Line]:
    if isinstance(content, list):
        return _of_table(path, content, is_known, notes)
    if "labels" in content and "images" not in content:
        labels = stylegan_labels(content)
        if labels is None:
            return [Line(name, None) for name in images]
        return [Line(name, label) for name, label in labels.items()]
    if "images" in content:
        return list(_of_coco(path, content))
    if all(isinstance(value, list) for value in content.values()):
        return [Line(str(name), label or None) for label, names in content.items() for name in names]
    return [Line(name, _text(label)) for name, label in content.items()]


def _of_coco(path: Path, content: Mapping[str, Any]) -> Iterator[Line]:
    """Images by the category of their annotations, which iNaturalist and others use for one label an image."""
    if not content.get("annotations"):
        raise UserError(f"{path}: has images without annotations: give the file of training images")
    images = {image["id"]: str(image["file_name"]) for image in content["images"]}
    names = {category["id"]: str(category["name"]) for category in content.get("categories", [])}
    if len(set(names.values())) < len(names):
        names = {}
    for annotation in content["annotations"]:
        number = annotation["category_id"]
        yield Line(images[annotation["image_id"]], names.get(number, str(number)) or None)
