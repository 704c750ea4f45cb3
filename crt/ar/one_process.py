"""ZeRO 1 and 2 where one process holds everything: the same update without the copies that partitioning needs.

DeepSpeed moves each gradient through a communication buffer into a partition, flattens the partition, converts it,
scales it, updates the master weights and converts those: nine passes over memory, which on a CPU cost as much as the
backward pass of a small batch, and on a GPU a fifth of a step of 32 images (`benchmarks/stage2.md`). Here gradients
stay where they arose, and the update is one pass over memory (CPU: of bfloat16 by our own kernel), or few kernels over
many tensors (GPU). Weights and optimizer state are DeepSpeed's own tensors; in float32 on a CPU they end with the same
bits, else to rounding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from crt.cpu import flat
from crt.threads import share_among_threads

# Elements updated at once on a CPU: gradient, weight and both moments in float32 take 16 bytes each.
_PIECE = 2**20
# Elements whose squares are summed in float32.
_SUM = 2**12
# Elements whose gradients are held in float32 at once on a GPU.
GPU_PIECE = 2**26


def updates_in_place(processes: int, zero_stage: int, offload: str, float32_sums: bool) -> bool:
    """Whether `skip_partitioning` applies.

    Args:
        processes: of the run.
        zero_stage, offload: of the params.
        float32_sums: whether bfloat16 gradients of micro-batches are summed in float32, while they are partitioned.
    """
    return processes == 1 and zero_stage in (1, 2) and offload == "none" and not float32_sums


def skip_partitioning(optimizer: Any, on_gpu: bool | None = None) -> None:
    """Let a `DeepSpeedZeroOptimizer` of one process, without offload, work in place: replaces two of its methods.

    Args:
        optimizer: as DeepSpeed has made it.
        on_gpu: which form of the update; None: by where the weights are.
    """

    def reduce_nothing(parameter: Tensor, group: int) -> None:
        """Leave the gradient at its parameter, where the end of the backward pass collects it."""

    if on_gpu is None:
        on_gpu = optimizer.single_partition_of_fp32_groups[0].device.type != "cpu"
    update = _GPUUpdate(optimizer) if on_gpu else _update

    def step(closure: Any = None) -> None:
        update(optimizer)
        # Here DeepSpeed makes the state known to its checkpoints, once.
        optimizer._lazy_init_hp_params_optimizer_state()

    optimizer.reduce_independent_p_g_buckets_and_remove_grads = reduce_nothing
    optimizer.step = step


class _Tensors(NamedTuple):
    """One parameter's, or some elements of it, flat."""

    gradient: Tensor
    master: Tensor
    mean: Tensor
    square: Tensor
    weights: Tensor


@torch.no_grad()
def _update(optimizer: Any) -> None:
    """Clip, AdamW, and the weights in the model's precision, piece by piece."""
    groups = [optimizer.averaged_gradients[index] for index in range(len(optimizer.optimizer.param_groups))]
    gradients = [gradient.reshape(-1) for group in groups for gradient in group]
    halves = all(gradient.dtype == torch.bfloat16 for gradient in gradients)
    norm = _norm_of_halves(gradients) if halves else _norm(gradients)
    optimizer._global_grad_norm = norm
    scale = 1.0 / torch.clamp((norm + 1e-6) / optimizer.clip_grad, min=1.0)
    for index, settings in enumerate(optimizer.optimizer.param_groups):
        master: Tensor = optimizer.single_partition_of_fp32_groups[index]
        weights: Tensor = optimizer.parallel_partitioned_bit16_groups[index][0]
        state = _adamw_state(optimizer, master)
        update = _update_from_halves if halves else _update_piecewise
        start = 0
        for gradient in groups[index]:
            part = slice(start, start + gradient.numel())
            moments = state["exp_avg"][part], state["exp_avg_sq"][part]
            tensors = _Tensors(gradient.reshape(-1), master.data[part], *moments, weights[part])
            update(tensors, scale, state["step"], settings)
            start = part.stop
        optimizer.averaged_gradients[index] = None
        optimizer.all_grad_tensors[index] = None


def _norm(gradients: Sequence[Tensor]) -> Tensor:
    pieces = (some for gradient in gradients for some in gradient.split(_PIECE))
    return torch.stack([torch.linalg.vector_norm(some.float()) for some in pieces]).norm()


def _update_piecewise(t: _Tensors, scale: Tensor, step: Tensor, settings: dict[str, Any]) -> None:
    for start in range(0, len(t.gradient), _PIECE):
        gradient, master, mean, square, weights = (tensor[start : start + _PIECE] for tensor in t)
        full = gradient.float().mul_(scale)
        torch._fused_adamw_([master], [full], [mean], [square], [], [step], **_adamw_options(settings))
        weights.copy_(master)


def _norm_of_halves(gradients: Sequence[Tensor]) -> Tensor:
    """`_norm` of bfloat16 gradients in one pass; the same bits with any number of threads."""
    from crt.ar.update_kernels import sum_of_squares

    sums = []
    for gradient in gradients:
        bits = flat(gradient)
        part = np.zeros(-(-len(bits) // _SUM), np.float64)

        def work(first: int, last: int, bits: NDArray[Any] = bits, part: NDArray[Any] = part) -> None:
            for start in range(first, last, _SUM):
                part[start // _SUM] = sum_of_squares(bits[start : min(start + _SUM, last)])

        share_among_threads(work, len(bits), _SUM)
        sums.append(part.sum())
    return torch.tensor(sum(sums)).sqrt().float()


def _update_from_halves(t: _Tensors, scale: Tensor, step: Tensor, settings: dict[str, Any]) -> None:
    """`_update_piecewise` for bfloat16 in one pass, to rounding."""
    from crt.ar.update_kernels import adamw

    (beta1, beta2), count, rate = settings["betas"], step.item(), settings["lr"]
    numbers = (
        scale.item(), 1 - rate * settings["weight_decay"], beta1, beta2,
        rate / (1 - beta1**count), 1 / math.sqrt(1 - beta2**count), settings["eps"],
    )  # fmt: skip
    arrays = tuple(map(flat, (t.master, t.gradient, t.mean, t.square, t.weights)))
    singles = tuple(map(np.float32, numbers))

    def work(first: int, last: int) -> None:
        adamw(*(array[first:last] for array in arrays), *singles)

    share_among_threads(work, len(t.gradient), _PIECE)


def _adamw_state(optimizer: Any, master: Tensor) -> dict[str, Tensor]:
    """The state of a group as torch's fused AdamW makes it, one step further."""
    state: dict[str, Tensor] = optimizer.optimizer.state[master]
    if not state:
        state |= {name: torch.zeros_like(master) for name in ("exp_avg", "exp_avg_sq")}
        state["step"] = torch.zeros((), device=master.device)
    state["step"] += 1
    return state


def _adamw_options(settings: dict[str, Any]) -> dict[str, Any]:
    """A group's settings as torch's fused kernel takes them."""
    beta1, beta2 = settings["betas"]
    kept = {name: settings[name] for name in ("lr", "weight_decay", "eps")}
    return kept | {"beta1": beta1, "beta2": beta2, "amsgrad": False, "maximize": False}


class _GPUUpdate:
    """`_update` in few kernels, each over many parameters, and without a look at any value."""

    def __init__(self, optimizer: Any) -> None:
        self.pieces: list[list[list[int]]] = []
        for gradients in ([p.numel() for p in group] for group in optimizer.params_in_partition):
            pieces: list[list[int]] = []
            for size in gradients:
                if not pieces or sum(pieces[-1]) + size > GPU_PIECE:
                    pieces.append([])
                pieces[-1].append(size)
            self.pieces.append(pieces)

    @torch.no_grad()
    def __call__(self, optimizer: Any) -> None:
        """Clip, AdamW, and the weights in the model's precision."""
        groups = [optimizer.averaged_gradients[index] for index in range(len(optimizer.optimizer.param_groups))]
        every = [gradient for gradients in groups for gradient in gradients]
        norm = torch.stack(torch._foreach_norm(every, 2, dtype=torch.float32)).norm()
        optimizer._global_grad_norm = norm
        divisor = torch.clamp((norm + 1e-6) / optimizer.clip_grad, min=1.0)
        for index, settings in enumerate(optimizer.optimizer.param_groups):
            master: Tensor = optimizer.single_partition_of_fp32_groups[index]
            weights: Tensor = optimizer.parallel_partitioned_bit16_groups[index][0]
            state = _adamw_state(optimizer, master)
            gradients, start = iter(groups[index]), 0
            for sizes in self.pieces[index]:
                part = slice(start, start + sum(sizes))
                masters, moments, squares = (
                    tensor[part].split(sizes) for tensor in (master.data, state["exp_avg"], state["exp_avg_sq"])
                )
                # Gradients in float32, which the kernel wants, for as long as it runs.
                full = torch.empty(sum(sizes), dtype=torch.float32, device=master.device).split(sizes)
                torch._foreach_copy_(full, [next(gradients).reshape(-1) for _ in sizes])
                torch._fused_adamw_(
                    masters,
                    full,
                    moments,
                    squares,
                    [],
                    [state["step"]] * len(sizes),
                    **_adamw_options(settings),
                    grad_scale=divisor,
                )
                weights[part].copy_(master.data[part])
                start = part.stop
            optimizer.averaged_gradients[index] = None
            optimizer.all_grad_tensors[index] = None
