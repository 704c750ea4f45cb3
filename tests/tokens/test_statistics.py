"""Entropies against scipy's, counts against NumPy's."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import entropy

from crt.tokens import statistics
from crt.tokens.statistics import CodebookUse, count_codes, entropy_bits
from tests.tokens.caches import make_header, random_codes, write_cache


@pytest.mark.parametrize("table_entries", [2**24, 200])
def test_statistics(tmp_path, monkeypatch, table_entries):
    """The second size of the table forces several passes over positions and rows."""
    monkeypatch.setattr(statistics, "_TABLE_ENTRIES", table_entries)
    header = make_header(rows=5000, views=("center", "flip"), grid=(2, 3), codebook_size=64)
    codes, labels = random_codes(header)
    codes = np.minimum(codes, np.arange(1, 7) * 10)  # another distribution at each position
    cache = write_cache(tmp_path / "tokens", header, codes, labels)
    reported = []
    use, position_entropy = count_codes(cache, reported.append)
    counts = np.bincount(codes.reshape(-1), minlength=64)
    np.testing.assert_array_equal(use.counts, counts)
    assert use.codes_used == len(np.unique(codes))
    assert use.entropy == pytest.approx(entropy(counts, base=2))
    expected = [entropy(np.bincount(codes[:, :, position].reshape(-1)), base=2) for position in range(6)]
    np.testing.assert_allclose(position_entropy, np.reshape(expected, (2, 3)))
    assert reported[-1] == codes.size


def test_entropy_of_known_distributions():
    assert entropy_bits(np.array([0, 7, 0])) == 0.0
    assert entropy_bits(np.full(256, 3)) == pytest.approx(8.0)
    assert entropy_bits(np.array([2, 1, 1])) == pytest.approx(1.5)


def test_use_of_a_codebook_on_known_counts():
    even = CodebookUse(np.array([5, 5, 5, 5, 0, 0, 0, 0]))
    assert (even.codes_used, even.share, even.perplexity, even.entropy) == (4, 0.5, 4.0, 2.0)
    many = CodebookUse(np.ones(131_072, np.int64))
    assert (many.share, many.entropy) == pytest.approx((1.0, 17.0))
    assert CodebookUse(np.array([0, 7])).perplexity == 1.0
