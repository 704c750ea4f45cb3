"""Collectives of tokenizer training: what several processes do together to compute what one would alone.

Each process holds an equal share of the global batch, and its loss is the mean over that share. A term
that is not itself a mean over images (batch statistics, entropies, norms) goes through the differentiable
mean below. In one process all of these do nothing.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

_BUCKET_BYTES = 64 * 2**20


def world_size() -> int:
    """Number of processes that train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def mean_over_ranks(value: Tensor) -> Tensor:
    """Mean of equally shaped tensors, one per process; gradients flow back to all of them.

    Its gradient is that of the mean loss over the processes once `average_gradients` has run.
    """
    return _DifferentiableSum.apply(value) / world_size() if world_size() > 1 else value


def sum_over_ranks(value: Tensor) -> Tensor:
    """Sum of equally shaped tensors, one per process; carries no gradient, and leaves `value` as it is."""
    total = value.detach().clone()
    if world_size() > 1:
        dist.all_reduce(total)
    return total


def average_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Replace each parameter's gradient by its mean over the processes.

    A parameter without a gradient is left alone, so it must lack one in every process.
    """
    if world_size() == 1:
        return
    bucket: list[Tensor] = []
    size = 0
    for parameter in parameters:
        if parameter.grad is not None:
            bucket.append(parameter.grad)
            size += parameter.grad.nbytes
        if size >= _BUCKET_BYTES:
            _average(bucket)
            bucket, size = [], 0
    _average(bucket)


def _average(tensors: list[Tensor]) -> None:
    """Average tensors of one type over the processes in place, in a single message."""
    if not tensors:
        return
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    dist.all_reduce(flat)
    flat /= world_size()
    parts = flat.split([tensor.numel() for tensor in tensors])
    torch._foreach_copy_(tensors, [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)])


class _DifferentiableSum(torch.autograd.Function):
    """Sum over the processes, whose gradient is the sum of the processes' gradients."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, value: Tensor) -> Tensor:
        return sum_over_ranks(value)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *gradients: Tensor) -> Tensor:
        return sum_over_ranks(gradients[0])
