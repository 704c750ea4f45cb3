"""The CPU forms of the operations against torch's own."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from crt import cpu, precision
from crt.ar.model import Linear
from crt.cpu_kernels import compile_kernel, in_order
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
    monkeypatch.setattr(cpu, "multiplies_bfloat16", lambda: request.param)


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


@pytest.mark.parametrize("fast", [True, False])
def test_bf16_is_multiplied_as_such_where_that_is_fast(
    fast: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """In a linear layer, under autocast, and in the rate that utilisation is a share of."""
    monkeypatch.setattr(cpu, "multiplies_bfloat16", lambda: fast)
    taken: list[torch.dtype] = []
    torchs_linear = F.linear
    monkeypatch.setattr(F, "linear", lambda x, weight, *bias: taken.append(x.dtype) or torchs_linear(x, weight, *bias))
    layer, x = Linear(8, 8, std=1.0).bfloat16(), torch.ones(2, 8, dtype=torch.bfloat16)
    assert layer(x).dtype == torch.bfloat16
    assert taken == [torch.bfloat16 if fast else torch.float32]
    device, gpu = torch.device("cpu"), torch.device("cuda")
    with precision.autocast(device, "bf16"):
        assert torch.is_autocast_enabled("cpu") == fast
    with precision.autocast(device, "float32"):
        assert not torch.is_autocast_enabled("cpu")
    assert precision.multiplies_as(device, "bf16") == taken[0]
    assert precision.multiplies_as(gpu, "bf16") == torch.bfloat16
    assert precision.multiplies_as(gpu, "float32") == torch.float32
    caplog.set_level("INFO", "crt")
    for where, wanted in ((gpu, "bf16"), (device, "float32"), (device, "bf16")):
        precision.announce_precision("sample", where, wanted)
    line = "sample.precision bf16: this processor multiplies no bfloat16: products are computed in float32"
    assert [record.getMessage() for record in caplog.records] == [] if fast else [line]


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


@pytest.mark.parametrize(
    "features, system, answer, expected",
    [
        ({"amx-tile", "amx-bf16"}, "Linux", 0, True),
        ({"amx-tile", "amx-bf16"}, "Linux", -1, False),
        ({"amx-tile", "amx-bf16"}, "Darwin", 0, False),
        ({"amx-tile", "amx-int8"}, "Linux", 0, False),
    ],
)
def test_matrix_registers_serve_only_where_the_system_lends_them(
    features: set[str], system: str, answer: int, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without leave the first such instruction ends the process."""
    monkeypatch.setattr(cpu, "processor_features", lambda: frozenset(features))
    monkeypatch.setattr("platform.system", lambda: system)
    monkeypatch.setattr("ctypes.CDLL", lambda _: SimpleNamespace(syscall=lambda *_: answer))
    assert cpu.has_matrix_registers.__wrapped__() == expected


def test_floats_in_the_order_of_integers() -> None:
    tiny = np.float32(1e-40)
    values = np.array([-np.inf, -3e38, -1.5, -1, -tiny, -0.0, 0.0, tiny, 0.25, 1, 3e38, np.inf], np.float32)

    @compile_kernel
    def all_of(bits, out):  # type: ignore[no-untyped-def]
        for k in range(bits.size):
            out[k] = in_order(bits[k])

    numbers, back = np.empty(len(values), np.int32), np.empty(len(values), np.int32)
    all_of(values.view(np.int32), numbers)
    all_of(numbers, back)
    assert (np.diff(numbers.astype(np.int64)) > 0).all()
    assert (back == values.view(np.int32)).all()
