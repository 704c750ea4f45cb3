"""What is asked of DeepSpeed; oracle: DeepSpeed's own reading of it, and the arithmetic of batches."""

from __future__ import annotations

from typing import Any

import pytest
from deepspeed.runtime.config import DeepSpeedConfig

from crt.ar.deepspeed_config import bucket_elements, deepspeed_config, max_live_elements, micro_batches
from crt.errors import UserError
from crt.params import TrainAR, load_params
from tests.conftest import ROOT

PARAMS = load_params(ROOT / "params.yaml").train_ar
MILLIONS = 300 * 10**6


def params(**changes: Any) -> TrainAR:
    return PARAMS.model_copy(update={"batch_size": 12, "micro_batch_size": None, "precision": "float32"} | changes)


def read(asked: TrainAR, world_size: int = 1, device: str = "cpu", **rest: Any) -> DeepSpeedConfig:
    """As DeepSpeed reads it: unknown keys and batches that do not multiply are refused."""
    config = deepspeed_config(asked, world_size, MILLIONS, device, **rest)
    found = DeepSpeedConfig(dict(config))
    assert found.world_size * found.train_micro_batch_size_per_gpu * found.gradient_accumulation_steps == 12
    return found


@pytest.mark.parametrize(
    ("batch", "micro", "world_size", "message"),
    [
        (12, None, 5, "among 5 processes: choose a multiple of 5, or another number of processes"),
        (4, None, 24, "among 24 processes: choose a multiple of 24, or another number of processes"),
        (12, 4, 2, "among 2 processes of micro_batch_size 4: choose a multiple of 8, or another number of processes"),
    ],
)
def test_a_batch_that_does_not_divide_is_told_with_one_that_does(batch, micro, world_size, message):
    asked = params(batch_size=batch, micro_batch_size=micro)
    with pytest.raises(UserError) as refused:
        micro_batches(asked, world_size)
    assert str(refused.value) == f"train_ar.batch_size {batch} does not divide {message}"
    advised = int(message.partition("multiple of ")[2].split(",")[0])
    cut = micro_batches(params(batch_size=advised, micro_batch_size=micro), world_size)
    assert cut == (micro or advised // world_size, 1)


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_gradients_are_summed_in_float32_where_many_bfloat16_are(zero_stage):
    """ZeRO 0 knows no other choice. Steps that are not finite are stopped at, not skipped."""
    for micro, summed in ((None, None), (4, "fp32" if zero_stage else None)):
        found = read(params(zero_stage=zero_stage, precision="bf16", micro_batch_size=micro))
        assert found.bfloat16_config.enabled and not found.bfloat16_config.check_grad_overflow
        assert (found.grad_accum_dtype, found.gradient_accumulation_steps) == (summed, 1 if micro is None else 3)
    found = read(params(zero_stage=zero_stage, micro_batch_size=4))
    assert (found.bfloat16_config.enabled, found.grad_accum_dtype) == (False, None)
    assert found.gradient_clipping == PARAMS.optimizer.clip_norm


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(
    ("offload", "optimizer", "parameters"),
    [("none", False, False), ("optimizer", True, False), ("optimizer_and_parameters", True, True)],
)
def test_what_is_offloaded_lies_on_the_host(offload, optimizer, parameters, device):
    """Pinned where a GPU fetches it."""
    zero = read(params(zero_stage=3, offload=offload), device=device).zero_config
    for part, wanted in ((zero.offload_optimizer, optimizer), (zero.offload_param, parameters)):
        assert (part is not None) is wanted
        assert part is None or (part.device, part.pin_memory) == ("cpu", device == "cuda")


@pytest.mark.parametrize(("zero_stage", "overlaps"), [(1, False), (2, True), (3, True)])
def test_messages_go_while_the_backward_pass_still_computes(zero_stage, overlaps):
    zero = read(params(zero_stage=zero_stage)).zero_config
    assert (zero.stage, zero.overlap_comm, zero.contiguous_gradients) == (zero_stage, overlaps, True)
    assert zero.reduce_bucket_size == zero.allgather_bucket_size == bucket_elements(MILLIONS) < MILLIONS


def test_zero_3_gathers_a_part_of_a_large_model_and_keeps_norms_whole():
    """Norms of the paper's largest model have 4,096 elements, its smallest matrix far more than a hundred thousand."""
    zero = read(params(zero_stage=3)).zero_config
    assert zero.max_live_parameters == zero.max_reuse_distance == max_live_elements(MILLIONS) == MILLIONS // 4
    assert 4096 < zero.param_persistence_threshold <= 10**5
    assert zero.sub_group_size == zero.prefetch_bucket_size == bucket_elements(MILLIONS)
    # A small one would not fill the buffer.
    assert max_live_elements(10_000) == bucket_elements(10_000) == 10_000


def test_checkpoints_of_other_processes_are_loaded_where_they_are_asked_for():
    assert read(params(), universal=True).load_universal_checkpoint
    assert not read(params()).load_universal_checkpoint
