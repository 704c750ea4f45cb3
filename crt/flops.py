"""Floating-point operations, counted by torch on the meta device: nothing is computed and nothing is guessed."""

from __future__ import annotations

from collections.abc import Callable

from torch.utils.flop_counter import FlopCounterMode


def count_flops(work: Callable[[], object]) -> int:
    """FLOPs (multiply and add count as two) of all matrix products, convolutions and attentions in `work`.

    Build models and inputs of `work` on the meta device to count without computing.
    """
    counter = FlopCounterMode(display=False)
    with counter:
        work()
    return int(counter.get_total_flops())
