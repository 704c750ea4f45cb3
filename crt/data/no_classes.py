"""Folders that stand where classes do and are something else: splits, pictures beside their masks, parts of one set.

Told by their names and those of their images. Parts are put together; of the rest, what may be classes as well is
noted, and what may not be is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import PurePosixPath
from typing import Any

from crt.data.decode import Undecodable
from crt.data.listing import first_three, printable, read_entry
from crt.data.tree import Tree, is_image
from crt.errors import UserError

_SUFFIX = "(data|images?|set|split)?[ab]?([^a-z].*)?"
_TRAIN = re.compile(f"(.*[^a-z])?train(ing)?{_SUFFIX}")
_HELD_OUT = re.compile(f"(.*[^a-z])?(val(id(ation)?)?|test(ing)?){_SUFFIX}")
_PICTURES = re.compile("(.*[^a-z])?(images?|imgs?)|jpe?gs?|jpegimages|photos?|pictures?")
_ANNOTATIONS = re.compile(
    "annotations?|labels?|(.*[^a-z])?(masks?|anno)|segmentations?|segmentation(class|object)(aug)?|trimaps?|"
    "ground_?truths?|gts?|edges?|depths?"
)
# What numbered parts of one set are called: HAM10000_images_part_1, images_001.
_PART = re.compile("(.*[^a-z])?(images?|imgs?|photos?|pictures?|parts?|batch|chunk|shard)[^a-z]*[0-9]+")
# Images in each numbered part: of FFHQ and StyleGAN's tool, and of img2dataset.
_PART_SIZES = (1000, 10000)
_NUM_BUCKETS = 1000  # folders over which Danbooru's images are spread
ONE_CLASS = "images"
"""The class of images that have none."""
LABEL_FILES = (".csv", ".tsv", ".jsonl", ".json", ".txt", ".lst", ".mat")
"""Endings of files that may hold labels."""
_SURELY_TABLES = (".csv", ".tsv", ".jsonl", ".mat")
STYLEGAN_LABELS = "dataset.json"
# Of files that are looked into for names of images.
_MOST_LISTS = 50
_MOST_LIST_BYTES = 2**26
_HEAD_BYTES = 2**16
_MIN_NAME = 5


def refuse_no_classes(tree: Tree, root: str, by_class: Mapping[str, list[int]]) -> None:
    """Refuse class folders in `root` that are none.

    Args:
        by_class: rows of the tree's images below each of the class folders, of which there are several.

    Raises:
        UserError: as said, with what to do instead.
    """
    names = sorted(by_class)
    shown = f"{tree.name}: folders {first_three([root + name for name in names])}"
    train, held_out = ([name for name in names if kind.fullmatch(name.lower())] for kind in (_TRAIN, _HELD_OUT))
    trained, others = (
        {_inner_folder(tree, row) for name in some for row in by_class[name]} for some in (train, held_out)
    )
    is_alike = not _stems(train).isdisjoint(_stems(held_out) - {""})
    if (
        train
        and held_out
        and (set(names) == {*train, *held_out} or not trained.isdisjoint(others - {None}) or is_alike)
    ):
        raise UserError(
            f"{shown} look like splits: name them train and val; or, if they are the classes, give them other names"
        )
    refuse_annotations(tree, root, names)
    for name, rows in by_class.items():
        inner = {tree.files[row][len(root) + len(name) + 1 :].partition("/")[0] for row in rows}
        if len(inner) > 1 and inner <= set(names) - {name}:
            raise UserError(
                f"{tree.name}: folder {printable(root + name)} holds folders that are called like those beside it, "
                f"{first_three(sorted(inner))}: {tree.unpack_first}move it away, if it is a copy of the data set, or "
                "set prepare_data.path to it"
            )


def _stems(names: Sequence[str]) -> set[str]:
    """What folders are called but for the word of the split."""
    return {re.sub("(train|test)(ing)?|val(id(ation)?)?", "*", name.lower()).strip("*") for name in names}


def lettered_classes(
    tree: Tree, root: str, by_class: Mapping[str, list[int]], notes: list[str]
) -> dict[str, list[int]] | None:
    """Rows by class, where folders are the first letters of the class folders in them, as of SUN397 and Places365.

    A class is called by all folders below its letter: church/indoor. None of other folders.
    """
    if not all(len(name) == 1 for name in by_class):
        return None
    found: dict[str, list[int]] = {}
    for letter, rows in by_class.items():
        for row in rows:
            name = tree.files[row][len(root) + 2 :].rpartition("/")[0]
            if not name.lower().startswith(letter.lower()):
                return None
            found.setdefault(name, []).append(row)
    notes.append(
        f"{tree.name}: folders {first_three([root + name for name in sorted(by_class)])} are the first letters of "
        "those in them, which are the classes"
    )
    return dict(sorted(found.items()))


def without_parts(tree: Tree, root: str, by_class: dict[str, list[int]], notes: list[str]) -> dict[str, list[int]]:
    """Rows by class, those of numbered parts of one set put together: they are one class."""
    if len(by_class) < 2 or not _are_parts(tree, by_class):
        return by_class
    shown = f"{tree.name}: folders {first_three([root + name for name in sorted(by_class)])}"
    parts = f"{shown} hold images whose numbers say which folder they lie in, so they are parts of one set, not classes"
    notes.append(f"{parts}: all are one class; if they are the classes, give them other names")
    return {ONE_CLASS: sorted(row for rows in by_class.values() for row in rows)}


def stylegan_classes(
    tree: Tree, root: str, by_class: dict[str, list[int]], notes: list[str]
) -> dict[str, list[int]] | None:
    """Rows of the images of all classes by the labels that StyleGAN's tool wrote beside them, or None without any.

    Classes are in the order of their numbers.

    Raises:
        UserError: the file cannot be read, or names an image that is not there.
    """
    rows = sorted(row for of_class in by_class.values() for row in of_class)
    names = [tree.files[row] for row in rows]
    above = [f"{folder}/".removeprefix("./") for folder in PurePosixPath(names[0]).parents]
    folder = next((x for x in above if x.startswith(root) and f"{x}{STYLEGAN_LABELS}" in tree.files), None)
    if folder is None or not all(name.startswith(folder) for name in names):
        return None
    path = f"{folder}{STYLEGAN_LABELS}"
    try:
        data = read_entry([tree.container], path, tree.places[tree.files.index(path)])
        assert isinstance(data, bytes)
        labels = stylegan_labels(json.loads(data))
    except (Undecodable, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise UserError(
            f"{tree.name}: {path} cannot be read as labels of StyleGAN's tool: get it again, or remove it"
        ) from None
    if not labels:
        notes.append(f"{tree.name}: {path} has no labels: all images are one class")
        return {ONE_CLASS: rows}
    row_of = dict(zip(names, rows, strict=True))
    if missing := [name for name in labels if folder + name not in row_of]:
        raise UserError(
            f"{tree.name}: {path} names {len(missing)} images that are not there: {first_three(missing)}: get the data "
            "set again, or remove that file"
        )
    found: dict[str, list[int]] = {str(label): [] for label in sorted(map(int, set(labels.values())))}
    for name, label in labels.items():
        found[label].append(row_of[folder + name])
    left = (
        f", and {len(rows) - len(labels)} images that it does not name are left out" if len(rows) > len(labels) else ""
    )
    notes.append(f"{tree.name}: labels are those of {path}{left}")
    return {label: sorted(of_label) for label, of_label in found.items()}


def stylegan_labels(content: Mapping[str, Any]) -> dict[str, str] | None:
    """Whole numbers by image as StyleGAN's tool writes them, or None for images without labels.

    Raises:
        ValueError, LookupError, TypeError, AttributeError: it wrote no such content.
    """
    if content["labels"] is None:
        return None
    labels = dict(content["labels"])
    if not all(isinstance(label, int) and not isinstance(label, bool) for label in labels.values()):
        raise TypeError
    return {name.replace("\\", "/"): str(label) for name, label in labels.items()}


def refuse_annotations(tree: Tree, root: str, names: Sequence[str]) -> None:
    """Refuse folders of pictures and of their masks or other annotations that stand beside each other.

    Raises:
        UserError: as said.
    """
    pictures = [name for name in names if is_pictures(name)]
    drawn = [name for name in names if _ANNOTATIONS.fullmatch(name.lower())]
    if len(pictures) == 1 and drawn and len(names) == 1 + len(drawn):
        first = tree.unpack_first
        raise UserError(
            f"{tree.name}: folders {first_three([root + name for name in names])} look like pictures beside their "
            f"annotations, not like classes: {first}move {drawn[0]} elsewhere, or set prepare_data.path to "
            f"{root}{pictures[0]}; or, if they are the classes, give them other names{labels_elsewhere(tree)}"
        )


def pictures(tree: Tree) -> list[int]:
    """Rows of a tree's images; those in folders called like annotations, such as masks, only if there are no others."""
    rows = [row for row, name in enumerate(tree.files) if is_image(name)]
    return [row for row in rows if not is_annotation(tree.files[row])] or rows


def is_annotation(path: str) -> bool:
    """Whether a path leads through a folder that is called after annotations."""
    return any(_ANNOTATIONS.fullmatch(part.lower()) for part in PurePosixPath(path).parts[:-1])


def is_pictures(name: str) -> bool:
    """Whether a folder is called after what it holds, pictures, so that its name is no class."""
    return bool(_PICTURES.fullmatch(name.lower()))


def labels_elsewhere(tree: Tree) -> str:
    """The end of a refusal: files from which labels may be read, or ""."""
    tables = _tables(tree)
    first = tree.unpack_first
    return f"; or, if labels are in {first_three(tables)}, {first}set prepare_data.path to that file" if tables else ""


def note_labels_beside(tree: Tree, notes: list[str]) -> None:
    """Note files that may hold labels of images which are read as one class."""
    paths = [PurePosixPath(name) for name in tree.files]
    if any(path.suffix.lower() == ".cls" for path in paths):
        notes.append(
            f"{tree.name}: one class, for .cls files are not read: set prepare_data.source to webdataset to have their "
            "labels from the .tar files"
        )
        return
    tables = _tables(tree)
    if tables:
        which = "that file" if len(tables) == 1 else "the one"
        notes.append(
            f"{tree.name}: one class, for {first_three(tables)} {_are(tables)} not read: if labels are in there, "
            f"{tree.unpack_first}set prepare_data.path to {which}"
        )


def note_parts(tree: Tree, classes: Sequence[str], notes: list[str]) -> None:
    """Note classes that are called alike but for their numbers, and like parts of one set."""
    if len({re.sub("[0-9]+", "", name) for name in classes}) > 1 or not all(
        _PART.fullmatch(x.lower()) for x in classes
    ):
        return
    tables = _tables(tree)
    labels = f", or, if labels are in {first_three(tables)}, set prepare_data.path to that file" if tables else ""
    notes.append(
        f"{tree.name}: the classes {first_three(classes)} are called like parts of one set: if they are, "
        f"{tree.unpack_first}put their images into one folder{labels}"
    )


def note_order_of_numbers(tree: Tree, classes: Sequence[str], notes: list[str]) -> None:
    """Note classes called by numbers that are not in the numbers' order."""
    if all(re.fullmatch("[0-9]{1,18}", name) for name in classes):
        index = next((index for index, name in enumerate(sorted(classes, key=int)) if classes[index] != name), None)
        if index is not None:
            notes.append(
                f"{tree.name}: classes are numbered by their folders' names as text: class index {index} is folder "
                f"{classes[index]}; to have them by size, give all names equally many digits"
            )


def _inner_folder(tree: Tree, row: int) -> str | None:
    """The folder right above an image, unless that is a class folder."""
    *_, upper, folder, _ = ["", "", "", *tree.files[row].split("/")]
    return folder if upper else None


def _are_parts(tree: Tree, by_class: Mapping[str, list[int]]) -> bool:
    """Whether each image's number says which folder it lies in.

    As its first digits do, in 01000/01234.png or 00001/img00001234.png, or its last three, in Danbooru's 0234/1234.jpg.
    """
    found: list[tuple[int, int]] = []
    for name, rows in by_class.items():
        if not re.fullmatch("[0-9]{3,5}", name):
            return False
        ends = [re.search(r"([0-9]+)\.[^.]+$", tree.files[row]) for row in rows]
        found += [(int(name), int(end[1]) if end else -1) for end in ends]
    if all(len(name) == 5 for name in by_class):
        return any(
            all(number // size * step == folder for folder, number in found)
            for size in _PART_SIZES
            for step in (1, size)
        )
    numbers = {number for _, number in found}
    # Two images of one number, or none above the folders' own, are classes whose images bear their number.
    return (
        max(numbers) >= _NUM_BUCKETS
        and len(numbers) == len(found)
        and all(number % _NUM_BUCKETS == folder for folder, number in found)
    )


def _tables(tree: Tree) -> list[str]:
    """Files that may hold labels of the tree's images and can be read: tables, and lists that name some of them."""
    paths = [PurePosixPath(name) for name in tree.files if is_image(name)]
    images = {name for path in paths for name in (path.name, path.stem)}
    found, lists = [], 0
    for row, name in enumerate(tree.files):
        path = PurePosixPath(name)
        ending = path.suffix.lower()
        if ending in _SURELY_TABLES or path.name == STYLEGAN_LABELS:
            found.append(name)
        elif ending in LABEL_FILES and lists < _MOST_LISTS and tree.places[row]["size"] <= _MOST_LIST_BYTES:
            lists += 1
            with suppress(Undecodable, UserError):
                data = read_entry([tree.container], name, tree.places[row])
                assert isinstance(data, bytes)
                if "label" in path.stem.lower() or (path.stem not in images and _names_images(data, images)):
                    found.append(name)
    return found


def _names_images(data: bytes, images: set[str]) -> bool:
    """Whether a text names two images in its beginning; short names without an ending may be anything."""
    words = re.split(r"[\s,;:/\"'{}\[\]]+", data[:_HEAD_BYTES].decode("utf-8", "replace"))
    return len({word for word in words if len(word) >= _MIN_NAME and word in images}) > 1


def _are(names: Sequence[str]) -> str:
    return "is" if len(names) == 1 else "are"
