"""Every way that DeepSpeed can spread the stage-2 model over a cluster, and what of it fits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from crt.ar.deepspeed_config import micro_batches
from crt.ar.memory import Memory, Split, stage2_memory
from crt.ar.model import ARConfig
from crt.params import TrainAR
from crt.plan.cluster import Cluster


@dataclass(frozen=True)
class Layout:
    """One way, and its memory."""

    split: Split
    memory: Memory
    micro_batch: int
    """Images per process and forward pass that the params ask for."""
    largest: int
    """That fit, as a divisor of a process's share of the batch; 0: none."""
    chosen: bool
    """Whether it is the way of the params."""

    @property
    def peak_bytes(self) -> int:
        """Of one GPU, at the params' micro-batch."""
        return self.memory.peak(self.micro_batch)


def layouts(params: TrainAR, config: ARConfig, cluster: Cluster) -> Iterator[Layout]:
    """All combinations of ZeRO stage, activation checkpointing and offload that the params allow.

    Raises:
        UserError: the batch does not divide among the GPUs.
    """
    micro, accumulation = micro_batches(params, cluster.gpus)
    share, trains = params.batch_size // cluster.gpus, params.steps > 0
    for stage in range(4):
        for offload in _offloads(stage):
            for checkpointing in (False, True):
                split = Split(cluster.gpus, params.precision, stage, offload, checkpointing, accumulation > 1, trains)
                memory = stage2_memory(config, split)
                largest = _largest(config, split, share, cluster.available_bytes)
                chosen = (stage, offload, checkpointing) == (
                    params.zero_stage,
                    params.offload,
                    params.activation_checkpointing,
                )
                yield Layout(split, memory, micro, largest, chosen)


def _offloads(stage: int) -> tuple[str, ...]:
    if stage == 0:
        return ("none",)
    return ("none", "optimizer", "optimizer_and_parameters") if stage == 3 else ("none", "optimizer")


def _largest(config: ARConfig, split: Split, share: int, available: int) -> int:
    """The largest micro-batch that fits and divides a process's share of the batch; 0 if there is none."""
    if stage2_memory(config, replace(split, accumulating=False)).largest_micro_batch(available) >= share:
        return share
    fits = stage2_memory(config, replace(split, accumulating=True)).largest_micro_batch(available)
    return max((size for size in range(1, min(share - 1, fits) + 1) if share % size == 0), default=0)
