"""The CPU forms of the operations against torch's own."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from crt import cpu
from tests.conftest import output_and_gradients

CASES: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], list[tuple[int, ...]]]] = {
    **{
        f"attention, causal {causal}": (
            partial(cpu.attention, causal=causal),
            partial(F.scaled_dot_product_attention, is_causal=causal),
            [(2, 3, 12, 16)] * 3,
        )
        for causal in (True, False)
    },
    "linear": (cpu.linear, F.linear, [(2, 5, 24), (7, 24)]),
    "linear, one row": (cpu.linear, F.linear, [(24,), (7, 24)]),
}


@pytest.fixture(params=[True, False], ids=["bf16 products", "float32 products"])
def processor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that multiplies bfloat16, one that does not."""
    monkeypatch.setattr("crt.processor.multiplies_bfloat16", lambda: request.param)


@pytest.mark.usefixtures("processor")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_results_and_gradients_are_torchs(name: str, dtype: torch.dtype) -> None:
    ours, torchs, shapes = CASES[name]
    torch.manual_seed(0)
    values = [torch.randn(shape).to(dtype) for shape in shapes]
    exact = [value.double() for value in values]
    results = output_and_gradients(ours, values), output_and_gradients(torchs, exact)
    for one, other in zip(*results, strict=True):
        tolerance = (1e-5 if dtype == torch.float32 else 2e-2) * other.abs().max().item()
        torch.testing.assert_close(one.double(), other.double(), rtol=0, atol=tolerance)
    assert results[0][0].dtype == dtype


def test_wide_products_round_once() -> None:
    torch.manual_seed(0)
    x, weight = (torch.randn(shape).bfloat16() for shape in ((64, 512), (32, 512)))
    exact = F.linear(x.double(), weight.double())
    assert ((cpu.linear(x, weight) - exact).abs() <= exact.abs() * 2**-8 + 1e-4).all()


@pytest.mark.parametrize("wanted", [(True, False), (False, True)])
def test_wide_products_give_the_gradients_that_are_asked_for(wanted: tuple[bool, bool]) -> None:
    results = []
    for product in (cpu.linear, F.linear):
        x, weight = (torch.ones(2, 2, requires_grad=needed) for needed in wanted)
        product(x, weight).sum().backward()
        results.append((x.grad, weight.grad))
    for ours, torchs in zip(*results, strict=True):
        assert (ours is None and torchs is None) or torch.equal(ours, torchs)


def test_wide_products_have_second_derivatives() -> None:
    torch.manual_seed(0)
    x, weight, direction = torch.randn(3, 4), torch.randn(2, 4), torch.randn(3, 4)
    results = []
    for product in (cpu.linear, F.linear):
        leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
        (slope,) = torch.autograd.grad(product(*leaves).square().sum(), leaves[0], create_graph=True)
        results.append(torch.autograd.grad((slope * direction).sum(), leaves))
    for ours, torchs in zip(*results, strict=True):
        torch.testing.assert_close(ours, torchs)
