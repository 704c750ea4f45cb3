"""Floating-point operations, counted by torch on fake tensors, and the rate that a device reaches."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from crt.distributed import as_one_process
from crt.precision import multiplies_as

if TYPE_CHECKING:
    from crt.ar.model import ARConfig
    from crt.params import TrainTokenizer

Shape = tuple[int, ...]


def _attention_flops(query: Shape, key: Shape, *_: object, **__: object) -> int:
    """Scores and weighted sum of (B, H, T, D): two products."""
    batch, heads, length, width = query
    return 2 * (2 * batch * heads * length * key[2] * width)


def _attention_backward_flops(grad: Shape, query: Shape, key: Shape, *_: object, **__: object) -> int:
    """The scores again, and two products for each of those of the forward pass."""
    return 5 * _attention_flops(query, key) // 2


# torch counts its attention kernels of GPUs, and forgets those of CPUs, which fake tensors go through as well.
_CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}


def count_flops(work: Callable[[], object]) -> int:
    """FLOPs (multiply and add count as two) of all matrix products, convolutions and attentions in `work`.

    Attention counts as if no position were masked, as is usual.

    Build models and inputs of `work` under `FakeTensorMode` to count without computing.
    """
    counter = FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION)
    with counter:
        work()
    return int(counter.get_total_flops())


def tokenizer_training_flops(params: TrainTokenizer, with_regularizer: bool) -> int:
    """FLOPs of stage 1: forward and backward of all its networks, in every step.

    Args:
        params: section train_tokenizer.
        with_regularizer: whether lambda is above 0; without, no regularizer runs.
    """
    from crt.tokenizer.losses import untrained_perceptual_loss
    from crt.tokenizer.objective import Objective

    size = params.image_size
    # One of several processes counts while the others do not: nothing may be sent.
    with FakeTensorMode(), as_one_process():
        perceptual = untrained_perceptual_loss() if params.loss.lpips_weight > 0 else None
        objective = Objective.untrained(params, with_regularizer, perceptual)

        def step(adversarial: bool) -> None:
            # A whole batch: some products are made once for all its images, and one alone takes other paths.
            images = torch.zeros(params.batch_size, 3, size, size)
            uniforms = torch.zeros(params.batch_size, objective.model.num_tokens)
            made = objective.tokenizer_loss(images, uniforms, 1.0, adversarial)
            made.total.backward()
            if adversarial:
                objective.discriminator_loss(images, made.reconstructions).backward()

        start = params.steps if objective.discriminator is None else min(params.discriminator.start_step, params.steps)
        steps = {False: start, True: params.steps - start}
        return sum(number * count_flops(partial(step, adversarial)) for adversarial, number in steps.items() if number)


def tokenizer_flops_per_image(params: TrainTokenizer, with_regularizer: bool) -> int:
    """`tokenizer_training_flops` over all steps and images of a batch."""
    return tokenizer_training_flops(params, with_regularizer) // max(params.steps * params.batch_size, 1)


def ar_flops_per_image(config: ARConfig, activation_checkpointing: bool = False) -> int:
    """FLOPs that stage 2 spends on one training sequence: forward and backward, and recomputation if asked."""
    from crt.ar.model import ARTransformer

    with FakeTensorMode():
        model = ARTransformer(config, activation_checkpointing).train()
        codes = torch.zeros(1, config.num_tokens, dtype=torch.int64)
        labels = torch.zeros(1, dtype=torch.int64)
        return count_flops(lambda: model(codes, labels).mean().backward())


def matmul_rate(device: torch.device, precision: str, seconds: float = 0.2) -> float:
    """FLOPs per second of a large square matrix product on this device, measured now: what MFU is a share of.

    Where bfloat16 is multiplied in float32, that of float32.
    """
    side = 8192 if device.type == "cuda" else 1024
    dtype = multiplies_as(device, precision)
    # Random: a GPU that multiplies constants draws less power and runs faster than it ever does at work.
    draws = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(side, side, dtype=dtype, device=device, generator=draws) for _ in range(2))
    best, end = float("inf"), time.monotonic() + seconds
    while True:
        started = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
        if time.monotonic() > end:
            return 2 * side**3 / best
