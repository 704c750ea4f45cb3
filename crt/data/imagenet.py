"""ImageNet (ILSVRC2012), as downloaded or extracted, from its own site, from Kaggle or from the Hugging Face Hub.

The folder holds, for training, `ILSVRC2012_img_train.tar` (a tar of one tar per class) or `train/CLASS/*.JPEG`;
for validation `ILSVRC2012_img_val.tar`, or `val/` with class folders, or flat. Flat images are labelled by the
WordNet id in their names, which the Hub's have; else, for validation, by the development kit,
`ILSVRC2012_devkit_t12.tar.gz` or its extracted folder, or by Kaggle's `LOC_val_solution.csv`. Classes are
numbered by sorted WordNet id, as in published models; the kit's own numbers differ.
"""

from __future__ import annotations

import csv
import io
import os
import posixpath
import re
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from crt import interrupt
from crt.data.archives import archive_kind, list_tar, tar_members
from crt.data.class_folders import (
    check_classes,
    check_val_classes,
    images_by_class,
    listing_by_class,
    listing_of,
)
from crt.data.listing import PLACE, Container, Listing, printable, sorted_listing
from crt.data.source import Source
from crt.data.synsets import class_names, imagenet_names
from crt.data.tree import Tree, folder_tree, is_clutter, is_image
from crt.errors import UserError
from crt.progress import Progress

TRAIN_ARCHIVE = "ILSVRC2012_img_train.tar"
VAL_ARCHIVE = "ILSVRC2012_img_val.tar"
DEVKIT_ARCHIVE = "ILSVRC2012_devkit_t12.tar.gz"
GROUND_TRUTH = "data/ILSVRC2012_validation_ground_truth.txt"
META = "data/meta.mat"
KAGGLE_LABELS = "LOC_val_solution.csv"
_KAGGLE_TREE = Path("ILSVRC/Data/CLS-LOC")  # below the folder of those labels


def open_imagenet(folder: Path) -> Source:
    """ImageNet in a folder; see the module's description for what it must hold.

    Raises:
        UserError: something is missing or damaged, and the message says what; or there is an unknown class.
    """
    if not folder.is_dir():
        state = "is not a folder" if folder.exists() else "not found"
        raise UserError(f"{folder}: {state}: set prepare_data.path to the folder that holds {TRAIN_ARCHIVE} or train/")
    if not any((folder / name).exists() for name in (TRAIN_ARCHIVE, "train")) and (folder / _KAGGLE_TREE).is_dir():
        folder /= _KAGGLE_TREE
    notes: list[str] = []
    classes, train, train_container = _open_train(folder, notes)
    val, val_container = _open_val(folder, classes, notes)
    val.places["container"] = 1
    return Source(classes, class_names(classes), [train_container, val_container], {"train": train, "val": val}, notes)


def _open_train(folder: Path, notes: list[str]) -> tuple[list[str], Listing, Container]:
    archive = folder / TRAIN_ARCHIVE
    if archive.is_file():
        _require_tar(archive)
        ids, folders, places = _list_tar_of_tars(archive)
        classes = sorted(set(folders))
        check_classes(str(archive), classes, list(imagenet_names()))
        labels = np.searchsorted(np.array(classes), np.array(folders)).astype(np.int64)
        return classes, sorted_listing(ids, labels, places), Container(str(archive), "tar")
    if not (folder / "train").is_dir():
        raise UserError(f"{folder}: holds neither {TRAIN_ARCHIVE} nor train/: put one of them there")
    tree = _below(folder, "train")
    by_class = _images_by_name(tree) if tree.folders == {"train"} else images_by_class(tree, "train/", notes)
    classes = sorted(by_class)
    check_classes(f"{folder}/train", classes, list(imagenet_names()))
    return classes, listing_by_class(tree, by_class, classes), tree.container


def _open_val(folder: Path, classes: list[str], notes: list[str]) -> tuple[Listing, Container]:
    archive = folder / VAL_ARCHIVE
    if archive.is_file():
        _require_tar(archive)
        members, _ = list_tar(archive, str(archive))
        files = sorted(name for name in members if is_image(name) and not is_clutter(name))
        modified = archive.stat().st_mtime_ns
        places = np.array([(0, *members[name], modified) for name in files], PLACE)
        tree = Tree(str(archive), Container(str(archive), "tar"), [f"val/{name}" for name in files], places, set())
        return _flat_val(folder, tree, classes, notes), tree.container
    if not (folder / "val").is_dir():
        raise UserError(f"{folder}: holds neither {VAL_ARCHIVE} nor val/: put one of them there")
    tree = _below(folder, "val")
    if tree.folders == {"val"}:
        return _flat_val(folder, tree, classes, notes), tree.container
    by_class = images_by_class(tree, "val/", notes)
    check_classes(f"{folder}/val", sorted(by_class), list(imagenet_names()))
    check_val_classes(str(folder), classes, sorted(by_class), notes)
    return listing_by_class(tree, by_class, classes), tree.container


def _images_by_name(tree: Tree) -> dict[str, list[int]]:
    """Rows of training images that lie in no class folder, by the WordNet id in their names."""
    found: dict[str, list[int]] = {}
    for row, name in enumerate(tree.files):
        if is_image(name):
            wnid = _class_in_name(name)
            if wnid is None:
                raise UserError(
                    f"{tree.name}: {printable(name)} lies in no class folder, and its name has no WordNet id: put "
                    "training images into a folder for each class (n01440764, ...)"
                )
            found.setdefault(wnid, []).append(row)
    if not found:
        raise UserError(f"{tree.name}/train: holds no images: put training images there, or {TRAIN_ARCHIVE} beside it")
    return found


def _class_in_name(name: str) -> str | None:
    """n01440764 of n01440764_10026_n01440764.JPEG and of ILSVRC2012_val_00000293_n01440764.JPEG."""
    found = re.search(r"(?:^|_)(n\d{8})[_.]", Path(name).name)
    return found[1] if found else None


def _flat_val(folder: Path, tree: Tree, classes: list[str], notes: list[str]) -> Listing:
    """Validation images without class folders, labelled by their names, or by what came with them."""
    index = {name: label for label, name in enumerate(classes)}
    rows = [row for row, name in enumerate(tree.files) if is_image(name)]
    if not rows:
        raise UserError(f"{tree.name}: holds no validation images: fetch it again")
    names = [tree.files[row] for row in rows]
    wnids = [_class_in_name(name) for name in names]
    if None in wnids:
        labels_file, truth = _validation_classes(folder)
        for place, name in enumerate(names):
            number = re.search(r"_(\d{8})\.\w+$", name)
            wnids[place] = wnids[place] or truth.get(int(number[1]) if number else 0)
            if wnids[place] is None:
                raise UserError(
                    f"{tree.name}: {printable(name)} is not a validation image that {labels_file} labels "
                    f"(ILSVRC2012_val_00000001.JPEG to {len(truth):08d}): remove it"
                )
        if len(rows) < len(truth):
            notes.append(f"{tree.name}: has {len(rows)} of the {len(truth)} validation images")
    seen = [wnid for wnid in wnids if wnid is not None]
    check_val_classes(str(folder), classes, sorted(set(seen)), notes)
    return listing_of(tree, rows, [index.get(wnid, -1) for wnid in seen])


def _require_tar(archive: Path) -> None:
    if archive_kind(archive) != "tar":
        raise UserError(f"{archive}: compressed, or no tar: put it there as it was downloaded")


def _below(folder: Path, name: str) -> Tree:
    """The tree of one subfolder, with paths from `folder`."""
    tree = folder_tree(folder / name)
    files, folders = [f"{name}/{file}" for file in tree.files], {name, *(f"{name}/{inner}" for inner in tree.folders)}
    return Tree(str(folder), Container(str(folder), "folder"), files, tree.places, folders)


def _list_tar_of_tars(path: Path) -> tuple[list[str], list[str], np.ndarray]:
    """Ids, class folders and places of the training archive's images, in the archive's order."""
    ids: list[str] = []
    folders: list[str] = []
    entries: list[tuple[int, int, int, int, int]] = []
    with open(path, "rb") as outer, open(path, "rb") as inner:
        state = os.fstat(outer.fileno())
        end = state.st_size
        progress = Progress(f"reading {path.name}", max(end >> 20, 1), "MiB")
        for member in tar_members(outer, 0, end, str(path)):
            name = Path(member.name)
            if not (member.isreg() and name.suffix == ".tar") or is_clutter(posixpath.normpath(member.name)):
                continue
            before, stop = len(ids), member.offset_data + member.size
            for image in tar_members(inner, member.offset_data, stop, f"{path}: {member.name}"):
                if image.isreg() and is_image(image.name) and not is_clutter(posixpath.normpath(image.name)):
                    ids.append(f"train/{name.stem}/{Path(image.name).name}")
                    folders.append(name.stem)
                    entries.append((0, image.offset_data, image.size, -1, state.st_mtime_ns))
            if len(ids) == before:
                raise UserError(f"{path}: {member.name} holds no images: fetch the archive again")
            progress.update(min(stop >> 20, progress.total - 1))
            interrupt.raise_if_stopped()
        progress.update(progress.total)
    if not ids:
        raise UserError(f"{path}: holds no class archives (nXXXXXXXX.tar): fetch it again")
    return ids, folders, np.array(entries, PLACE)


def _validation_classes(folder: Path) -> tuple[str, dict[int, str]]:
    """The file that labels the validation images, and the WordNet id of each by its number."""
    kaggle = _kaggle_labels(folder)
    if kaggle is not None:
        return str(kaggle), _read_kaggle_labels(kaggle)
    truth, meta = (_read_devkit(folder, name) for name in (GROUND_TRUTH, META))
    wnids = _wnid_by_number(meta, folder)
    try:
        classes = [wnids[int(line)] for line in truth.decode("ascii").split()]
    except (ValueError, KeyError):
        raise UserError(f"{folder}: {GROUND_TRUTH} names a class that {META} lacks: fetch the devkit again") from None
    return GROUND_TRUTH, dict(enumerate(classes, start=1))


def _kaggle_labels(folder: Path) -> Path | None:
    """Kaggle's labels, in the folder or where its download has them, or None."""
    places = [folder]
    if folder.resolve().parts[-3:] == _KAGGLE_TREE.parts:
        places.append(folder.resolve().parents[2])
    return next((place / KAGGLE_LABELS for place in places if (place / KAGGLE_LABELS).is_file()), None)


def _read_kaggle_labels(path: Path) -> dict[int, str]:
    """WordNet id by the number of the validation image: lines of a name and, after a comma, an id with its boxes."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            lines = csv.DictReader(file)
            found = {int(line["ImageId"].rpartition("_")[2]): line["PredictionString"].split()[0] for line in lines}
    except (OSError, ValueError, LookupError, AttributeError, TypeError, csv.Error):
        raise UserError(f"{path}: damaged: fetch it again") from None
    if not found or not all(re.fullmatch(r"n\d{8}", wnid) for wnid in found.values()):
        raise UserError(f"{path}: does not label images by WordNet ids: fetch it again")
    return found


def _read_devkit(folder: Path, name: str) -> bytes:
    """One file of the development kit, from its archive or its extracted folder."""
    archive, extracted = folder / DEVKIT_ARCHIVE, folder / DEVKIT_ARCHIVE.removesuffix(".tar.gz")
    for base in (extracted, folder / "devkit", folder):
        if (base / name).is_file():
            return (base / name).read_bytes()
    if not archive.is_file():
        where = f"{extracted}/{name}" if extracted.is_dir() else archive
        raise UserError(
            f"{where}: not found: the validation images are labelled by it, or by Kaggle's {KAGGLE_LABELS}: "
            "put one of them there"
        )
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for member in tar:
                if member.isreg() and f"/{member.name}".endswith(f"/{name}"):
                    content = tar.extractfile(member)
                    assert content is not None
                    return content.read()
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        if isinstance(error, PermissionError):
            raise UserError(f"{archive}: cannot be read ({error.strerror}): make it readable and run again") from None
        raise UserError(f"{archive}: damaged: fetch it again") from None
    raise UserError(f"{archive}: holds no {name}: fetch it again")


def _wnid_by_number(meta: bytes, folder: Path) -> dict[int, str]:
    """WordNet id by the kit's own class number, from its MATLAB table of synsets."""
    from scipy.io import loadmat

    try:
        synsets: Any = np.atleast_1d(loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"])
        return {int(entry["ILSVRC2012_ID"]): str(entry["WNID"]) for entry in synsets}
    except Exception:  # a damaged file may make the reader raise anything
        raise UserError(f"{folder}: {META} of the devkit is damaged: fetch it again") from None
