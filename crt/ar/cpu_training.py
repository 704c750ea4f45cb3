"""Operations of a training step on a CPU by kernels that Numba compiles, with their backward passes.

They compute what the general forms in `crt.ar.model` do, to rounding (dropout draws other elements). torch 2.11 walks
through memory once for each of their parts, and its generator takes longer for a random mask than all else does for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from crt.ar import cpu_training_kernels as kernels
from crt.ar.cpu_attention_kernels import Shape, attention_kernels, attention_tile
from crt.cpu import flat, once
from crt.threads import share_among_threads

# Rows whose sums over the batch are added by themselves: the same bits with any number of threads.
_ROWS = 64
_ELEMENTS = 2**16
# Of all images and heads, from which attention is compiled: that takes 4 to 7 s, more than short sequences give back.
_LEAST_SCORES = 2**20


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in float32. Same shape."""
    result: Tensor = _RMSNorm.apply(x, weight, eps)
    return result


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x, gains = x.contiguous(), weight.float()
        result, inverse = torch.empty_like(x), torch.empty(x.numel() // x.shape[-1])
        arrays = flat(x), flat(gains), np.float32(eps), flat(result), flat(inverse)
        _by_rows(kernels.rms_norm_kernels(x.shape[-1], _as_bits(x))[0], arrays, len(inverse))
        ctx.save_for_backward(x, weight, inverse)
        return result

    @staticmethod
    @once
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, inverse = ctx.saved_tensors
        result, gains = torch.empty_like(x), weight.float()
        of_gains = torch.zeros(-(-len(inverse) // _ROWS), len(gains))
        arrays = tuple(map(flat, (x, gradient.contiguous(), gains, inverse, result)))
        kernel = kernels.rms_norm_kernels(x.shape[-1], _as_bits(x))[1]

        def work(first: int, last: int) -> None:
            for start in range(first, last, _ROWS):
                some = of_gains[start // _ROWS].numpy()
                kernel(*arrays, some, np.uintp(start), np.uintp(min(start + _ROWS, last)))

        share_among_threads(work, len(inverse), _ROWS)
        return result, of_gains.sum(0).to(weight.dtype), None


def dropout(x: Tensor, probability: float) -> Tensor:
    """Elements set to zero with `probability` (to a multiple of 2^-32), the others scaled up. Same shape."""
    result: Tensor = _Dropout.apply(x, probability)
    return result


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, probability: float) -> Tensor:
        ctx.seed = torch.randint(2**32, (2,)).numpy().astype(np.uint32)
        ctx.probability = probability
        return _dropped(x, ctx)

    @staticmethod
    @once
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _dropped(gradient, ctx), None


def _dropped(x: Tensor, ctx: Any) -> Tensor:
    """What stays of `x` in the places that the seed tells."""
    x = x.contiguous()
    result = torch.empty_like(x)
    arrays, kernel = (flat(x), flat(result)), kernels.dropout_kernel(_as_bits(x))
    threshold = min(round(ctx.probability * 2**32), 2**32 - 1)
    numbers = *ctx.seed, np.uint32(threshold), np.float32(1 / (1 - threshold / 2**32))

    def work(first: int, last: int) -> None:
        kernel(*(array[first:last] for array in arrays), np.uintp(first), *numbers)

    share_among_threads(work, x.numel(), _ELEMENTS)
    return result


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of both in one: (..., 2 F) to (..., F)."""
    result: Tensor = _SwiGLU.apply(gate_up)
    return result


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        width, x = x.shape[-1] // 2, x.contiguous()
        result = x.new_empty(*x.shape[:-1], width)
        _by_rows(kernels.swiglu_kernels(width, _as_bits(x))[0], (flat(x), flat(result)), result.numel() // width)
        ctx.save_for_backward(x)
        return result

    @staticmethod
    @once
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        width, result = x.shape[-1] // 2, torch.empty_like(x)
        arrays = flat(x), flat(gradient.contiguous()), flat(result)
        _by_rows(kernels.swiglu_kernels(width, _as_bits(x))[1], arrays, gradient.numel() // width)
        return result


def attends(x: Tensor, heads: int) -> bool:
    """Whether `causal_attention` is worth compiling for a residual stream, (B, T, C)."""
    return x.shape[0] * heads * x.shape[1] ** 2 >= _LEAST_SCORES


def causal_attention(qkv: Tensor, heads: int, rotation: Tensor) -> Tensor:
    """Each place attends to itself and those before it, by queries and keys rotated as by `crt.ar.model.rotate`.

    Args:
        qkv: (B, T, 3 H D): queries, keys and values by heads.
        heads: H.
        rotation: (T, D / 2, 2) float32.

    Returns:
        (B, T, H D).
    """
    result: Tensor = _CausalAttention.apply(qkv, heads, rotation)
    return result


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, heads: int, rotation: Tensor) -> Tensor:
        batch, length, channels = qkv.shape
        qkv, ctx.heads, ctx.rotation = qkv.contiguous(), heads, rotation
        result = qkv.new_empty(batch, length, channels // 3)
        logarithms = torch.empty(batch, heads, length)
        _CausalAttention.run(0, ctx, (qkv, *rotation.unbind(-1), result, logarithms))
        ctx.save_for_backward(qkv, logarithms)
        return result

    @staticmethod
    @once
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        qkv, logarithms = ctx.saved_tensors
        result = torch.empty_like(qkv)
        _CausalAttention.run(1, ctx, (qkv, *ctx.rotation.unbind(-1), logarithms, gradient, result))
        return result, None, None

    @staticmethod
    def run(way: int, ctx: Any, tensors: tuple[Tensor, ...]) -> None:
        batch, length, channels = tensors[0].shape
        width = channels // 3 // ctx.heads
        tile = attention_tile(tensors[0].dtype, width)
        shape = Shape(length, ctx.heads, width, tile, _as_bits(tensors[0]))
        # bfloat16 by pairs of channels.
        arrays = (flat(tensor.contiguous()) for tensor in tensors)
        pairs = tuple(array.view(np.uint32) if array.dtype == np.uint16 else array for array in arrays)
        _by_rows(attention_kernels(shape)[way], pairs, batch * ctx.heads)


def cross_entropy(logits: Tensor, codes: Tensor) -> Tensor:
    """Negative log-likelihood in float32: (N, K) and (N,) int64 to (N,)."""
    result: Tensor = _CrossEntropy.apply(logits, codes)
    return result


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, codes: Tensor) -> Tensor:
        logits, codes = logits.contiguous(), codes.contiguous()
        losses, sums = torch.empty(len(codes)), torch.empty(len(codes))
        kernel = kernels.cross_entropy_kernels(logits.shape[-1], _as_bits(logits))[0]
        _by_rows(kernel, tuple(map(flat, (logits, codes, losses, sums))), len(codes))
        ctx.save_for_backward(logits, codes, sums)
        return losses

    @staticmethod
    @once
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        logits, codes, sums = ctx.saved_tensors
        result = torch.empty_like(logits)
        kernel = kernels.cross_entropy_kernels(logits.shape[-1], _as_bits(logits))[1]
        _by_rows(kernel, tuple(map(flat, (logits, codes, gradient.contiguous(), sums, result))), len(codes))
        return result, None


def _as_bits(x: Tensor) -> bool:
    return x.dtype == torch.bfloat16


def _by_rows(kernel: Callable[..., None], arrays: tuple[Any, ...], rows: int) -> None:
    """Call kernel(*arrays, first, last) for some of the rows in each thread."""
    share_among_threads(lambda first, last: kernel(*arrays, np.uintp(first), np.uintp(last)), rows, 1)
