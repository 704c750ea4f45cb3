"""The CPU forms of the operations against torch's own, and the one process's update against that of ZeRO."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from crt.ar import cpu, engine
from crt.ar.engine import deepspeed_engine, deepspeed_session, gather_weights, gradient_norm, set_learning_rate
from crt.ar.model import rotary_table
from crt.distributed import join_world
from crt.params import load_params
from tests.ar.conftest import small_config
from tests.conftest import ROOT


def pairwise_rotation(x: Tensor, rotation: Tensor) -> Tensor:
    even, odd = x.float()[..., 0::2], x.float()[..., 1::2]
    cos, sin = rotation[:, None].unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).type_as(x)


ROTATION, TARGETS = rotary_table((3, 4), 16, 10000.0), torch.arange(700) % 1000
CASES: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], list[tuple[int, ...]]]] = {
    "attention": (
        cpu.causal_attention,
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        [(2, 3, 12, 16)] * 3,
    ),
    "rotation": (lambda x: cpu.rotate(x, ROTATION), lambda x: pairwise_rotation(x, ROTATION), [(2, 12, 6, 16)]),
    # More rows than are treated at once, and not a multiple.
    "norm": (
        lambda x, weight: cpu.rms_norm(x, weight, 1e-5),
        lambda x, weight: F.rms_norm(x, (768,), weight, 1e-5),
        [(3, 250, 768), (768,)],
    ),
    "cross-entropy": (
        lambda logits: cpu.cross_entropy(logits, TARGETS),
        lambda logits: F.cross_entropy(logits.float(), TARGETS, reduction="none"),
        [(700, 1000)],
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_results_and_gradients_are_torchs(name: str, dtype: torch.dtype) -> None:
    ours, torchs, shapes = CASES[name]
    torch.manual_seed(0)
    values = [torch.randn(shape).to(dtype) for shape in shapes]
    results = []
    for function, precision in ((ours, dtype), (torchs, torch.float64 if name == "attention" else torch.float32)):
        inputs = [value.to(precision, copy=True).requires_grad_() for value in values]
        output = function(*inputs)
        output.backward(torch.linspace(-1, 1, output.numel()).view(output.shape).to(output.dtype))
        results.append([output, *(value.grad for value in inputs)])
    for one, other in zip(*results, strict=True):
        tolerance = (1e-5 if dtype == torch.float32 else 2e-2) * other.abs().max().item()
        torch.testing.assert_close(one.double(), other.double(), rtol=0, atol=tolerance)
    assert results[0][0].dtype == (torch.float32 if name == "cross-entropy" else dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("probability", [0.0, 0.1, 0.5, 0.999])
def test_dropout_drops_its_share_and_keeps_the_mean(probability: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.ones(1_000_003, dtype=dtype, requires_grad=True)  # a size that no word divides
    y = cpu.dropout(x, probability)
    dropped = (y == 0).double().mean().item()
    deviation = (probability * (1 - probability) / x.numel()) ** 0.5
    assert dropped == pytest.approx(probability, abs=5 * deviation + 2**-15)
    assert y.double().mean().item() == pytest.approx(1, abs=5 * deviation / (1 - probability) + 0.04)
    (given,) = torch.autograd.grad(y, x, torch.full_like(y, 2.0))
    assert torch.equal(given, 2 * y)
    # Neighbours, which share a random word, are independent.
    if 0 < probability < 0.9:
        zero = (y == 0).double()
        for distance in (1, 2, 3, 4):
            both = (zero[:-distance] * zero[distance:]).mean().item()
            assert both == pytest.approx(probability**2, abs=0.003)
    torch.manual_seed(0)
    assert torch.equal(cpu.dropout(x, probability), y)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("zero_stage", [1, 2])
@pytest.mark.parametrize("micro_batch", [6, 3])
def test_one_process_updates_as_zero_does(
    precision: str, zero_stage: int, micro_batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: DeepSpeed's own buckets, partitions and optimizer step. Gradients are clipped at some steps."""
    params = load_params(ROOT / "params.yaml").train_ar
    optimizer = params.optimizer.model_copy(update={"clip_norm": 0.7})
    changes = {"precision": precision, "zero_stage": zero_stage, "batch_size": 6, "micro_batch_size": micro_batch}
    params = params.model_copy(update=changes | {"optimizer": optimizer})
    config = small_config()
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(config.codebook_size, (6, config.num_tokens), generator=generator)
    labels = torch.arange(6) % config.num_classes

    def train() -> tuple[dict[str, Tensor], list[float]]:
        norms = []
        with join_world() as world, deepspeed_session(world), deepspeed_engine(params, config, 0, world) as run:
            run.train()
            set_learning_rate(run, 1e-2)
            for step in range(4):
                for rows in range(0, 6, micro_batch):
                    torch.manual_seed(step + rows)
                    run.backward(run(codes[rows : rows + micro_batch], labels[rows : rows + micro_batch]).mean())
                    run.step()
                norms.append(gradient_norm(run).item())
            return gather_weights(run, world), norms

    weights, norms = train()
    calls: list[Any] = []
    monkeypatch.setattr(engine, "skip_partitioning", calls.append)
    expected, expected_norms = train()
    assert norms == pytest.approx(expected_norms, rel=1e-5)
    assert min(norms) < 0.7 < max(norms)
    for name, weight in weights.items():
        # Clipping divides by a norm that is summed in another order.
        torch.testing.assert_close(weight, expected[name], rtol=1e-4, atol=1e-5)
    # Float32 sums of bfloat16 gradients are left to DeepSpeed.
    assert len(calls) == (0 if precision == "bf16" and micro_batch == 3 else 1)
