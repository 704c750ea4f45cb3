"""Small caches for the tests, written by the package's own writer from arrays that the tests keep."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from crt.tokens.cache import TokenCache
from crt.tokens.layout import CacheHeader, write_index, write_shard


def make_header(rows=100, views=("center",), grid=(16, 16), codebook_size=64, num_classes=10, block_rows=256, **facts):
    values = {"split": "train", "tokenizer_content": "a" * 64, "data_content": "b" * 64} | facts
    return CacheHeader(
        rows=rows,
        views=views,
        grid=grid,
        codebook_size=codebook_size,
        num_classes=num_classes,
        block_rows=block_rows,
        **values,
    )


def random_codes(header, seed=0):
    rng = np.random.default_rng(seed)
    shape = (header.rows, len(header.views), header.num_tokens)
    codes = rng.integers(0, header.codebook_size, shape, dtype=np.int64)
    return codes, rng.integers(0, header.num_classes, header.rows)


def write_cache(folder: Path, header, codes, labels) -> TokenCache:
    folder.mkdir(exist_ok=True)
    for index in range(header.num_shards):
        rows = np.array(header.shard_range(index))
        write_shard(
            folder,
            folder.parent / "temporary",
            header,
            index,
            codes=codes[rows],
            labels=labels[rows],
            source_index=rows,
        )
    write_index(folder, folder.parent / "temporary", header, [f"class {n}, straße" for n in range(header.num_classes)])
    return TokenCache(folder, header.split)
