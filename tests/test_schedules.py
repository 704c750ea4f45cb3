"""Oracle: the schedules' definitions, at the steps where an off-by-one would show."""

from __future__ import annotations

import math

import pytest

from crt.schedules import learning_rate_factor


def factors(schedule, steps, warmup, final):
    return [learning_rate_factor(step, steps, schedule, warmup, final) for step in range(steps)]


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear"])
def test_warmup_rises_evenly_to_one(schedule):
    assert factors(schedule, 20, 4, 0.1)[:4] == [0.25, 0.5, 0.75, 1.0]


def test_constant_stays():
    assert factors("constant", 10, 2, 0.0)[1:] == [1.0] * 9


@pytest.mark.parametrize("warmup", [0, 1, 5])
def test_decay_ends_at_the_final_fraction_at_the_last_step(warmup):
    for schedule in ("cosine", "linear"):
        values = factors(schedule, 30, warmup, 0.1)
        assert values[-1] == pytest.approx(0.1)
        assert max(values) == values[max(warmup - 1, 0)] == 1.0
        assert values[max(warmup - 1, 0) :] == sorted(values[max(warmup - 1, 0) :], reverse=True)


@pytest.mark.parametrize("warmup", [0, 1, 5])
def test_a_line_falls_by_equal_steps_from_the_last_step_of_the_warmup(warmup):
    top = max(warmup - 1, 0)
    expected = [1.0 - 0.9 * step / (29 - top) for step in range(30 - top)]
    assert factors("linear", 30, warmup, 0.1)[top:] == pytest.approx(expected)


def test_shapes_halfway():
    assert learning_rate_factor(50, 101, "cosine", 0, 0.2) == pytest.approx(0.2 + 0.8 * 0.5)
    assert learning_rate_factor(25, 101, "linear", 0, 0.2) == pytest.approx(0.2 + 0.8 * 0.75)
    assert learning_rate_factor(25, 101, "cosine", 0, 0.0) == pytest.approx((1 + math.cos(math.pi / 4)) / 2)


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear"])
def test_trainings_no_longer_than_their_warmup(schedule):
    assert factors(schedule, 1, 0, 0.5)[0] in (1.0, 0.5)
    assert factors(schedule, 3, 10, 0.5) == [0.1, 0.2, pytest.approx(0.3)]
    assert factors(schedule, 2, 2, 0.5) == [0.5, 1.0]
