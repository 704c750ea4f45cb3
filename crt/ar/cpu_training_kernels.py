"""What a training step on a CPU does between its matrix products, each in one pass over memory, by Numba at first use.

torch walks through memory once for each operation, and in bfloat16 converts on the way; at size B and few images that
took as long as a quarter of the products (`benchmarks/stage2.md`). Arrays are contiguous; those of bfloat16 are given
as their bits, uint16 (`as_bits`); what is computed is float32. As in `crt.tokenizer.winograd_kernels`, LLVM vectorises
only with constant sizes and unsigned indices, hence a kernel for each width. Rows are those of the last dimension: each
kernel treats [first, last) of them, and what it writes does not depend on how rows are shared.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from crt.cpu_kernels import compile_kernel, conversions, exp_of_negative

_ZERO, _TWO = np.uintp(0), np.uintp(2)
_UNIT = np.float32(1)
# Of the largest logit, which is looked for in so many places at once.
_LANES = np.uintp(64)
_THIRTEEN, _SIXTEEN = np.uint32(13), np.uint32(16)
_FACTORS = np.uint32(0x85EBCA6B), np.uint32(0xC2B2AE35)


@functools.cache
def rms_norm_kernels(width: int, as_bits: bool) -> tuple[Callable[..., None], Callable[..., None]]:
    """The norm and its backward pass; see `crt.ar.cpu_training.rms_norm`.

    Returns:
        Functions of (x, gains, eps, out, inverse, first, last), which fills out and inverse, float32 (N,), and of
        (x, gradient, gains, inverse, out, of_gains, first, last), which fills out and adds to of_gains, float32 (C,).
    """
    c, share = np.uintp(width), np.float32(1 / width)
    load, store = conversions(as_bits)

    @compile_kernel
    def forward(x: Any, gains: Any, eps: Any, out: Any, inverse: Any, first: Any, last: Any) -> None:
        for row in range(first, last):
            start = row * c
            squares = np.float32(0)
            for k in range(c):
                value = load(x[start + k])
                squares += value * value
            scale = _UNIT / np.sqrt(squares * share + eps)
            inverse[row] = scale
            for k in range(c):
                out[start + k] = store(load(x[start + k]) * scale * gains[k])

    @compile_kernel
    def backward(
        x: Any, gradient: Any, gains: Any, inverse: Any, out: Any, of_gains: Any, first: Any, last: Any
    ) -> None:
        for row in range(first, last):
            start = row * c
            # Where the square overflowed, the gradient is no number, as torch's.
            scale = inverse[row] if inverse[row] != 0 else np.float32(np.nan)
            product = np.float32(0)
            for k in range(c):
                given, value = load(gradient[start + k]), load(x[start + k]) * scale
                of_gains[k] += given * value
                product += given * gains[k] * value
            slope = product * share
            for k in range(c):
                value = load(gradient[start + k]) * gains[k] - load(x[start + k]) * scale * slope
                out[start + k] = store(value * scale)

    return forward, backward


@compile_kernel
def _mixed(word: Any) -> Any:
    """A permutation of uint32 whose every output bit hangs on every input bit (the finalizer of MurmurHash3)."""
    word = np.uint32((word ^ (word >> _SIXTEEN)) * _FACTORS[0])
    word = np.uint32((word ^ (word >> _THIRTEEN)) * _FACTORS[1])
    return np.uint32(word ^ (word >> _SIXTEEN))


@functools.cache
def dropout_kernel(as_bits: bool) -> Callable[..., None]:
    """Dropping, in the forward pass and in the same places in the backward pass; see `crt.ar.cpu_training.dropout`.

    Returns:
        Function of (x, out, start, low, high, threshold, scale): the elements from `start` on of an array, whose draws
        are their places mixed with a seed of two uint32; one below the threshold drops its element.
    """
    load, store = conversions(as_bits)

    @compile_kernel
    def drop(x: Any, out: Any, start: Any, low: Any, high: Any, threshold: Any, scale: Any) -> None:
        for k in range(np.uintp(x.size)):
            draw = _mixed(np.uint32(_mixed(np.uint32(np.uint32(start + k) + low)) ^ high))
            out[k] = store(load(x[k]) * (scale if draw >= threshold else np.float32(0)))

    return drop


@functools.cache
def swiglu_kernels(width: int, as_bits: bool) -> tuple[Callable[..., None], Callable[..., None]]:
    """silu(gate) up and its backward pass, of rows of (gate, up), 2 `width` in all.

    Returns:
        Functions of (x, out, first, last) and of (x, gradient, out, first, last).
    """
    f = np.uintp(width)
    load, store = conversions(as_bits)

    @compile_kernel
    def sigmoid(gate: Any) -> Any:
        power = exp_of_negative(-abs(gate))
        return (_UNIT if gate >= 0 else power) / (_UNIT + power)

    @compile_kernel
    def forward(x: Any, out: Any, first: Any, last: Any) -> None:
        for row in range(first, last):
            start = row * _TWO * f
            for k in range(f):
                gate = load(x[start + k])
                out[row * f + k] = store(gate * sigmoid(gate) * load(x[start + f + k]))

    @compile_kernel
    def backward(x: Any, gradient: Any, out: Any, first: Any, last: Any) -> None:
        for row in range(first, last):
            start = row * _TWO * f
            for k in range(f):
                gate, up, given = load(x[start + k]), load(x[start + f + k]), load(gradient[row * f + k])
                share = sigmoid(gate)
                out[start + k] = store(given * up * share * (_UNIT + gate * (_UNIT - share)))
                out[start + f + k] = store(given * gate * share)

    return forward, backward


@functools.cache
def cross_entropy_kernels(num_codes: int, as_bits: bool) -> tuple[Callable[..., None], Callable[..., None]]:
    """Negative log-likelihoods and their gradient; see `crt.ar.cpu_training.cross_entropy`.

    Returns:
        Functions of (logits, codes, losses, sums, first, last), which fills losses and the logarithms of the sums of
        exponentials, both float32 (N,), and of (logits, codes, gradient, sums, out, first, last). Logits and out are
        (N, K).
    """
    size, whole = np.uintp(num_codes), np.uintp(num_codes) // _LANES * _LANES
    load, store = conversions(as_bits)

    @compile_kernel
    def largest(logits: Any, start: Any, scratch: Any) -> Any:
        """Of a row; without those that are no number."""
        for lane in range(_LANES):
            scratch[lane] = np.float32(-np.inf)
        for block in range(_ZERO, whole, _LANES):
            for lane in range(_LANES):
                value = load(logits[start + block + lane])
                scratch[lane] = value if value > scratch[lane] else scratch[lane]
        for k in range(whole, size):
            value = load(logits[start + k])
            scratch[_ZERO] = value if value > scratch[_ZERO] else scratch[_ZERO]
        highest = scratch[_ZERO]
        for lane in range(_LANES):
            highest = scratch[lane] if scratch[lane] > highest else highest
        return highest

    @compile_kernel
    def forward(logits: Any, codes: Any, losses: Any, sums: Any, first: Any, last: Any) -> None:
        scratch = np.empty(_LANES, np.float32)
        for row in range(first, last):
            start = row * size
            highest = largest(logits, start, scratch)
            total, plain = np.float32(0), np.float32(0)
            for k in range(size):
                value = load(logits[start + k])
                total += exp_of_negative(value - highest)
                plain += value
            sums[row] = highest + np.log(total) + plain * np.float32(0)  # no number where a logit is none
            losses[row] = sums[row] - load(logits[start + np.uintp(codes[row])])

    @compile_kernel
    def backward(logits: Any, codes: Any, gradient: Any, sums: Any, out: Any, first: Any, last: Any) -> None:
        for row in range(first, last):
            start, total = row * size, sums[row]
            factor = gradient[row] + total * np.float32(0)
            for k in range(size):
                out[start + k] = store(exp_of_negative(load(logits[start + k]) - total) * factor)
            at = start + np.uintp(codes[row])
            out[at] = store((exp_of_negative(load(logits[at]) - total) - _UNIT) * factor)

    return forward, backward
