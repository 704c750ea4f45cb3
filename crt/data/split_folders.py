"""Where the class folders of each split lie: folders around them are entered, and splits are told by their names."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import PurePosixPath

from crt.data.listing import first_three
from crt.data.no_classes import is_pictures
from crt.data.other_kinds import ARCHIVES, UNREAD_PICTURES
from crt.data.tree import Tree, is_image
from crt.errors import UserError

# Folders that hold a split, in lower case; of those for validation the first that is there counts.
TRAIN_FOLDERS = ("train", "training")
VAL_FOLDERS = ("val", "valid", "validation", "test", "testing")
# Names that mean a split also where other folders stand beside it, or none.
_PLAIN_TRAIN = ("train",)
_PLAIN_VAL = ("val", "valid", "validation", "test")
# A split's word in a name, before which and behind which others of the set are called the same.
_SPLIT_IN_NAME = re.compile("(.*?)(train(?:ing)?|val(?:id(?:ation)?)?|test(?:ing)?)((?![a-z]).*|images?|set|data)")
# Tiny ImageNet's file beside its folder of validation images: a line of tab-separated values for each, its
# name and its class first.
TINY_IMAGENET_LABELS = "val_annotations.txt"


def split_roots(tree: Tree, notes: list[str]) -> dict[str, str]:
    """Where each split's class folders are, as prefixes of paths.

    Folders that only wrap the whole (archives often have one) are entered. train/ and val/ count as splits
    where no folder with images stands beside them; a class may be called "train".

    Raises:
        UserError: splits with a folder beside them, or validation images without training images.
    """
    root = ""
    while True:
        top = folders_in(tree, root)
        train, val = _named(top, TRAIN_FOLDERS), _named(top, VAL_FOLDERS)
        if not (train or val):
            train, val = _called_alike(_full(tree, root))
        if train and val and top > {*train, *val}:
            top = _without_bare(tree, root, top, [*train, *val], notes)
        if len(train) == 1 and top == {*train, *val} and (val or train == ["train"]):
            if not val:
                notes.append(f"{tree.name}: has {train[0]}/ only: validation images are set aside from it")
                return {"all": f"{root}{train[0]}/"}
            unused = f"; {', '.join(val[1:])} unused" if len(val) > 1 else ""
            notes.append(
                f"{tree.name}: training images are those of {train[0]}/, validation images those of {val[0]}/{unused}"
            )
            roots = {"train": f"{root}{train[0]}/", "val": f"{root}{val[0]}/"}
            return {split: _entered(tree, inner, notes) for split, inner in roots.items()}
        plain = _named(top, _PLAIN_TRAIN) and _named(top, _PLAIN_VAL)
        if plain or (train and val and top == {*train, *val}):
            strange = min(top - {train[0], *val})
            raise UserError(
                f"{tree.name}: folder {root}{strange} beside {train[0]}/ and {val[0]}/: "
                "neither split nor class: move it"
            )
        if top and top <= set(_PLAIN_VAL):
            raise UserError(
                f"{tree.name}: holds {root}{val[0]}/ but no train/: add it, or give the class folders alone"
            )
        inner = _inner_root(tree, root, top, notes)
        if inner is None:
            return {"all": root}
        root = inner


def _entered(tree: Tree, root: str, notes: list[str]) -> str:
    """A split's folder, or the one inside that holds its class folders: some archives have train/train/CLASS."""
    while inner := _inner_root(tree, root, top := folders_in(tree, root), notes):
        root = inner
    name = min(top, default="")
    is_whole = len(top) == 1 and f"{root}{TINY_IMAGENET_LABELS}" not in tree.files
    if is_whole and (is_pictures(name) or name == PurePosixPath(root).name):
        inner = f"{root}{name}/"
        if images_in(tree, inner) and not _full(tree, inner):  # test/test/IMAGE, and Images/IMAGE
            return inner
    return root


def _inner_root(tree: Tree, root: str, top: set[str], notes: list[str]) -> str | None:
    """The folder in `root` that holds the class folders instead, or None."""
    if _wraps(tree, root, top):
        notes.append(f"{tree.name}: class folders are those in {root}{min(top)}/")
        return f"{root}{min(top)}/"
    images = images_in(tree, root)
    full = _folders_of(images)
    if len(full) != 1 or not full < top:
        return None
    (name,) = full
    # Others hold annotations, splits and the like, if they hold files and none is a picture or may hold some.
    others = [file for file in tree.files if file.startswith(root) and not file.startswith(f"{root}{name}/")]
    kept = {file[len(root) :].partition("/")[0] for file in others if "/" in file[len(root) :]}
    is_nested = all("/" in path[len(name) + 1 :] for path in images)
    if not (is_nested or is_pictures(name)) or kept != top - full or any(_may_hold_images(file) for file in others):
        return None
    notes.append(
        f"{tree.name}: {'class folders' if is_nested else 'images'} are those in {root}{name}/; folders without images "
        f"beside it are ignored: {first_three(sorted(kept))}"
    )
    return f"{root}{name}/"


def _may_hold_images(file: str) -> bool:
    return file.lower().endswith((*ARCHIVES, *UNREAD_PICTURES))


def _without_bare(tree: Tree, root: str, top: set[str], splits: Sequence[str], notes: list[str]) -> set[str]:
    """The folders of `root` but those without images, such as annotations, that stand beside its splits."""
    full = {*splits, *_full(tree, root)}
    if bare := sorted(top - full):
        beside = ", ".join(splits)
        notes.append(f"{tree.name}: folders without images beside {beside} are ignored: {first_three(bare)}")
    return top - set(bare)


def _called_alike(folders: set[str]) -> tuple[list[str], list[str]]:
    """Folders of training and of validation images that are called alike otherwise: train2017 and val2017.

    None unless all are such, and one of training images.
    """
    found: dict[str, list[str]] = {}
    for folder in sorted(folders):
        parts = _SPLIT_IN_NAME.fullmatch(folder.lower())
        if parts is None:
            return [], []
        found.setdefault(f"{parts[1]}*{parts[3]}", []).append(folder)
    if len(found) != 1:
        return [], []
    train = [folder for folder in folders if "train" in folder.lower()]
    val = sorted(folders - set(train), key=lambda folder: ("val" not in folder.lower(), folder))
    return (train, val) if len(train) == 1 and val else ([], [])


def _full(tree: Tree, root: str) -> set[str]:
    """The folders right in `root` that hold images."""
    return _folders_of(images_in(tree, root))


def _folders_of(images: Sequence[str]) -> set[str]:
    """The uppermost folders on the paths of images."""
    return {name.partition("/")[0] for name in images if "/" in name}


def _named(folders: set[str], names: Sequence[str]) -> list[str]:
    """Those of `folders` that have one of `names`, upper case or lower, in the order of `names`."""
    return sorted(
        (folder for folder in folders if folder.lower() in names),
        key=lambda folder: (names.index(folder.lower()), folder),
    )


def _wraps(tree: Tree, root: str, top: set[str]) -> bool:
    """Whether `root` holds a single folder, without images of its own, in which the class folders or splits are.

    Several folders in it are taken for that. One alone may as well be a part of a single class, so that folders
    deeper in must all hold images to be taken for classes.
    """
    folders, inner, is_nested = top, root, False
    while len(folders) == 1:
        inner += min(folders) + "/"
        folders, images = folders_in(tree, inner), images_in(tree, inner)
        if any("/" not in name for name in images):
            return False
        if len(folders) > 1:
            return not is_nested or folders == {name.partition("/")[0] for name in images}
        if _named(folders, TRAIN_FOLDERS):
            return True
        is_nested = True
    return False


def folders_in(tree: Tree, root: str) -> set[str]:
    """Names of the folders that lie right in `root`."""
    return {name[len(root) :] for name in tree.folders if name.startswith(root) and "/" not in name[len(root) :]}


def images_in(tree: Tree, root: str) -> list[str]:
    """Paths of all image files below `root`, relative to it."""
    return [name[len(root) :] for name in tree.files if name.startswith(root) and is_image(name)]
