"""The packed data set: `index.json` and HDF5 shards, written by prepare_data and read by everything else.

A shard holds, for n images of one split:

    labels      (n,) int32         class index
    source_ids  (n,) UTF-8 text    path inside the source, padded to one length
    sha256      (n, 32) uint8      of the pixels as a reader gets them, see `pixel_digest`
    pixels      (n, S, S, 3) uint8          storage "pixels": RGB of one size
    blob        (bytes,) uint8              storage "encoded": image files one behind the other,
    offsets     (n + 1,) int64                image i is blob[offsets[i]:offsets[i + 1]]

All data sets are contiguous and uncompressed, so an image is read by one request to the file system.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Sequence
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np

from crt.data.decode import Undecodable, decode
from crt.data.listing import printable
from crt.errors import LocalError, UserError
from crt.files import refuse_unreadable
from crt.hdf5_frame import hdf5_frame

INDEX = "index.json"
SCHEMA = 1
SPLITS = ("train", "val")
# Images of fewer bytes are read through memory maps, which fetch neighbours along. Of a large one at a random place a
# map fetches several times its bytes from the disk, and all that it ever showed counts as the process's memory.
_MAPPED_BYTES = 2**16


class PackedImages:
    """One split of a packed data set.

    Files are opened at first use in each process, so an object may be handed to forked or spawned workers.

    Args:
        folder: output of prepare_data.
        split: "train" or "val".

    Raises:
        UserError: the folder holds no packed data set, or the split has no images.
    """

    def __init__(self, folder: str | Path, split: str) -> None:
        self.folder, self.split = Path(folder), split
        index = read_index(folder)
        if split not in index["splits"]:
            raise UserError(f"{self.folder}: has no split {split!r}: choose one of {', '.join(index['splits'])}")
        shards = index["splits"][split]["shards"]
        if not shards:
            remedy = "raise prepare_data.val_fraction, or add images" if split == "val" else "add images"
            raise UserError(f"{self.folder}: split {split!r} holds no images: {remedy}, {_made_again(self.folder)}")
        self.storage: str = index["storage"]
        self.image_size: int | None = index["image_size"]
        self._shape = (self.image_size or 0, self.image_size or 0, 3)  # of storage "pixels"
        self.are_small: bool = self.storage == "pixels" and math.prod(self._shape) < _MAPPED_BYTES
        """Whether a batch is read in no time: of image files, and of large images, workers had better read ahead."""
        self.class_names: list[str] = [entry["name"] for entry in index["classes"]]
        self._files = [self.folder / shard["file"] for shard in shards]
        self._starts = np.cumsum([0, *(shard["images"] for shard in shards)])
        self.labels: np.ndarray = self._column("labels").astype(np.int64)
        self._opened: dict[int, _Opened] = {}
        self._ids: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": {}, "_ids": {}}

    @property
    def num_classes(self) -> int:
        """Classes of the data set, whether or not this split has images of each."""
        return len(self.class_names)

    def image(self, index: int) -> np.ndarray:
        """(H, W, 3) uint8 RGB of one image; all of one size for storage "pixels".

        Raises:
            UserError: the stored file is damaged.
        """
        if self.storage == "pixels":
            return self.pixels([index])[0]
        try:
            return decode(self.encoded(index))
        except Undecodable as error:
            shard, row = self._locate(index)
            raise LocalError(
                f"{self._files[shard]}: image {row} ({printable(self.source_id(index))}) is damaged ({error}): "
                f"{_made_again(self.folder)}"
            ) from None

    def pixels(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """(B, S, S, 3) uint8 RGB of the images at `indices`; for storage "pixels" only."""
        if self.storage != "pixels":
            raise ValueError("images of one size need storage 'pixels'")
        rows = self._checked(indices)
        shards = np.searchsorted(self._starts, rows, side="right") - 1
        images = np.empty((len(rows), *self._shape), np.uint8)
        for shard in np.unique(shards).tolist():
            places = np.flatnonzero(shards == shard)
            inside, mapped = rows[places] - self._starts[shard], self._open(shard).mapped
            if mapped is not None:
                images[places] = mapped[inside]
            else:
                for place, row in zip(places.tolist(), inside.tolist(), strict=True):
                    images[place] = np.frombuffer(self._content(shard, row), np.uint8).reshape(self._shape)
        return images

    def encoded(self, index: int) -> bytes:
        """The image file stored for one image; for storage "encoded" only."""
        if self.storage != "encoded":
            raise ValueError("image files need storage 'encoded'")
        shard, row = self._locate(index)
        return self._content(shard, row)

    def source_id(self, index: int) -> str:
        """Path of the image inside the source that it came from."""
        shard, row = self._locate(index)
        if shard not in self._ids:
            with _open_shard(self._files[shard]) as file:
                self._ids[shard] = file["source_ids"][()]
        return self._ids[shard][row].decode("utf-8")

    def digests(self) -> np.ndarray:
        """(N, 32) uint8: `pixel_digest` of every image, as recorded when it was packed."""
        return self._column("sha256")

    def _column(self, name: str) -> np.ndarray:
        parts = []
        for path, expected in zip(self._files, np.diff(self._starts), strict=True):
            with _open_shard(path) as file:
                parts.append(file[name][()])
            if len(parts[-1]) != expected:
                raise UserError(
                    f"{path}: holds {len(parts[-1])} images instead of {expected}: {_made_again(self.folder)}"
                )
        return np.concatenate(parts)

    def _checked(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        rows = np.asarray(indices, np.int64)
        if rows.size and not (rows.min() >= 0 and rows.max() < len(self)):
            raise IndexError(f"{rows.min()} to {rows.max()} reaches outside the {len(self)} images")
        return rows

    def _locate(self, index: int) -> tuple[int, int]:
        row = int(self._checked([index])[0])
        shard = int(np.searchsorted(self._starts, row, side="right")) - 1
        return shard, row - int(self._starts[shard])

    def _open(self, shard: int) -> _Opened:
        if shard not in self._opened:
            path = self._files[shard]
            with _open_shard(path) as file:
                if self.storage == "pixels":
                    data = file["pixels"]
                    offsets = np.arange(len(data) + 1) * math.prod(self._shape)
                else:
                    data, offsets = file["blob"], file["offsets"][()]
                mapped = _memory_map(path, data) if self.are_small else None
                self._opened[shard] = _Opened(FileIO(path), data.id.get_offset() + offsets, mapped)
        return self._opened[shard]

    def _content(self, shard: int, row: int) -> bytes:
        """What is stored of one image.

        Raises:
            UserError: the file was cut short meanwhile.
        """
        opened = self._open(shard)
        start, end = opened.offsets[row : row + 2].tolist()
        content = os.pread(opened.file.fileno(), end - start, start)  # forked processes share the file's position
        if len(content) != end - start:
            raise LocalError(f"{self._files[shard]}: ends too early: {_made_again(self.folder)}")
        return content


class _Opened(NamedTuple):
    """A shard in use."""

    file: FileIO
    offsets: np.ndarray
    """(n + 1,) int64: image i is bytes offsets[i] to offsets[i + 1] of the file."""
    mapped: np.ndarray | None
    """(n, S, S, 3) uint8, where images are small."""


def read_index(folder: str | Path) -> dict[str, Any]:
    """The checked content of a packed data set's index.json.

    Raises:
        UserError: it is missing, damaged, or of another schema.
    """
    path = Path(folder) / INDEX
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        schema = index["schema"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        refuse_unreadable(path, error)
        remedy = _made_again(path.parent) if path.exists() else "make the data set with stage prepare_data"
        raise UserError(f"{path}: missing or damaged: {remedy}") from None
    if schema != SCHEMA:
        raise UserError(f"{path}: has schema {schema}, this version reads {SCHEMA}: {_made_again(path.parent)}")
    return index


def pixel_digest(pixels: np.ndarray) -> bytes:
    """SHA-256 (32 bytes) of an image's shape and pixels: equal for equal images only.

    Args:
        pixels: (H, W, 3) uint8.
    """
    shape = np.array(pixels.shape, "<i8").tobytes()
    return hashlib.sha256(shape + np.ascontiguousarray(pixels).data).digest()


def create_shard(
    path: Path,
    *,
    split: str,
    storage: str,
    image_size: int | None,
    labels: np.ndarray,
    source_ids: Sequence[str],
    digests: np.ndarray,
    payload_bytes: np.ndarray,
) -> np.ndarray:
    """Write a shard whose images are still missing: their place is reserved, and told.

    Several processes may then write images into it, in any order. The bytes of the finished file depend
    on the arguments and images alone.

    Args:
        labels: (n,) class indices.
        source_ids: n paths; bytes that are no UTF-8 are written as backslash escapes.
        digests: (n, 32) uint8.
        payload_bytes: (n,) bytes of each image, as pixels or as a file.

    Returns:
        (n,) int64: byte offset in the file at which each image belongs.
    """
    offsets = np.concatenate([[0], np.cumsum(payload_bytes, dtype=np.int64)])
    texts = [text.encode("utf-8", "backslashreplace") for text in source_ids]
    text_type = h5py.string_dtype("utf-8", max(len(text) for text in texts))
    columns = {"labels": labels.astype(np.int32), "source_ids": np.array(texts, text_type), "sha256": digests}
    least_bytes = int(offsets[-1]) + sum(column.nbytes for column in columns.values())
    with hdf5_frame(path, least_bytes, libver="v110") as file:
        file.attrs["schema"] = SCHEMA
        file.attrs["split"], file.attrs["storage"] = np.bytes_(split), np.bytes_(storage)
        for name, column in columns.items():
            file.create_dataset(name, data=column)
        if storage == "pixels":
            name, shape = "pixels", [len(labels), image_size, image_size, 3]
        else:
            name, shape = "blob", [int(offsets[-1])]
            file.create_dataset("offsets", data=offsets)
        # Reserved at once and not filled, so that it has an address before any image is written.
        creation = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        creation.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        creation.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
        creation.set_layout(h5py.h5d.CONTIGUOUS)
        creation.set_obj_track_times(False)
        space = h5py.h5s.create_simple(tuple(shape))
        data = h5py.h5d.create(file.id, name.encode(), h5py.h5t.NATIVE_UINT8, space, creation)
        start = data.get_offset()
    return start + offsets[:-1]


def _open_shard(path: Path) -> h5py.File:
    try:
        # Published shards never change, and not every shared file system can lock.
        return h5py.File(path, "r", locking=False)
    except OSError as error:
        refuse_unreadable(path, error)
        reason = "missing" if isinstance(error, FileNotFoundError) else "damaged"
        raise UserError(f"{path}: {reason}: {_made_again(path.parent)}") from None


def _made_again(folder: Path) -> str:
    """The remedy for a published data set: a current result is kept, whatever became of its source or its files."""
    return f"delete {folder} and run prepare_data again"


def _memory_map(path: Path, data: h5py.Dataset) -> np.ndarray:
    return np.memmap(path, data.dtype, "r", offset=data.id.get_offset(), shape=data.shape)
