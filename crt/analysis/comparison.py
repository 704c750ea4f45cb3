"""Comparing runs that share a seed: paired differences with their t test and confidence interval."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

Row = Mapping[str, Any]
"""A run of a study: its choices by axis (texts), its seed and its metrics (numbers)."""


@dataclass(frozen=True)
class PairedDifference:
    """Mean of other - baseline over seeds."""

    mean: float
    low: float
    high: float
    """95% interval of the mean, from Student's t; NaN with a single pair."""
    p_value: float
    """Two-sided paired t test; NaN with a single pair, or where all differences are equal."""
    pairs: int


def paired_difference(baseline: Mapping[int, float], other: Mapping[int, float]) -> PairedDifference:
    """Compare two methods on the seeds that both have.

    Args:
        baseline, other: value of a metric by seed.

    Raises:
        ValueError: they share no seed.
    """
    seeds = sorted(set(baseline) & set(other))
    if not seeds:
        raise ValueError("the two methods share no seed")
    differences = np.array([other[seed] - baseline[seed] for seed in seeds])
    mean = float(differences.mean())
    if len(seeds) < 2:
        return PairedDifference(mean, float("nan"), float("nan"), float("nan"), len(seeds))
    # Of equal numbers the computed mean may differ from them by a rounding, and p would be of that.
    error = float(differences.std(ddof=1) / np.sqrt(len(seeds))) if np.ptp(differences) > 0 else 0.0
    half = float(stats.t.ppf(0.975, len(seeds) - 1)) * error
    p_value = float(2 * stats.t.sf(abs(mean) / error, len(seeds) - 1)) if error > 0 else float("nan")
    return PairedDifference(mean, mean - half, mean + half, p_value, len(seeds))


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (0 for a single value)."""
    array = np.asarray(values, dtype=np.float64)
    return float(array.mean()), float(array.std(ddof=1)) if array.size > 1 else 0.0


def mean_text(values: Sequence[float]) -> str:
    """Mean and standard deviation in four and two digits; a single value alone, its spread is unknown."""
    mean, spread = mean_and_spread(values)
    return f"{mean:.4g} ± {spread:.2g}" if len(values) > 1 else f"{mean:.4g}"


def cells(rows: Iterable[Row]) -> list[list[Row]]:
    """Runs that differ in their seed alone, together."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(value for value in row.values() if isinstance(value, str)), []).append(row)
    return list(groups.values())
