"""The follower of bytes against allocations that are known."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from crt.plan.live_bytes import LiveBytes


def test_what_is_let_go_counts_no_more_and_views_count_once() -> None:
    with LiveBytes() as live:
        a = torch.zeros(1000)
        b = a.view(10, 100)[2:]
        assert live.now == live.peak == 4000
        del a
        assert live.now == 4000  # the view holds it
        c = b + 1
        assert live.now == 4000 + 3200
        del b
        c.mul_(2)
        assert (live.now, live.peak) == (3200, 7200)
        live.restart()
        assert live.peak == 3200
        del c
        assert live.now == 0


def test_the_graph_holds_what_the_backward_pass_needs() -> None:
    weight = torch.ones(500, requires_grad=True)
    with FakeTensorMode(allow_non_fake_inputs=True), LiveBytes() as live:
        x: Tensor = weight.exp()  # kept: its gradient is itself
        y = x + 1  # kept by nothing
        total = y.exp().sum()
        del x, y
        assert live.now == 2 * 2000 + 4
        total.backward()
        del total
        assert live.now == 2000  # the gradient
        assert live.peak >= 3 * 2000
