"""Memory of one process of `train_tokenizer`: whole steps are walked through on fake tensors.

Without a step (`train_tokenizer.steps: 0`) the tokenizer is only validated: then a batch of that is walked through.

Fake tensors on the CPU, since the backward pass of fake ones on a GPU needs a GPU. Where a GPU keeps something else
this module puts it in its place: group norm by the kernels of `crt/tokenizer/norm_kernels.py`, and what autocast
computes in float32. Not in it: the CUDA context, which the caller sets aside, cuDNN's workspaces, what compilation
saves, upkeep of the codebook. A step measured on an H200 agrees within 1% (`benchmarks/stage1.md`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from crt import processor
from crt.params import TrainTokenizer
from crt.plan.live_bytes import LiveBytes
from crt.tokenizer.losses import untrained_perceptual_loss
from crt.tokenizer.model import Tokenizer
from crt.tokenizer.norm import GroupNorm
from crt.tokenizer.objective import Objective
from crt.tokenizer.state import build_optimizers, descend

# Operations of ours that autocast computes in float32 on GPUs, and on CPUs in bfloat16.
_WIDE_ON_GPUS = {"pow", "__pow__", "layer_norm", "softmax", "log_softmax"}

# With so many in a step each further one mostly costs the same.
_MANY_IMAGES = 16


@dataclass(frozen=True)
class TokenizerMemory:
    """Bytes of one process."""

    state: int
    """Held between steps: networks, averaged weights, optimizers."""
    fixed: int
    """Held at the fullest moment of a step with many images, whatever their number."""
    per_image: int
    """What each image adds to that."""
    least: int
    """The fullest moment of a step with one image: with few it may be the update."""
    images: int
    """Of one process in a step, as the params have it."""
    peak: int
    """The fullest moment of such a step."""

    def largest(self, available: int) -> int:
        """Images per process that fit into `available` bytes; 0: none does."""
        return max((available - self.fixed) // self.per_image, 0) if available >= self.least else 0


def tokenizer_memory(params: TrainTokenizer, with_regularizer: bool, processes: int) -> TokenizerMemory:
    """All of it, with the discriminator if it takes part in any step; without a step, of the validation.

    Args:
        params: section train_tokenizer.
        with_regularizer: whether lambda is above 0.
        processes: that share the batch.
    """
    images = params.batch_size // processes
    with ExitStack() as stack:
        for context in (_group_of(processes), FakeTensorMode(), _AsOnGPU(), _fused_norm(params.channels_last)):
            stack.enter_context(context)
        stack.enter_context(patch.object(processor, "multiplies_bfloat16", lambda: True))
        live = stack.enter_context(LiveBytes())
        step = _Step(params, with_regularizer and params.steps > 0)
        state = live.now

        @cache
        def peak(count: int) -> int:
            live.restart()
            step.run(count)
            return live.peak

        many = max(images, _MANY_IMAGES)
        while peak(many) < 2 * state:  # the update, with gradients beside the state, may still be the fullest moment
            many *= 4
        per_image = (peak(2 * many) - peak(many)) // many
        fixed = peak(many) - many * per_image
        return TokenizerMemory(state, fixed, per_image, least=peak(1), images=images, peak=peak(images))


class _Step:
    """Everything that a step holds, once the optimizers have their state; or a validation, if there is no step."""

    def __init__(self, params: TrainTokenizer, with_regularizer: bool) -> None:
        perceptual = untrained_perceptual_loss() if params.loss.lpips_weight > 0 else None
        self.params, self.objective = params, Objective.untrained(params, with_regularizer, perceptual)
        o = self.objective
        self.averaged = Tokenizer(o.model.config).eval().requires_grad_(False)
        if not params.steps:
            return
        self.optimizers = build_optimizers(params, o.model, o.regularizer, o.discriminator)
        for name, optimizer in self.optimizers.items():
            for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
                parameter.grad = torch.zeros_like(parameter)
            self._descend(name)

    def run(self, images: int) -> None:
        """All passes over so many images, and the updates."""
        o, size = self.objective, self.params.image_size
        layout = torch.channels_last if self.params.channels_last else torch.contiguous_format
        batch = torch.zeros(images, 3, size, size).contiguous(memory_format=layout)
        if not self.params.steps:
            self.averaged(batch)
            return
        adversarial = o.is_adversarial(self.params.steps - 1)
        made = o.tokenizer_loss(batch, torch.zeros(images, o.model.num_tokens), 1.0, adversarial)
        made.total.backward()
        self._descend("tokenizer")
        if o.regularizer is not None:
            self._descend("regularizer")
        if adversarial:
            o.discriminator_loss(batch, made.reconstructions).backward()
            self._descend("discriminator")

    def _descend(self, name: str) -> None:
        descend(self.optimizers[name], self.params.optimizer.clip_norm)


class _AsOnGPU(TorchFunctionMode):
    """Autocast's rules of a GPU, on a CPU."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if torch.is_autocast_enabled("cpu") and getattr(func, "__name__", "") in _WIDE_ON_GPUS:
            args = tuple(value.float() if isinstance(value, Tensor) else value for value in args)
        return func(*args, **(kwargs or {}))


class _FusedNorm(torch.autograd.Function):
    """What `crt/tokenizer/norm_kernels.py` takes, keeps and gives."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight, bias = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(bias)


@contextmanager
def _fused_norm(channels_last: bool) -> Iterator[None]:
    def forward(norm: GroupNorm, x: Tensor, silu: bool = False) -> Tensor:
        result: Tensor = _FusedNorm.apply(x, norm.weight, norm.bias)
        return result

    # Those of another layout are torch's own.
    with patch.object(GroupNorm, "forward", forward) if channels_last else nullcontext():
        yield


@contextmanager
def _group_of(processes: int) -> Iterator[None]:
    """A process group whose other members do not exist: nothing is sent, and all code takes it for one."""
    if processes == 1:
        yield
        return
    dist.init_process_group("fake", rank=0, world_size=processes, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()
