"""Bytes of all tensors alive on each process between the backward pass and the update: `torchrun ... JOBS RESULTS`.

Where the params have no step: before the validation. JOBS is a JSON list of params files; RESULTS gets, for each
process, the bytes of each. Once the backward pass is over no activation lives, so what is left is what the run must
hold: weights, gradients, optimizer state and DeepSpeed's buffers.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from crt.ar.deepspeed_config import micro_batches
from crt.ar.engine import deepspeed_engine, deepspeed_session, set_learning_rate
from crt.distributed import World, join_world
from crt.launch import leave
from crt.params import load_params
from tests.ar.conftest import small_config

LOOKS = 5


def measure(params_file: str, world: World) -> int:
    """Bytes that this process holds for a run, between the backward pass of its second step and the update, if any."""
    params = load_params(params_file).train_ar
    model = params.model
    config = small_config(layers=model.layers, heads=model.heads, width=model.width, ffn_multiple=model.ffn_multiple)
    micro, accumulation = micro_batches(params, world.size)
    codes, labels = torch.zeros(micro, config.num_tokens, dtype=torch.int64), torch.zeros(micro, dtype=torch.int64)
    gc.collect()
    gc.freeze()  # what is there already is not looked at again
    with deepspeed_engine(params, config, 0, world) as engine:
        set_learning_rate(engine, 1e-3)
        for step in range(min(params.steps, 2)):
            for index in range(accumulation):
                engine.backward(engine(codes, labels).mean())
                if step == 0 or index < accumulation - 1:
                    engine.step()
        return min(live_bytes() for _ in range(LOOKS))


def live_bytes() -> int:
    """Bytes of the tensors that have come since the freeze, a moment from now: gloo's threads let go of sums late."""
    time.sleep(0.2)
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
    tensors += [tensor.grad for tensor in tensors if tensor.is_leaf and tensor.grad is not None]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


if __name__ == "__main__":
    jobs, results = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    with join_world() as world, deepspeed_session(world):
        measured = [measure(job, world) for job in jobs]
        everyone: list[Any] = [None] * world.size
        dist.all_gather_object(everyone, measured)
        if world.is_main:
            results.write_text(json.dumps(everyone))
    leave(0)
