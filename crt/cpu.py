"""Forms of the models' operations that are fast on a CPU; on other devices torch's own kernels are.

Each computes what the general form beside its call does, to rounding. torch 2.11 is slow here at the backward pass of
fused attention, at random bits (its generator spends a 64-bit word on each element), at rotation pair by pair, and at
passes over whole tensors, each from memory and back, where the work is less than the way (`benchmarks/stage2.md`).
"""

from __future__ import annotations

import functools
import math
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

Result = TypeVar("Result")

# What one operation touches between its passes should stay in a core's cache.
_ELEMENTS_AT_ONCE = 2**18
_INTEGER_OF = {torch.bfloat16: torch.int16, torch.float32: torch.int32}


@functools.cache
def processor_features() -> frozenset[str]:
    """What this processor can do beyond its kind's least, by LLVM's names."""
    from llvmlite import binding

    return frozenset(name for name, present in binding.get_host_cpu_features().items() if present)


def is_cpu(x: Tensor) -> bool:
    """Whether these forms serve for `x`.

    The compiler fuses the general ones itself, and FLOPs and memory, which fake tensors tell, are counted for those.
    """
    if isinstance(x, FakeTensor) or torch.compiler.is_compiling():
        return False
    return x.device.type == "cpu" and x.dtype in _INTEGER_OF


def attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
    """Softmax of the scores times the values, the scores kept for the backward pass.

    Scores are rounded to the inputs' type, the softmax is computed in float32.

    Args:
        q, k, v: (B, H, T, D).
        causal: whether a place sees itself and the places before it only.

    Returns:
        (B, H, T, D).
    """
    length, width = q.shape[-2:]
    mask = torch.full((length, length), -math.inf, dtype=q.dtype).triu(1) if causal else q.new_zeros(())
    shape = q.shape[:2]
    # Copies, which keep nothing else alive.
    q, k, v = (x.flatten(0, 1).contiguous() for x in (q, k, v))  # B H, T, D
    scores = torch.baddbmm(mask, q, k.transpose(1, 2), alpha=width**-0.5)  # B H, T, T
    return torch.bmm(scores.softmax(-1), v).unflatten(0, shape)


def _once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A backward pass that says so where it shall be differentiated again: what it saved is no function of its inputs.

    torch's own `once_differentiable` is silent where no gradient that comes in requires gradients.
    """

    @functools.wraps(backward)
    def checked(ctx: Any, gradient: Tensor) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "create_graph=True: the CPU forms of stage 2 have first derivatives only: use model.double(), "
                "where torch's own serve"
            )
        return backward(ctx, gradient)

    return checked


def dropout(x: Tensor, probability: float) -> Tensor:
    """Elements set to zero with `probability` (to a multiple of 2^-15), the others scaled up. Same shape."""
    return _Dropout.apply(x, probability) if probability > 0 else x


class _Dropout(torch.autograd.Function):
    """Drops by integer arithmetic on the elements' bits, four draws from each random word."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, probability: float) -> Tensor:
        threshold = min(round(probability * 2**15), 2**15 - 1)
        words = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_()
        keep = words.view(torch.int16)[: x.numel()].view(x.shape)
        # 15 random bits minus the threshold: the sign, spread over all bits, is 0 where the element stays.
        keep.bitwise_and_(2**15 - 1).sub_(threshold).bitwise_right_shift_(15).bitwise_not_()
        ctx.save_for_backward(keep)
        ctx.scale = 1 / (1 - threshold / 2**15)
        return _kept(x, keep).mul_(ctx.scale)

    @staticmethod
    @_once
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (keep,) = ctx.saved_tensors
        return _kept(gradient, keep).mul_(ctx.scale), None


def _kept(x: Tensor, keep: Tensor) -> Tensor:
    """`x` where `keep` has all bits set, 0 where it has none."""
    integer = _INTEGER_OF[x.dtype]
    return torch.bitwise_and(x.contiguous().view(integer), keep.to(integer)).view(x.dtype)


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Neighbouring channels as complex numbers, times those of `rotation`: (B, T, heads, D) by (T, D/2, 2)."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))  # B, T, heads, D/2
    turned = pairs * torch.view_as_complex(rotation)[:, None]
    return torch.view_as_real(turned).flatten(-2).type_as(x)


def cross_entropy(logits: Tensor, codes: Tensor) -> Tensor:
    """Negative log-likelihood in float32: (N, K) and (N,) int64 to (N,)."""
    return _CrossEntropy.apply(logits, codes)


class _CrossEntropy(torch.autograd.Function):
    """Some rows at a time, and no copy of the logits kept in float32."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, codes: Tensor) -> Tensor:
        ctx.save_for_backward(logits, codes)
        pairs = zip(logits.split(_rows(logits)), codes.split(_rows(logits)), strict=True)
        return torch.cat([F.cross_entropy(some.float(), targets, reduction="none") for some, targets in pairs])

    @staticmethod
    @_once
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        logits, codes = ctx.saved_tensors
        result = torch.empty_like(logits)
        rows = _rows(logits)
        for some, targets, factor, out in zip(
            logits.split(rows), codes.split(rows), gradient.split(rows), result.split(rows), strict=True
        ):
            difference = some.softmax(-1, dtype=torch.float32)
            difference[torch.arange(len(targets)), targets] -= 1
            torch.mul(difference, factor[:, None], out=difference)
            out.copy_(difference)
        return result, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in float32. Same shape."""
    return _RMSNorm.apply(x, weight, eps)


class _RMSNorm(torch.autograd.Function):
    """Some rows at a time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        result, inverse = torch.empty_like(x), x.new_empty(x.numel() // x.shape[-1], 1, dtype=torch.float32)
        factor = weight.float()
        for some, out, scale in _pieces(x, result, inverse):
            wide = some.float()
            torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps, out=scale)
            out.copy_((wide * scale).mul_(factor))
        ctx.save_for_backward(x, weight, inverse)
        return result

    @staticmethod
    @_once
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, inverse = ctx.saved_tensors
        # Where the square overflowed, the gradient is no number, as torch's: zeros would hide that a run diverged.
        inverse = inverse.masked_fill(inverse == 0, math.nan)
        result, factor = torch.empty_like(x), weight.float()
        of_weight = torch.zeros_like(factor)
        for some, given, out, scale in _pieces(x, gradient, result, inverse):
            normed, wide = some.float().mul_(scale), given.float()
            of_weight += (wide * normed).sum(0)
            wide.mul_(factor)
            slope = (wide * normed).mean(-1, keepdim=True)
            out.copy_(wide.sub_(normed.mul_(slope)).mul_(scale))
        return result, of_weight.to(weight.dtype), None


def _rows(x: Tensor) -> int:
    """Rows (of the last dimension) that are treated at once."""
    return max(1, _ELEMENTS_AT_ONCE // x.shape[-1])


def _pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Tensors of (..., C), each C its own, cut alike into some rows of (rows, C)."""
    flat = [x.reshape(-1, x.shape[-1]) for x in tensors]
    return zip(*(x.split(_rows(flat[0])) for x in flat), strict=True)


def flat(x: Tensor) -> NDArray[Any]:
    """The memory of a contiguous tensor on the CPU, (n,), as Numba takes it; that of bfloat16 as bits, uint16."""
    x = x.detach()
    return (x.view(torch.uint16) if x.dtype == torch.bfloat16 else x).numpy().reshape(-1)


def share_among_threads(work: Callable[[int, int], None], size: int, unit: int) -> None:
    """Call work(first, last) for ranges that make up `size`, cut at multiples of `unit`, in torch's number of threads.

    For what leaves Python's lock, such as Numba's kernels, whose own threads would be a second OpenMP that spins beside
    torch's. In each of these threads torch works alone.
    """
    threads = torch.get_num_threads()
    if threads == 1 or size <= unit:
        work(0, size)
        return
    share = -(-size // (threads * unit)) * unit
    cuts = [*range(0, size, share), size]
    for _ in _pool(os.getpid(), threads).map(work, cuts, cuts[1:]):
        pass


def alone(work: Callable[[], Result]) -> Result:
    """work() in a thread in which torch works alone: after each use of several its threads spin, in the way of ours."""
    threads = torch.get_num_threads()
    return work() if threads == 1 else _pool(os.getpid(), threads).submit(work).result()


@functools.lru_cache(maxsize=1)
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """Threads that multiply matrices alone. `process`: a fork has none of its parent's threads."""
    del process
    pool = ThreadPoolExecutor(threads, "crt", initializer=_work_alone)
    # The setting is the thread's own and the default of threads to come: put that back once all of these are there.
    together = threading.Barrier(threads)
    list(pool.map(lambda _: together.wait(), range(threads)))
    torch.set_num_threads(threads)
    return pool


def _work_alone() -> None:
    # A thread's first look at the setting sets it to the default: after that the thread keeps its own.
    torch.get_num_threads()
    torch.set_num_threads(1)
