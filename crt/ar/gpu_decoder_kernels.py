"""Triton kernels of one sampling step on a GPU: few of them, and each reads the memory it needs once.

A layer of a step for up to `FEW` sequences takes five: norm and qkv; attention; out and residual; norm, gate and up;
down and residual. Their products are sums along the rows of the weights, for no matrix unit helps where a weight
serves so few sequences: what counts is how many bytes are under way. With more sequences torch multiplies, and kernels
do what lies between.

Rounding is that of the model in torch: sums are in float32, and what a module returns is rounded to the model's
precision. All kernels find the position in memory, so one recording of a step serves every position.

How much a program does follows from the shapes, by rules that a sweep on an H200 gave (`benchmarks/sampling.md`):

- `linear`: a thread reads 16 bytes of a row of the weights at a time, and a program's threads lie side by side along
  the row, so that only their sums cross over. Behind a norm, which each program does for itself, a program has one
  warp and up to 8 rows while there are enough programs; without, 2 rows and up to 8 warps while there are too few.
- `attend`: a program for each head of a sequence, with 32 channels of keys per thread at a time and as many requested
  ahead. It has 4 warps, or 8 where there are too few programs for the device and each should end soon.

Tried without gain: starting a kernel before the one before it has ended (programmatic dependent launch), which made
steps of size 3B take 1.6 times as long.

The tests run the kernels in Triton's interpreter: it has no arithmetic in bfloat16, so all of it is in float32 here.

Shapes: M sequences, C width, H heads, D channels per head, F hidden width of the feed-forward layer, T codes of an
image, K codes in the codebook.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

FEW = 4
"""Most sequences that `linear` takes."""
DRAW_LIMIT = 16384
"""Most codes that `draw` takes."""
_MOST_ROWS, _NORM_PROGRAMS = 8, 1700
_MOST_WARPS, _READING_WARPS = 8, 2500
_PROGRAMS = 2 * 132
_LANES = 32
_LOWEST = tl.constexpr(-1.0e30)  # of scores; -inf would make differences undefined


def linear(
    x: Tensor,
    weight: Tensor,
    *,
    gain: Tensor | None = None,
    eps: float = 0.0,
    gated: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    """Product of few rows with a matrix, and what stands before and after it in a block.

    Args:
        x: (M, inputs), M <= `FEW`.
        weight: (outputs, inputs), or (2 outputs, inputs) if `gated`.
        gain: (inputs,): x is normalized first, as by `F.rms_norm`.
        eps: of the norm.
        gated: the first half of the product is the gate: silu(gate) * up.
        residual: (M, outputs): the product is added to it in place.

    Returns:
        (M, outputs): `residual` where there is one.
    """
    sequences, inputs = x.shape
    rows, outputs = len(weight), len(weight) // 2 if gated else len(weight)
    y = torch.empty(sequences, outputs, dtype=x.dtype, device=x.device) if residual is None else residual
    program_rows, warps, vector = 2, 1, 16 // x.element_size()
    if gain is not None:
        while program_rows < _MOST_ROWS and rows >= 2 * program_rows * _NORM_PROGRAMS:
            program_rows *= 2
    else:
        while warps < _MOST_WARPS and rows // 2 * warps < _READING_WARPS and warps * _LANES * vector < inputs:
            warps *= 2
    _linear[(triton.cdiv(rows, program_rows),)](
        x, x if gain is None else gain, weight, y, outputs, eps,
        M=sequences, K=inputs, ROWS=program_rows, BLOCK=warps * _LANES * vector, VECTOR=vector,
        NORM=gain is not None, GATED=gated, RESIDUAL=residual is not None, num_warps=warps,
    )  # fmt: skip
    return y


def attend(qkv: Tensor, rotation: Tensor, keys: Tensor, values: Tensor, *, position: Tensor) -> Tensor:
    """Attention of one code to itself and all before it; its key and value join the caches.

    Args:
        qkv: (M, 3 C), not rotated.
        rotation: (T, D/2, 2) float32.
        keys: (M, H, T, D), filled before `position`.
        values: the same.
        position: (1,) int64.

    Returns:
        (M, C).
    """
    sequences, heads, num_tokens, width = keys.shape
    y = torch.empty(sequences, heads * width, dtype=qkv.dtype, device=qkv.device)
    programs, channels = sequences * heads, triton.next_power_of_2(width)
    warps = 8 if programs < _PROGRAMS else 4
    _attend[(programs,)](
        qkv, rotation, keys, values, position, y, width**-0.5 * math.log2(math.e), heads, num_tokens,
        D=width, CHANNELS=channels, BLOCK=max(warps * _LANES * 32 // channels, 1), num_warps=warps,
    )  # fmt: skip
    return y


def norm(x: Tensor, gain: Tensor, eps: float, addend: Tensor | None = None) -> Tensor:
    """`F.rms_norm` of (M, C); `addend` is added to x in place before."""
    y, width = torch.empty_like(x), x.shape[1]
    block = triton.next_power_of_2(width)
    _norm[(len(x),)](
        x, x if addend is None else addend, gain, y, eps,
        C=width, BLOCK=block, ADD=addend is not None, num_warps=8 if block > 2048 else 4,
    )  # fmt: skip
    return y


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up: (M, 2 F) to (M, F)."""
    sequences, width = len(gate_up), gate_up.shape[1] // 2
    y = torch.empty(sequences, width, dtype=gate_up.dtype, device=gate_up.device)
    block = min(1024, triton.next_power_of_2(width))
    _swiglu_rows[(sequences, triton.cdiv(width, block))](gate_up, y, width, BLOCK=block, num_warps=4)
    return y


def draw(
    logits: Tensor,
    uniforms: Tensor,
    scales: Tensor,
    position: Tensor,
    *,
    codes: Tensor,
    previous: Tensor,
    temperature: float,
) -> None:
    """Guidance, temperature, and a draw among all codes, as `crt.ar.generator.draw_next` does it.

    Args:
        logits: (B, K) for B images, or (2 B, K) under guidance: with classes first, then without. K <= `DRAW_LIMIT`.
        uniforms: (B, T) float64.
        scales: (T,) float32 of guidance.
        position: (1,) int64.
        codes: (B, T) int64; the column at `position` is written.
        previous: (B,) or (2 B,) int64: the codes again, for both halves.
        temperature: divides the logits.
    """
    num_images, num_tokens = codes.shape
    block = triton.next_power_of_2(logits.shape[1])
    _draw[(num_images,)](
        logits, uniforms, scales, position, codes, previous, num_images, num_tokens, logits.shape[1], temperature,
        BLOCK=block, GUIDED=len(logits) > num_images,
        num_warps=min(max(block // 1024, 1), 16),
    )  # fmt: skip


@triton.jit
def _linear(
    x, gain, weight, y, outputs, eps,
    M: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr,
    NORM: tl.constexpr, GATED: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    k = tl.arange(0, BLOCK)
    row = tl.arange(0, ROWS)
    if GATED:  # gate and up in turns
        output = tl.program_id(0) * (ROWS // 2) + row // 2
        row = output + row % 2 * outputs
    else:
        output = tl.program_id(0) * ROWS + row
        row = output
    inside = (output < outputs)[:, None]
    piece = weight + row.to(tl.int64)[:, None] * K + k[None, :]
    # Weights never change: the first ones are requested before the kernels before this one have ended.
    w = tl.load(piece, mask=inside & (k < K)[None, :], other=0.0, eviction_policy="evict_first")
    w_next = tl.load(piece + BLOCK, mask=inside & (k + BLOCK < K)[None, :], other=0.0, eviction_policy="evict_first")
    if NORM:
        g = tl.load(gain + k, mask=k < K, other=0.0)
    scale0, scale1, scale2, scale3 = 1.0, 1.0, 1.0, 1.0
    if NORM:
        square0 = tl.zeros((BLOCK,), tl.float32)
        square1, square2, square3 = square0, square0, square0
        for start in tl.static_range(0, K, BLOCK):
            square0 += _squares(x, start + k, K)
            if M > 1:
                square1 += _squares(x + K, start + k, K)
            if M > 2:
                square2 += _squares(x + 2 * K, start + k, K)
            if M > 3:
                square3 += _squares(x + 3 * K, start + k, K)
        scale0, scale1, scale2, scale3 = _totals(square0, square1, square2, square3, 0, M)
        scale0 = tl.rsqrt(scale0 / K + eps)
        if M > 1:
            scale1 = tl.rsqrt(scale1 / K + eps)
        if M > 2:
            scale2 = tl.rsqrt(scale2 / K + eps)
        if M > 3:
            scale3 = tl.rsqrt(scale3 / K + eps)
    sum0 = tl.zeros((ROWS, BLOCK // VECTOR), tl.float32)
    sum1, sum2, sum3 = sum0, sum0, sum0
    for start in range(0, K, BLOCK):
        here, later = start + k, start + 2 * BLOCK + k
        w_later = tl.load(
            piece + (start + 2 * BLOCK), mask=inside & (later < K)[None, :], other=0.0, eviction_policy="evict_first"
        )
        if NORM:
            g_next = tl.load(gain + BLOCK + here, mask=here + BLOCK < K, other=0.0)
        else:
            g = 0.0
        sum0 += _products(w, x, g, scale0, here, K, ROWS, BLOCK, VECTOR, NORM)
        if M > 1:
            sum1 += _products(w, x + K, g, scale1, here, K, ROWS, BLOCK, VECTOR, NORM)
        if M > 2:
            sum2 += _products(w, x + 2 * K, g, scale2, here, K, ROWS, BLOCK, VECTOR, NORM)
        if M > 3:
            sum3 += _products(w, x + 3 * K, g, scale3, here, K, ROWS, BLOCK, VECTOR, NORM)
        w, w_next = w_next, w_later
        if NORM:
            g = g_next
    sum0, sum1, sum2, sum3 = _totals(sum0, sum1, sum2, sum3, 1, M)
    _finish(sum0, y, tl.program_id(0), outputs, ROWS, GATED, RESIDUAL)
    if M > 1:
        _finish(sum1, y + outputs, tl.program_id(0), outputs, ROWS, GATED, RESIDUAL)
    if M > 2:
        _finish(sum2, y + 2 * outputs, tl.program_id(0), outputs, ROWS, GATED, RESIDUAL)
    if M > 3:
        _finish(sum3, y + 3 * outputs, tl.program_id(0), outputs, ROWS, GATED, RESIDUAL)


@triton.jit
def _squares(x, k, K: tl.constexpr):
    values = tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)
    return values * values


@triton.jit
def _products(
    w, x, g, scale, k, K: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Products of (ROWS, BLOCK) with a piece of x, summed over what one thread holds: (ROWS, BLOCK / VECTOR)."""
    dtype = x.dtype.element_ty
    values = tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)
    if NORM:
        values = _normalized(values, scale, g, dtype).to(tl.float32)
    return tl.sum(tl.reshape(w.to(tl.float32) * values[None, :], (ROWS, BLOCK // VECTOR, VECTOR)), axis=2)


@triton.jit
def _totals(a, b, c, d, AXIS: tl.constexpr, M: tl.constexpr):
    """Sums of the first M tensors along an axis, all in one: the program's warps wait for each other once."""
    if M == 1:
        a = tl.sum(a, axis=AXIS)
    elif M == 2:
        a, b = tl.reduce((a, b), AXIS, _add_two)
    else:
        a, b, c, d = tl.reduce((a, b, c, d), AXIS, _add_four)
    return a, b, c, d


@triton.jit
def _add_two(a, b, a_more, b_more):
    return a + a_more, b + b_more


@triton.jit
def _add_four(a, b, c, d, a_more, b_more, c_more, d_more):
    return a + a_more, b + b_more, c + c_more, d + d_more


@triton.jit
def _finish(sums, y, program, outputs, ROWS: tl.constexpr, GATED: tl.constexpr, RESIDUAL: tl.constexpr):
    dtype = y.dtype.element_ty
    result = sums.to(dtype)
    if GATED:
        gate, up = tl.split(tl.reshape(result, (ROWS // 2, 2)))
        result = _swiglu(gate, up, dtype)
        output = program * (ROWS // 2) + tl.arange(0, ROWS // 2)
    else:
        output = program * ROWS + tl.arange(0, ROWS)
    if RESIDUAL:
        before = tl.load(y + output, mask=output < outputs, other=0.0)
        result = (before.to(tl.float32) + result.to(tl.float32)).to(dtype)
    tl.store(y + output, result, mask=output < outputs)


@triton.jit
def _swiglu(gate, up, dtype: tl.constexpr):
    gate = gate.to(tl.float32)
    return ((gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32) * up.to(tl.float32)).to(dtype)


@triton.jit
def _attend(
    qkv, rotation, keys, values, position, y, scale, heads, num_tokens,
    D: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    d, t = tl.arange(0, CHANNELS), tl.arange(0, BLOCK)
    used = d < D
    here = tl.load(position).to(tl.int32)
    keys += program.to(tl.int64) * num_tokens * D
    values += program.to(tl.int64) * num_tokens * D
    at = t[:, None] * D + d[None, :]
    # Earlier steps filled the caches, and the position moves after the last kernel: both may be read at once.
    k = tl.load(keys + at, mask=(t < here)[:, None] & used[None, :], other=0.0)
    v = tl.load(values + at, mask=(t < here)[:, None] & used[None, :], other=0.0)
    row = qkv + (program // heads).to(tl.int64) * (3 * heads * D) + program % heads * D
    q = _rotated(row, rotation + here * D, d, used)
    own_k = _rotated(row + heads * D, rotation + here * D, d, used)
    own_v = tl.load(row + 2 * heads * D + d, mask=used, other=0.0)
    tl.store(keys + here * D + d, own_k, mask=used)
    tl.store(values + here * D + d, own_v, mask=used)
    q = q.to(tl.float32) * scale
    own_score = tl.sum(q * own_k.to(tl.float32), axis=0)
    # Online softmax (base 2) for each of the BLOCK places by itself: nothing crosses over before the end.
    highest = tl.full((BLOCK,), _LOWEST, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    mean = tl.zeros((BLOCK, CHANNELS), tl.float32)
    for start in range(0, here, BLOCK):
        ahead = start + BLOCK
        k_ahead = tl.load(keys + ahead * D + at, mask=(ahead + t < here)[:, None] & used[None, :], other=0.0)
        v_ahead = tl.load(values + ahead * D + at, mask=(ahead + t < here)[:, None] & used[None, :], other=0.0)
        score = tl.where(start + t < here, tl.sum(q[None, :] * k.to(tl.float32), axis=1), _LOWEST)
        higher = tl.maximum(highest, score)
        keep = tl.exp2(highest - higher)
        weight = tl.where(start + t < here, tl.exp2(score - higher), 0.0)
        total = total * keep + weight
        mean = mean * keep[:, None] + weight[:, None] * v.to(tl.float32)
        highest = higher
        k, v = k_ahead, v_ahead
    top = tl.maximum(tl.max(highest, axis=0), own_score)
    share, own_weight = tl.exp2(highest - top), tl.exp2(own_score - top)
    result = tl.sum(mean * share[:, None], axis=0) + own_weight * own_v.to(tl.float32)
    result = result / (tl.sum(total * share, axis=0) + own_weight)
    tl.store(y + program.to(tl.int64) * D + d, result.to(y.dtype.element_ty), mask=used)


@triton.jit
def _rotated(x, rotation, d, used):
    """A head's channels, neighbouring pairs turned, in the precision of x."""
    even = d % 2 == 0
    values = tl.load(x + d, mask=used, other=0.0).to(tl.float32)
    partners = tl.load(x + tl.where(even, d + 1, d - 1), mask=used, other=0.0).to(tl.float32)
    cos = tl.load(rotation + d // 2 * 2, mask=used, other=0.0)
    sin = tl.load(rotation + d // 2 * 2 + 1, mask=used, other=0.0)
    return (values * cos + tl.where(even, -partners, partners) * sin).to(x.dtype.element_ty)


@triton.jit
def _norm(x, addend, gain, y, eps, C: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr):
    dtype = x.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * C
    c = tl.arange(0, BLOCK)
    values = tl.load(x + row + c, mask=c < C, other=0.0).to(tl.float32)
    if ADD:
        more = tl.load(addend + row + c, mask=c < C, other=0.0).to(tl.float32)
        added = (values + more).to(dtype)
        tl.store(x + row + c, added, mask=c < C)
        values = added.to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values, axis=0) / C + eps)
    gains = tl.load(gain + c, mask=c < C, other=0.0)
    tl.store(y + row + c, _normalized(values, scale, gains, dtype), mask=c < C)


@triton.jit
def _normalized(x, scale, gain, dtype: tl.constexpr):
    return ((x * scale).to(dtype).to(tl.float32) * gain.to(tl.float32)).to(dtype)


@triton.jit
def _swiglu_rows(gate_up, y, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gate_up + row * 2 * width + f, mask=f < width, other=0.0)
    up = tl.load(gate_up + (row * 2 + 1) * width + f, mask=f < width, other=0.0)
    tl.store(y + row * width + f, _swiglu(gate, up, y.dtype.element_ty), mask=f < width)


@triton.jit
def _draw(
    logits, uniforms, scales, position, codes, previous, num_images, num_tokens, num_codes, temperature,
    BLOCK: tl.constexpr, GUIDED: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(0)
    here = tl.load(position).to(tl.int32)
    code = tl.arange(0, BLOCK)
    inside = code < num_codes
    logit = tl.load(logits + image * num_codes + code, mask=inside, other=0.0).to(tl.float32)
    if GUIDED:
        without = tl.load(logits + (num_images + image) * num_codes + code, mask=inside, other=0.0).to(tl.float32)
        logit = without + tl.load(scales + here) * (logit - without)
    logit = tl.where(inside, logit / temperature, float("-inf"))
    weight = tl.exp(logit - tl.max(logit, axis=0))
    cumulative = tl.cumsum(weight.to(tl.float64), axis=0)
    # Added in another order, the sum may go down by a rounding where a weight is 0: such codes are left out.
    total = tl.max(tl.where(weight > 0, cumulative, 0.0), axis=0)
    target = tl.load(uniforms + image * num_tokens + here) * total
    # It may round up to the total, beyond the last code: step below it.
    below = (total.to(tl.int64, bitcast=True) - 1).to(tl.float64, bitcast=True)
    target = tl.minimum(target, below)
    drawn = tl.min(tl.where((cumulative > target) & (weight > 0), code, num_codes - 1), axis=0).to(tl.int64)
    tl.store(codes + image * num_tokens + here, drawn)
    tl.store(previous + image, drawn)
    if GUIDED:
        tl.store(previous + num_images + image, drawn)
