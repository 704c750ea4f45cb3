"""Images in class folders: `CLASS/.../IMAGE`, or the same below train/ and val/ (or test/, or similar names).

A class folder's own folders are walked; its name is the class. Classes are numbered in the order of
their folders' names. A folder of images alone, without folders, is one class. Tiny ImageNet's validation
images, which lie in one folder, have their classes from the file beside it.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from crt.data.decode import Undecodable
from crt.data.listing import Listing, first_three, printable, read_entry, sorted_listing
from crt.data.no_classes import (
    LABEL_FILES,
    ONE_CLASS,
    STYLEGAN_LABELS,
    is_pictures,
    labels_elsewhere,
    lettered_classes,
    note_labels_beside,
    note_order_of_numbers,
    note_parts,
    refuse_annotations,
    refuse_no_classes,
    stylegan_classes,
    without_parts,
)
from crt.data.other_kinds import ARCHIVES, UNREAD_PICTURES, read_otherwise
from crt.data.source import Source
from crt.data.split_folders import TINY_IMAGENET_LABELS, TRAIN_FOLDERS, folders_in, images_in, split_roots
from crt.data.synsets import class_names
from crt.data.tree import EXTENSIONS, Tree, is_image, open_tree
from crt.errors import UserError

# Further names that are given to splits: train2017, training_set, devset, eval-images.
_LIKE_SPLIT = re.compile(
    "(train(ing)?|val(id(ation)?)?|test(ing)?|dev(el(opment)?)?|eval(uation)?)(data|images?|set|split)?([^a-z].*)?"
)
# Endings of files in which labels may be, and which are not read.
_LISTS = (".xml", ".xls", ".xlsx", ".ods")
# Of StyleGAN's tool, which puts a thousand images into each.
_TOOLS_FOLDER = re.compile("[0-9]{5}")


def open_class_folders(path: Path, work: Path, only: Sequence[str] | None = None) -> Source:
    """A folder or archive of class folders.

    Args:
        path: the folder or archive.
        work: see `crt.data.tree.open_tree`.
        only: the class folders that may be there; None: any.

    Raises:
        UserError: it is missing, damaged, empty, or laid out otherwise; class folders look like splits; or
            validation has a class that training lacks.
    """
    if os.path.isfile(path) and not path.name.lower().endswith(ARCHIVES):
        if path.suffix.lower() in _LISTS:
            raise UserError(
                f"{path}: labels are read from {', '.join(LABEL_FILES)} files alone: write it as one, with the columns "
                "filename and label"
            )
        if other := read_otherwise([path.name]):
            raise UserError(f"{path}: no folder or archive of image files: {other}")
    tree = open_tree(path, "prepare_data.path", work)
    if not tree.files and not tree.folders:
        raise UserError(f"{path}: empty: put images there, or set prepare_data.path to the folder that holds them")
    outside = next((name for name in tree.files if "/" not in name and is_image(name)), None)
    if outside is not None and (only is not None or any("/" in name and is_image(name) for name in tree.files)):
        raise _outside(tree, outside)
    notes: list[str] = []
    roots = split_roots(tree, notes)
    found: dict[str, dict[str, list[int]]] = {}
    for split, root in roots.items():
        sorted_already = split == "val" and not folders_in(tree, root).isdisjoint(found["train"])
        if split == "val" and not sorted_already and f"{root}{TINY_IMAGENET_LABELS}" in tree.files:
            found[split] = _annotated_images(tree, root)
        else:
            # Validation images without classes belong to training images without classes.
            may_be_flat = only is None and (split != "val" or list(found["train"]) == [ONE_CLASS])
            if split == "val" and not may_be_flat:
                _refuse_flat_val(tree, root, roots["train"])
            by_class = images_by_class(tree, root, notes, may_be_flat=may_be_flat)
            found[split] = by_class if only is not None else without_parts(tree, root, by_class, notes)
    told = None if only is not None else _told_classes(tree, roots, found, notes)
    found = told or found
    root, by_class = next((roots[split], found[split]) for split in ("train", "all") if split in found)
    classes = list(by_class) if told else sorted(by_class)
    if only is not None:
        check_classes(tree.name, classes, only)
    if not told and len(classes) == 1:
        _note_inner_folders(tree, root, classes[0], notes)
        note_labels_beside(tree, notes)
    elif not told and only is None:
        refuse_no_classes(tree, root, by_class)
        _note_upper_folders(tree, root, by_class, notes)
        note_order_of_numbers(tree, classes, notes)
        note_parts(tree, classes, notes)
    if "val" in found:
        check_val_classes(tree.name, classes, sorted(found["val"]), notes)
    splits = {split: listing_by_class(tree, by_class, classes) for split, by_class in found.items()}
    return Source(classes, class_names(classes), [tree.container], splits, notes)


def _told_classes(
    tree: Tree, roots: Mapping[str, str], found: Mapping[str, dict[str, list[int]]], notes: list[str]
) -> dict[str, dict[str, list[int]]] | None:
    """By split, rows by class in the classes' order, where what is found tells surely that they are not the folders."""
    # Folders of the tool's kind, also where their images do not bear its numbers.
    may_be_parts = all(len(by_class) == 1 or all(map(_TOOLS_FOLDER.fullmatch, by_class)) for by_class in found.values())
    told, said = {}, list[str]()
    for split, by_class in found.items():
        classes = (stylegan_classes if may_be_parts else lettered_classes)(tree, roots[split], by_class, said)
        if classes is None:
            return None
        told[split] = classes
    notes += said
    return told


def listing_by_class(tree: Tree, by_class: dict[str, list[int]], classes: Sequence[str]) -> Listing:
    """A listing of the files that `images_by_class` found; labels are places in `classes`."""
    rows = [row for name in classes for row in by_class.get(name, [])]
    return listing_of(tree, rows, [label for label, name in enumerate(classes) for _ in by_class.get(name, [])])


def listing_of(tree: Tree, rows: Sequence[int], labels: Sequence[int]) -> Listing:
    """A listing of the files at `rows` of a tree."""
    places = tree.places[np.array(rows, np.int64)]
    return sorted_listing([tree.files[row] for row in rows], np.array(labels, np.int64), places)


def images_by_class(tree: Tree, root: str, notes: list[str], *, may_be_flat: bool = False) -> dict[str, list[int]]:
    """Rows of the image files below each class folder of `root` (empty, or ending in `/`).

    With `may_be_flat`, images that lie there without class folders are one class.

    Raises:
        UserError: an image lies outside the class folders, one of which is empty; or there is no image.
    """
    where = f"{tree.name}/{root}" if root else tree.name
    found: dict[str, list[int]] = {name: [] for name in folders_in(tree, root)}
    outside: list[int] = []
    ignored: Counter[str] = Counter()
    for row, name in enumerate(tree.files):
        if not name.startswith(root):
            continue
        if not is_image(name):
            if PurePosixPath(name).name == STYLEGAN_LABELS:
                continue  # looked at where it may count
            ignored[PurePosixPath(name).suffix.lower() or "no extension"] += 1
            continue
        folder, inner, _ = name[len(root) :].partition("/")
        (found[folder] if inner else outside).append(row)
    if outside and (not may_be_flat or any(found.values())):
        raise _outside(tree, tree.files[outside[0]])
    if outside:
        found = {ONE_CLASS: outside}
        notes.append(f"{where}: holds no class folders: its images are one class")
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(ignored.items()))
    if not any(found.values()):
        hint = read_otherwise([name for name in tree.files if name.startswith(root)])
        hint = tree.unpack_first + hint if hint.startswith("set prepare_data.") else hint
        if not hint and "no extension" in ignored:
            hint = f"if those without one are images, give their names an extension, such as {EXTENSIONS[0]}"
        raise UserError(
            f"{where}: holds no images ({', '.join(EXTENSIONS)}){kinds and f', but {kinds}'}: add some, "
            f"or set prepare_data.path to the folder that holds them{hint and f', or {hint}'}"
        )
    empty = sorted(name for name, rows in found.items() if not rows)
    if empty:
        full = {name: rows for name, rows in found.items() if rows}
        refuse_no_classes(tree, root, full)  # what it tells to do often makes an empty folder no matter
        raise UserError(
            f"{tree.name}: class folder {printable(root + empty[0])} holds no images ({', '.join(EXTENSIONS)}): "
            f"add some, or move the folder away{_deeper(tree, root, full)}{labels_elsewhere(tree)}"
        )
    if ignored:
        unread = [kind for kind in sorted(ignored) if kind in UNREAD_PICTURES]
        remedy = f"; convert {', '.join(unread)} to PNG or JPEG to have them read" if unread else ""
        notes.append(f"{where}: files without an image's file name are ignored: {kinds}{remedy}")
    return found


def _annotated_images(tree: Tree, root: str) -> dict[str, list[int]]:
    """Rows of the image files below `root` by the class that the file of annotations gives them.

    Raises:
        UserError: a line without a class, or an image without a line.
    """
    name = f"{root}{TINY_IMAGENET_LABELS}"
    try:
        data = read_entry([tree.container], name, tree.places[tree.files.index(name)])
    except Undecodable as error:
        raise UserError(f"{tree.name}: {name} cannot be read ({error}): get the data set again") from None
    assert isinstance(data, bytes)
    classes: dict[str, str] = {}
    for number, line in enumerate(data.decode("utf-8", errors="replace").splitlines(), 1):
        if not line.strip():
            continue
        image, _, rest = line.partition("\t")
        classes[image] = rest.partition("\t")[0].strip()
        if not classes[image]:
            raise UserError(f"{tree.name}: {name}: line {number} gives no class: get the data set again")
    found: dict[str, list[int]] = {}
    for row, path in enumerate(tree.files):
        if path.startswith(root) and is_image(path):
            image = PurePosixPath(path).name
            if image not in classes:
                raise UserError(f"{tree.name}: {name} gives {path} no class: get the data set again")
            found.setdefault(classes[image], []).append(row)
    return found


def _deeper(tree: Tree, root: str, full: dict[str, list[int]]) -> str:
    """A further remedy, where the one folder with images holds folders: downloads often put others beside it."""
    name, *others = full
    is_nested = all("/" in path for path in _below_class(tree, root, name, full[name]))
    if others or not (is_nested or is_pictures(name)):
        return ""
    why = "if the class folders are in there" if is_nested else "whose images are then one class"
    return f"; or {tree.unpack_first}set prepare_data.path to its folder {root}{name}, {why}"


def _refuse_flat_val(tree: Tree, root: str, train: str) -> None:
    """Refuse validation images without class folders beside training images with them: the test images of a contest.

    Raises:
        UserError: as said.
    """
    images = images_in(tree, root)
    if not images and not read_otherwise([name for name in tree.files if name.startswith(root)]):
        raise UserError(
            f"{tree.name}: {root} holds no images: add some, or remove it: validation images are then set aside from "
            f"{train}"
        )
    if images and not any("/" in name for name in images):
        raise UserError(
            f"{tree.name}: {root} holds images without class folders: give it class folders, or remove it: "
            f"validation images are then set aside from {train}"
        )


def _outside(tree: Tree, name: str) -> UserError:
    shown = printable(name)
    return UserError(f"{tree.name}: image {shown} lies outside the class folders: move it into one, or delete it")


def check_classes(name: str, classes: Sequence[str], known: Sequence[str]) -> None:
    """Refuse class folders other than those that a source has."""
    strange = sorted(set(classes) - set(known))
    if strange:
        raise UserError(
            f"{name}: folder {strange[0]} is not a class of this source ({known[0]} to {known[-1]}): "
            "remove it, or set prepare_data.source to imagefolder"
        )


def check_val_classes(name: str, classes: Sequence[str], val_classes: Sequence[str], notes: list[str]) -> None:
    """Refuse validation classes without training images; note classes without validation images."""
    strange = sorted(set(val_classes) - set(classes))
    if strange:
        shown, other = printable(strange[0]), ""
        if set(classes).isdisjoint(val_classes):
            other = "; or, as no class has both, if they are no classes, put all images of each split into one folder"
        raise UserError(f"{name}: class {shown} has validation images, but no training images: add some{other}")
    missing = sorted(set(classes) - set(val_classes))
    if missing:
        what = "1 class has" if len(missing) == 1 else f"{len(missing)} classes have"
        notes.append(f"{name}: {what} no validation images: {first_three(missing)}")


def _note_inner_folders(tree: Tree, root: str, name: str, notes: list[str]) -> None:
    """Note where the classes may be instead, if the images of a data set's one class lie in several folders of it."""
    inner, folders = root, [name]
    while len(folders) == 1:
        inner += folders[0] + "/"
        folders = sorted({image.partition("/")[0] for image in images_in(tree, inner) if "/" in image})
    if folders:
        refuse_annotations(tree, inner, folders)
        first = tree.unpack_first
        notes.append(
            f"{tree.name}: one class {name}, which holds folders {first_three(folders)}: "
            f"{first}set prepare_data.path to its folder {inner[:-1]} if those are the classes"
        )


def _note_upper_folders(tree: Tree, root: str, by_class: dict[str, list[int]], notes: list[str]) -> None:
    """Note classes that may be splits, or whose own folders may be the classes, since all images lie in those.

    Raises:
        UserError: such class folders look like splits, by their names or since all hold the same folders.
    """
    like_split = [name for name in sorted(by_class) if _LIKE_SPLIT.fullmatch(name.lower())]
    below = {name: _below_class(tree, root, name, rows) for name, rows in by_class.items()}
    flat = [name for name, paths in below.items() if not all("/" in path for path in paths)]
    if flat:
        if len(like_split) == len(by_class):
            shown = ", ".join(map(printable, like_split))
            notes.append(f"{tree.name}: the classes are {shown}: if those are splits, name them train and val")
        elif set(flat) <= set(like_split):
            notes.append(
                f"{tree.name}: class {printable(flat[0])} may be a split, since other folders hold folders of images: "
                "if it is, move it away"
            )
        return
    inner = {name: {path.partition("/")[0] for path in paths} for name, paths in below.items()}
    several = sorted(set().union(*inner.values()))
    while len(several) == 1 and all(path.count("/") > 1 for paths in below.values() for path in paths):
        below = {name: [path.partition("/")[2] for path in paths] for name, paths in below.items()}
        inner = {name: {path.partition("/")[0] for path in paths} for name, paths in below.items()}
        several = sorted(set().union(*inner.values()))
    names, inside = (first_three(some) for some in (sorted(inner), several))
    is_alike = all(folders == set(several) for folders in inner.values())
    is_in_split = PurePosixPath(root).name.lower() in TRAIN_FOLDERS
    if not is_in_split and (len(like_split) > 1 or (len(several) > 1 and (like_split or is_alike))):
        raise UserError(
            f"{tree.name}: folders {names} look like splits, since their images lie in folders {inside} of each: "
            "name them train and val; or, if they are the classes, move their images out of their inner folders; or, "
            f"if they are versions of one set, {tree.unpack_first}set prepare_data.path to one, such as "
            f"{root}{min(inner)}"
        )
    if len(several) > 1:  # one name alone, such as images, tells nothing
        notes.append(
            f"{tree.name}: the classes are the {len(inner)} upper folders {names}, whose images lie in folders "
            f"{inside}: to have the inner ones, put those into one folder and set prepare_data.path to it"
        )


def _below_class(tree: Tree, root: str, name: str, rows: Sequence[int]) -> list[str]:
    """Paths of a class folder's images, relative to it."""
    return [tree.files[row][len(root) + len(name) + 1 :] for row in rows]
