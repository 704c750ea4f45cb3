"""How a cache uses its codebook: the numbers that show a collapsed tokenizer or a broken cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from crt.tokens.cache import TokenCache

# Entries of the table of counts held at once, and tokens counted at once: some 400 MB in all.
_TABLE_ENTRIES = 2**24


@dataclass(frozen=True)
class CodebookUse:
    """How often each code occurs, and what that tells of the codebook."""

    counts: np.ndarray
    """(codebook_size,) int64; at least one code occurs."""

    @property
    def codes_used(self) -> int:
        return int((self.counts > 0).sum())

    @property
    def share(self) -> float:
        """Of the codes, that occur at all."""
        return self.codes_used / len(self.counts)

    @property
    def entropy(self) -> float:
        """Of a code, wherever it stands, in bits; at most log2(codebook size)."""
        return entropy_bits(self.counts)

    @property
    def perplexity(self) -> float:
        """The number of equally frequent codes that would have this entropy."""
        return 2**self.entropy


def count_codes(cache: TokenCache, report: Callable[[int], None] = lambda done: None) -> tuple[CodebookUse, np.ndarray]:
    """Count every code at every position.

    Args:
        cache: the split.
        report: called now and then with the number of tokens counted so far.

    Returns:
        Use of the codebook, all views together, and (grid rows, grid columns) bits: entropy of the code at each
        position, over images and views.
    """
    size, tokens = cache.codebook_size, cache.num_tokens
    positions = min(tokens, max(1, _TABLE_ENTRIES // size))
    counts, entropies, done = np.zeros(size, np.int64), [], 0
    for first in range(0, tokens, positions):
        width = min(positions, tokens - first)
        table = np.zeros(width * size, np.int64)
        offsets = np.arange(width, dtype=np.int64) * size
        step = max(1, _TABLE_ENTRIES // (cache.num_views * width))
        for start in range(0, len(cache), step):
            codes = cache.array[start : start + step, :, first : first + width]
            table += np.bincount((codes + offsets).reshape(-1), minlength=len(table))
            done += codes.size
            report(done)
        by_position = table.reshape(width, size)
        entropies += [entropy_bits(row) for row in by_position]
        counts += by_position.sum(axis=0)
    return CodebookUse(counts), np.array(entropies).reshape(cache.grid)


def entropy_bits(counts: np.ndarray) -> float:
    """Shannon entropy, in bits, of the distribution that `counts` (K,) stand for (plug-in estimate)."""
    shares = counts[counts > 0] / counts.sum()
    # 0.0 - ... rather than -...: a single code has entropy 0, not -0.
    return float(0.0 - (shares * np.log2(shares)).sum())
