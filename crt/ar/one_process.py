"""ZeRO 1 and 2 where one CPU process holds everything: the same update without the copies that partitioning needs.

DeepSpeed moves each gradient through a communication buffer into a partition, flattens the partition, converts it,
scales it, updates the master weights and converts those: nine passes over memory, which on a CPU cost as much as the
backward pass of a small batch. Here gradients stay where they arose, and each piece of the update is done while it is
in the cache. Weights and optimizer state are DeepSpeed's own tensors and end with the same bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Elements updated at once: gradient, weight and both moments in float32 take 16 bytes each.
_PIECE = 2**20


def skip_partitioning(optimizer: Any) -> None:
    """Let a `DeepSpeedZeroOptimizer` of one process, without offload, work in place: replaces two of its methods."""

    def reduce_nothing(parameter: Tensor, group: int) -> None:
        """Leave the gradient at its parameter, where the end of the backward pass collects it."""

    def step(closure: Any = None) -> None:
        _update(optimizer)
        # Here DeepSpeed makes the state known to its checkpoints, once.
        optimizer._lazy_init_hp_params_optimizer_state()

    optimizer.reduce_independent_p_g_buckets_and_remove_grads = reduce_nothing
    optimizer.step = step


@torch.no_grad()
def _update(optimizer: Any) -> None:
    """Clip, AdamW, and the weights in the model's precision, piece by piece."""
    groups = [optimizer.averaged_gradients[index] for index in range(len(optimizer.optimizer.param_groups))]
    pieces = (some for gradients in groups for gradient in gradients for some in gradient.reshape(-1).split(_PIECE))
    norm = torch.stack([torch.linalg.vector_norm(some.float()) for some in pieces]).norm()
    optimizer._global_grad_norm = norm
    scale = 1.0 / torch.clamp((norm + 1e-6) / optimizer.clip_grad, min=1.0)
    for index, settings in enumerate(optimizer.optimizer.param_groups):
        master: Tensor = optimizer.single_partition_of_fp32_groups[index]
        weights: Tensor = optimizer.parallel_partitioned_bit16_groups[index][0]
        state = optimizer.optimizer.state[master]
        if not state:
            # As torch's fused AdamW makes it.
            state |= {"step": torch.zeros(()), "exp_avg": torch.zeros_like(master)}
            state["exp_avg_sq"] = torch.zeros_like(master)
        state["step"] += 1
        start = 0
        for gradient in groups[index]:
            for some in gradient.reshape(-1).split(_PIECE):
                piece = slice(start, start + some.numel())
                torch._fused_adamw_(
                    [master.data[piece]],
                    [some.float().mul_(scale)],
                    [state["exp_avg"][piece]],
                    [state["exp_avg_sq"][piece]],
                    [],
                    [state["step"]],
                    lr=settings["lr"],
                    beta1=settings["betas"][0],
                    beta2=settings["betas"][1],
                    weight_decay=settings["weight_decay"],
                    eps=settings["eps"],
                    amsgrad=False,
                    maximize=False,
                )
                weights[piece].copy_(master.data[piece])
                start += some.numel()
        optimizer.averaged_gradients[index] = None
        optimizer.all_grad_tensors[index] = None
