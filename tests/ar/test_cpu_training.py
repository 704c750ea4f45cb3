"""The compiled operations of a training step on a CPU. Oracle: torch's own in float64, and the general forms."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from crt import cpu
from crt.ar import cpu_training
from crt.ar import cpu_training_kernels as kernels
from crt.ar.model import rotary_table
from tests.ar.conftest import small_model
from tests.conftest import output_and_gradients

Operation = Callable[..., Tensor]
PRECISIONS = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
ROTATION, TARGETS = rotary_table((3, 4), 16, 10000.0), torch.arange(130) % 1000


def heads(qkv: Tensor, rotation: Tensor) -> Tensor:
    """Of three heads, the plain way; all in one tensor."""
    qk, v = qkv.unflatten(-1, (9, 16)).split((6, 3), dim=2)
    even, odd = qk.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = rotation.to(qkv.dtype)[:, None].unbind(-1)
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)
    return torch.stack((*turned.chunk(2, dim=2), v)).transpose(2, 3)


def swiglu(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


# Ours, the oracle, and the shapes of the inputs: rows beyond one thread's block, widths that no vector divides.
CASES: dict[str, tuple[Operation, Operation, list[tuple[int, ...]]]] = {
    "norm": (
        lambda x, weight: cpu_training.rms_norm(x, weight, 1e-5),
        lambda x, weight: F.rms_norm(x, (100,), weight, 1e-5),
        [(3, 2000, 100), (100,)],
    ),
    "swiglu": (cpu_training.swiglu, swiglu, [(2, 7, 76)]),
    "heads": (
        lambda x: torch.stack(cpu_training.rotated_heads(x, 3, ROTATION)),
        partial(heads, rotation=ROTATION),
        [(2, 12, 144)],
    ),
    "cross-entropy": (
        lambda logits: cpu_training.cross_entropy(logits, TARGETS),
        lambda logits: F.cross_entropy(logits, TARGETS, reduction="none"),
        [(130, 1000)],
    ),
}


@pytest.fixture(autouse=True, params=[1, 3])
def threads(request: pytest.FixtureRequest) -> int:
    """Torch's threads, whose number changes no bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@PRECISIONS
@pytest.mark.parametrize("name", CASES)
def test_results_and_gradients_are_torchs(name: str, dtype: torch.dtype) -> None:
    ours, torchs, shapes = CASES[name]
    torch.manual_seed(0)
    values = [torch.randn(shape).mul_(3).to(dtype) for shape in shapes]
    exact = [value.double() for value in values]
    results = output_and_gradients(ours, values), output_and_gradients(torchs, exact)
    for one, other in zip(*results, strict=True):
        tolerance = (2e-6 if one.dtype == torch.float32 else 2**-7) * other.abs().max().item()
        torch.testing.assert_close(one.double(), other, rtol=0, atol=tolerance)
    assert results[0][0].dtype == (torch.float32 if name == "cross-entropy" else dtype)


@PRECISIONS
@pytest.mark.parametrize("probability", [0.1, 0.5, 0.999])
def test_dropout_drops_its_share_and_keeps_the_mean(probability: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.ones(1_000_003, dtype=dtype, requires_grad=True)  # a size that no word divides
    y = cpu_training.dropout(x, probability)
    dropped = (y == 0).double().mean().item()
    deviation = (probability * (1 - probability) / x.numel()) ** 0.5
    assert dropped == pytest.approx(probability, abs=5 * deviation)
    assert y.double().mean().item() == pytest.approx(1, abs=5 * deviation / (1 - probability) + 0.04)
    (given,) = torch.autograd.grad(y, x, torch.full_like(y, 2.0))
    assert torch.equal(given, 2 * y)
    # Neighbours are independent, and so is the same place the next time.
    if probability < 0.9:
        zero, following = (y == 0).double(), (cpu_training.dropout(x, probability) == 0).double()
        for one, other in [(zero, following), *((zero[:-distance], zero[distance:]) for distance in (1, 2, 3, 4))]:
            assert (one * other).mean().item() == pytest.approx(probability**2, abs=0.003)
    torch.manual_seed(0)
    assert torch.equal(cpu_training.dropout(x, probability), y)


def test_each_half_of_the_seed_draws_anew() -> None:
    x, scale, half = np.ones(10_000, np.float32), np.float32(2), np.uint32(2**31)
    drawn = {}
    for low, high in ((1, 2), (1, 3), (2, 2)):
        drawn[low, high] = np.empty_like(x)
        kernels.dropout_kernel(False)(x, drawn[low, high], np.uintp(0), np.uint32(low), np.uint32(high), half, scale)
    for other in ((1, 3), (2, 2)):
        assert (drawn[1, 2] == drawn[other]).mean() == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("name", [*CASES, "dropout"])
def test_the_number_of_threads_changes_no_bit(name: str) -> None:
    ours, _, shapes = CASES.get(name, (partial(cpu_training.dropout, probability=0.3), None, [(300, 1000)]))
    before, found = torch.get_num_threads(), []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        found.append(output_and_gradients(ours, [torch.randn(shape) for shape in shapes]))
    torch.set_num_threads(before)
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("place", [3, 150, 195])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_logit_that_is_no_number_makes_loss_and_gradient_none(value: float, place: int) -> None:
    """A run that diverged must be seen, whichever code it is."""
    logits = torch.randn(3, 200)
    logits[1, place] = value
    losses = cpu_training.cross_entropy(logits.requires_grad_(), torch.tensor([1, 2, 3]))
    assert losses.isfinite().tolist() == [True, False, True]
    losses.sum().backward()
    assert logits.grad.isfinite().all(1).tolist() == [True, False, True]


def test_a_norm_that_overflowed_has_a_gradient_that_is_none() -> None:
    """As torch's: zeros would hide that a run diverged."""
    x = torch.tensor([[1e30, 1.0], [1.0, 2.0]], requires_grad=True)
    cpu_training.rms_norm(x, torch.ones(2), 1e-5).sum().backward()
    assert x.grad.isfinite().all(1).tolist() == [False, True]


def test_second_derivatives_are_refused_where_they_would_be_wrong() -> None:
    x, weight = torch.randn(6, 8, requires_grad=True), torch.ones(8, requires_grad=True)
    for y in (
        cpu_training.rms_norm(x, weight, 1e-5),
        cpu_training.dropout(x, 0.5),
        cpu_training.cross_entropy(x, torch.arange(6)),
    ):
        with pytest.raises(RuntimeError, match="create_graph=True"):
            torch.autograd.grad(y.sum(), x, create_graph=True)


@PRECISIONS
def test_a_model_is_the_same_with_them(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses and gradients of all parameters, without dropout, whose draws differ."""
    codes, labels = torch.randint(12, (4, 16), generator=torch.Generator().manual_seed(0)), torch.arange(4) % 3
    found = []
    for least in (0, 2**40):
        monkeypatch.setattr(cpu, "_LEAST_COMPILED", least)
        model = small_model(scale=2.0).to(dtype).requires_grad_(True)
        losses = model(codes, labels)
        losses.sum().backward()
        found.append([losses, *(parameter.grad for parameter in model.parameters())])
    for one, other in zip(*found, strict=True):
        tolerance = (1e-5 if dtype == torch.float32 else 0.05) * other.abs().max().item()
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance)
