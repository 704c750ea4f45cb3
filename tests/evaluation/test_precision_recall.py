"""Oracles: loops over the definitions, and values known by construction."""

from __future__ import annotations

import signal

import numpy as np
import pytest

from crt import interrupt
from crt.evaluation import precision_recall as module
from crt.evaluation.precision_recall import class_agreement, inception_score, precision_recall
from crt.interrupt import Stopped
from crt.randomness import numpy_generator


def share_inside_by_loops(points, centres, neighbours):
    radii = []
    for i, centre in enumerate(centres):
        others = sorted(np.linalg.norm(centre - other) for j, other in enumerate(centres) if j != i)
        radii.append(others[neighbours - 1])
    inside = [
        any(np.linalg.norm(point - centre) <= radius for centre, radius in zip(centres, radii, strict=True))
        for point in points
    ]
    return np.mean(inside)


@pytest.mark.parametrize("block", [7, 2048])
@pytest.mark.parametrize("neighbours", [1, 3])
def test_precision_and_recall_are_the_definition(monkeypatch, block, neighbours):
    monkeypatch.setattr(module, "_BLOCK_ROWS", block)
    rng = np.random.default_rng(1)
    samples = (rng.normal(size=(50, 3)) * 0.7 + 1e3).astype(np.float32)
    reference = (rng.normal(size=(40, 3)) + 1e3).astype(np.float32)
    precision, recall = precision_recall(samples, reference, neighbours)
    assert precision == share_inside_by_loops(samples.astype(float), reference.astype(float), neighbours)
    assert recall == share_inside_by_loops(reference.astype(float), samples.astype(float), neighbours)
    assert 0 < recall < precision < 1


def test_a_signal_ends_them_between_two_blocks(monkeypatch):
    monkeypatch.setattr(module, "_BLOCK_ROWS", 10)
    blocks = []
    original = module._squared_distances

    def stop_at_the_third(a, b):
        blocks.append(len(a))
        if len(blocks) == 3:
            monkeypatch.setattr(interrupt, "_received", [signal.SIGTERM])
        return original(a, b)

    monkeypatch.setattr(module, "_squared_distances", stop_at_the_third)
    with pytest.raises(Stopped):
        precision_recall(np.zeros((50, 3)), np.ones((50, 3)), 1)
    assert len(blocks) == 3


def test_sets_on_and_off_the_manifold():
    rng = np.random.default_rng(2)
    reference = rng.normal(size=(30, 4))
    assert precision_recall(reference, reference, 3) == (1.0, 1.0)
    assert precision_recall(reference + 100, reference, 3) == (0.0, 0.0)
    # One mode of two: all samples are real, half of the reference is missed.
    modes = np.concatenate([reference, reference + 100])
    assert precision_recall(reference, modes, 3) == (1.0, 0.5)


def test_a_ball_holds_its_edge():
    """Integers about 0, so that no distance is rounded: 3 and -3 lie as far out as the ball of 2 and -2 reaches."""
    reference = np.array([[-2.0], [-1.0], [1.0], [2.0]])
    assert precision_recall(np.array([[3.0], [-3.0], [4.0], [5.0]]), reference, 1)[0] == 0.5


def test_too_few_images_for_the_neighbours():
    with pytest.raises(ValueError, match="3 neighbours"):
        precision_recall(np.zeros((3, 2)), np.zeros((9, 2)), 3)


def test_inception_score_of_certain_and_balanced_classes_is_their_number():
    certain = np.eye(5, dtype=np.float32)[np.arange(1000) % 5]
    assert inception_score(certain, splits=1, seed=0)[0] == pytest.approx(5)
    same = np.full((1000, 5), 0.2, np.float32)
    assert inception_score(same, splits=10, seed=0) == pytest.approx((1, 0))


def test_inception_score_is_the_definition():
    probabilities = np.random.default_rng(3).dirichlet(np.ones(4), size=50)
    marginal = probabilities.mean(axis=0)
    total = sum(p[k] * np.log(p[k] / marginal[k]) for p in probabilities for k in range(4))
    assert inception_score(probabilities, splits=1, seed=0)[0] == pytest.approx(np.exp(total / 50))


def test_inception_scores_spread_is_that_of_its_splits():
    """As published: the deviation of the splits, not an estimate from them."""
    probabilities = np.random.default_rng(4).dirichlet(np.ones(4), size=40)
    order = numpy_generator(7, "inception score").permutation(40)
    scores = [inception_score(probabilities[part], splits=1, seed=0)[0] for part in np.array_split(order, 3)]
    assert inception_score(probabilities, splits=3, seed=7) == pytest.approx((np.mean(scores), np.std(scores)))


def test_inception_score_does_not_fall_for_a_file_in_class_order():
    ordered = np.repeat(np.eye(10), 500, axis=0)
    mean, spread = inception_score(ordered, splits=10, seed=0)
    assert mean > 9.8  # in file order each split would hold one class and score 1
    assert spread < 0.1
    assert inception_score(ordered, splits=10, seed=0) == (mean, spread)


def test_class_agreement_counts_equal_classes():
    assert class_agreement(np.array([0, 1, 2, 3]), np.array([0, 1, 3, 3])) == 0.75
    with pytest.raises(ValueError, match="labels"):
        class_agreement(np.array([0]), np.array([0, 1]))
