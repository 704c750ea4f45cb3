"""LMDB files of images, as LSUN is published: each value is an image file.

A data set is one file (`data.mdb` in a folder of its own, or NAME.lmdb), or a folder of several. The path to a file
names its split (`bedroom_train_lmdb/data.mdb`), and what else it says is the class: LSUN has one per scene or object.
Images are read where they lie.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np

from crt import interrupt
from crt.data.listing import PLACE, Container, open_lmdb, printable
from crt.data.other_kinds import read_otherwise
from crt.data.shards import listings_by_label, splits_of_shards
from crt.data.source import Source
from crt.data.synsets import class_names
from crt.data.tree import folder_tree
from crt.errors import UserError
from crt.progress import Progress

_DATA = "data.mdb"
_LOCK = "lock.mdb"
_NOT_A_CLASS = re.compile(r"(?<![a-z])(train(ing)?|val(id(ation)?)?|test(ing)?|lmdb|mdb|data)(?![a-z])", re.IGNORECASE)


def open_lmdb_files(path: Path) -> Source:
    """The images of one LMDB file, or of those in a folder.

    Raises:
        UserError: there is none, one is damaged or cut short, or only some name a class or a split.
    """
    notes: list[str] = []
    folder, files = _files(path)
    split_of = splits_of_shards(folder, files, notes)
    used = [name for name in files if split_of[name]]
    samples: dict[str, list[tuple[str, str | None]]] = {split: [] for split in sorted(set(split_of.values()) - {""})}
    places: dict[str, list[np.ndarray]] = {split: [] for split in samples}
    containers = []
    for number, name in enumerate(used):
        keys, sizes = _entries(folder / name)
        if not keys:
            raise UserError(f"{printable(str(folder / name))}: holds no images: fetch it again, or move it away")
        containers.append(Container(str(folder / name), "lmdb"))
        label = _class_of(folder, name)
        samples[split_of[name]] += [(f"{name}/{key}", label) for key in keys]
        of_file = np.zeros(len(keys), PLACE)
        of_file["container"], of_file["size"], of_file["crc"] = number, sizes, -1
        of_file["offset"] = len(f"{name}/")
        of_file["modified"] = os.stat(folder / name).st_mtime_ns
        places[split_of[name]].append(of_file)
    classes, listings = listings_by_label(folder, samples, places, "a folder named after the class", notes)
    return Source(classes, class_names(classes), containers, listings, notes)


def _files(path: Path) -> tuple[Path, list[str]]:
    """A folder, and the LMDB files in it."""
    if path.is_file():
        return path.parent, [path.name]
    if not path.is_dir():
        raise UserError(f"{path}: not found: set prepare_data.path to an LMDB file, or to the folder of some")
    files = folder_tree(path).files
    found = [name for name in files if name.lower().endswith((".mdb", ".lmdb")) and Path(name).name != _LOCK]
    if not found:
        other = "unpack the archives in it first" if any(name.endswith(".zip") for name in files) else ""
        other = other or read_otherwise(files)
        raise UserError(
            f"{path}: holds no LMDB files ({_DATA} or NAME.lmdb): give the folder that does{other and f', or {other}'}"
        )
    return path, found


def _class_of(folder: Path, name: str) -> str | None:
    """What the path to a file says besides its split: the part that says it most closely; None for nothing."""
    for part in (*reversed(Path(name).with_suffix("").parts), folder.name):
        said = re.sub(r"[ _.-]+", "_", _NOT_A_CLASS.sub("", part)).strip("_")
        if said:
            return said
    return None


def _entries(path: Path) -> tuple[list[str], np.ndarray]:
    """Keys of a file in order, and the (n,) bytes of their values.

    Raises:
        UserError: it is no LMDB file, is cut short or unreadable, or has a key that is not text.
    """
    import lmdb

    where = printable(str(path))
    keys: list[str] = []
    sizes: list[int] = []
    try:
        with open_lmdb(str(path)).begin(buffers=True) as transaction:
            name = path.parent.name if path.name == _DATA else path.name
            progress = Progress(f"listing {name}", transaction.stat()["entries"], "images")
            for key, value in transaction.cursor():
                keys.append(bytes(key).decode())
                sizes.append(len(value))
                progress.update(len(keys))
                interrupt.raise_if_stopped()
    except UnicodeDecodeError:
        raise UserError(f"{where}: has a key that is not text: write the images as files into class folders") from None
    except lmdb.Error as error:
        raise UserError(f"{where}: not an LMDB file, or damaged ({error}): fetch or unpack it again") from None
    return keys, np.array(sizes, np.int64)
