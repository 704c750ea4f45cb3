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
