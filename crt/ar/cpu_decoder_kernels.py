"""What a step of decoding does on a CPU between its linear layers, a kernel each, by Numba at first use.

Torch's batched products of a single query take several times as long as the memory needs to bring keys and values, and
rotation, softmax, the writing of the cache, norms and activations are dozens of operations, each of a few microseconds,
that all start anew.

Arrays are flat. Those of bfloat16 are given as their bits, uint16 (`as_bits`); what is summed is float32. As in
`crt.tokenizer.winograd_kernels`, LLVM vectorises only with constant sizes and unsigned indices, hence a kernel for each
width.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from crt.cpu_kernels import compile_kernel, from_bits, to_bits

_BIAS, _MANTISSA = np.int32(127), np.int32(23)
_LOG2_E, _LOWEST, _HALF, _UNIT = np.float32(math.log2(math.e)), np.float32(-126), np.float32(0.5), np.float32(1)
# Of 2^f, for f from -1/2 to 1/2: a relative error of 1e-7, that of float32.
_C1, _C2, _C3, _C4, _C5, _C6 = (np.float32(math.log(2) ** k / math.factorial(k)) for k in range(1, 7))
_ZERO, _ONE, _TWO, _THREE, _FOUR = (np.uintp(number) for number in range(5))
_CACHE_LINE = 64  # bytes


@compile_kernel
def _exp(x: Any) -> Any:
    """The exponential of a float32 that is not positive; one that vectors can take, unlike the library's."""
    z = max(x * _LOG2_E, _LOWEST)
    whole = np.floor(z + _HALF)
    f = z - whole
    power = _UNIT + f * (_C1 + f * (_C2 + f * (_C3 + f * (_C4 + f * (_C5 + f * _C6)))))
    return power * np.int32((np.int32(whole) + _BIAS) << _MANTISSA).view(np.float32)


@compile_kernel
def _same(value: Any) -> Any:
    return np.float32(value)


def _prefetch_type(_: Any, array: Any, index: Any) -> tuple[Any, Callable[..., Any]]:
    """Have the line of array[index] brought to the second-level cache while work goes on."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        address = builder.bitcast(builder.gep(data, [args[1]]), cgutils.voidptr_t)
        number = ir.IntType(32)
        function_type = ir.FunctionType(ir.VoidType(), [address.type, number, number, number])
        function = cgutils.get_or_insert_function(builder.module, function_type, "llvm.prefetch.p0i8")
        read, second_level, data_cache = number(0), number(2), number(1)
        builder.call(function, [address, read, second_level, data_cache])
        return context.get_dummy_value()

    return types.void(array, index), generate


_prefetch: Any = intrinsic(_prefetch_type)


def _conversions(as_bits: bool) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    """Of an array's element to float32, and back."""
    return (from_bits, to_bits) if as_bits else (_same, _same)


@functools.cache
def attention_kernel(head_width: int, as_bits: bool) -> Callable[..., None]:
    """Attends at one position, for some of the rows; a row is one head of one sequence.

    Returns:
        Function of (qkv, keys, values, turn, out, scratch, first, last, position, heads, length): qkv (B, 3 H, D), the
        position's own, unrotated; keys and values (B H, length, D), of which it writes the position's; turn float32
        (D,), cosine and sine by pair; out (B H, D); scratch float32 (length + 2 D,); rows [first, last).
    """
    d, pairs = np.uintp(head_width), np.uintp(head_width // 2)
    step = np.uintp(_CACHE_LINE // (2 if as_bits else 4))
    steps = (d + step - _ONE) // step
    scale = np.float32(head_width**-0.5)
    load, store = _conversions(as_bits)

    @compile_kernel
    def scores_of(keys: Any, values: Any, at: Any, scratch: Any, count: Any) -> Any:
        """Products of the query with the row's keys, into the scratch from 2 D on; the largest.

        The row's values are on their way meanwhile: the processor itself foresees one array only, page by page.
        """
        highest = np.float32(-np.inf)
        for t in range(count):
            start = at + t * d
            for line in range(steps):
                _prefetch(values, start + line * step)
            total = np.float32(0)
            for k in range(d):
                total += scratch[k] * load(keys[start + k])
            scratch[_TWO * d + t] = total
            highest = max(highest, total)
        return highest

    @compile_kernel
    def weigh(scratch: Any, count: Any, highest: Any) -> Any:
        """Scores to exponentials; their sum."""
        total = np.float32(0)
        for t in range(_TWO * d, _TWO * d + count):
            weight = _exp(scratch[t] - highest)
            scratch[t] = weight
            total += weight
        return total

    @compile_kernel
    def sum_values(keys: Any, values: Any, at: Any, following: Any, scratch: Any, count: Any) -> None:
        """The row's values by their weights, into the scratch from D on; four at a time: fewer stores of the sum.

        The keys of the row that follows are on their way meanwhile.
        """
        for k in range(d):
            scratch[d + k] = np.float32(0)
        weights, whole = _TWO * d, count // _FOUR * _FOUR
        for t in range(_ZERO, whole, _FOUR):
            for line in range(_FOUR * steps):
                _prefetch(keys, following + t * d + line * step)
            v0 = at + t * d
            v1, v2, v3 = v0 + d, v0 + _TWO * d, v0 + _THREE * d
            w0, w1 = scratch[weights + t], scratch[weights + t + _ONE]
            w2, w3 = scratch[weights + t + _TWO], scratch[weights + t + _THREE]
            for k in range(d):
                scratch[d + k] += (w0 * load(values[v0 + k]) + w1 * load(values[v1 + k])) + (
                    w2 * load(values[v2 + k]) + w3 * load(values[v3 + k])
                )
        for t in range(whole, count):
            v0, w0 = at + t * d, scratch[weights + t]
            for k in range(d):
                scratch[d + k] += w0 * load(values[v0 + k])

    @compile_kernel
    def attend(
        qkv: Any, keys: Any, values: Any, turn: Any, out: Any, scratch: Any,
        first: Any, last: Any, position: Any, heads: Any, length: Any,
    ) -> None:  # fmt: skip
        for row in range(np.uintp(first), np.uintp(last)):
            q = (row // heads * _THREE * heads + row % heads) * d
            k_new, v_new = q + heads * d, q + _TWO * heads * d
            cached, following = row * length * d, min(row + _ONE, np.uintp(last) - _ONE) * length * d
            new = cached + position * d
            for pair in range(pairs):
                even, odd = _TWO * pair, _TWO * pair + _ONE
                cos, sin = turn[even], turn[odd]
                a, b = load(qkv[q + even]), load(qkv[q + odd])
                scratch[even], scratch[odd] = (a * cos - b * sin) * scale, (a * sin + b * cos) * scale
                a, b = load(qkv[k_new + even]), load(qkv[k_new + odd])
                keys[new + even], keys[new + odd] = store(a * cos - b * sin), store(a * sin + b * cos)
            for k in range(d):
                values[new + k] = qkv[v_new + k]
            count = position + _ONE
            total = weigh(scratch, count, scores_of(keys, values, cached, scratch, count))
            sum_values(keys, values, cached, following, scratch, count)
            for k in range(d):
                out[row * d + k] = store(scratch[d + k] / total)

    return attend


@functools.cache
def norm_kernel(width: int, as_bits: bool) -> Callable[..., None]:
    """Adds to the residual stream and normalizes it, for all rows.

    Returns:
        Function of (x, addend, gain, out, rows, eps): x and out (rows, C), x is added to in place; addend (rows, C), or
        empty; gain (C,).
    """
    c = np.uintp(width)
    load, store = _conversions(as_bits)

    @compile_kernel
    def add_and_normalize(x: Any, addend: Any, gain: Any, out: Any, rows: Any, eps: Any) -> None:
        for row in range(np.uintp(rows)):
            start = row * c
            if addend.size:
                for k in range(c):
                    x[start + k] = store(load(x[start + k]) + load(addend[start + k]))
            squares = np.float32(0)
            for k in range(c):
                value = load(x[start + k])
                squares += value * value
            factor = _UNIT / np.sqrt(squares / np.float32(width) + np.float32(eps))
            for k in range(c):
                out[start + k] = store(load(x[start + k]) * factor * load(gain[k]))

    return add_and_normalize


@functools.cache
def swiglu_kernel(width: int, as_bits: bool) -> Callable[..., None]:
    """The feed-forward layer's activation, silu(gate) up, for some of the rows.

    Returns:
        Function of (gate_up, out, first, last): gate_up (rows, 2 F), gates first; out (rows, F); rows [first, last).
    """
    f = np.uintp(width)
    load, store = _conversions(as_bits)

    @compile_kernel
    def swiglu(gate_up: Any, out: Any, first: Any, last: Any) -> None:
        for row in range(np.uintp(first), np.uintp(last)):
            gates, target = row * _TWO * f, row * f
            for k in range(f):
                gate = load(gate_up[gates + k])
                power = _exp(-abs(gate))
                silu = gate * (_UNIT if gate >= 0 else power) / (_UNIT + power)
                out[target + k] = store(silu * load(gate_up[gates + f + k]))

    return swiglu
