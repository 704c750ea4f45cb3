"""AdamW of bfloat16 gradients on a CPU in one pass over memory, compiled by Numba at first use.

torch's pieces of it (to float32, scaling, moments and weights, to bfloat16) walk through memory five times. Arrays of
bfloat16 are given as their bits, uint16.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from crt.cpu_kernels import compile_kernel, from_bits, to_bits


@compile_kernel
def sum_of_squares(gradient: Any) -> Any:
    """Of a few thousand elements, in float32."""
    total = np.float32(0)
    for k in range(gradient.size):
        value = from_bits(gradient[k])
        total += value * value
    return total


@compile_kernel
def adamw(
    master: Any, gradient: Any, mean: Any, square: Any, weights: Any,
    scale: Any, decay: Any, beta1: Any, beta2: Any, rate: Any, correction: Any, eps: Any,
) -> None:  # fmt: skip
    """One step of some elements: float32 master weights and moments, and the weights rounded to the nearest bfloat16.

    Args:
        scale: of the gradient, float32 as all that follow.
        decay: factor of the weights.
        rate: the learning rate over the first moment's bias correction.
        correction: 1 over the root of the second moment's.
    """
    for k in range(master.size):
        value = from_bits(gradient[k]) * scale
        first = beta1 * mean[k] + (np.float32(1) - beta1) * value
        second = beta2 * square[k] + (np.float32(1) - beta2) * value * value
        mean[k], square[k] = first, second
        updated = master[k] * decay - rate * first / (np.sqrt(second) * correction + eps)
        master[k] = updated
        weights[k] = to_bits(updated)
