"""Distances between two sets of features: Frechet distance (FID is one) and kernel distance (KID), in float64.

Both come from clean-fid's own code; what is added here is what it lacks: statistics gathered in a stream,
a draw of the kernel distance's subsets that repeats, and the distance that perfect images would score.
"""

from __future__ import annotations

import contextlib
import io
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from cleanfid import fid as cleanfid_fid

from crt.progress import logger
from crt.randomness import draw_seed


class Moments(Protocol):
    """What a distance needs to know of a set of features."""

    @property
    def count(self) -> float:
        """Images in the set."""

    @property
    def mean(self) -> np.ndarray:
        """(D,)."""

    @property
    def covariance(self) -> np.ndarray:
        """(D, D)."""


@dataclass(frozen=True)
class GivenMoments:
    """Mean (D,) and covariance (D, D) that somebody else took, of so many images that their number plays no part."""

    mean: np.ndarray
    covariance: np.ndarray
    count: float = math.inf


class GaussianStatistics:
    """Mean and covariance of features seen batch by batch; parts gathered apart can be merged.

    Sums of squares are kept about the running mean (Chan, Golub and LeVeque 1979), so nothing cancels.

    Args:
        dimension: D, the number of features of an image.
    """

    def __init__(self, dimension: int) -> None:
        self.count = 0
        self.mean = np.zeros(dimension)
        self._scatter = np.zeros((dimension, dimension))

    @property
    def covariance(self) -> np.ndarray:
        """(D, D), with divisor N - 1 as in `numpy.cov`; needs two images at least."""
        if self.count < 2:
            raise ValueError(f"a covariance needs two images at least, got {self.count}")
        return self._scatter / (self.count - 1)

    def update(self, features: np.ndarray) -> None:
        """Add a batch of features (B, D) of any float type."""
        features = np.asarray(features, np.float64)
        mean, count = features.mean(axis=0), len(features)
        centred = features - mean
        total = self.count + count
        shift = mean - self.mean
        self._scatter += centred.T @ centred + np.outer(shift, shift) * (self.count * count / total)
        self.mean = self.mean + shift * (count / total)
        self.count = total


def frechet_distance(a: Moments, b: Moments) -> float:
    """Squared Frechet (Wasserstein-2) distance of the two Gaussians, by clean-fid's code.

        |mu_a - mu_b|^2 + Tr(S_a + S_b - 2 (S_a S_b)^(1/2))     (Heusel et al. 2017, eq. 6)

    Where that code fails on covariances of too few images (an imaginary root), the same quantity is computed
    from the eigenvalues of the symmetric matrix S_a^(1/2) S_b S_a^(1/2).
    """
    covariances = a.covariance, b.covariance
    output = io.StringIO()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(output), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")  # scipy announces the end of an argument that clean-fid passes
            distance = float(cleanfid_fid.frechet_distance(a.mean, covariances[0], b.mean, covariances[1]))
    except ValueError as error:
        output.write(str(error))
        distance = float("nan")
    if not np.isfinite(distance):
        logger.warning("Frechet distance: clean-fid's root failed (%s): taken from eigenvalues", output.getvalue())
        distance = _frechet_from_eigenvalues(a, b)
    # Rounding of the root can leave a distance of almost nothing just below zero.
    return max(distance, 0.0)


def expected_distance(reference: Moments, counts: tuple[float, float]) -> float:
    """The Frechet distance that perfect images would score, because finite sets differ by chance.

    For two independent sets of n and m images of one Gaussian with covariance eigenvalues l_i, to first order in 1/n:

        (1/n + 1/m) (sum_i l_i  +  1/2 sum_ij l_i l_j / (l_i + l_j)  +  1/4 sum_i l_i)

    The first term is the error of the means. The others follow from the second-order expansion of the distance in
    the errors E of a covariance, sum_ij E_ij^2 / (2 (l_i + l_j)), with E_ij^2 = l_i l_j (1 + [i = j]) / n expected.
    Below some ten images per feature it is an order of magnitude only.

    Args:
        reference: statistics whose covariance stands for the true one.
        counts: n and m; infinite for moments of a whole population.
    """
    values = np.clip(np.linalg.eigvalsh(reference.covariance), 0, None)
    sums = values[:, None] + values[None, :]
    products = np.divide(values[:, None] * values[None, :], sums, out=np.zeros_like(sums), where=sums > 0)
    return float((1 / counts[0] + 1 / counts[1]) * (1.25 * values.sum() + products.sum() / 2))


def scarcity(name: str, dimension: int, counts: Mapping[str, float], expected: float | None = None) -> str:
    """The warning that a set has fewer images than its covariance needs, naming the bias.

    Args:
        name: of the figure that suffers.
        dimension: D, the number of features; a covariance of full rank needs more images than that.
        counts: number of images by what they are called.
        expected: what perfect images would score where the sets are independent, see `expected_distance`.
    """
    scarce = " and ".join(f"{count} {which}" for which, count in counts.items() if count <= dimension)
    floor = "" if expected is None else f", as many perfect images would score about {expected:.3g} instead of 0"
    return (
        f"{name}: {scarce} are too few for a covariance of {dimension} features: the distance is biased upwards"
        f"{floor}: compare only with results of the same numbers of images"
    )


def kernel_distance(a: np.ndarray, b: np.ndarray, subsets: int, subset_size: int, seed: int) -> float:
    """Kernel distance (KID) with the cubic kernel, by clean-fid's code: unbiased, unlike the Frechet distance.

    The squared maximum mean discrepancy (Binkowski et al. 2018), averaged over random subsets.

    Args:
        a: features (N, D).
        b: features (M, D).
        subsets: number of random subsets to average over.
        subset_size: images of each subset; the smaller set's size if that is less.
        seed: of the choice of the subsets.
    """
    state = np.random.get_state()  # clean-fid draws from numpy's global generator
    try:
        np.random.seed(draw_seed(seed, "kernel distance") % 2**32)
        return float(
            cleanfid_fid.kernel_distance(
                np.asarray(a, np.float64), np.asarray(b, np.float64), num_subsets=subsets, max_subset_size=subset_size
            )
        )
    finally:
        np.random.set_state(state)


def _frechet_from_eigenvalues(a: Moments, b: Moments) -> float:
    values, vectors = np.linalg.eigh(a.covariance)
    root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    product = root @ b.covariance @ root
    trace_root = np.sqrt(np.clip(np.linalg.eigvalsh((product + product.T) / 2), 0, None)).sum()
    difference = a.mean - b.mean
    return float(difference @ difference + np.trace(a.covariance) + np.trace(b.covariance) - 2 * trace_root)
