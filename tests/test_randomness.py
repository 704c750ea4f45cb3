"""Draws are functions of (seed, stream, position). Oracle: NumPy's SeedSequence, and the check value of CRC-32."""

from __future__ import annotations

import numpy as np
import torch

from crt.randomness import draw_seed, numpy_generator, seed_torch, torch_generator

# What CRC-32 gives for these digits, by its definition: the same in every process and on every machine.
STREAM, CHECK_VALUE = "123456789", 0xCBF43926


def test_a_draw_is_the_same_in_every_process():
    state = np.random.SeedSequence([7, CHECK_VALUE, 3, 4]).generate_state(1, np.uint64)[0]
    assert draw_seed(7, STREAM, 3, 4) == int(state) >> 1


def test_seed_stream_and_each_part_of_the_position_tell_draws_apart():
    draws = [
        draw_seed(seed, stream, epoch, index)
        for seed in (0, 1)
        for stream in ("crop", "flip")
        for epoch in range(3)
        for index in range(3)
    ]
    assert len(set(draws)) == len(draws)
    assert all(0 <= draw < 2**63 for draw in draws)


def test_generators_begin_at_their_draw_whatever_was_drawn_before():
    first, again = (numpy_generator(0, "crop", 5).integers(0, 2**63, 4) for _ in range(2))
    assert np.array_equal(first, again)
    drawn = torch.rand(4, generator=torch_generator(0, "crop", 5))
    seed_torch(0, "crop", 5)
    assert torch.equal(torch.rand(4), drawn)
    assert torch.equal(torch.rand(4, generator=torch_generator(0, "crop", 5)), drawn)
    assert not torch.equal(torch.rand(4, generator=torch_generator(0, "crop", 6)), drawn)
