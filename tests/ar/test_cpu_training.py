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

from crt.ar import cpu_attention_kernels, cpu_training
from crt.ar import cpu_training_kernels as kernels
from crt.ar.model import rotary_table
from tests.ar.conftest import small_model
from tests.conftest import output_and_gradients

Operation = Callable[..., Tensor]
PRECISIONS = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
ROTATION, TARGETS = rotary_table((5, 15), 20, 10000.0), torch.arange(130) % 1000


def attention(qkv: Tensor, heads: int, rotation: Tensor) -> Tensor:
    """The plain way."""
    qk, v = qkv.unflatten(-1, (3 * heads, -1)).split((2 * heads, heads), dim=2)
    even, odd = qk.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = rotation.to(qkv.dtype)[:, None].unbind(-1)
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)
    q, k, v = (x.transpose(1, 2) for x in (*turned.chunk(2, dim=2), v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


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
    "attention": (
        # Of a quarter, exactly: bfloat16's rounding of large scores is no error of the kernel's.
        lambda qkv: cpu_training.causal_attention(qkv / 4, 3, ROTATION),
        lambda qkv: attention(qkv / 4, 3, ROTATION),
        [(2, 75, 180)],
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


# A single place, an odd length and more than a panel of channels, several panels of keys; each is compiled for seconds.
@PRECISIONS
@pytest.mark.parametrize(
    "grid, heads, width, vectors",
    [
        ((1, 1), 1, 4, "widest"),
        ((1, 7), 1, 100, "widest"),
        ((13, 10), 2, 64, "widest"),
        ((13, 10), 2, 64, "wide"),
        ((5, 7), 3, 32, "widest"),
        ((9, 9), 1, 96, "widest"),
        ((5, 7), 2, 24, "narrow"),
    ],
)
@pytest.mark.parametrize("threads", [3], indirect=True)
def test_attention_of_any_shape_on_any_processor(
    grid: tuple[int, int], heads: int, width: int, vectors: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if vectors != "widest":
        monkeypatch.setattr(cpu_attention_kernels, "has_matrix_registers", lambda: False)
    if vectors == "narrow":
        monkeypatch.setattr(cpu_attention_kernels, "processor_features", frozenset)
    sizes = {"heads": heads, "rotation": rotary_table(grid, width, 100.0)}
    torch.manual_seed(0)
    qkv = torch.randn(2, grid[0] * grid[1], 3 * heads * width).to(dtype)
    found = output_and_gradients(partial(cpu_training.causal_attention, **sizes), [qkv])
    expected = output_and_gradients(partial(attention, **sizes), [qkv.double()])
    for one, other in zip(found, expected, strict=True):
        tolerance = (2e-6 if dtype == torch.float32 else 2**-7) * other.abs().max().item()
        torch.testing.assert_close(one.double(), other, rtol=0, atol=tolerance)


# Of a head; AMX takes the second.
WIDTHS = pytest.mark.parametrize("width", [20, 32])


@PRECISIONS
@WIDTHS
@pytest.mark.parametrize("place", [0, 5, 63, 64, 74])
@pytest.mark.parametrize("threads", [1], indirect=True)
def test_attention_sees_nothing_that_follows(place: int, width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    rotation = rotary_table((5, 15), width, 10000.0)
    qkv = torch.randn(1, 75, 9 * width).to(dtype)
    other = qkv.clone()
    other[:, place + 1 :] = 1e30
    one, other = (cpu_training.causal_attention(x, 3, rotation)[:, : place + 1] for x in (qkv, other))
    assert torch.equal(one, other)
    # Nor does what precedes get a gradient from it.
    qkv.requires_grad_()
    cpu_training.causal_attention(qkv, 3, rotation)[:, place].sum().backward()
    seen = qkv.grad.abs().sum(-1)[0] > 0
    assert seen.tolist() == [t <= place for t in range(75)]


@PRECISIONS
@WIDTHS
@pytest.mark.parametrize("value", [math.nan, -math.nan, math.inf])
@pytest.mark.parametrize("part", [0, 3, 6], ids=["query", "key", "value"])
@pytest.mark.parametrize("threads", [1], indirect=True)
def test_what_is_no_number_goes_through_attention(part: int, value: float, width: int, dtype: torch.dtype) -> None:
    """A run that diverged must be seen: from a key's place on, and a value in all of its tile too (zero times NaN)."""
    qkv = torch.randn(1, 75, 9 * width).to(dtype)
    qkv[0, 66, part * width + 3] = value
    qkv.requires_grad_()
    result = cpu_training.causal_attention(qkv, 3, rotary_table((5, 15), width, 10000.0))
    bad = ~result[0, :, :width].isfinite().all(-1)
    rows = cpu_attention_kernels.attention_tile(dtype, width).rows
    first = 66 // rows * rows if part == 6 else 66
    assert bad.tolist() == [t == 66 if part == 0 else t >= first for t in range(75)]
    assert result[0, :, width:].isfinite().all()
    result.sum().backward()
    assert not qkv.grad.isfinite().all()


@pytest.mark.parametrize("threads", [1], indirect=True)
def test_a_score_that_overflows_leaves_no_finite_gradient() -> None:
    qkv = torch.randn(1, 75, 180)
    qkv[0, 66, :120] = 1e25
    qkv.requires_grad_()
    result = cpu_training.causal_attention(qkv, 3, ROTATION)
    assert result.isfinite().all(-1)[0].tolist() == [t != 66 for t in range(75)]
    (gradient,) = torch.autograd.grad(result[0, 66].sum(), qkv)
    assert not gradient[0, 66, :60].isfinite().any()
    assert not gradient[0, :67, 60:].isfinite().any()


@pytest.mark.parametrize("threads", [1], indirect=True)
def test_attention_is_compiled_for_many_scores_only() -> None:
    """Not for the digits' transformer, for that of CIFAR-10's preset and larger ones."""
    assert not cpu_training.attends(torch.empty(64, 16, 128), 4)
    assert cpu_training.attends(torch.empty(256, 64, 384), 6)
    assert cpu_training.attends(torch.empty(2, 256, 768), 12)


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
        monkeypatch.setattr("crt.ar.model._LEAST_COMPILED", least)
        monkeypatch.setattr(cpu_training, "_LEAST_SCORES", least)
        model = small_model(scale=2.0).to(dtype).requires_grad_(True)
        losses = model(codes, labels)
        losses.sum().backward()
        found.append([losses, *(parameter.grad for parameter in model.parameters())])
    for one, other in zip(*found, strict=True):
        tolerance = (1e-5 if dtype == torch.float32 else 0.05) * other.abs().max().item()
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance)
