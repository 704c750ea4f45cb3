"""Forms of the models' operations that are fast on a CPU; on other devices torch's own kernels are.

Each computes what the general form beside its call does, to rounding. torch 2.11 is slow here at the backward pass of
fused attention (`benchmarks/stage2.md`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from crt import processor


def is_cpu(x: Tensor) -> bool:
    """Whether these forms serve for `x`.

    The compiler fuses the general ones itself, and FLOPs and memory, which fake tensors tell, are counted for those.
    """
    if isinstance(x, FakeTensor) or torch.compiler.is_compiling():
        return False
    return x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float32)


def widens(x: Tensor) -> bool:
    """Whether products of `x` are faster in float32: see `crt.processor.multiplies_bfloat16`."""
    return x.dtype == torch.bfloat16 and is_cpu(x) and not processor.multiplies_bfloat16()


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """Product of bfloat16, (..., C) and (O, C) to (..., O), by one of float32; keeps what torch's own would."""
    result: Tensor = _WideLinear.apply(x, weight)
    return result


class _WideLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x.float(), weight.float()).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        of_x, of_weight = ctx.needs_input_grad
        wide = gradient.float()
        x_gradient = (wide @ weight.float()).to(x.dtype) if of_x else None
        if not of_weight:
            return x_gradient, None
        rows, inputs = wide.reshape(-1, len(weight)), x.float().reshape(-1, weight.shape[1])
        return x_gradient, (rows.T @ inputs).to(weight.dtype)


def attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
    """Softmax of the scores times the values, the scores kept for the backward pass.

    Scores are rounded to the inputs' type, unless it `widens`; the softmax is computed in float32.

    Args:
        q, k, v: (B, H, T, D).
        causal: whether a place sees itself and the places before it only.

    Returns:
        (B, H, T, D).
    """
    dtype = q.dtype
    if widens(q):
        q, k, v = q.float(), k.float(), v.float()
    length, width = q.shape[-2:]
    mask = torch.full((length, length), -math.inf, dtype=q.dtype).triu(1) if causal else q.new_zeros(())
    shape = q.shape[:2]
    # Copies, which keep nothing else alive.
    q, k, v = (x.flatten(0, 1).contiguous() for x in (q, k, v))  # B H, T, D
    scores = torch.baddbmm(mask, q, k.transpose(1, 2), alpha=width**-0.5)  # B H, T, T
    return torch.bmm(scores.softmax(-1), v).unflatten(0, shape).to(dtype)


def once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A backward pass that says so where it shall be differentiated again: what it saved is no function of its inputs.

    torch's own `once_differentiable` is silent where no gradient that comes in requires gradients.
    """

    @functools.wraps(backward)
    def checked(ctx: Any, *gradients: Tensor) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "create_graph=True: the CPU forms of stage 2 have first derivatives only: use model.double(), "
                "where torch's own serve"
            )
        return backward(ctx, *gradients)

    return checked


def flat(x: Tensor) -> NDArray[Any]:
    """The memory of a contiguous tensor on the CPU, (n,), as Numba takes it; that of bfloat16 as bits, uint16."""
    x = x.detach()
    return (x.view(torch.uint16) if x.dtype == torch.bfloat16 else x).numpy().reshape(-1)
