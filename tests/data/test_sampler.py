"""Oracle: the definition, an endless sequence of permutations laid end to end."""

from __future__ import annotations

import time

import numpy as np
import pytest

from crt.data.sampler import batch_rows, rank_slice
from crt.errors import UserError


@pytest.mark.parametrize("num_rows, batch_size", [(10, 4), (7, 7), (5, 12), (1, 3), (64, 16)])
def test_epochs_are_permutations(num_rows, batch_size):
    steps = -(-3 * num_rows // batch_size)
    parts = [batch_rows(num_rows, batch_size, step, seed=3) for step in range(steps)]
    rows, epochs = (np.concatenate(arrays)[: 3 * num_rows] for arrays in zip(*parts, strict=True))
    assert epochs.tolist() == np.repeat([0, 1, 2], num_rows).tolist()
    for epoch in range(3):
        assert sorted(rows[epochs == epoch]) == list(range(num_rows))


def test_epochs_and_seeds_differ():
    orders = {tuple(batch_rows(50, 50, step, seed)[0]) for step in range(3) for seed in range(3)}
    assert len(orders) == 9


def test_any_step_is_what_walking_there_gives():
    walked = [batch_rows(13, 5, step, 0)[0] for step in range(40)]
    for step in (39, 0, 17):
        assert np.array_equal(batch_rows(13, 5, step, 0)[0], walked[step])


def test_far_steps_cost_no_more_than_near_ones():
    batch_rows(1_000_000, 256, 0, 0)
    start = time.perf_counter()
    rows, epochs = batch_rows(1_000_000, 256, 10**9, 0)
    assert time.perf_counter() - start < 2  # one permutation, not the quarter of a million before it
    assert epochs[0] == 10**9 * 256 // 1_000_000 and rows.max() < 1_000_000


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_share_the_batch_without_gap_or_overlap(world_size):
    rows, _ = batch_rows(100, 8, 5, 0)
    parts = [rows[rank_slice(8, rank, world_size)] for rank in range(world_size)]
    assert np.array_equal(np.concatenate(parts), rows)


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(UserError, match=r"batch_size 10 .* 4 processes: choose a multiple of 4"):
        rank_slice(10, 0, 4)


def test_no_rows_is_a_programming_error():
    with pytest.raises(ValueError, match="no rows"):
        batch_rows(0, 4, 0, 0)
