"""Oracles: numpy.cov, the closed form for Gaussians, clean-fid's own scores, a Monte Carlo mean, explicit loops."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from cleanfid import fid as cleanfid_fid

from crt.evaluation.frechet import (
    GaussianStatistics,
    GivenMoments,
    _frechet_from_eigenvalues,
    expected_distance,
    frechet_distance,
    kernel_distance,
    scarcity,
)


def statistics(features: np.ndarray, batch: int = 64) -> GaussianStatistics:
    result = GaussianStatistics(features.shape[1])
    for start in range(0, len(features), batch):
        result.update(features[start : start + batch])
    return result


def exact(mean: np.ndarray, covariance: np.ndarray) -> GaussianStatistics:
    """Statistics with exactly this mean and covariance."""
    root = np.linalg.cholesky(covariance)
    dimension = len(mean)
    points = np.concatenate([root.T, -root.T]) * np.sqrt((2 * dimension - 1) / 2)
    return statistics(points + mean)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_streamed_statistics_equal_numpy_on_the_whole_set(rng):
    # a large offset: sums of squares that are not centred would lose all digits
    features = rng.normal(size=(1001, 5)) * [1, 2, 3, 4, 1e-3] + 1e6
    for batch_size in (7, 64, 2000):
        streamed = statistics(features, batch_size)
        assert streamed.count == 1001
        np.testing.assert_allclose(streamed.mean, features.mean(axis=0), rtol=1e-14)
        np.testing.assert_allclose(streamed.covariance, np.cov(features, rowvar=False), rtol=1e-8, atol=1e-10)


def test_one_image_has_no_covariance():
    with pytest.raises(ValueError, match="two images"):
        _ = statistics(np.ones((1, 3))).covariance


def test_distance_is_the_closed_form_for_commuting_gaussians(rng):
    """For covariances with common eigenvectors: |mu_a - mu_b|^2 + sum (sqrt(l_a) - sqrt(l_b))^2."""
    vectors = np.linalg.qr(rng.normal(size=(8, 8)))[0]
    a, b = rng.uniform(0.5, 4, 8), rng.uniform(0.5, 4, 8)
    mean_a, mean_b = rng.normal(size=8), rng.normal(size=8)
    expected = ((mean_a - mean_b) ** 2).sum() + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    pair = exact(mean_a, vectors * a @ vectors.T), exact(mean_b, vectors * b @ vectors.T)
    assert frechet_distance(*pair) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(*pair[::-1]) == pytest.approx(expected, rel=1e-9)
    assert _frechet_from_eigenvalues(*pair) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(pair[0], pair[0]) == pytest.approx(0, abs=1e-9)


def test_distance_is_clean_fids_on_the_same_features(rng):
    a, b = rng.normal(size=(500, 32)), rng.normal(size=(400, 32)) @ rng.normal(size=(32, 32)) / 5 + 0.3
    expected = cleanfid_fid.fid_from_feats(a, b)
    assert frechet_distance(statistics(a), statistics(b)) == pytest.approx(expected, abs=1e-6)
    assert _frechet_from_eigenvalues(statistics(a), statistics(b)) == pytest.approx(expected, abs=1e-6)


def test_fewer_images_than_features_still_give_the_distance(rng):
    """Singular covariances, where the eigenvalue form stays exact."""
    a, b = statistics(rng.normal(size=(20, 64))), statistics(rng.normal(size=(25, 64)))
    assert frechet_distance(a, b) == pytest.approx(_frechet_from_eigenvalues(a, b), rel=1e-3)
    constant = statistics(np.zeros((20, 64)))
    assert frechet_distance(constant, constant) == 0
    assert frechet_distance(a, constant) == pytest.approx(a.mean @ a.mean + np.trace(a.covariance), rel=1e-6)


def test_a_root_that_clean_fid_gives_up_on_is_taken_from_eigenvalues(rng, monkeypatch, caplog):
    def give_up(*_):
        raise ValueError("Imaginary component 0.5")

    a, b = statistics(rng.normal(size=(50, 4))), statistics(rng.normal(size=(50, 4)) + 1)
    expected = frechet_distance(a, b)
    monkeypatch.setattr(cleanfid_fid, "frechet_distance", give_up)
    monkeypatch.setattr("crt.progress.logger.propagate", True)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert "Imaginary component 0.5" in caplog.text


def test_expected_distance_is_the_mean_distance_of_equal_gaussians(rng):
    scales = np.sqrt([4.0, 1.0, 0.5, 0.1, 0.01])
    n, m, trials = 400, 250, 300
    scores = [
        frechet_distance(statistics(rng.normal(size=(n, 5)) * scales), statistics(rng.normal(size=(m, 5)) * scales))
        for _ in range(trials)
    ]
    predicted = expected_distance(exact(np.zeros(5), np.diag(scales**2)), (n, m))
    standard_error = np.std(scores) / np.sqrt(trials)
    assert predicted == pytest.approx(np.mean(scores), abs=4 * standard_error)
    assert standard_error < predicted / 20  # tight enough to tell a wrong coefficient


def test_given_moments_are_those_of_a_population(rng):
    """Oracle: the closed form; and only the other set's chance counts, whose mean distance is drawn."""
    scales = np.sqrt([4.0, 1.0, 0.5, 0.1, 0.01])
    population = GivenMoments(np.zeros(5), np.diag(scales**2))
    shifted = exact(np.full(5, 2.0), np.diag((2 * scales) ** 2))
    assert frechet_distance(shifted, population) == pytest.approx(5 * 4 + (scales**2).sum(), rel=1e-9)
    scores = [frechet_distance(statistics(rng.normal(size=(400, 5)) * scales), population) for _ in range(300)]
    predicted = expected_distance(population, (400, population.count))
    assert predicted == pytest.approx(np.mean(scores), abs=4 * np.std(scores) / np.sqrt(300))


def test_scarcity_names_the_set_the_numbers_and_the_bias():
    text = scarcity("gfid", 2048, {"samples": 500, "reference images": 50_000}, 31.4)
    assert "\n" not in text
    assert "500 samples are too few" in text
    assert "50000" not in text
    assert "2048 features" in text
    assert "31.4" in text


def kernel_distance_by_loops(x, y):
    """Unbiased squared MMD with (x.y / D + 1)^3, from its definition; equal numbers of images."""

    def mean_kernel(u, v, skip_diagonal):
        values = [
            (u[i] @ v[j] / len(u[i]) + 1) ** 3
            for i, j in itertools.product(range(len(u)), range(len(v)))
            if not (skip_diagonal and i == j)
        ]
        return sum(values) / len(values)

    return mean_kernel(x, x, True) + mean_kernel(y, y, True) - 2 * mean_kernel(x, y, False)


def test_kernel_distance_of_whole_sets_is_the_definition(rng):
    x, y = rng.normal(size=(30, 6)), rng.normal(size=(30, 6)) + 0.5
    expected = kernel_distance_by_loops(x, y)
    assert kernel_distance(x, y, subsets=1, subset_size=1000, seed=0) == pytest.approx(expected, rel=1e-10)
    assert kernel_distance(x, y, subsets=7, subset_size=30, seed=1) == pytest.approx(expected, rel=1e-10)


def test_kernel_distance_repeats_and_leaves_numpys_generator_alone(rng):
    x, y = rng.normal(size=(60, 4)), rng.normal(size=(80, 4)) + 1
    np.random.seed(5)
    expected_next = np.random.rand()
    np.random.seed(5)
    first = kernel_distance(x, y, subsets=5, subset_size=20, seed=3)
    assert np.random.rand() == expected_next
    assert kernel_distance(x, y, subsets=5, subset_size=20, seed=3) == first
    assert kernel_distance(x, y, subsets=5, subset_size=20, seed=4) != first
