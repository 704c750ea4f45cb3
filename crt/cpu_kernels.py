"""What the kernels that Numba compiles for CPUs have in common: how they are compiled, and bfloat16 as its bits."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

_LAST, _HALF_BITS, _ROUNDING = np.uint32(1), np.uint32(16), np.uint32(0x7FFF)

compile_kernel: Any = numba.njit(
    nogil=True, error_model="numpy", boundscheck=False, fastmath={"contract", "nsz", "reassoc", "arcp"}
)
"""Decorator: sums in any order and fused products, as vectors need; NaN and infinity stay what they are."""


@compile_kernel
def from_bits(bits: Any) -> Any:
    """The float32 of a bfloat16's bits, uint16."""
    return np.uint32(np.uint32(bits) << _HALF_BITS).view(np.float32)


@compile_kernel
def to_bits(value: Any) -> Any:
    """The bits, uint16, of the bfloat16 nearest to a float32, ties to even."""
    bits = np.float32(value).view(np.uint32)
    return np.uint16((bits + _ROUNDING + ((bits >> _HALF_BITS) & _LAST)) >> _HALF_BITS)
