"""Checking every byte of a cache against its checksums."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from crt.errors import UserError
from crt.tokens.layout import CacheHeader, Shard, block_checksum, read_index, read_shard


def verify_split(folder: Path, split: str) -> Iterator[tuple[int, list[str]]]:
    """Check all of one split, shard by shard, in bounded memory.

    Args:
        folder: the cache.
        split: "train" or "val".

    Yields:
        For each shard, the rows that it has and a line for each thing that is wrong with it.

    Raises:
        UserError: the index is missing or damaged.
    """
    header, _, records = read_index(folder / f"{split}.h5")
    for index, record in enumerate(records):
        try:
            shard = read_shard(folder, header, index)
        except UserError as error:
            yield record.rows, [str(error)]
            continue
        path = folder / header.shard_name(index)
        lines = [] if shard.record == record else [f"{path}: is not the shard that {header.index_name} was made with"]
        yield record.rows, lines + damaged_blocks(folder, header, index, shard)


def damaged_blocks(
    folder: Path, header: CacheHeader, index: int, shard: Shard, counts: np.ndarray | None = None
) -> list[str]:
    """A line for each block of one shard whose bytes do not match its checksum.

    Args:
        folder: the cache.
        header: its facts.
        index: which shard.
        shard: the shard as `read_shard` returned it.
        counts: (codebook_size,) int64 to which the number of uses of each code is added, if given.
    """
    path = folder / header.shard_name(index)
    first, lines = header.shard_range(index).start, []
    for number, (block, codes) in enumerate(read_blocks(path, header, index, shard)):
        rows = slice(block.start - first, block.stop - first)
        where = f"{path}: block {number} (rows {block.start} to {block.stop - 1})"
        checksum = block_checksum(codes, shard.labels[rows], shard.source_index[rows])
        if checksum != shard.block_checksums[number].tobytes():
            lines.append(f"{where} is damaged: restore the file, or delete {folder} and run tokenize again")
        elif codes.max() >= header.codebook_size:
            lines.append(f"{where} holds code {codes.max()} of a codebook of {header.codebook_size}: report it")
        elif counts is not None:
            counts += np.bincount(codes.reshape(-1), minlength=header.codebook_size)
    return lines


def read_blocks(path: Path, header: CacheHeader, index: int, shard: Shard) -> Iterator[tuple[range, np.ndarray]]:
    """The blocks of one shard: rows, and codes (rows, views, tokens), read without mapping them into memory."""
    with open(path, "rb") as file:
        file.seek(shard.record.codes_offset)
        for block in header.blocks(index):
            content = file.read(len(block) * header.row_bytes)
            codes = np.frombuffer(content, header.code_type)
            yield block, codes.reshape(len(block), len(header.views), header.num_tokens)
