"""DeepSpeed around the stage-2 model: the process group it wants, the engine, its optimizer, and its weights back."""

from __future__ import annotations

import gc
import io
import logging
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from crt.ar.decoder import is_partitioned
from crt.ar.deepspeed_config import deepspeed_config
from crt.ar.model import ARConfig, ARTransformer, count_parameters
from crt.ar.one_process import skip_partitioning, updates_in_place
from crt.distributed import World
from crt.errors import UserError
from crt.launch import import_large
from crt.params import Optimizer, TrainAR
from crt.randomness import seed_torch


@contextmanager
def deepspeed_session(world: World) -> Iterator[None]:
    """Import DeepSpeed quietly and give it a process group, also where this process is alone."""
    if world.device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # DeepSpeed takes the device's number from here. Under srun a process may see its own GPU only, as number 0.
    os.environ["LOCAL_RANK"] = str(world.device.index or 0)
    import_large("deepspeed")
    import deepspeed
    import deepspeed.comm
    import deepspeed.ops

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # DeepSpeed looks here for one thing, a collective through shared memory, which on a CPU it would compile for a
    # minute at first use; gloo serves as well. Filled in, the table also spares the compiler runs that make it.
    deepspeed.ops.__compatible_ops__ = defaultdict(bool)
    alone = not dist.is_initialized()
    if alone:
        backend = "nccl" if world.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        deepspeed.init_distributed(auto_mpi_discovery=False, dist_init_required=False)
        yield
    finally:
        if alone:
            # Through DeepSpeed, which otherwise keeps references to the dead group for the next run in this process.
            deepspeed.comm.destroy_process_group()


@contextmanager
def quiet() -> Iterator[None]:
    """Drop what DeepSpeed prints past its logger: memory statistics and notes to its developers."""
    with redirect_stdout(io.StringIO()):
        yield


@contextmanager
def deepspeed_engine(
    params: TrainAR,
    config: ARConfig,
    seed: int,
    world: World,
    *,
    initial: Mapping[str, Tensor] | None = None,
    universal: bool = False,
) -> Iterator[Any]:
    """The model at its initial weights inside a DeepSpeed engine, within a `deepspeed_session`.

    Args:
        params: the section `train_ar`.
        config: the model.
        seed: of the initial weights.
        world: this process among all.
        initial: weights of another model that take the place of random ones, by name; not all need be there.
        universal: whether a checkpoint of another number of processes will be loaded.

    Yields:
        deepspeed.DeepSpeedEngine; calling it is calling the model.

    Raises:
        UserError: the batch does not divide among the processes, or as `build_optimizer`.
    """
    import deepspeed

    settings = deepspeed_config(params, world.size, count_parameters(config), world.device.type, universal)
    # The same numbers on every process: ZeRO-3 splits each module over them as soon as it is made.
    seed_torch(seed, "ar_weights")
    partitioned = params.zero_stage == 3
    with deepspeed.zero.Init(config_dict_or_path=settings, enabled=partitioned), world.device:
        model = ARTransformer(config, params.activation_checkpointing)
    _take_over(model, initial or {}, world)
    if params.compile:
        _compile(model, world)
    with quiet():
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=build_optimizer(model, params.optimizer, params.offload, world.device),
            config=settings,
            dist_init_required=False,
        )
    if params.zero_stage == 0 and params.precision == "float32":
        # The one case in which DeepSpeed clips without keeping the norm.
        def clip_and_keep_norm() -> None:
            engine._global_grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), params.optimizer.clip_norm)

        engine.clip_fp32_gradients = clip_and_keep_norm
    if params.zero_stage == 0 and params.precision == "bf16":
        # DeepSpeed has made this optimizer's state by a step with zero gradients, which Adam would count as its first.
        engine.optimizer.optimizer.state.clear()
    _fill_masters(engine, initial or {}, world)
    if updates_in_place(world.size, params.zero_stage, params.offload, float32_sums="data_types" in settings):
        skip_partitioning(engine.optimizer)
    try:
        yield engine
    finally:
        # Memory and hooks, so that another engine may be made in this process.
        engine.destroy()
        gc.collect()


@torch.no_grad()
def _take_over(model: ARTransformer, weights: Mapping[str, Tensor], world: World) -> None:
    """Copy weights into a model, one at a time, also where ZeRO-3 has split it: rank 0's count there."""
    import deepspeed

    for name, parameter in model.named_parameters():
        if name not in weights:
            continue
        if not is_partitioned(model):
            parameter.copy_(weights[name])
            continue
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            if world.is_main:
                parameter.copy_(weights[name])


@torch.no_grad()
def _fill_masters(engine: Any, weights: Mapping[str, Tensor], world: World) -> None:
    """Give float32 weights to the master weights, which DeepSpeed made of them rounded to the model's precision."""
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

    masters = _unpartitioned_masters(engine.optimizer)
    for name, parameter in engine.module.named_parameters():
        if name not in weights:
            continue
        if id(parameter) in masters:
            masters[id(parameter)].copy_(weights[name])
        elif is_partitioned(engine.module):
            # The function for whole ones fails at those that do not divide among the processes.
            size = parameter.ds_tensor.numel()
            own = weights[name].flatten()[world.rank * size : (world.rank + 1) * size]
            safe_set_local_fp32_param(parameter, F.pad(own, (0, size - len(own))))
        else:
            safe_set_full_fp32_param(parameter, weights[name])


def _compile(model: ARTransformer, world: World) -> None:
    """Compile, as a whole where that serves.

    One process gains from it what Python takes between the layers: at size B as much as the GPU takes. Several need
    each block's gradients as soon as they are there, to exchange them meanwhile, and recomputation is by blocks too;
    then one compilation serves all blocks.
    """
    model.rotation(world.device)  # kept from now on: the compiler shall find it
    if world.size == 1 and not model.activation_checkpointing:
        model.compile(dynamic=False)
        return
    for block in model.blocks:
        block.compile(dynamic=False)


def build_optimizer(
    model: torch.nn.Module, params: Optimizer, offload: str, device: torch.device
) -> torch.optim.Optimizer:
    """AdamW with weight decay on matrices and embedding tables, none on the norms' scales.

    Its learning rate is 0 until `set_learning_rate`.

    Raises:
        UserError: there is nothing to compile the optimizer with that offload needs.
    """
    decayed: list[torch.nn.Parameter] = []
    free: list[torch.nn.Parameter] = []
    for parameter in model.parameters():
        shape = getattr(parameter, "ds_shape", parameter.shape)  # of the whole, where ZeRO-3 has split it
        (decayed if len(shape) >= 2 else free).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": params.weight_decay},
        {"params": free, "weight_decay": 0.0},
    ]
    betas = (params.betas[0], params.betas[1])
    if offload != "none" and device.type == "cuda":
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        try:
            return DeepSpeedCPUAdam(groups, lr=0.0, betas=betas, adamw_mode=True)
        except RuntimeError as error:  # it is compiled at first use
            reason = str(error.__cause__ or error).splitlines()[0]
            raise UserError(
                f"train_ar.offload: DeepSpeed's optimizer for the host cannot be compiled ({reason}): install a C++ "
                "compiler, such as g++, and ninja, or set train_ar.offload to none"
            ) from None
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, fused=True)


def set_learning_rate(engine: Any, learning_rate: float) -> None:
    """Use this rate from the next step on."""
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate


def gradient_norm(engine: Any) -> Tensor:
    """Norm of the last step's gradients, over micro-batches and processes, before clipping: () float32."""
    return torch.as_tensor(engine.get_global_grad_norm(), dtype=torch.float32, device=engine.device)


def gather_weights(engine: Any, world: World) -> dict[str, Tensor]:
    """The float32 weights, whole, on the CPU of rank 0; empty elsewhere. A collective call."""
    from deepspeed.utils import safe_get_full_fp32_param

    masters = _unpartitioned_masters(engine.optimizer)
    weights = {}
    for name, parameter in engine.module.named_parameters():
        # One parameter at a time, so that no device ever holds all of a partitioned model.
        whole = masters.get(id(parameter))
        if whole is None:
            whole = safe_get_full_fp32_param(parameter)
        if whole is None:
            whole = parameter
        if world.is_main:
            weights[name] = whole.detach().float().cpu().clone().view(getattr(parameter, "ds_shape", parameter.shape))
    return weights


def _unpartitioned_masters(optimizer: Any) -> dict[int, Tensor]:
    """Float32 master weights by the id of their bfloat16 parameter, where ZeRO 0 keeps them."""
    low, high = getattr(optimizer, "fp16_groups", None), getattr(optimizer, "fp32_groups", None)
    if low is None or high is None:
        return {}
    pairs = zip(low, high, strict=True)
    return {id(parameter): master for lows, highs in pairs for parameter, master in zip(lows, highs, strict=True)}
