"""Folders that stand where classes do and are something else: splits, pictures beside their masks, parts of one set.

Told by their names and those of their images. Parts are put together; of the rest, what may be classes as well is
noted, and what may not be is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath

from crt.data.listing import first_three
from crt.data.tree import Tree
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
LABEL_FILES = (".csv", ".tsv", ".jsonl")
"""Endings of tables that may hold labels."""
STYLEGAN_LABELS = "dataset.json"


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
    if train and held_out and (set(names) == {*train, *held_out} or not trained.isdisjoint(others - {None})):
        raise UserError(
            f"{shown} look like splits: name them train and val; or, if they are the classes, give them other names"
        )
    refuse_annotations(tree, root, names)


def without_parts(tree: Tree, root: str, by_class: dict[str, list[int]], notes: list[str]) -> dict[str, list[int]]:
    """Rows by class, those of numbered parts of one set put together: they are one class.

    Raises:
        UserError: a file beside them may have labels.
    """
    if len(by_class) < 2 or not _are_parts(tree, by_class):
        return by_class
    shown = f"{tree.name}: folders {first_three([root + name for name in sorted(by_class)])}"
    parts = f"{shown} hold images whose numbers say which folder they lie in, so they are parts of one set, not classes"
    labels = f"{root}{STYLEGAN_LABELS}"
    if labels in tree.files:
        first = tree.unpack_first
        raise UserError(f"{parts}: {first}set prepare_data.path to its {labels} to read labels, or remove that file")
    notes.append(f"{parts}: all are one class; if they are the classes, give them other names")
    return {ONE_CLASS: sorted(row for rows in by_class.values() for row in rows)}


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
            f"{root}{pictures[0]}; or, if they are the classes, give them other names"
        )


def is_pictures(name: str) -> bool:
    """Whether a folder is called after what it holds, pictures, so that its name is no class."""
    return bool(_PICTURES.fullmatch(name.lower()))


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
    matlab = [str(path) for path in paths if path.suffix.lower() == ".mat"]
    if tables:
        first = tree.unpack_first
        notes.append(
            f"{tree.name}: one class, for {first_three(tables)} {_are(tables)} not read: if labels are in there, "
            f"{first}set prepare_data.path to that file"
        )
    elif matlab:
        notes.append(
            f"{tree.name}: one class, for {first_three(matlab)} {_are(matlab)} not read: if labels are in there, put "
            "images into a folder for each class, or write a .csv file with the columns filename and label"
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
    """Files that may hold labels and can be read."""
    return [
        name for name in tree.files if name.lower().endswith(LABEL_FILES) or PurePosixPath(name).name == STYLEGAN_LABELS
    ]


def _are(names: Sequence[str]) -> str:
    return "is" if len(names) == 1 else "are"
