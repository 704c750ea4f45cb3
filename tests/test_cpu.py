"""The CPU forms of the operations against torch's own."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from crt import cpu
from crt.ar.model import rotary_table


def pairwise_rotation(x: Tensor, rotation: Tensor) -> Tensor:
    even, odd = x.float()[..., 0::2], x.float()[..., 1::2]
    cos, sin = rotation[:, None].unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).type_as(x)


ROTATION, TARGETS = rotary_table((3, 4), 16, 10000.0), torch.arange(700) % 1000
CASES: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], list[tuple[int, ...]]]] = {
    **{
        f"attention, causal {causal}": (
            partial(cpu.attention, causal=causal),
            partial(F.scaled_dot_product_attention, is_causal=causal),
            [(2, 3, 12, 16)] * 3,
        )
        for causal in (True, False)
    },
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
    exact = torch.float64 if name.startswith("attention") else torch.float32
    for function, precision in ((ours, dtype), (torchs, exact)):
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


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("size", [0, 3, 4, 21, 400])
def test_ranges_for_threads_cover_everything_once(threads: int, size: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    ranges: list[tuple[int, int]] = []
    cpu.share_among_threads(lambda first, last: ranges.append((first, last)), size, 4)
    assert torch.get_num_threads() == threads
    with pytest.raises(ZeroDivisionError):
        cpu.share_among_threads(lambda first, last: 1 // 0, size, 4)
    torch.set_num_threads(before)
    assert [place for first, last in sorted(ranges) for place in range(first, last)] == list(range(size))
    assert all(first % 4 == 0 for first, _ in ranges) and len(ranges) <= max(threads, 1)


def test_torch_works_alone_in_our_threads() -> None:
    """Oracle: the process's threads, of which torch makes some for each thread that it helps."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    a = torch.randn(8, 128, 128)
    seen: list[int] = []

    def work(*_: int) -> None:
        torch.bmm(a, a).sum()  # what makes torch look at its default
        seen.append(torch.get_num_threads())

    work()
    tasks = len(os.listdir("/proc/self/task"))
    cpu.share_among_threads(work, 3, 1)
    for _ in range(3):
        cpu.alone(work)
    assert seen == [3, *[1] * 6]
    assert len(os.listdir("/proc/self/task")) <= tasks + 3
    torch.set_num_threads(before)


def test_second_derivatives_are_refused_where_they_would_be_wrong() -> None:
    x, weight = torch.randn(6, 8, requires_grad=True), torch.ones(8, requires_grad=True)
    for y in (cpu.rms_norm(x, weight, 1e-5), cpu.dropout(x, 0.5), cpu.cross_entropy(x, torch.arange(6))):
        with pytest.raises(RuntimeError, match="create_graph=True"):
            torch.autograd.grad(y.sum(), x, create_graph=True)
