"""LlamaGen's code folders: one pair of .npy files per image.

`extract_codes_c2i.py` writes, into one folder, `NAME_codes/N.npy`, int64 (1, augmentations, tokens), and
`NAME_labels/N.npy`, int64 (1,), for N = 0, 1, 2, ...: the number of the image in torchvision's ImageFolder.
Augmentations are the image and its mirror image, or torchvision's ten crops. Its processes pad the data set
to a multiple of their number, so the last few files may repeat the first ones.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from crt.errors import UserError
from crt.files import NUMPY_ERRORS


class CodeFolder:
    """One such folder, checked when opened as far as names and the first file go.

    Args:
        folder: holds one `*_codes` folder and its `*_labels` folder.
        num_images: images of the data set, if the folder may hold repeated ones behind them.

    Raises:
        UserError: the layout is another one, or files are missing.
    """

    def __init__(self, folder: Path, num_images: int | None = None) -> None:
        names = sorted(path.name for path in folder.glob("[!.]*_codes") if path.is_dir())
        if len(names) != 1:
            raise UserError(f"{folder}: needs one folder *_codes, has {len(names)}: give LlamaGen's --code-path")
        self.codes_folder = folder / names[0]
        self.labels_folder = folder / (names[0].removesuffix("_codes") + "_labels")
        present = _numbered_files(self.codes_folder)
        self.num_images = present if num_images is None else num_images
        if not 0 < self.num_images <= min(present, _numbered_files(self.labels_folder)):
            raise UserError(
                f"{folder}: has {present} images in {names[0]} and {_numbered_files(self.labels_folder)} labels, "
                f"not {self.num_images} of both: extract the codes again, or state --num-images"
            )
        first = _load(self.codes_folder / "0.npy")
        if first.ndim != 3 or first.shape[0] != 1:
            raise UserError(f"{self.codes_folder / '0.npy'}: has shape {first.shape}, not (1, augmentations, tokens)")
        self.num_views, self.num_tokens = first.shape[1:]

    def labels(self, report: Callable[[], None]) -> np.ndarray:
        """(num_images,) int64 class indices. `report` is called after each file."""
        labels = np.empty(self.num_images, np.int64)
        for number in range(self.num_images):
            path = self.labels_folder / f"{number}.npy"
            label = _load(path)
            if label.shape != (1,) or label[0] < 0:
                raise UserError(f"{path}: holds no label: extract the codes again")
            labels[number] = label[0]
            report()
        return labels

    def codes(self, number: int, codebook_size: int) -> np.ndarray:
        """(views, tokens) int64 codes of one image.

        Raises:
            UserError: the file is missing, damaged, of another shape, or has codes outside the codebook.
        """
        path = self.codes_folder / f"{number}.npy"
        codes = _load(path)
        if codes.shape != (1, self.num_views, self.num_tokens):
            raise UserError(f"{path}: has shape {codes.shape}, not {(1, self.num_views, self.num_tokens)}")
        if codes.min() < 0 or codes.max() >= codebook_size:
            raise UserError(f"{path}: holds codes {codes.min()} to {codes.max()} of a codebook of {codebook_size}")
        return codes[0]

    def sample_digest(self) -> bytes:
        """SHA-256 of a few of the files: tells folders of other codes apart without reading them all."""
        digest = hashlib.sha256()
        for number in np.unique(np.linspace(0, self.num_images - 1, 16).astype(int)):
            digest.update(_load(self.codes_folder / f"{number}.npy").tobytes())
        return digest.digest()


def _numbered_files(folder: Path) -> int:
    """How many files 0.npy, 1.npy, ... there are without a gap; hidden files do not count, other names are refused.

    Raises:
        UserError: the folder is missing, empty, or has gaps or other files.
    """
    try:
        with os.scandir(folder) as entries:
            # Desktops and network drives leave files such as .DS_Store.
            names = {entry.name for entry in entries if not entry.name.startswith(".")}
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({error.strerror}): give LlamaGen's --code-path") from None
    missing = next((number for number in range(len(names)) if f"{number}.npy" not in names), None)
    if missing is not None or not names:
        raise UserError(f"{folder}: {missing or 0}.npy is missing among {len(names)} files: extract the codes again")
    return len(names)


def _load(path: Path) -> np.ndarray:
    """An integer array from a .npy file; nothing is unpickled."""
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, *NUMPY_ERRORS) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: cannot be read ({reason}): extract the codes again") from None
    if array.dtype.kind not in "iu" or array.size == 0:
        raise UserError(f"{path}: holds {array.dtype} of shape {array.shape}, not integers: extract the codes again")
    return array
