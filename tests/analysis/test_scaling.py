"""The scaling-law fit against laws that are known because the points were made from them."""

from __future__ import annotations

import numpy as np
import pytest

from crt.analysis.scaling import Undetermined, compute_saved, fit_scaling_law, pareto_frontier


def law(compute, loss_min, alpha, lambda_0):
    return loss_min + np.exp(lambda_0 + alpha * np.log(compute))


@pytest.mark.parametrize(("loss_min", "alpha", "lambda_0"), [(2.0, -0.65, 26.0), (1.2, -0.3, 12.0), (0.0, -0.73, 30.0)])
def test_known_parameters_are_recovered_exactly_without_noise(loss_min, alpha, lambda_0):
    compute = np.geomspace(1e17, 1e21, 12)
    fit = fit_scaling_law(compute, law(compute, loss_min, alpha, lambda_0), resamples=50)
    assert fit.alpha == pytest.approx(alpha, abs=1e-4)
    assert fit.loss_min == pytest.approx(loss_min, abs=1e-3)
    assert fit.lambda_0 == pytest.approx(lambda_0, abs=5e-3)
    assert fit.undetermined is None
    assert fit.predict(1e22) == pytest.approx(law(1e22, loss_min, alpha, lambda_0), rel=1e-3)


def test_intervals_cover_the_truth_as_often_as_they_say():
    compute = np.repeat(np.geomspace(1e17, 1e20, 8), 4)
    covered = 0
    for trial in range(40):
        noise = np.random.default_rng(trial).normal(0, 0.05, compute.size)
        fit = fit_scaling_law(compute, law(compute, 2.0, -0.5, 20.0) + noise, resamples=120, seed=trial)
        covered += fit.alpha_interval[0] <= -0.5 <= fit.alpha_interval[1]
    # Binomial(40, 0.95) falls below 31 with probability 2e-4; a percentile bootstrap is a little narrow.
    assert covered >= 31


def test_the_interval_holds_95_percent_of_the_resamples():
    """Oracle: each resample of the runs fitted by itself."""
    compute = np.repeat(np.geomspace(1e17, 1e20, 8), 2)
    loss = law(compute, 2.0, -0.5, 20.0) + np.random.default_rng(1).normal(0, 0.05, compute.size)
    fit = fit_scaling_law(compute, loss, resamples=40, seed=3)
    generator = np.random.default_rng(3)
    draws = [generator.integers(0, 16, 16) for _ in range(40)]
    alphas = [fit_scaling_law(compute[rows], loss[rows], resamples=0).alpha for rows in draws]
    assert fit.alpha_interval == pytest.approx(np.percentile(alphas, [2.5, 97.5]))


@pytest.mark.parametrize(
    ("compute", "loss", "reason"),
    [
        ([1e18, 1e19, 1e20], [5.0, 4.0, 3.5], "only 3 distinct"),
        ([1e18, 1e19, 1e20] * 2, [5.0, 4.0, 3.5] * 2, "only 3 distinct"),  # seeds add no compute
        (np.geomspace(1e17, 1e21, 8), law(np.geomspace(1e17, 1e21, 8), 5.0, -4.0, 170.0), "at the edge of its search"),
        ([1e18, 1.5e18, 2e18, 3e18], [5.0, 4.8, 4.7, 4.6], "span only a factor of 3"),
        # All but the first point are flat: how steep the law is rests on that one.
        (np.geomspace(1e11, 1e13, 6).repeat(2), np.repeat([9, 4.7, 4.0, 4.1, 3.8, 3.85], 2), "known to lie"),
    ],
)
def test_points_that_do_not_determine_the_law_are_not_extrapolated(compute, loss, reason):
    fit = fit_scaling_law(compute, loss, resamples=100)
    assert reason in fit.undetermined
    assert np.isfinite(fit.predict(compute[1]))
    with pytest.raises(Undetermined, match="no extrapolation"):
        fit.predict(1e23)


@pytest.mark.parametrize(
    "loss",
    [
        [3.0, 3.1, 2.9, 3.0, 3.1, 2.95, 3.02, 3.0],  # flat
        [4.2, 4.2, 4.3, 4.3, 5.0, 6.1, 5.9, 4.7],  # overfitted: larger models, larger loss
        [3.0] * 8,
    ],
)
def test_a_loss_that_does_not_fall_with_compute_has_no_law(loss):
    with pytest.raises(Undetermined, match="explains only"):
        fit_scaling_law(np.geomspace(1e17, 1e20, 8), loss)


def test_too_few_points_are_refused():
    with pytest.raises(Undetermined, match="2 distinct computes"):
        fit_scaling_law([1e18, 1e18, 1e19], [3.0, 3.1, 2.0])


def test_frontier_keeps_exactly_the_runs_that_nothing_cheaper_beats():
    compute, loss = np.array([1.0, 2.0, 2.0, 3.0, 4.0, 0.5]), np.array([5.0, 6.0, 4.0, 4.5, 1.0, 9.0])
    expected = [i for i in range(6) if not any((compute[j] <= compute[i]) and (loss[j] < loss[i]) for j in range(6))]
    assert sorted(pareto_frontier(compute, loss)) == sorted(expected)


def test_a_run_that_costs_more_for_the_same_loss_is_not_on_the_frontier():
    assert pareto_frontier([3.0, 1.0, 2.0, 1.0], [4.0, 5.0, 5.0, 5.0]).tolist() == [1, 0]


def test_compute_saved_is_the_shift_between_two_laws():
    compute = np.geomspace(1e17, 1e20, 40)
    _levels, saved = compute_saved((compute, law(compute, 2, -0.5, 20)), (compute / 2.5, law(compute, 2, -0.5, 20)))
    assert saved == pytest.approx(2.5, rel=1e-6)
    with pytest.raises(Undetermined, match="share no level"):
        compute_saved(([1.0, 2.0], [5.0, 4.0]), ([1.0, 2.0], [2.0, 1.0]))
