"""Group normalisation (Wu and He 2018) at the speed that the autoencoder's largest feature maps ask for."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from crt.launch import has_gpu

norm_kernels: Any = None
if has_gpu() and importlib.util.find_spec("triton") is not None:  # Triton comes with torch for GPUs
    from crt.tokenizer import norm_kernels

_ELEMENTS_AT_ONCE = 2**16


class GroupNorm(nn.GroupNorm):
    """Group normalisation in the precision of its input, and SiLU behind it where asked for.

    Autocast would turn bf16 activations into float32 here, twice the memory traffic of the costliest
    feature maps. The kernels take their statistics in float32 whatever the input is.
    """

    def forward(self, x: Tensor, silu: bool = False) -> Tensor:
        """(B, C, H, W) to the same."""
        with torch.autocast(x.device.type, enabled=False):
            if norm_kernels is not None and x.device.type == "cuda" and _is_channels_last(x):
                return norm_kernels.group_norm(x, self.weight, self.bias, self.num_groups, self.eps, silu)[0]
            y = self._normalize(x)
            return F.silu(y, inplace=True) if silu else y

    def _normalize(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        ours = x.device.type == "cpu" and _is_channels_last(x) and (x.requires_grad or x.dtype == torch.float32)
        if ours and not isinstance(x, FakeTensor):  # those are walked through piece by piece for nothing
            return _ChannelsLastGroupNorm.apply(x, weight, bias, self.num_groups, self.eps)
        return F.group_norm(x, self.num_groups, weight, bias, self.eps)


class _ChannelsLastGroupNorm(torch.autograd.Function):
    """For channels-last images on a CPU: a forward pass that is exact in float32, a backward pass that is fast.

    torch's own forward pass adds up each group one element after the other and takes the variance as a difference of
    squares: at 128 channels and 256 px it is wrong by 1e-3 where the mean is six deviations, a thousand times what the
    contiguous layout gives, and codes near a tie change. In bfloat16 that hides in the rounding. Its backward pass
    walks with a stride: at 16 channels and 256 px it takes ten times as long as the convolutions beside it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:  # noqa: PLR0917
        batch, channels, height, width = x.shape
        if x.dtype == torch.float32:
            mean, rstd = _statistics(x, groups, eps)
            scale = rstd.repeat_interleave(channels // groups, 1) * weight  # B, C
            offset = bias - mean.repeat_interleave(channels // groups, 1) * scale
            y = torch.empty_like(x)  # channels last as well
            rows, out = x.permute(0, 2, 3, 1), y.permute(0, 2, 3, 1)
            torch.addcmul(offset[:, None, None], rows, scale[:, None, None], out=out)
        else:
            y, mean, rstd = torch.native_group_norm(x, weight, bias, batch, channels, height * width, groups, eps)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.eps = eps
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, rstd = ctx.saved_tensors
        if torch.is_grad_enabled():  # to be differentiated again: by what torch can differentiate
            return *_differentiable_gradients(gradient, x, weight, mean.shape[1], ctx.eps), None, None
        batch, channels, height, width = x.shape
        groups, count = mean.shape[1], channels // mean.shape[1] * height * width
        rows, slopes = (t.permute(0, 2, 3, 1) for t in (x, gradient.contiguous(memory_format=torch.channels_last)))
        mean, rstd = mean.float(), rstd.float()

        def per_group(values: Tensor) -> Tensor:
            return values.view(batch, groups, -1)

        # Over rows in the precision at hand, which is fast, then over columns in full: the roundings average out.
        slope_sum, product_sum = ((t.sum(2).float().sum(1)) for t in (slopes, slopes * rows))  # (B, C)
        scale = (
            per_group(weight.float().expand(batch, -1)) * rstd[..., None]
        )  # (B, G, C / G): dy / dx, statistics fixed
        slope_mean, product_mean = ((per_group(t) * scale).sum(2) / count for t in (slope_sum, product_sum))
        # What passes through mean and variance is linear in x, with one slope and offset per group.
        slope = (slope_mean * mean - product_mean) * rstd.square()  # (B, G)
        offset = -slope * mean - slope_mean

        def per_channel(values: Tensor) -> Tensor:
            expanded = values.view(batch, groups, -1).expand(-1, -1, channels // groups)
            return expanded.reshape(batch, 1, 1, channels).to(x.dtype)

        x_gradient = torch.addcmul(per_channel(offset), rows, per_channel(slope))
        x_gradient.addcmul_(slopes, scale.reshape(batch, 1, 1, channels).to(x.dtype))
        centred = per_group(product_sum) - per_group(slope_sum) * mean[..., None]
        weight_gradient = (centred * rstd[..., None]).sum(0).flatten().to(weight.dtype)
        return x_gradient.permute(0, 3, 1, 2), weight_gradient, slope_sum.sum(0).to(weight.dtype), None, None


def _differentiable_gradients(
    gradient: Tensor, x: Tensor, weight: Tensor, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias as functions of all three arguments, by the definition."""
    wide, slopes = (t.float() if t.itemsize == 2 else t for t in (x, gradient))
    grouped = wide.unflatten(1, (groups, -1))  # B, G, C / G, H, W
    variance, mean = torch.var_mean(grouped, (2, 3, 4), correction=0, keepdim=True)
    rstd = (variance + eps).rsqrt()
    normed = (grouped - mean) * rstd
    inner = (slopes * weight.to(slopes.dtype)[:, None, None]).unflatten(1, (groups, -1))
    along = (inner * normed).mean((2, 3, 4), keepdim=True)
    x_gradient = (inner - inner.mean((2, 3, 4), keepdim=True) - normed * along) * rstd
    weight_gradient = (slopes * normed.flatten(1, 2)).sum((0, 2, 3))
    return (
        x_gradient.flatten(1, 2).to(x.dtype),
        weight_gradient.to(weight.dtype),
        slopes.sum((0, 2, 3)).to(weight.dtype),
    )


def _statistics(x: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and 1 / sqrt(variance + eps) of each group: (B, C, H, W) channels last, float32, to two of (B, groups)."""
    batch, channels, height, width = x.shape
    # As many small images at once, or of a large one as many pixels, as the cache holds.
    images = max(1, _ELEMENTS_AT_ONCE // (height * width * channels))
    pixels = max(1, _ELEMENTS_AT_ONCE // channels)
    sums = []
    for some in x.permute(0, 2, 3, 1).reshape(batch, height * width, channels).split(images):
        # Short sums in float32, and the sum of those in float64.
        parts = [torch.stack([part.sum(1), (part * part).sum(1)]) for part in some.split(pixels, 1)]
        sums.append(torch.stack(parts).double().sum(0))  # 2, images, C
    count = channels // groups * height * width
    mean, square = (torch.cat(sums, 1).view(2, batch, groups, -1).sum(3) / count).unbind(0)
    return mean.float(), (square - mean.square() + eps).rsqrt().float()


def _is_channels_last(x: Tensor) -> bool:
    # Images of one pixel or one channel are both: torch's kernel is as good there.
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
