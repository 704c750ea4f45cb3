"""The sources by name, and the small ones: digits and CIFAR-10."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.error import URLError

import numpy as np

from crt.data.arrays import open_arrays
from crt.data.class_folders import open_class_folders
from crt.data.imagenet import open_imagenet
from crt.data.label_files import is_label_file, open_label_file
from crt.data.listing import read_entry, sorted_listing
from crt.data.lmdb import open_lmdb_files
from crt.data.parquet import open_arrow, open_parquet
from crt.data.source import Source, raw_container
from crt.data.tfrecord import open_tfrecords
from crt.data.tree import Tree, open_tree
from crt.data.webdataset import open_webdataset
from crt.errors import UserError
from crt.params import PrepareData

CIFAR10_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
# The official binary version: records of one label byte and 32x32 pixels, channel by channel.
_CIFAR_TRAIN_FILES = [f"data_batch_{number}" for number in range(1, 6)]
_CIFAR_VAL_FILE = "test_batch"
_CIFAR_RECORD_BYTES = 1 + 3 * 32 * 32
_READ_IN_PLACE = {
    "imagenet": open_imagenet,
    "webdataset": open_webdataset,
    "lmdb": open_lmdb_files,
    "tfrecord": open_tfrecords,
}
_READ_WITH_COPIES = {
    "imagefolder": open_class_folders,
    "parquet": open_parquet,
    "arrow": open_arrow,
    "arrays": open_arrays,
}


def open_source(params: PrepareData, work: Path) -> Source:
    """Find the images of the source that the params name.

    Args:
        params: section prepare_data.
        work: folder for what must be decompressed or fetched first; what is already there is used again.

    Raises:
        UserError: the source is missing, empty, incomplete, or not laid out as it must be.
    """
    if params.source == "digits":
        return _open_digits(work)
    path = None if params.path is None else Path(os.path.expanduser(params.path))
    if params.source == "cifar10":
        return _fetch_cifar10(work) if path is None else _open_cifar10(path, work)
    assert path is not None
    if params.source in _READ_IN_PLACE:
        return _READ_IN_PLACE[params.source](path)
    if params.source == "imagefolder" and is_label_file(path):
        return open_label_file(path)
    return _READ_WITH_COPIES[params.source](path, work)


def _open_digits(work: Path) -> Source:
    """scikit-learn's 1,797 handwritten digits, 8x8 pixels of 17 grays."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    gray = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    container, places = raw_container(work / "digits.rgb", [np.repeat(gray[..., None], 3, axis=-1)])
    ids = [f"{label}/{row:04d}" for row, label in enumerate(digits.target)]
    names = [str(digit) for digit in range(10)]
    return Source(names, names, [container], {"all": sorted_listing(ids, digits.target.astype(np.int64), places)})


def _open_cifar10(path: Path, work: Path) -> Source:
    """CIFAR-10 from the official binary version, or from class folders."""
    tree = open_tree(path, "prepare_data.path", work)
    rows = {Path(name).name: row for row, name in enumerate(tree.files)}
    if f"{_CIFAR_VAL_FILE}.bin" in rows or f"{_CIFAR_TRAIN_FILES[0]}.bin" in rows:
        batches = {}
        for name in (*_CIFAR_TRAIN_FILES, _CIFAR_VAL_FILE):
            if f"{name}.bin" not in rows:
                raise UserError(f"{path}: {name}.bin is missing: fetch cifar-10-binary.tar.gz again")
            batches[name] = _read_cifar_batch(tree, rows[f"{name}.bin"])
        return _cifar10_of(batches, work)
    if _CIFAR_TRAIN_FILES[0] in rows:
        raise UserError(
            f"{path}: the python version of CIFAR-10 consists of pickles, which can run code and are not read: "
            "give cifar-10-binary.tar.gz, or set prepare_data.path to null"
        )
    return open_class_folders(path, work, only=CIFAR10_CLASSES)


def _read_cifar_batch(tree: Tree, row: int) -> tuple[np.ndarray, np.ndarray]:
    """(n,) labels and (n, 32, 32, 3) uint8 pixels of one file of the binary version."""
    data = read_entry([tree.container], tree.files[row], tree.places[row])
    assert isinstance(data, bytes)
    records = np.frombuffer(data, np.uint8)
    if not len(records) or len(records) % _CIFAR_RECORD_BYTES:
        raise UserError(f"{tree.name}: {tree.files[row]} holds no whole number of records: fetch the archive again")
    records = records.reshape(-1, _CIFAR_RECORD_BYTES)
    labels = records[:, 0].astype(np.int64)
    if labels.max() >= len(CIFAR10_CLASSES):
        raise UserError(f"{tree.name}: {tree.files[row]} holds label {labels.max()}, CIFAR-10 has 0 to 9")
    return labels, records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)


def _fetch_cifar10(work: Path) -> Source:
    """CIFAR-10 as torchvision fetches and checks it; what is already in `work` is not fetched again."""
    from torchvision.datasets import CIFAR10

    batches = {}
    for name, train in (("train", True), (_CIFAR_VAL_FILE, False)):
        try:
            data = CIFAR10(str(work / "fetched"), train=train, download=True)
        except (URLError, OSError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"cifar10 cannot be fetched ({reason}): check the network, or fetch cifar-10-binary.tar.gz elsewhere "
                "and set prepare_data.path to it"
            ) from None
        batches[name] = np.array(data.targets, np.int64), data.data
    return _cifar10_of(batches, work)


def _cifar10_of(batches: dict[str, tuple[np.ndarray, np.ndarray]], work: Path) -> Source:
    """A source from (labels, pixels) by batch; the test batch is validation, the others are training."""
    container, places = raw_container(work / "cifar10.rgb", [pixels for _, pixels in batches.values()])
    labels = np.concatenate([labels for labels, _ in batches.values()])
    ids = [f"{name}/{row:05d}" for name, (batch_labels, _) in batches.items() for row in range(len(batch_labels))]
    in_val = np.array([name.startswith(_CIFAR_VAL_FILE) for name in ids])
    splits = {
        split: sorted_listing([ids[row] for row in rows], labels[rows], places[rows])
        for split, rows in (("train", np.flatnonzero(~in_val)), ("val", np.flatnonzero(in_val)))
    }
    return Source(CIFAR10_CLASSES, CIFAR10_CLASSES, [container], splits)
