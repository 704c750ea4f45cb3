"""Samples in the formats of other tools: PNG folders by class, and the batch file of ADM's evaluator.

Files appear in one rename, so one that is there is whole: a stopped export continues behind it.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import h5py
import numpy as np
from PIL import Image

from crt.data.pool import available_cpus
from crt.files import replacing
from crt.interrupt import raise_if_stopped
from crt.progress import Progress

_IMAGES_AT_ONCE = 256
# Zip's earliest date: a fixed one, so that the same images make the same bytes.
_ZIP_DATE = (1980, 1, 1, 0, 0, 0)


def export_samples(path: Path, formats: Collection[str]) -> None:
    """Write a samples file beside itself in other formats; files that are there already stay.

    Args:
        path: an HDF5 file of the stage sample, NAME.h5.
        formats: of "npz" (NAME.npz: `arr_0` (N, S, S, 3) uint8, as ADM's evaluator reads it, and labels as `arr_1`)
            and "png" (NAME_png/CLASS/INDEX.png, where CLASS is the number of the class).

    Raises:
        Stopped: a signal arrived; complete files are kept.
    """
    if "npz" in formats:
        write_adm_batch(path, path.with_suffix(".npz"))
    if "png" in formats:
        write_png_folders(path, path.with_name(f"{path.stem}_png"))


def write_adm_batch(source: Path, target: Path) -> None:
    """One .npz, streamed: uncompressed, so that readers may seek in it, and complete or absent.

    In the order of the samples file, classes in turn: the evaluator's Inception Score takes its splits in this order.
    """
    if target.exists():
        return
    with h5py.File(source, "r", locking=False) as file, replacing(target) as temporary:
        progress = Progress(f"export {target.name}", len(file["images"]), "images")
        with zipfile.ZipFile(temporary, "w") as archive:
            _add_array(archive, "arr_0", file["images"], progress.update)
            _add_array(archive, "arr_1", file["labels"], lambda done: None)


def _add_array(archive: zipfile.ZipFile, name: str, data: h5py.Dataset, report: Callable[[int], None]) -> None:
    with archive.open(zipfile.ZipInfo(f"{name}.npy", _ZIP_DATE), "w", force_zip64=True) as stream:
        header = {"descr": data.dtype.str, "fortran_order": False, "shape": data.shape}
        np.lib.format.write_array_header_1_0(stream, header)
        for start in range(0, len(data), _IMAGES_AT_ONCE):
            raise_if_stopped()
            stream.write(data[start : start + _IMAGES_AT_ONCE].tobytes())
            report(min(start + _IMAGES_AT_ONCE, len(data)))


def write_png_folders(source: Path, folder: Path) -> None:
    """One PNG per image; the names of the classes go to `class_names.json` beside the folders."""
    with (
        h5py.File(source, "r", locking=False) as file,
        ThreadPoolExecutor(available_cpus()) as threads,  # Pillow compresses outside the interpreter's lock
    ):
        images, labels = file["images"], file["labels"][()]
        folder.mkdir(exist_ok=True)
        names = json.dumps(json.loads(file.attrs["class_names"]), ensure_ascii=False)
        (folder / "class_names.json").write_text(names, encoding="utf-8")
        for label in np.unique(labels):
            (folder / f"{label:05d}").mkdir(exist_ok=True)
        paths = [folder / f"{label:05d}" / f"{row:08d}.png" for row, label in enumerate(labels)]
        missing = np.array([not path.exists() for path in paths])
        progress = Progress(f"export {folder.name}", len(paths), "images", done=int((~missing).sum()))
        for start in range(0, len(paths), _IMAGES_AT_ONCE):
            raise_if_stopped()
            here = np.flatnonzero(missing[start : start + _IMAGES_AT_ONCE])
            if len(here):
                block = images[start : start + _IMAGES_AT_ONCE]
                list(threads.map(_write_png, block[here], [paths[start + row] for row in here]))
                progress.update(progress.done + len(here))


def _write_png(image: np.ndarray, path: Path) -> None:
    """uint8 (S, S, 3) to a file, whole or absent."""
    with replacing(path) as temporary:
        Image.fromarray(image).save(temporary, "PNG", compress_level=1)
