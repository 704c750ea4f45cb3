"""Run by test_norm_kernels.py with TRITON_INTERPRET=1, which must be set before Triton is imported: the kernels of
crt/tokenizer/norm_kernels.py on a CPU, against torch in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from crt.tokenizer import norm_kernels

EPS = 1e-6
# Images, channels, height, width, groups.
SHAPES = [(2, 8, 5, 7, 4), (1, 24, 9, 9, 8), (2, 16, 33, 17, 16), (2, 32, 16, 16, 1)]


def main() -> None:
    torch.manual_seed(0)
    norm_kernels._CHUNK = 2**9  # several chunks
    for shape in SHAPES:
        for silu in (False, True):
            check_against_torch(shape, silu, torch.float32, 1e-5)
    check_against_torch(SHAPES[1], True, torch.bfloat16, 5e-3)
    check_operators()
    check_place()


def inputs(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, int]:
    batch, channels, height, width, groups = shape
    # Far from zero: the variance must not be a difference of large squares.
    x = (torch.randn(batch, channels, height, width) * 2 + 50).to(dtype).to(memory_format=torch.channels_last)
    return x, torch.randn(channels), torch.randn(channels), groups


def check_against_torch(shape: tuple[int, ...], silu: bool, dtype: torch.dtype, tolerance: float) -> None:
    x, weight, bias, groups = inputs(shape, dtype)
    slope = torch.randn_like(x)
    exact = [tensor.double().requires_grad_() for tensor in (x, weight, bias)]
    expected = F.group_norm(exact[0], groups, exact[1], exact[2], EPS)
    if silu:
        expected = F.silu(expected)
    expected.backward(slope.double())
    y, mean, rstd = norm_kernels.forward(x, weight, bias, groups, EPS, silu)
    assert y.dtype == dtype and y.is_contiguous(memory_format=torch.channels_last)
    found = (y, *norm_kernels.backward(slope, x, weight, bias, mean, rstd, groups, silu))
    for name, ours, theirs in zip(
        ["y", "x", "weight", "bias"], found, (expected, *(t.grad for t in exact)), strict=True
    ):
        error = float((ours.double() - theirs.detach()).norm() / theirs.detach().norm())
        assert error < tolerance, (shape, silu, dtype, name, error)


def check_operators() -> None:
    """As torch's operators, with their fake versions and gradient, eager and compiled."""
    for operator, function in (
        (norm_kernels.group_norm, norm_kernels.forward),
        (norm_kernels._group_norm_backward, norm_kernels.backward),
    ):
        operator.register_kernel("cpu")(function)
    x, weight, bias, groups = inputs(SHAPES[0], torch.float32)
    for tensor in (x, weight, bias):
        tensor.requires_grad_()
    torch.library.opcheck(norm_kernels.group_norm, (x, weight, bias, groups, EPS, True))

    def loss(*tensors: Tensor) -> Tensor:
        return norm_kernels.group_norm(*tensors, groups, EPS, True)[0].square().sum()

    eager = torch.autograd.grad(loss(x, weight, bias), (x, weight, bias))
    compiled = torch.autograd.grad(torch.compile(loss, backend="aot_eager")(x, weight, bias), (x, weight, bias))
    for a, b in zip(eager, compiled, strict=True):
        torch.testing.assert_close(a, b)
    assert eager[0].is_contiguous(memory_format=torch.channels_last)


def check_place() -> None:
    """Kernels are launched where their tensors are, whichever GPU is the current one; the launches are only noted."""
    x, weight, bias, groups = inputs(SHAPES[0], torch.float32)
    here: list[Tensor | None] = [None]
    launches = []

    @contextmanager
    def device_of(tensor: Tensor) -> Iterator[None]:
        here[0] = tensor
        yield
        here[0] = None

    class Noted:
        def __getitem__(self, grid: tuple[int, int]) -> Callable[..., None]:
            return lambda first, *_, **__: launches.append(here[0] is x)

    names = [n for n, value in vars(norm_kernels).items() if isinstance(value, InterpretedFunction)]
    with ExitStack() as patches:
        for name in names:
            patches.enter_context(patch.object(norm_kernels, name, Noted()))
        patches.enter_context(patch.object(torch.cuda, "device_of", device_of))
        _, mean, rstd = norm_kernels.forward(x, weight, bias, groups, EPS, True)
        norm_kernels.backward(x, x, weight, bias, mean, rstd, groups, True)
    assert launches == [True] * 6, launches


if __name__ == "__main__":
    main()
