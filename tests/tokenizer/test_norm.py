"""Our backward pass of group normalisation against torch's own."""

import pytest
import torch
import torch.nn.functional as F

from crt.tokenizer.norm import GroupNorm


@pytest.mark.parametrize(("channels", "groups", "size"), [(16, 16, 24), (32, 8, 8), (64, 32, 1), (12, 1, 6)])
def test_gradients_equal_torchs_for_channels_last_images(channels, groups, size):
    generator = torch.Generator().manual_seed(0)
    norm = GroupNorm(groups, channels, 1e-6)
    with torch.no_grad():
        norm.weight.normal_(1.0, 0.3, generator=generator)
        norm.bias.normal_(generator=generator)
    # A mean far from zero, where sums that cancel would show.
    images = 3 + torch.randn(3, channels, size, size, generator=generator)
    slopes = torch.randn(images.shape, generator=generator)
    results = []
    for layout in (torch.channels_last, torch.contiguous_format):
        x = images.contiguous(memory_format=layout).requires_grad_()
        y = norm(x)
        gradients = torch.autograd.grad(y, (x, norm.weight, norm.bias), slopes.contiguous(memory_format=layout))
        results.append((y, *gradients))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=5e-5)


def test_gradients_pass_gradcheck():
    norm = GroupNorm(2, 4, 1e-6).double()
    x = torch.randn(2, 4, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    assert torch.autograd.gradcheck(norm, (x,))


def test_second_derivatives_pass_gradgradcheck():
    norm = GroupNorm(2, 4, 1e-6).double()
    torch.nn.init.normal_(norm.weight, 1.0, 0.3, generator=torch.Generator().manual_seed(1))
    x = torch.randn(2, 4, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()

    def of_all(x, weight, bias):
        return torch.func.functional_call(norm, {"weight": weight, "bias": bias}, (x,))

    assert torch.autograd.gradgradcheck(of_all, (x, norm.weight, norm.bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gradient_penalty_has_all_its_parts(dtype):
    """Oracle: torch's own, in the other layout. The slopes of a sum are constants: nothing of them needs gradients."""
    norm = GroupNorm(4, 16, 1e-6)
    torch.nn.init.normal_(norm.weight, 1.0, 0.3, generator=torch.Generator().manual_seed(1))
    images = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    factors, results = images.sin(), []
    for layout in (torch.channels_last, torch.contiguous_format):
        x = images.contiguous(memory_format=layout).requires_grad_()
        (slope,) = torch.autograd.grad((norm(x) * factors).sum(), x, create_graph=True)
        results.append((slope, *torch.autograd.grad(slope.float().square().sum(), (x, norm.weight))))
    tolerance = 1e-4 if dtype == torch.float32 else 5e-2
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype == theirs.dtype
        assert (ours - theirs).float().norm() < tolerance * theirs.float().norm()


def test_bf16_gradients_are_as_near_the_truth_as_torchs():
    generator = torch.Generator().manual_seed(0)
    norm = GroupNorm(8, 32, 1e-6)
    images = 1 + torch.randn(2, 32, 32, 32, generator=generator)
    slopes = torch.randn(images.shape, generator=generator)

    def errors(layout: torch.memory_format) -> list[float]:
        x = images.bfloat16().contiguous(memory_format=layout).requires_grad_()
        found = torch.autograd.grad(
            norm(x), (x, norm.weight, norm.bias), slopes.bfloat16().contiguous(memory_format=layout)
        )
        return [float((a - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)]

    x = images.bfloat16().double().requires_grad_()
    weight, bias = (p.detach().double().requires_grad_() for p in (norm.weight, norm.bias))
    y = F.group_norm(x, 8, weight, bias, 1e-6)
    exact = torch.autograd.grad(y, (x, weight, bias), slopes.bfloat16().double())
    for ours, theirs in zip(errors(torch.channels_last), errors(torch.contiguous_format), strict=True):
        assert ours < 3 * theirs


@pytest.mark.parametrize("with_gradient", [False, True])
@pytest.mark.parametrize("channels, side", [(16, 5), (32, 64), (96, 100)])
def test_float32_is_exact_in_either_layout(channels: int, side: int, with_gradient: bool) -> None:
    """Oracle: float64. torch's own channels-last kernel is wrong by 1e-4 and more where the mean is large."""
    torch.manual_seed(0)
    norm = GroupNorm(8, channels, 1e-6)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    x = torch.randn(2, channels, side, side) * 0.5 + 3
    exact = torch.nn.functional.group_norm(x.double(), 8, norm.weight.double(), norm.bias.double(), 1e-6)
    for layout in (torch.contiguous_format, torch.channels_last):
        y = norm(x.contiguous(memory_format=layout).requires_grad_(with_gradient))
        torch.testing.assert_close(y.double(), exact, rtol=0, atol=2e-5)
