"""Learning-rate schedules, as a pure function of the step: nothing to save, nothing to resume."""

from __future__ import annotations

import math
from typing import Literal


def learning_rate_factor(
    step: int,
    steps: int,
    schedule: Literal["constant", "cosine", "linear"],
    warmup_steps: int,
    final_fraction: float,
) -> float:
    """What the learning rate of one step is multiplied by.

    Warmup is linear: step s of the first `warmup_steps` has the factor (s + 1) / warmup_steps, so the last
    of them has 1. After it the factor falls, along half a cosine or a line, to `final_fraction` at the very
    last step; "constant" stays at 1 and does not look at `final_fraction`.

    Args:
        step: counted from 0.
        steps: steps of the whole training.
        schedule: shape after the warmup.
        warmup_steps: 0 for none.
        final_fraction: factor of step `steps` - 1, in [0, 1].
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    # Step warmup_steps - 1 has the factor 1; without a warmup step 0 has.
    top = max(warmup_steps - 1, 0)
    progress = min((step - top) / max(steps - 1 - top, 1), 1.0)
    remaining = 0.5 * (1 + math.cos(math.pi * progress)) if schedule == "cosine" else 1 - progress
    return final_fraction + (1 - final_fraction) * remaining
