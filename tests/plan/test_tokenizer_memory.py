"""Derived memory of train_tokenizer: against a GPU's peak, a GPU's own rules, and closed forms."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from crt import processor
from crt.__main__ import main
from crt.ar.memory import _fused_attention, saved_bytes
from crt.commands.plan import _tokenizer_misfit
from crt.params import TrainTokenizer, load_params
from crt.plan import tokenizer_memory as module
from crt.plan.cluster import make_cluster
from crt.plan.tokenizer_memory import TokenizerMemory, tokenizer_memory
from crt.precision import autocast
from crt.progress import human_bytes
from crt.tokenizer import losses
from crt.tokenizer.model import Tokenizer, TokenizerConfig
from crt.tokenizer.objective import Objective
from tests.conftest import ROOT, write_params

# benchmarks/stage1.md: one H200, 32 images, no LPIPS, no regularizer, compiled.
MEASURED_PEAK = 20.2e9


def section(file: str = "presets/imagenet256.yaml", **changes: Any) -> TrainTokenizer:
    """Section train_tokenizer, the discriminator from the first step on, with changes of its own sections and keys."""
    params = load_params(ROOT / file).train_tokenizer
    changes["discriminator"] = {"start_step": 0} | changes.get("discriminator", {})
    changes = {
        name: getattr(params, name).model_copy(update=value) if isinstance(value, dict) else value
        for name, value in changes.items()
    }
    return params.model_copy(update=changes)


def small(**changes: Any) -> TrainTokenizer:
    """Of the digits, with two levels of one block each: every operation costs, on fake tensors, whatever its size."""
    changes["architecture"] = {"channel_multipliers": [1, 2]} | changes.get("architecture", {})
    return section("params.yaml", **changes)


def test_the_peak_is_that_of_a_gpu() -> None:
    derived = tokenizer_memory(section(batch_size=32, loss={"lpips_weight": 0.0}), False, 1)
    assert derived.peak == pytest.approx(MEASURED_PEAK, rel=0.03)


@contextmanager
def autocast_of_gpus(device: torch.device, precision: str) -> Iterator[None]:
    """Autocast as it is on a GPU, which torch grants no machine without one."""
    if device.type == "cpu":
        with autocast(device, precision):
            yield
        return
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", False)
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()


def kept_by_forward_pass(params: TrainTokenizer, device: str) -> int:
    """Bytes that autograd keeps of a forward pass on fake tensors of a device."""
    as_there = module._AsOnGPU() if device == "cpu" else _fused_attention()
    with (
        patch.object(processor, "multiplies_bfloat16", lambda: True),
        patch("crt.tokenizer.objective.autocast", autocast_of_gpus),
        FakeTensorMode(),
        torch.device(device),
        as_there,
        module._fused_norm(True),
    ):
        network = losses._lpips_network(pretrained=False, pnet_rand=True).requires_grad_(False)
        for name, constant in list(network.scaling_layer.named_buffers()):
            setattr(network.scaling_layer, name, constant.to(device))
        perceptual = partial(losses._mean_perceptual_distance, network) if params.loss.lpips_weight else None
        objective = Objective.untrained(params, True, perceptual)
        objective.device = torch.device(device)
        images = torch.zeros(2, 3, params.image_size, params.image_size).contiguous(memory_format=torch.channels_last)
        uniforms = torch.zeros(2, objective.model.num_tokens)
        networks = nn.ModuleList([objective.model, objective.regularizer, objective.discriminator])
        return saved_bytes(lambda: objective.tokenizer_loss(images, uniforms, 1.0, True).total, networks)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"regularizer": {"kind": "larp"}, "loss": {"entropy_weight": 0.1, "lpips_weight": 0.0}},
        {"regularizer": {"kind": "cross_entropy"}, "discriminator": {"kind": "stylegan"}},
    ],
    ids=["paper", "larp and entropy", "cross-entropy and stylegan"],
)
def test_a_forward_pass_keeps_what_it_does_on_a_gpu(changes) -> None:
    """Oracle: the same pass on fake tensors of a GPU, under that device's autocast."""
    params = section(**changes)
    assert kept_by_forward_pass(params, "cpu") == pytest.approx(kept_by_forward_pass(params, "cuda:0"), rel=1e-4)


def test_the_state_is_networks_averages_and_two_moments() -> None:
    params = small(discriminator={"kind": "patchgan", "channels": 8, "layers": 1})
    with FakeTensorMode():
        made = Objective.untrained(params, True, None)
    networks = nn.ModuleList([made.model, made.regularizer, made.discriminator])
    trained, averaged = (sum(weights.nbytes for weights in network.parameters()) for network in (networks, made.model))
    assert tokenizer_memory(params, True, 1).state == pytest.approx(3 * trained + averaged, rel=0.01)


@pytest.mark.parametrize(
    "changes",
    [
        {"quantizer": {"update": "ema"}},
        {"regularizer": {"kind": "larp"}},
        {
            "loss": {"entropy_weight": 0.1, "pixel": "l1"},
            "discriminator": {"kind": "stylegan", "adaptive_weight": True},
        },
        {"precision": "float32", "channels_last": False, "architecture": {"attention": False, "dropout": 0.1}},
    ],
)
def test_whatever_the_params_switch_on_is_walked_through(changes) -> None:
    of_two = tokenizer_memory(small(batch_size=16, **changes), True, 2)
    assert of_two.images == 8
    assert of_two.peak > of_two.state + 8 * of_two.per_image / 2 > of_two.state
    assert not dist.is_initialized()


def test_a_batch_costs_the_same_however_it_is_derived() -> None:
    """The fullest moment may be another one in a small batch: only there it is no straight line."""
    params = small(batch_size=64)
    few, many = (tokenizer_memory(params.model_copy(update={"batch_size": size}), True, 1) for size in (64, 256))
    assert few.peak + 192 * few.per_image == pytest.approx(many.peak, rel=0.01)
    assert few.largest(many.peak) == pytest.approx(256, abs=3)


def test_the_largest_batch_is_the_last_that_fits() -> None:
    memory = TokenizerMemory(state=100, fixed=105, per_image=10, least=120, images=4, peak=145)
    assert [memory.largest(available) for available in (145, 154, 155, 144, 120, 119, 0)] == [4, 4, 5, 3, 1, 0, 0]


def test_where_images_are_small_and_the_networks_large_the_update_is_the_fullest_moment() -> None:
    params = small(batch_size=2, architecture={"decoder_channels": 128})
    memory = tokenizer_memory(params, False, 2)
    assert (memory.images, memory.peak) == (1, memory.least)
    assert memory.least > memory.fixed + memory.per_image
    assert memory.largest(memory.least - 1) == 0
    many = memory.largest(2 * memory.least)
    tight = tokenizer_memory(params.model_copy(update={"batch_size": 2 * many}), False, 2)
    assert 0 <= 2 * memory.least - tight.peak < 1.1 * memory.per_image


def test_without_a_step_it_is_that_of_a_validation() -> None:
    """Oracle: networks without gradients and moments; the decoder's some feature maps of the full resolution."""
    one_width = {"channel_multipliers": [1, 1], "attention": False}
    params = small(steps=0, batch_size=16, architecture=one_width, discriminator={"kind": "none"})
    model = Tokenizer(TokenizerConfig.from_params(params))
    memory = tokenizer_memory(params, True, 1)
    assert memory.state == 2 * sum(weights.nbytes for weights in model.parameters())
    one_map = 4 * params.architecture.decoder_channels * params.image_size**2
    assert 3 * one_map < memory.per_image < 6 * one_map
    assert memory.peak == pytest.approx(memory.state + 16 * memory.per_image, rel=0.01)


MEMORY = TokenizerMemory(state=10**9, fixed=2 * 10**9, per_image=10**9, least=3 * 10**9, images=8, peak=10**10)


@pytest.mark.parametrize(
    ("gigabytes", "line"),
    [
        (10, None),
        (9.9, "does not fit: train_tokenizer needs 10 GB of 9.9 GB: set train_tokenizer.batch_size to 14 or less, or use more GPUs"),  # noqa: E501
        (2.9, "does not fit: train_tokenizer needs 10 GB of 2.9 GB: use GPUs with more memory"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_told_with_a_remedy(gigabytes, line) -> None:
    assert _tokenizer_misfit(MEMORY, make_cluster("h100", 2, gigabytes, None, 0.0)) == line


def test_the_plan_says_whether_stage_1_fits_and_without_a_step_it_needs_less(tmp_path, capsys) -> None:
    """Memory in which neither training fits: without steps there is room for both."""
    untrained = {"train_tokenizer.steps": 0, "train_tokenizer.init_from": "weights"}
    untrained |= {"train_ar.steps": 0, "train_ar.init_from": "weights"}
    found = []
    for changes in ({}, untrained):
        params = write_params(tmp_path / "params.yaml", {"sample.batch_size": 1} | changes)
        status = main(["plan", "--params", str(params), "--gpus", "2", "--reserve", "0", "--gpu-memory", "0.015"])
        found.append((status, capsys.readouterr().out.splitlines()))
    (trained, told), (validated, other) = found
    assert (trained, validated) == (1, 0)
    assert any(line.startswith("does not fit: train_ar needs") for line in told)
    assert "  checkpoint      none: nothing is trained" in other
    memory = tokenizer_memory(load_params(ROOT / "params.yaml").train_tokenizer, True, 2)
    assert _tokenizer_misfit(memory, make_cluster("h100", 2, 0.015, None, 0.0)) in told
    held = f"  {human_bytes(memory.peak)} ! at 32 images at once: networks and optimizers {human_bytes(memory.state)}, "
    (line,) = [line for line in told if line.startswith(held)]
    assert line.endswith(f"batch_size {2 * memory.largest(15 * 10**6) or 'none'}")
