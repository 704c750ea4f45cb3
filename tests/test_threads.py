"""Work shared among threads."""

from __future__ import annotations

import os

import pytest
import torch

from crt import threads as our_threads


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("size", [0, 3, 4, 21, 400])
def test_ranges_for_threads_cover_everything_once(threads: int, size: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    ranges: list[tuple[int, int]] = []
    our_threads.share_among_threads(lambda first, last: ranges.append((first, last)), size, 4)
    assert torch.get_num_threads() == threads
    with pytest.raises(ZeroDivisionError):
        our_threads.share_among_threads(lambda first, last: 1 // 0, size, 4)
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
    our_threads.share_among_threads(work, 3, 1)
    for _ in range(3):
        our_threads.alone(work)
    assert seen == [3, *[1] * 6]
    assert len(os.listdir("/proc/self/task")) <= tasks + 3
    torch.set_num_threads(before)
