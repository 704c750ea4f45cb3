"""Random draws as a function of (seed, stream, position), so that resuming needs no hidden state."""

from __future__ import annotations

import zlib

import numpy as np
import torch


def draw_seed(seed: int, stream: str, *position: int) -> int:
    """A 63-bit seed for one draw.

    Args:
        seed: the run's seed.
        stream: what is drawn, such as "crop": different streams are independent.
        position: where, such as (epoch, index) or (step, rank).
    """
    entropy = [seed, zlib.crc32(stream.encode()), *position]
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> 1)


def numpy_generator(seed: int, stream: str, *position: int) -> np.random.Generator:
    """NumPy generator for one draw; see `draw_seed`."""
    return np.random.Generator(np.random.Philox(draw_seed(seed, stream, *position)))


def torch_generator(seed: int, stream: str, *position: int, device: str | torch.device = "cpu") -> torch.Generator:
    """Torch generator for one draw; see `draw_seed`."""
    return torch.Generator(device=device).manual_seed(draw_seed(seed, stream, *position))


def seed_torch(seed: int, stream: str, *position: int) -> None:
    """Set torch's global generators (dropout, initialisation) for one step; see `draw_seed`."""
    torch.manual_seed(draw_seed(seed, stream, *position))
