"""Sets of images that can be measured: each is named, counted and read a stretch at a time, in bounded memory."""

from __future__ import annotations

import json
import math
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import IO, Protocol

import h5py
import numpy as np

from crt.data.packed import PackedImages
from crt.data.pool import available_cpus
from crt.data.transforms import center_crop
from crt.errors import UserError
from crt.evaluation.frechet import GivenMoments
from crt.files import NUMPY_ERRORS, refuse_unreadable, sha256_file


class ImageSource(Protocol):
    """A named set of square images."""

    @property
    def name(self) -> str:
        """As recorded in results."""

    @property
    def checksum(self) -> str:
        """SHA-256 of what it holds."""

    @property
    def image_size(self) -> int:
        """S, pixels a side."""

    def __len__(self) -> int:
        """Number of images."""

    def read(self, start: int, stop: int) -> np.ndarray:
        """Images of the rows [start, stop) as uint8 (B, S, S, 3)."""


class SplitSource:
    """A split of the prepared data, each image cropped about its centre.

    Args:
        folder: output of prepare_data.
        split: "train" or "val", which is the source's name too.
        image_size: S.
        content: digest of the folder's files, from its manifest.
    """

    def __init__(self, folder: str | Path, split: str, image_size: int, content: str) -> None:
        self.images = PackedImages(folder, split)
        self.name, self.image_size, self.checksum = split, image_size, content
        self._threads = ThreadPoolExecutor(available_cpus())  # Pillow decodes outside the interpreter's lock

    def __len__(self) -> int:
        return len(self.images)

    @property
    def labels(self) -> np.ndarray:
        """Class of each image, int64 (N,)."""
        return self.images.labels

    def read(self, start: int, stop: int) -> np.ndarray:
        return self.read_rows(np.arange(start, stop))

    def read_rows(self, rows: np.ndarray, side: int | None = None) -> np.ndarray:
        """Images of any rows, uint8 (B, S, S, 3), or cropped at another `side` than S."""
        side = side or self.image_size
        if self.images.storage == "pixels" and self.images.image_size == side:
            return self.images.pixels(rows)
        return np.stack(list(self._threads.map(lambda row: center_crop(self.images.image(row), side), rows.tolist())))


class SampleSource:
    """The images that the stage sample made.

    Args:
        folder: its output.
        content: digest of the folder's files, from its manifest.
        file_name: the one with the images of the guidance scale in question.

    Raises:
        UserError: the file is damaged.
    """

    def __init__(self, folder: str | Path, content: str, file_name: str = "samples.h5") -> None:
        self.path, self.checksum = Path(folder) / file_name, content
        self.name = self.path.stem
        try:
            with h5py.File(self.path, "r", locking=False) as file:
                self.labels = np.asarray(file["labels"], np.int64)
                self.class_names: list[str] = json.loads(file.attrs["class_names"])
                self.guidance_scale = float(file.attrs["guidance_scale"])
                self._count, self.image_size = file["images"].shape[:2]
        except (OSError, KeyError, ValueError, RuntimeError) as error:
            refuse_unreadable(self.path, error)
            raise UserError(f"{self.path}: damaged: delete {folder} and make it again with the sample stage") from None

    def __len__(self) -> int:
        return self._count

    @cached_property
    def _file(self) -> h5py.File:
        return h5py.File(self.path, "r", locking=False)

    def read(self, start: int, stop: int) -> np.ndarray:
        return self._file["images"][start:stop]

    def read_rows(self, rows: np.ndarray) -> np.ndarray:
        """Images of any rows, uint8 (B, S, S, 3)."""
        return np.stack([self._file["images"][row] for row in rows])


class AdmBatch:
    """A batch file in the format of ADM's evaluator: an .npz whose array `arr_0` is uint8 (N, S, S, 3).

    The array streams out of the archive, which may be compressed; only the rows asked for are held, and reading on
    from the last row costs no second look at what lies before. ADM's own files also hold the moments of the whole
    data set's features (`mu`, `sigma`, and of the spatial ones `mu_s`, `sigma_s`), under TensorFlow's resize:
    published distances are distances from these, while the images serve precision and recall.

    Args:
        path: such as VIRTUAL_imagenet256_labeled.npz, 10,000 training images.

    Raises:
        UserError: the file is missing, no .npz, or holds no such array.
    """

    name = "adm_train"

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self._stream, shape, dtype = self._open()
        except FileNotFoundError:
            raise UserError(
                f"{path}: not found: fetch the ADM reference batch, or set evaluate.generation_reference to val"
            ) from None
        except (OSError, KeyError, *NUMPY_ERRORS) as error:
            refuse_unreadable(self.path, error)
            raise UserError(
                f"{path}: no ADM batch file: expected an .npz with the array arr_0: fetch it again"
            ) from None
        if dtype != np.uint8 or len(shape) != 4 or shape[1] != shape[2] or shape[3] != 3:
            raise UserError(f"{path}: arr_0 is {dtype} {shape}, expected uint8 (N, S, S, 3): fetch it again")
        self._count, self.image_size = shape[:2]
        self._row = 0  # at which the stream stands

    def __len__(self) -> int:
        return self._count

    @cached_property
    def checksum(self) -> str:
        return sha256_file(self.path)

    def moments(self, column: str, dimension: int) -> GivenMoments | None:
        """Moments of the whole data set's features, if the file has them.

        Args:
            column: "features" or "spatial".
            dimension: D, of the features that they are to be compared with.

        Raises:
            UserError: they are damaged, or of other features.
        """
        suffix = {"features": "", "spatial": "_s"}[column]
        names = f"mu{suffix}", f"sigma{suffix}"
        try:
            with np.load(self.path, allow_pickle=False) as file:
                if not set(names) <= set(file.files):
                    return None
                mean, covariance = (np.asarray(file[name], np.float64) for name in names)
        except (OSError, *NUMPY_ERRORS) as error:
            refuse_unreadable(self.path, error)
            raise UserError(f"{self.path}: {names[0]} or {names[1]} is damaged: fetch the file again") from None
        if mean.shape != (dimension,) or covariance.shape != (dimension, dimension):
            raise UserError(
                f"{self.path}: {names[0]} and {names[1]} have the shapes {mean.shape} and {covariance.shape}, "
                f"but the network has {dimension} features: fetch the file again"
            )
        return GivenMoments(mean, covariance)

    def read(self, start: int, stop: int) -> np.ndarray:
        if start < self._row:
            self._stream, self._row = self._open()[0], 0
        for _ in range(self._row, start):
            self._next(1)
        images = self._next(stop - start)
        self._row = stop
        return images

    def _next(self, rows: int) -> np.ndarray:
        shape = rows, self.image_size, self.image_size, 3
        try:
            data = bytearray(self._stream.read(math.prod(shape)))  # torch wants arrays that may be written
        except (OSError, zipfile.BadZipFile, zlib.error) as error:
            refuse_unreadable(self.path, error)
            data = bytearray()
        if len(data) != math.prod(shape):
            raise UserError(f"{self.path}: arr_0 is damaged or ends early: fetch the file again")
        return np.frombuffer(data, np.uint8).reshape(shape)

    def _open(self) -> tuple[IO[bytes], tuple[int, ...], np.dtype]:
        """The stream of `arr_0`, standing at its first image, with its shape and type."""
        archive = zipfile.ZipFile(self.path)
        stream = archive.open("arr_0.npy")
        read_header = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[np.lib.format.read_magic(stream)]
        shape, fortran_order, dtype = read_header(stream)
        if fortran_order:
            raise ValueError("column-major array")
        return stream, shape, dtype
