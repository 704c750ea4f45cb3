"""Group normalisation of channels-last images on a GPU, with SiLU behind it: Triton kernels.

torch 2.11 normalises groups of contiguous images only, in its own kernels and in what its compiler makes: every norm
copies channels-last activations to the other layout, and the convolutions copy them back. These kernels read and write
channels last, add up in a fixed order, and never store what lies between norm and SiLU. Memory traffic bounds them: two
readings and a writing forward, four readings and a writing backward.

Shapes: B images, C channels in G groups, P pixels. Each image is cut into Q chunks of pixels, whose sums are made apart
and put together by a small kernel.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Elements of a tile: what 128 threads hold in registers.
_TILE = 4096
# Elements that one program adds up: enough to stream, few enough to fill the GPU.
_CHUNK = 2**17
_WARPS = 4


@triton.jit
def _tile_of(x_ptr, pixel, pixels, channel, channels):
    """Pointers and mask of a tile, rows of pixels by channels, of the image at x_ptr."""
    inside = (pixel < pixels)[:, None] & (channel < channels)[None, :]
    return x_ptr + pixel[:, None].to(tl.int64) * channels + channel[None, :], inside


@triton.jit
def _coefficients(weight_ptr, bias_ptr, mean_ptr, rstd_ptr, channel, group, known):
    """What each channel is scaled and moved by: weight, bias, and its group's mean and 1 / deviation."""
    weight = tl.load(weight_ptr + channel, known, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + channel, known, other=0.0).to(tl.float32)
    return weight, bias, tl.load(mean_ptr + group, known, other=0.0), tl.load(rstd_ptr + group, known, other=0.0)


@triton.jit
def _normalized(x, mean, rstd):
    return (x - mean[None, :]) * rstd[None, :]


@triton.jit
def _silu_slope(h):
    share = tl.sigmoid(h)
    return share * (1 + h * (1 - share))


@triton.jit
def _moments(
    x_ptr, sums_ptr, pixels, channels, chunks,
    ROWS: tl.constexpr, CHUNK_ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Sums over a chunk of x - pivot and of its square, by channel: (B, Q, 2, C). The pivot is the first pixel."""
    image, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    channel = tl.arange(0, BLOCK_C)
    x_ptr += image * pixels * channels
    pivot = tl.load(x_ptr + channel, channel < channels, other=0.0).to(tl.float32)
    total = tl.zeros((ROWS, BLOCK_C), tl.float32)
    square = tl.zeros((ROWS, BLOCK_C), tl.float32)
    for start in range(0, CHUNK_ROWS, ROWS):
        pixel = chunk * CHUNK_ROWS + start + tl.arange(0, ROWS)
        place, inside = _tile_of(x_ptr, pixel, pixels, channel, channels)
        x = tl.load(place, inside, other=0.0).to(tl.float32) - pivot[None, :]
        x = tl.where(inside, x, 0.0)
        total += x
        square += x * x
    sums_ptr += (image * chunks + chunk) * 2 * channels + channel
    tl.store(sums_ptr, tl.sum(total, 0), channel < channels)
    tl.store(sums_ptr + channels, tl.sum(square, 0), channel < channels)


@triton.jit
def _group_sums(sums_ptr, image, group, group_width, chunks, channels, CHUNKS: tl.constexpr, BLOCK: tl.constexpr):
    """The channels of a group, which of them there are, and both of their sums over all chunks in float64."""
    index, chunk = tl.arange(0, BLOCK), tl.arange(0, CHUNKS)
    channel, wanted = group * group_width + index, index < group_width
    place = sums_ptr + (image * chunks + chunk)[:, None] * 2 * channels + channel[None, :]
    inside = (chunk < chunks)[:, None] & wanted[None, :]
    first = tl.load(place, inside, other=0.0).to(tl.float64)
    second = tl.load(place + channels, inside, other=0.0).to(tl.float64)
    return channel, wanted, tl.sum(first, 0), tl.sum(second, 0)


@triton.jit
def _statistics(
    x_ptr, sums_ptr, mean_ptr, rstd_ptr, eps, pixels, channels, chunks, group_width,
    CHUNKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Mean and 1 / sqrt(variance + eps) of one group: (B, G) each."""
    image, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    channel, wanted, total, square = _group_sums(sums_ptr, image, group, group_width, chunks, channels, CHUNKS, BLOCK)
    pivot = tl.load(x_ptr + image * pixels * channels + channel, wanted, other=0.0).to(tl.float64)
    means = pivot + total / pixels
    mean = tl.sum(tl.where(wanted, means, 0.0), 0) / group_width
    apart = tl.where(wanted, means - mean, 0.0)
    spread = tl.sum(square - total * total / pixels, 0) + tl.sum(apart * apart, 0) * pixels
    variance = (spread / (group_width * pixels)).to(tl.float32)
    place = image * tl.num_programs(1) + group
    tl.store(mean_ptr + place, mean.to(tl.float32))
    tl.store(rstd_ptr + place, 1 / tl.sqrt(variance + eps))


@triton.jit
def _apply(
    x_ptr, y_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr, pixels, channels, groups, group_width,
    SILU: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, BLOCK_C)
    known, group = channel < channels, image * groups + channel // group_width
    weight, bias, mean, rstd = _coefficients(weight_ptr, bias_ptr, mean_ptr, rstd_ptr, channel, group, known)
    pixel = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    start = image * pixels * channels
    place, inside = _tile_of(x_ptr + start, pixel, pixels, channel, channels)
    h = _normalized(tl.load(place, inside, other=0.0).to(tl.float32), mean, rstd) * weight[None, :] + bias[None, :]
    if SILU:
        h = h * tl.sigmoid(h)
    place, inside = _tile_of(y_ptr + start, pixel, pixels, channel, channels)
    tl.store(place, h.to(y_ptr.dtype.element_ty), inside)


@triton.jit
def _slope_sums(
    x_ptr, slope_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr, sums_ptr, pixels, channels, groups, group_width, chunks,
    SILU: tl.constexpr, ROWS: tl.constexpr, CHUNK_ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Sums over a chunk of the slope behind the norm, and of it times the normalised x: (B, Q, 2, C)."""
    image, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    channel = tl.arange(0, BLOCK_C)
    known, group = channel < channels, image * groups + channel // group_width
    weight, bias, mean, rstd = _coefficients(weight_ptr, bias_ptr, mean_ptr, rstd_ptr, channel, group, known)
    total = tl.zeros((ROWS, BLOCK_C), tl.float32)
    product = tl.zeros((ROWS, BLOCK_C), tl.float32)
    image_start = image * pixels * channels
    for start in range(0, CHUNK_ROWS, ROWS):
        pixel = chunk * CHUNK_ROWS + start + tl.arange(0, ROWS)
        place, inside = _tile_of(x_ptr + image_start, pixel, pixels, channel, channels)
        x = _normalized(tl.load(place, inside, other=0.0).to(tl.float32), mean, rstd)
        place, inside = _tile_of(slope_ptr + image_start, pixel, pixels, channel, channels)
        slope = tl.load(place, inside, other=0.0).to(tl.float32)
        if SILU:
            slope *= _silu_slope(x * weight[None, :] + bias[None, :])
        total += slope
        product += slope * x
    sums_ptr += (image * chunks + chunk) * 2 * channels + channel
    tl.store(sums_ptr, tl.sum(total, 0), known)
    tl.store(sums_ptr + channels, tl.sum(product, 0), known)


@triton.jit
def _slope_statistics(
    sums_ptr, weight_ptr, means_ptr, totals_ptr, pixels, channels, chunks, group_width,
    CHUNKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of one group: means of the slopes at the normalised x, (B, G, 2); of its channels: both sums, (B, 2, C)."""
    image, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    channel, wanted, total, product = _group_sums(sums_ptr, image, group, group_width, chunks, channels, CHUNKS, BLOCK)
    weight = tl.load(weight_ptr + channel, wanted, other=0.0).to(tl.float64)
    count = group_width * pixels
    place = means_ptr + (image * tl.num_programs(1) + group) * 2
    tl.store(place, (tl.sum(weight * total, 0) / count).to(tl.float32))
    tl.store(place + 1, (tl.sum(weight * product, 0) / count).to(tl.float32))
    place = totals_ptr + image * 2 * channels + channel
    tl.store(place, total.to(tl.float32), wanted)
    tl.store(place + channels, product.to(tl.float32), wanted)


@triton.jit
def _apply_slopes(
    x_ptr, slope_ptr, out_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr, means_ptr, pixels, channels, groups,
    group_width, SILU: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The gradient of x."""
    image = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, BLOCK_C)
    known, group = channel < channels, image * groups + channel // group_width
    weight, bias, mean, rstd = _coefficients(weight_ptr, bias_ptr, mean_ptr, rstd_ptr, channel, group, known)
    slope_mean = tl.load(means_ptr + group * 2, known, other=0.0)
    product_mean = tl.load(means_ptr + group * 2 + 1, known, other=0.0)
    pixel = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    start = image * pixels * channels
    place, inside = _tile_of(x_ptr + start, pixel, pixels, channel, channels)
    x = _normalized(tl.load(place, inside, other=0.0).to(tl.float32), mean, rstd)
    place, inside = _tile_of(slope_ptr + start, pixel, pixels, channel, channels)
    slope = tl.load(place, inside, other=0.0).to(tl.float32)
    if SILU:
        slope *= _silu_slope(x * weight[None, :] + bias[None, :])
    slope = (slope * weight[None, :] - slope_mean[None, :] - x * product_mean[None, :]) * rstd[None, :]
    place, inside = _tile_of(out_ptr + start, pixel, pixels, channel, channels)
    tl.store(place, slope.to(out_ptr.dtype.element_ty), inside)


class _Cut:
    """How images of a shape are cut into tiles and chunks."""

    def __init__(self, x: Tensor, groups: int) -> None:
        self.images, self.channels = x.shape[:2]
        self.pixels, self.groups = x.shape[2] * x.shape[3], groups
        self.group_width = self.channels // groups
        self.block_c = triton.next_power_of_2(self.channels)
        self.rows = max(1, _TILE // self.block_c)
        self.chunk_rows = max(self.rows, _CHUNK // self.block_c)
        self.chunks = triton.cdiv(self.pixels, self.chunk_rows)
        self.tiles = triton.cdiv(self.pixels, self.rows)
        self.small = {
            "CHUNKS": triton.next_power_of_2(self.chunks),
            "BLOCK": triton.next_power_of_2(self.group_width),
            "num_warps": 1,
        }

    def partial_sums(self, x: Tensor) -> Tensor:
        """Room for two sums per chunk and channel."""
        return torch.empty((self.images, self.chunks, 2, self.channels), dtype=torch.float32, device=x.device)


def forward(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Group normalisation, and SiLU if asked for.

    Args:
        x: (B, C, H, W), channels last.
        weight, bias: (C,).
        groups: G, divides C.
        eps: added to the variance.
        silu: whether SiLU follows.

    Returns:
        The same shape, layout and precision as x; mean and 1 / deviation, (B, G) float32.
    """
    x = x.contiguous(memory_format=torch.channels_last)
    cut, y = _Cut(x, groups), torch.empty_like(x)
    mean, rstd = (torch.empty((cut.images, groups), dtype=torch.float32, device=x.device) for _ in range(2))
    sums = cut.partial_sums(x)
    tile = {"ROWS": cut.rows, "BLOCK_C": cut.block_c, "num_warps": _WARPS}
    with torch.cuda.device_of(x):  # Triton launches on the current GPU, wherever its tensors are
        _moments[cut.images, cut.chunks](
            x, sums, cut.pixels, cut.channels, cut.chunks, CHUNK_ROWS=cut.chunk_rows, **tile
        )  # fmt: skip
        _statistics[cut.images, groups](
            x, sums, mean, rstd, eps, cut.pixels, cut.channels, cut.chunks, cut.group_width, **cut.small
        )  # fmt: skip
        _apply[cut.images, cut.tiles](
            x, y, weight, bias, mean, rstd, cut.pixels, cut.channels, groups, cut.group_width, SILU=silu, **tile
        )  # fmt: skip
    return y, mean, rstd


def backward(
    slope: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, groups: int, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias.

    Args:
        slope: gradient of `forward`'s first result.
        x, weight, bias, groups, silu: as there.
        mean, rstd: `forward`'s other results.
    """
    x, slope = (tensor.contiguous(memory_format=torch.channels_last) for tensor in (x, slope))
    cut, out = _Cut(x, groups), torch.empty_like(x)
    sums = cut.partial_sums(x)
    means = torch.empty((cut.images, groups, 2), dtype=torch.float32, device=x.device)
    totals = torch.empty((cut.images, 2, cut.channels), dtype=torch.float32, device=x.device)
    tile = {"SILU": silu, "ROWS": cut.rows, "BLOCK_C": cut.block_c, "num_warps": _WARPS}
    size = (cut.pixels, cut.channels, groups, cut.group_width)
    with torch.cuda.device_of(x):
        _slope_sums[cut.images, cut.chunks](
            x, slope, weight, bias, mean, rstd, sums, *size, cut.chunks, CHUNK_ROWS=cut.chunk_rows, **tile
        )  # fmt: skip
        _slope_statistics[cut.images, groups](
            sums, weight, means, totals, cut.pixels, cut.channels, cut.chunks, cut.group_width, **cut.small
        )  # fmt: skip
        _apply_slopes[cut.images, cut.tiles](x, slope, out, weight, bias, mean, rstd, means, *size, **tile)
    return out, totals[:, 1].sum(0).to(weight.dtype), totals[:, 0].sum(0).to(bias.dtype)


# As operators of torch: its compiler takes them as they are, and keeps the layout around them.
group_norm = torch.library.custom_op("crt::group_norm", forward, mutates_args=(), device_types="cuda")
_group_norm_backward = torch.library.custom_op(
    "crt::group_norm_backward", backward, mutates_args=(), device_types="cuda"
)


@group_norm.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool) -> tuple[Tensor, Tensor, Tensor]:
    statistics = x.new_empty((x.shape[0], groups), dtype=torch.float32)
    return torch.empty_like(x, memory_format=torch.channels_last), statistics, torch.empty_like(statistics)


@_group_norm_backward.register_fake
def _(
    slope: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, groups: int, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    gradient = torch.empty_like(x, memory_format=torch.channels_last)
    return gradient, torch.empty_like(weight), torch.empty_like(bias)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, bias, groups, _, silu = inputs
    ctx.save_for_backward(x, weight, bias, output[1], output[2])
    ctx.groups, ctx.silu = groups, silu


def _differentiate(ctx: Any, slope: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    return *_group_norm_backward(slope, *ctx.saved_tensors, ctx.groups, ctx.silu), None, None, None


group_norm.register_autograd(_differentiate, setup_context=_keep)
