"""The paper's scaling law, compute-optimal frontiers and the compute that one method saves over another.

    L(C) = L_min + C^alpha * e^lambda_0        with alpha < 0, C in training FLOPs

For a given alpha the law is linear in L_min and e^lambda_0, so the fit searches alpha alone and solves the rest
exactly (variable projection). Confidence intervals come from a bootstrap over the runs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize_scalar, nnls

ALPHA_BOUNDS = (-3.0, -0.02)
# A fit is trusted outside its points only if it rests on this many distinct computes over this range of them...
MIN_COMPUTES, MIN_COMPUTE_RANGE = 4, 8.0
# ...and if the bootstrap pins the exponent down: its interval may be so many times as wide as its end nearer to zero.
MAX_RELATIVE_ALPHA_WIDTH = 1.0
# It is no fit at all unless it explains this share of the variance of the losses.
MIN_EXPLAINED = 0.5


class Undetermined(ValueError):
    """The points do not determine the law well enough for what was asked."""


@dataclass(frozen=True)
class ScalingFit:
    """A fitted law with 95% bootstrap intervals (low, high)."""

    loss_min: float
    alpha: float
    lambda_0: float
    alpha_interval: tuple[float, float]
    compute_range: tuple[float, float]
    undetermined: str | None
    """Why the fit must not be used outside its points; None if it may be."""

    def predict(self, compute: ArrayLike) -> NDArray[np.float64]:
        """L(C) at `compute` FLOPs.

        Raises:
            Undetermined: some compute lies outside the fitted range and the points do not determine the law there.
        """
        values = np.asarray(compute, dtype=np.float64)
        low, high = self.compute_range
        if self.undetermined and (values.min() < low or values.max() > high):
            raise Undetermined(f"no extrapolation from {low:.3g}..{high:.3g} FLOPs: {self.undetermined}")
        return self.loss_min + np.exp(self.lambda_0 + self.alpha * np.log(values))


def fit_scaling_law(compute: ArrayLike, loss: ArrayLike, *, resamples: int = 500, seed: int = 0) -> ScalingFit:
    """Fit L(C) = L_min + C^alpha e^lambda_0 by least squares.

    Args:
        compute: (N,) training FLOPs of each run.
        loss: (N,) its loss or distance; several runs (seeds) may share a compute.
        resamples: bootstrap resamples, drawn over all runs, that is over seeds and points together. Drawing seeds
            within each compute would give intervals that are too narrow when seeds are few.
        seed: of the bootstrap.

    Returns:
        The fit; `undetermined` says why it must not be extrapolated, if so.

    Raises:
        Undetermined: fewer than three distinct computes, a run without training, or a loss that does not fall with
            compute as the law has it.
        ValueError: shapes differ, or values are not finite.
    """
    c, y = np.asarray(compute, dtype=np.float64), np.asarray(loss, dtype=np.float64)
    if c.shape != y.shape or c.ndim != 1:
        raise ValueError(f"compute has shape {c.shape}, loss {y.shape}: both must be (N,)")
    if not (np.isfinite(c).all() and np.isfinite(y).all()):
        raise ValueError("all values must be finite")
    _refuse_free_runs(c)
    if np.unique(c).size < 3:
        raise Undetermined(f"{np.unique(c).size} distinct computes: three parameters need at least three")
    loss_min, alpha, lambda_0, rms = _fit(c, y)
    explained = 1 - rms**2 / float(y.var()) if y.var() > 0 else 0.0
    if explained < MIN_EXPLAINED:
        raise Undetermined(f"the law explains only {explained:.0%} of the variance")
    generator = np.random.default_rng(seed)
    draws = []
    for _ in range(resamples):
        rows = generator.integers(0, c.size, c.size)
        if np.unique(c[rows]).size >= 3:
            draws.append(_fit(c[rows], y[rows])[1])
    alpha_low, alpha_high = np.percentile(draws or [alpha], [2.5, 97.5])
    return ScalingFit(
        loss_min=loss_min,
        alpha=alpha,
        lambda_0=lambda_0,
        alpha_interval=(float(alpha_low), float(alpha_high)),
        compute_range=(float(c.min()), float(c.max())),
        undetermined=_why_undetermined(c, alpha, (float(alpha_low), float(alpha_high))),
    )


def pareto_frontier(compute: ArrayLike, loss: ArrayLike) -> NDArray[np.int64]:
    """Indices of the runs that are better than every cheaper (or equally cheap) one, by increasing compute."""
    c, y = np.asarray(compute, dtype=np.float64), np.asarray(loss, dtype=np.float64)
    best, kept = np.inf, []
    for row in np.lexsort((y, c)):
        if y[row] < best:
            best = y[row]
            kept.append(row)
    return np.array(kept, dtype=np.int64)


def compute_saved(
    baseline: tuple[ArrayLike, ArrayLike], other: tuple[ArrayLike, ArrayLike]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """How many times less compute `other` needs than `baseline` for the same quality.

    Args:
        baseline, other: (compute, loss) of each method's runs; their frontiers are compared.

    Returns:
        (loss levels that both reach, baseline compute / other compute at each), interpolated in log compute.

    Raises:
        Undetermined: the frontiers share no level of quality, or a run was not trained.
    """
    curves = []
    for compute, loss in (baseline, other):
        _refuse_free_runs(compute)
        rows = pareto_frontier(compute, loss)
        curves.append((np.asarray(loss, float)[rows][::-1], np.log(np.asarray(compute, float)[rows])[::-1]))
    low = max(curve[0].min() for curve in curves)
    high = min(curve[0].max() for curve in curves)
    if low > high:
        raise Undetermined("the two frontiers share no level of quality: add runs until they overlap")
    levels = np.unique(np.concatenate([curve[0] for curve in curves]))
    levels = levels[(levels >= low) & (levels <= high)]
    first, second = (np.interp(levels, *curve) for curve in curves)
    return levels, np.exp(first - second)


def _refuse_free_runs(compute: ArrayLike) -> None:
    if np.min(compute) <= 0:
        raise Undetermined("of models that were given, not trained, the compute is unknown")


def _fit(c: NDArray[np.float64], y: NDArray[np.float64]) -> tuple[float, float, float, float]:
    # Compute is centred in log space: C^alpha itself overflows nothing but loses digits at 1e21.
    center = float(np.exp(np.log(c).mean()))

    def solve(alpha: float) -> tuple[NDArray[np.float64], float]:
        design = np.stack([np.ones_like(c), (c / center) ** alpha], axis=1)
        weights, residual = nnls(design, y)
        return weights, float(residual)

    grid = np.linspace(*ALPHA_BOUNDS, 60)
    best = int(np.argmin([solve(alpha)[1] for alpha in grid]))
    bounds = (grid[max(best - 1, 0)], grid[min(best + 1, grid.size - 1)])
    alpha = float(minimize_scalar(lambda a: solve(a)[1], bounds=bounds, method="bounded", options={"xatol": 1e-9}).x)
    (loss_min, scale), residual = solve(alpha)
    lambda_0 = float(np.log(max(scale, 1e-300)) - alpha * np.log(center))
    return float(loss_min), alpha, lambda_0, residual / np.sqrt(c.size)


def _why_undetermined(c: NDArray[np.float64], alpha: float, alpha_interval: tuple[float, float]) -> str | None:
    low, high = alpha_interval
    computes = np.unique(c).size
    if computes < MIN_COMPUTES:
        return f"only {computes} distinct computes"
    if c.max() / c.min() < MIN_COMPUTE_RANGE:
        return f"the computes span only a factor of {c.max() / c.min():.2g}"
    if not ALPHA_BOUNDS[0] * 0.999 < alpha < ALPHA_BOUNDS[1] * 1.001:
        return f"the exponent {alpha:.3g} lies at the edge of its search range"
    if (high - low) / abs(high) > MAX_RELATIVE_ALPHA_WIDTH:
        return f"the exponent is only known to lie in {low:.3g}..{high:.3g}"
    return None
