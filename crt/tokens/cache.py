"""Reading a token cache: checked once when opened, then memory-mapped."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np

from crt.errors import UserError
from crt.tokens.layout import UNKNOWN, CacheHeader, ShardRecord, check_size, read_index, read_shard
from crt.tokens.mapping import announce, map_end_to_end

SPLITS = ("train", "val")
# Rows in memory take a tenth of this or less, rows on a disk ten times as long and more.
_COLD_SECONDS_PER_ROW = 3e-6


class TokenCache:
    """The codes of one split, as `tokenize` wrote them.

    Opening checks what is cheap to check: schema, completeness, that every shard is there, has its size and
    belongs to this cache. `crt.tokens.verify` checks the codes themselves. The codes are mapped at the first
    use in each process, so a cache may be handed to forked and to spawned workers.

    Args:
        folder: the tokenize stage's output.
        split: "train" or "val".

    Raises:
        UserError: the split is missing, damaged or incomplete.
    """

    def __init__(self, folder: str | Path, split: str) -> None:
        self.folder = Path(folder)
        if split not in SPLITS:
            raise UserError(f"{folder}: split {split!r} is unknown: use {' or '.join(map(repr, SPLITS))}")
        header, class_names, records = read_index(self.folder / f"{split}.h5")
        self.header: CacheHeader = header
        self.class_names: list[str] = class_names
        self.records: list[ShardRecord] = records
        labels, sources = [], []
        for index, record in enumerate(records):
            path = self.folder / header.shard_name(index)
            check_size(path, record)
            shard = read_shard(self.folder, header, index)
            if shard.record != record:
                raise UserError(f"{path}: is not the shard that {header.index_name} was made with: restore the folder")
            labels.append(shard.labels)
            sources.append(shard.source_index)
        self.labels: np.ndarray = np.concatenate(labels).astype(np.int64)
        """(N,) int64 class of each row."""
        self.source_index: np.ndarray = np.concatenate(sources).astype(np.int64)
        """(N,) int64 number of each row's image in its split of the data set."""
        self._bytes: np.ndarray | None = None
        self._array: np.ndarray | None = None
        self._cold = False

    def __len__(self) -> int:
        """Rows: images."""
        return self.header.rows

    @property
    def split(self) -> str:
        return self.header.split

    @property
    def views(self) -> tuple[str, ...]:
        """Name of each view, such as "center" or "ten_crop@1.1/0"."""
        return self.header.views

    @property
    def num_views(self) -> int:
        return len(self.header.views)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of an image's tokens."""
        return self.header.grid

    @property
    def num_tokens(self) -> int:
        return self.header.num_tokens

    @property
    def codebook_size(self) -> int:
        return self.header.codebook_size

    @property
    def num_classes(self) -> int:
        return self.header.num_classes

    @property
    def tokenizer_content(self) -> str:
        """Content digest of the tokenizer that made the codes."""
        return self.header.tokenizer_content

    @property
    def known_tokenizer(self) -> str | None:
        """`tokenizer_content`, or None where an import could not tell."""
        return None if self.tokenizer_content == UNKNOWN else self.tokenizer_content

    @property
    def data_content(self) -> str:
        """Content digest of the data set that they were made from."""
        return self.header.data_content

    @property
    def file_bytes(self) -> int:
        """Size of all files of this split."""
        index = self.folder / self.header.index_name
        return index.stat().st_size + sum(record.file_bytes for record in self.records)

    @property
    def array(self) -> np.ndarray:
        """All codes, (rows, views, tokens), read-only, memory-mapped over all shards."""
        if self._array is None:
            parts = [
                (self.folder / self.header.shard_name(index), record.codes_offset, record.rows * self.header.row_bytes)
                for index, record in enumerate(self.records)
            ]
            self._bytes = map_end_to_end(parts)
            codes = self._bytes.view(self.header.code_type)
            self._array = codes.reshape(self.header.rows, self.num_views, self.num_tokens)
        return self._array

    def codes(self, rows: np.ndarray, views: np.ndarray | int) -> np.ndarray:
        """Codes of some rows, one view of each.

        Args:
            rows: (B,) integers.
            views: (B,) integers, or one view for all.

        Returns:
            (B, num_tokens) int64, tokens in raster order.

        Raises:
            IndexError: a row or view is out of range.
        """
        if self._cold:
            self._announce(rows, views)
        started = time.perf_counter()
        codes = self.array[rows, views].astype(np.int64)
        self._cold = time.perf_counter() - started > _COLD_SECONDS_PER_ROW * len(codes)
        return codes

    def _announce(self, rows: np.ndarray, views: np.ndarray | int) -> None:
        row_bytes, view_bytes, _ = self.array.strides
        starts = np.asarray(rows, np.int64) % len(self) * row_bytes + np.asarray(views) % self.num_views * view_bytes
        assert self._bytes is not None
        announce(self._bytes, starts, view_bytes)

    def __getstate__(self) -> dict[str, Any]:
        # A spawned worker maps the files itself, from wherever it runs.
        return self.__dict__ | {"folder": self.folder.absolute(), "_bytes": None, "_array": None}


def locate_splits(path: Path) -> tuple[Path, list[str]]:
    """Folder and splits that a path stands for: a cache's folder, or the index file of one split.

    Raises:
        UserError: it is neither.
    """
    if path.is_dir():
        splits = [split for split in SPLITS if (path / f"{split}.h5").exists()]
        if splits:
            return path, splits
    elif path.stem in SPLITS and path.suffix == ".h5":
        return path.parent, [path.stem]
    wanted = " or ".join(f"{split}.h5" for split in SPLITS)
    raise UserError(f"{path}: is not a token cache: give the tokenize stage's output folder, or {wanted} in it")
