"""Forms of the models' operations that are fast on a CPU; on other devices torch's own kernels are.

Each computes what the general form beside its call does, to rounding. torch 2.11 is slow here at the backward pass of
fused attention (`benchmarks/stage2.md`).
"""

from __future__ import annotations

import ctypes
import functools
import math
import os
import platform
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

Result = TypeVar("Result")

# Elements of the residual stream from which kernels are compiled: that takes seconds, as trainings of small models do.
_LEAST_COMPILED = 2**16

# Numbers of the system call and of what it asks for, on x86-64.
_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA = 158, 0x1023, 18


@functools.cache
def processor_features() -> frozenset[str]:
    """What this processor can do beyond its kind's least, by LLVM's names."""
    from llvmlite import binding

    return frozenset(name for name, present in binding.get_host_cpu_features().items() if present)


@functools.cache
def has_matrix_registers() -> bool:
    """Whether this process may use AMX for bfloat16: Linux lends its registers to those that ask (arch_prctl(2))."""
    if not {"amx-tile", "amx-bf16"} <= processor_features() or platform.system() != "Linux":
        return False
    return ctypes.CDLL(None).syscall(_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA) == 0


@functools.cache
def multiplies_bfloat16() -> bool:
    """Whether this processor has a fast product of bfloat16.

    oneDNN has none below AVX-512. torch's own takes 10 to 200 times as long there as one of float32.
    """
    return bool(torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def is_cpu(x: Tensor) -> bool:
    """Whether these forms serve for `x`.

    The compiler fuses the general ones itself, and FLOPs and memory, which fake tensors tell, are counted for those.
    """
    if isinstance(x, FakeTensor) or torch.compiler.is_compiling():
        return False
    return x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float32)


def compiled_forms(residual: Tensor) -> ModuleType | None:
    """`crt.ar.cpu_training` where its kernels serve for a residual stream, (..., C), and are worth compiling."""
    if not is_cpu(residual) or residual.numel() < _LEAST_COMPILED:
        return None
    from crt.ar import cpu_training

    return cpu_training


def widens(x: Tensor) -> bool:
    """Whether products of `x` are faster in float32: see `multiplies_bfloat16`."""
    return x.dtype == torch.bfloat16 and is_cpu(x) and not multiplies_bfloat16()


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
