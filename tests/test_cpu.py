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

from crt import cpu
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
}


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
