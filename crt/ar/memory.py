"""Memory of one stage-2 process, derived from the model, the precision and how DeepSpeed splits what it holds.

W, G and O are the bytes per parameter of weights, gradients and optimizer state (the float32 master weights, where
the weights are bfloat16, and Adam's two moments). ZeRO 1 splits O over the N processes, ZeRO 2 the gradients too as
the backward pass makes them, ZeRO 3 also the weights. Three moments can be the fullest:

- the backward pass begins: every activation is kept, the losses' working set is there, gradients only if they
  accumulate over micro-batches;
- the backward pass ends: activations are gone, gradients are complete, with ZeRO 1 still whole;
- the update: float32 copies of the gradients beside bfloat16 ones.

Without a step (`train_ar.steps: 0`) the model is only validated: there are no moments yet, and of gradients only what
ZeRO 3 sets aside.

Activations are not estimated: the forward pass runs on fake tensors and autograd tells what it keeps. Tests hold the
split state against a run of two processes and the activations against real tensors; on an H200 the peaks of sizes B
and L agree within 5% (`benchmarks/stage2.md`). What is not in it: the CUDA context and NCCL's buffers, which the
caller sets aside, and what compilation saves by not keeping activations: at size B, a third of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from crt.ar.deepspeed_config import bucket_elements, max_live_elements
from crt.ar.model import ARConfig, ARTransformer, count_parameters
from crt.ar.one_process import GPU_PIECE, updates_in_place

_DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Split:
    """How a run is laid out over processes: what the memory depends on besides the model."""

    processes: int
    precision: str
    zero_stage: int
    offload: str
    activation_checkpointing: bool
    accumulating: bool
    """Whether a step has more than one micro-batch."""
    trains: bool = True
    """Whether there is any step."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one process."""

    weights: int
    gradients: int
    """As they are held from the backward pass to the update."""
    optimizer: int
    buffers: int
    """In which gradients and weights travel."""
    backward_start: int
    """State held when the backward pass starts, without activations."""
    backward_end: int
    update: int
    host: int
    """In the host's memory, by offload."""
    activations_per_image: int
    """Kept by the forward pass, and the working set of the losses; without a step, of a pass that keeps nothing."""

    def peak(self, micro_batch: int) -> int:
        """The fullest moment of a step with so many images in a micro-batch."""
        return max(self.backward_start + micro_batch * self.activations_per_image, self.backward_end, self.update)

    def largest_micro_batch(self, available: int) -> int:
        """Images per forward pass that fit into `available` bytes; 0: the state alone does not fit, or no image."""
        if max(self.backward_end, self.update) > available:
            return 0
        return max((available - self.backward_start) // self.activations_per_image, 0)


def held_bytes(num_parameters: int, split: Split) -> tuple[int, int, int, int]:
    """(weights, gradients, optimizer state, buffers) on the device between backward pass and update, if any."""
    share = 1 / split.processes
    low = split.precision == "bf16"
    weight = 2 if low else 4
    accumulates_wide = low and split.accumulating and split.zero_stage > 0
    gradient = 4 if accumulates_wide else weight
    moments = 8 if split.trains else 0
    stage, buffers = split.zero_stage, 0.0
    if stage == 0:
        # float32 master weights come with bfloat16 weights only.
        weights, gradients, state = float(weight), float(gradient), moments + (4.0 if low else 0.0)
    else:
        # Even in float32 the flat master copy of a process's share stands beside the weights.
        state = (4 + moments) * share
        weights = weight * (share if stage == 3 else 1)
        gradients = gradient * share
        if stage == 1 and accumulates_wide:
            gradients += gradient  # the sums over micro-batches, whole
        if stage == 3:
            # Gradients travel in the precision of the weights.
            buffers = weight * bucket_elements(num_parameters) / num_parameters
    if split.offload != "none":
        state = gradients = 0.0
    if not split.trains and stage < 3:
        gradients = 0.0
    if split.offload == "optimizer_and_parameters":
        weights = 0.0
    bytes_of = [round(per_parameter * num_parameters) for per_parameter in (weights, gradients, state, buffers)]
    return bytes_of[0], bytes_of[1], bytes_of[2], bytes_of[3]


def stage2_memory(config: ARConfig, split: Split) -> Memory:
    """All of it; see the module's text."""
    num_parameters = count_parameters(config)
    weights, gradients, optimizer, buffers = held_bytes(num_parameters, split)
    weight = 2 if split.precision == "bf16" else 4
    bucket = bucket_elements(num_parameters)
    in_place = updates_in_place(
        split.processes, split.zero_stage, split.offload, split.precision == "bf16" and split.accumulating
    )
    travelling = 0 if in_place else {0: 0, 1: bucket, 2: 2 * bucket, 3: 0}[split.zero_stage] * weight
    live = 0
    if split.zero_stage == 3:
        live = weight * (max_live_elements(num_parameters) + bucket)
    base = weights + optimizer + buffers + live
    whole = weight * num_parameters if split.zero_stage <= 1 else gradients
    copies = 0
    if split.precision == "bf16" and split.offload == "none":
        share = {0: num_parameters, 1: num_parameters // split.processes, 2: num_parameters // split.processes, 3: 0}
        copies = 4 * (min(num_parameters, GPU_PIECE) if in_place else share[split.zero_stage] or bucket)
    if not split.trains:
        travelling = whole = copies = 0
    return Memory(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        buffers=buffers,
        backward_start=base + travelling + (gradients if split.accumulating or not split.trains else 0),
        backward_end=base + travelling + max(whole, gradients),
        update=weights + optimizer + buffers + gradients + copies,
        host=_host_bytes(num_parameters, split),
        activations_per_image=_activations_per_image(config, split),
    )


def _host_bytes(num_parameters: int, split: Split) -> int:
    """Pinned memory of one process: float32 state and gradients of its share, and the weights if they are offloaded."""
    if split.offload == "none":
        return 0
    weights = (2 if split.precision == "bf16" else 4) if split.offload == "optimizer_and_parameters" else 0
    return (12 + 4 + weights) * num_parameters // split.processes


def _activations_per_image(config: ARConfig, split: Split) -> int:
    """What one image's forward pass keeps, and the most that its backward pass needs beside at once."""
    kept, block = activation_bytes(config, split.precision, split.activation_checkpointing, "cuda:0")
    if not split.trains:
        # Nothing is kept: logits, the same in float32 where they are not, and log-probabilities; a block needs less
        # than it would keep.
        bytes_per_logit = 4 + 4 + (2 if split.precision == "bf16" else 0)
        return max(bytes_per_logit * config.num_tokens * config.codebook_size, block)
    # When blocks are recomputed the losses' part is over.
    return kept + (max(loss_bytes(config), block) if split.activation_checkpointing else loss_bytes(config))


def loss_bytes(config: ARConfig) -> int:
    """What the backward pass of one image's losses needs at once, beside the saved log-probabilities.

    The gradients of log-probabilities and of logits, both in float32.
    """
    return 2 * 4 * config.num_tokens * config.codebook_size


@cache
def activation_bytes(config: ARConfig, precision: str, activation_checkpointing: bool, device: str) -> tuple[int, int]:
    """Bytes that the forward pass of one image keeps for the backward pass: of all, and of one whole block.

    Args:
        config: the model.
        precision: of weights and activations.
        activation_checkpointing: whether only each block's input is kept.
        device: "cuda:0" or "cpu", which keep different things; the device need not exist.
    """
    with FakeTensorMode():
        one, two = (_saved_bytes(replace(config, layers=layers), precision, device) for layers in (1, 2))
    block, ends = two - one, 2 * one - two
    if not activation_checkpointing:
        return ends + config.layers * block, block
    block_input = config.num_tokens * config.width * _DTYPES[precision].itemsize
    return ends + config.layers * block_input, block


def _saved_bytes(config: ARConfig, precision: str, device: str) -> int:
    with _default_dtype(_DTYPES[precision]), torch.device(device):
        model = ARTransformer(config).train()
    codes = torch.zeros(1, config.num_tokens, dtype=torch.int64, device=device)
    labels = torch.zeros(1, dtype=torch.int64, device=device)
    with _fused_attention() if device != "cpu" else nullcontext():
        return saved_bytes(lambda: model(codes, labels), model)


@contextmanager
def _fused_attention() -> Iterator[None]:
    """Let attention be one operator, as on any GPU: torch decomposes it for a device that does not exist."""

    def attend(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> Tensor:
        operator = torch.ops.aten._scaled_dot_product_efficient_attention
        return operator(q, k, v, None, compute_log_sumexp=True, is_causal=is_causal)[0]

    with patch.object(F, "scaled_dot_product_attention", attend):
        yield


def saved_bytes(forward: Callable[[], Tensor], model: torch.nn.Module) -> int:
    """Bytes of the distinct storages that autograd keeps of a forward pass, the model's own weights apart."""
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = forward()
    del result
    return sum(tensor.untyped_storage().nbytes() for key, tensor in kept.items() if key not in weights)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
