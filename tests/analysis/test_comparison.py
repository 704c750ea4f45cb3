"""Paired comparisons against scipy's own paired t test."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from crt.analysis.comparison import mean_and_spread, paired_difference


def test_agrees_with_scipy_on_the_shared_seeds():
    generator = np.random.default_rng(0)
    baseline = dict(enumerate(generator.normal(1.0, 0.1, 6)))
    other = {seed: value - 0.05 + generator.normal(0, 0.02) for seed, value in baseline.items() if seed != 2} | {9: 5.0}
    seeds = [0, 1, 3, 4, 5]
    expected = stats.ttest_rel([other[s] for s in seeds], [baseline[s] for s in seeds])
    interval = expected.confidence_interval(0.95)
    ours = paired_difference(baseline, other)
    assert (ours.p_value, ours.low, ours.high) == pytest.approx((expected.pvalue, interval.low, interval.high))
    assert ours.pairs == 5


def test_one_pair_has_a_difference_and_no_certainty():
    result = paired_difference({3: 1.0}, {3: 0.5})
    assert result.mean == -0.5
    assert math.isnan(result.p_value)
    assert math.isnan(result.low)


def test_equal_differences_have_no_p_value():
    # Their mean by floating point is 0.20000000000000004.
    result = paired_difference(dict.fromkeys(range(3), 0.0), dict.fromkeys(range(3), 0.2))
    assert math.isnan(result.p_value)
    assert result.low == result.high == result.mean


def test_methods_without_a_common_seed_are_refused():
    with pytest.raises(ValueError, match="share no seed"):
        paired_difference({0: 1.0}, {1: 1.0})


def test_spread_is_the_sample_standard_deviation():
    assert mean_and_spread([1.0, 2.0, 4.0]) == pytest.approx((7 / 3, np.std([1, 2, 4], ddof=1)))
    assert mean_and_spread([2.0]) == (2.0, 0.0)
