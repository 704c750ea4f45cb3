"""Finished blocks of a shard in the making, kept through a kill at any moment."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np

from crt.tokens.layout import CacheHeader

_DIGEST_BYTES = 32


class BlockJournal:
    """Append-only file of blocks, each behind its SHA-256: a torn block is known by it, cut off, and made again.

    Args:
        path: the file, which may hold blocks of an earlier run of the same recipe.
        header: facts of the cache that the shard belongs to.
        index: which shard.
    """

    def __init__(self, path: Path, header: CacheHeader, index: int) -> None:
        self.path, self.header = path, header
        self.blocks = header.blocks(index)
        self.done = 0
        """Blocks in the file."""
        if path.exists():
            self._recover()

    @property
    def complete(self) -> bool:
        return self.done == len(self.blocks)

    def append(self, codes: np.ndarray) -> None:
        """Add the next block.

        Args:
            codes: (rows of the block, views, tokens) integers.
        """
        if len(codes) != len(self.blocks[self.done]):
            raise ValueError(f"block {self.done} has {len(self.blocks[self.done])} rows, not {len(codes)}")
        content = np.ascontiguousarray(codes, self.header.code_type).tobytes()
        with open(self.path, "ab") as file:
            file.write(hashlib.sha256(content).digest() + content)
        self.done += 1

    def codes(self) -> np.ndarray:
        """Codes of the complete shard: (rows, views, tokens)."""
        parts = []
        with open(self.path, "rb") as file:
            for block in self.blocks:
                file.seek(_DIGEST_BYTES, os.SEEK_CUR)
                parts.append(np.frombuffer(file.read(len(block) * self.header.row_bytes), self.header.code_type))
        return np.concatenate(parts).reshape(-1, len(self.header.views), self.header.num_tokens)

    def _recover(self) -> None:
        """Count the whole blocks and cut off what follows them."""
        good = 0
        with open(self.path, "r+b") as file:
            for block in self.blocks:
                size = len(block) * self.header.row_bytes
                digest, content = file.read(_DIGEST_BYTES), file.read(size)
                if len(content) < size or hashlib.sha256(content).digest() != digest:
                    break
                self.done += 1
                good = file.tell()
            file.truncate(good)
