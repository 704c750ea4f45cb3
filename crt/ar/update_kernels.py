"""AdamW of bfloat16 gradients on a CPU in one pass over memory, compiled by Numba at first use.

torch's pieces of it (to float32, scaling, moments and weights, to bfloat16) walk through memory five times. Arrays of
bfloat16 are given as their bits, uint16.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

_ONE, _HALF_BITS, _ROUNDING = np.uint32(1), np.uint32(16), np.uint32(0x7FFF)
_compile = numba.njit(
    nogil=True, error_model="numpy", boundscheck=False, fastmath={"contract", "nsz", "reassoc", "arcp"}
)


@_compile
def _widened(bits: Any) -> Any:
    return np.uint32(np.uint32(bits) << _HALF_BITS).view(np.float32)


@_compile
def sum_of_squares(gradient: Any) -> Any:
    """Of a few thousand elements, in float32."""
    total = np.float32(0)
    for k in range(gradient.size):
        value = _widened(gradient[k])
        total += value * value
    return total


@_compile
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
        value = _widened(gradient[k]) * scale
        first = beta1 * mean[k] + (np.float32(1) - beta1) * value
        second = beta2 * square[k] + (np.float32(1) - beta2) * value * value
        mean[k], square[k] = first, second
        updated = master[k] * decay - rate * first / (np.sqrt(second) * correction + eps)
        master[k] = updated
        bits = np.float32(updated).view(np.uint32)
        weights[k] = np.uint16((bits + _ROUNDING + ((bits >> _HALF_BITS) & _ONE)) >> _HALF_BITS)
