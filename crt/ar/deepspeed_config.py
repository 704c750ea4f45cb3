"""The one place that turns params into DeepSpeed's configuration, and the batch into micro-batches."""

from __future__ import annotations

from typing import Any

from crt.errors import UserError
from crt.params import TrainAR

# Elements of the buffers in which gradients and weights travel: DeepSpeed allocates them whatever the model's size,
# so they are cut down to the model; above this size more does not raise the bandwidth.
_MAX_BUCKET = 2**26


def micro_batches(params: TrainAR, world_size: int) -> tuple[int, int]:
    """How the global batch is cut: (images per process and forward pass, forward passes per step).

    Raises:
        UserError: the batch does not divide by processes times micro-batch.
    """
    micro = params.micro_batch_size or params.batch_size // world_size
    if micro == 0 or params.batch_size % (micro * world_size):
        each = f" of micro_batch_size {micro}" if params.micro_batch_size else ""
        raise UserError(
            f"train_ar.batch_size {params.batch_size} does not divide among {world_size} processes{each}: "
            f"choose a multiple of {(params.micro_batch_size or 1) * world_size}, or another number of processes"
        )
    return micro, params.batch_size // (micro * world_size)


def deepspeed_config(
    params: TrainAR, world_size: int, num_parameters: int, device_type: str, universal: bool = False
) -> dict[str, Any]:
    """DeepSpeed's configuration for one run.

    The optimizer, its schedule and the checkpoints' places are not in it: the trainer owns them.

    Args:
        params: the section `train_ar`.
        world_size: number of processes.
        num_parameters: of the model.
        device_type: "cuda" or "cpu".
        universal: whether a checkpoint of another number of processes will be loaded.

    Raises:
        UserError: see `micro_batches`.
    """
    micro, accumulation = micro_batches(params, world_size)
    config: dict[str, Any] = {
        "train_batch_size": params.batch_size,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": params.optimizer.clip_norm,
        "zero_optimization": _zero(params, num_parameters, device_type),
        # The optimizer is the one that `crt.ar.engine` gives, on CPUs too.
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**62,
    }
    if params.precision == "bf16":
        # Float32 master weights and Adam moments, bfloat16 weights, activations and gradients. The trainer stops at
        # a non-finite loss or gradient; DeepSpeed's own check would skip such steps silently.
        config["bf16"] = {"enabled": True, "check_grad_overflow": False}
        if accumulation > 1 and params.zero_stage > 0:
            # Sums of many micro-batches lose their small terms in bfloat16. (ZeRO 0 knows no other choice.)
            config["data_types"] = {"grad_accum_dtype": "fp32"}
    if universal:
        config["checkpoint"] = {"load_universal": True}
    return config


def bucket_elements(num_parameters: int) -> int:
    """Elements of the buffers in which gradients and weights travel."""
    return min(num_parameters, _MAX_BUCKET)


def max_live_elements(num_parameters: int) -> int:
    """Elements of gathered weights that ZeRO 3 keeps at once on a process."""
    return max(num_parameters // 4, bucket_elements(num_parameters))


def _zero(params: TrainAR, num_parameters: int, device_type: str) -> dict[str, Any]:
    bucket = bucket_elements(num_parameters)
    zero: dict[str, Any] = {
        "stage": params.zero_stage,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
        "overlap_comm": params.zero_stage >= 2,
        "contiguous_gradients": True,
    }
    if params.zero_stage == 3:
        zero["stage3_prefetch_bucket_size"] = bucket
        # Norms stay whole on every process: gathering a few kilobytes costs more than keeping them.
        zero["stage3_param_persistence_threshold"] = min(num_parameters // 100, 10**5)
        zero["stage3_max_live_parameters"] = max_live_elements(num_parameters)
        zero["stage3_max_reuse_distance"] = max_live_elements(num_parameters)
        zero["sub_group_size"] = bucket
    host = {"device": "cpu", "pin_memory": device_type == "cuda"}
    if params.offload != "none":
        zero["offload_optimizer"] = host
    if params.offload == "optimizer_and_parameters":
        zero["offload_param"] = host
    return zero
