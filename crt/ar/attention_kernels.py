"""Attention of one position over a key-value cache on a CPU, in one pass over the cache, by Numba at first use.

Torch's batched products of a single query take several times as long as the memory needs to bring keys and values, and
rotation, softmax and the writing of the cache are a dozen small operations beside them. Arrays of bfloat16 are given as
their bits, uint16; sums are in float32.

Vectors run along a head's channels. As in `crt.tokenizer.winograd_kernels`, LLVM vectorises only with constant sizes,
flat arrays and unsigned indices, hence a kernel for each head width.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numba
import numpy as np

_HALF_BITS, _ONE, _ROUNDING, _BIAS = np.uint32(16), np.uint32(1), np.uint32(0x7FFF), np.int32(127)
_MANTISSA = np.int32(23)
_compile = numba.njit(
    nogil=True, error_model="numpy", boundscheck=False, fastmath={"contract", "nsz", "reassoc", "arcp"}
)
_LOG2_E, _LOWEST, _HALF = np.float32(math.log2(math.e)), np.float32(-126), np.float32(0.5)
# Of 2^f, for f from -1/2 to 1/2: a relative error of 1e-7, that of float32.
_C1, _C2, _C3, _C4, _C5, _C6 = (np.float32(math.log(2) ** k / math.factorial(k)) for k in range(1, 7))


@_compile
def _exp(x: Any) -> Any:
    """The exponential of a float32 that is not positive; one that vectors can take, unlike the library's."""
    z = max(x * _LOG2_E, _LOWEST)
    whole = np.floor(z + _HALF)
    f = z - whole
    power = np.float32(1) + f * (_C1 + f * (_C2 + f * (_C3 + f * (_C4 + f * (_C5 + f * _C6)))))
    return power * np.int32((np.int32(whole) + _BIAS) << _MANTISSA).view(np.float32)


@_compile
def _from_bits(bits: Any) -> Any:
    return np.uint32(np.uint32(bits) << _HALF_BITS).view(np.float32)


@_compile
def _to_bits(value: Any) -> Any:
    """The nearest bfloat16, ties to even."""
    bits = np.float32(value).view(np.uint32)
    return np.uint16((bits + _ROUNDING + ((bits >> _HALF_BITS) & _ONE)) >> _HALF_BITS)


@_compile
def _same(value: Any) -> Any:
    return np.float32(value)


@functools.cache
def attention_kernel(head_width: int, as_bits: bool) -> Callable[..., None]:
    """Attends at one position, for some of the rows; a row is one head of one sequence.

    Returns:
        Function of (qkv, keys, values, turn, out, scratch, first, last, position, heads, length), all arrays flat: qkv
        (B, 3 H, D), the position's own, unrotated; keys and values (B H, length, D), of which it writes the position's;
        turn (D,), cosine and sine by pair; out (B H, D); scratch float32 (length + 2 D,); rows [first, last).
    """
    d, pairs = np.uintp(head_width), np.uintp(head_width // 2)
    zero, one, two, three, four = (np.uintp(number) for number in range(5))
    scale = np.float32(head_width**-0.5)
    load, store = (_from_bits, _to_bits) if as_bits else (_same, _same)

    @_compile
    def scores_of(keys: Any, at: Any, scratch: Any, count: Any) -> Any:
        """Products of the query with the row's keys, into the scratch from 2 D on; the largest."""
        highest = np.float32(-np.inf)
        for t in range(count):
            start = at + t * d
            total = np.float32(0)
            for k in range(d):
                total += scratch[k] * load(keys[start + k])
            scratch[two * d + t] = total
            highest = max(highest, total)
        return highest

    @_compile
    def weigh(scratch: Any, count: Any, highest: Any) -> Any:
        """Scores to exponentials; their sum."""
        total = np.float32(0)
        for t in range(two * d, two * d + count):
            weight = _exp(scratch[t] - highest)
            scratch[t] = weight
            total += weight
        return total

    @_compile
    def sum_values(values: Any, at: Any, scratch: Any, count: Any) -> None:
        """The row's values by their weights, into the scratch from D on; four at a time: fewer stores of the sum."""
        for k in range(d):
            scratch[d + k] = np.float32(0)
        weights, whole = two * d, count // four * four
        for t in range(zero, whole, four):
            v0 = at + t * d
            v1, v2, v3 = v0 + d, v0 + two * d, v0 + three * d
            w0, w1 = scratch[weights + t], scratch[weights + t + one]
            w2, w3 = scratch[weights + t + two], scratch[weights + t + three]
            for k in range(d):
                scratch[d + k] += (w0 * load(values[v0 + k]) + w1 * load(values[v1 + k])) + (
                    w2 * load(values[v2 + k]) + w3 * load(values[v3 + k])
                )
        for t in range(whole, count):
            v0, w0 = at + t * d, scratch[weights + t]
            for k in range(d):
                scratch[d + k] += w0 * load(values[v0 + k])

    @_compile
    def attend(
        qkv: Any, keys: Any, values: Any, turn: Any, out: Any, scratch: Any,
        first: Any, last: Any, position: Any, heads: Any, length: Any,
    ) -> None:  # fmt: skip
        for row in range(np.uintp(first), np.uintp(last)):
            q = (row // heads * three * heads + row % heads) * d
            k_new, v_new = q + heads * d, q + two * heads * d
            cached = row * length * d
            new = cached + position * d
            for pair in range(pairs):
                even, odd = two * pair, two * pair + one
                cos, sin = turn[even], turn[odd]
                a, b = load(qkv[q + even]), load(qkv[q + odd])
                scratch[even], scratch[odd] = (a * cos - b * sin) * scale, (a * sin + b * cos) * scale
                a, b = load(qkv[k_new + even]), load(qkv[k_new + odd])
                keys[new + even], keys[new + odd] = store(a * cos - b * sin), store(a * sin + b * cos)
            for k in range(d):
                values[new + k] = qkv[v_new + k]
            count = position + one
            total = weigh(scratch, count, scores_of(keys, cached, scratch, count))
            sum_values(values, cached, scratch, count)
            for k in range(d):
                out[row * d + k] = store(scratch[d + k] / total)

    return attend
