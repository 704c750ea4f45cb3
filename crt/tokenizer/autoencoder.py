"""Convolutional encoder and decoder of the VQGAN (Esser et al. 2021), laid out as LlamaGen's VQ-16 and VQ-8.

    images   (B, 3, H, W) in [-1, 1]
    features (B, z_channels, H/f, W/f),  f = 2 ** (levels - 1)

Every level holds residual blocks; every level but the lowest resolution's is joined to the next by a
halving or doubling of the resolution. Self-attention, where switched on, follows each block of the lowest
resolution and stands in the middle.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crt.tokenizer.attention import attend
from crt.tokenizer.convolution import Convolution
from crt.tokenizer.norm import GroupNorm

NORM_EPS = 1e-6


class ResidualBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with a 1x1 convolution on x where the width changes."""

    def __init__(self, in_channels: int, out_channels: int, norm_groups: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = GroupNorm(norm_groups, in_channels, NORM_EPS)
        self.conv1 = Convolution(in_channels, out_channels)
        self.norm2 = GroupNorm(norm_groups, out_channels, NORM_EPS)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = Convolution(out_channels, out_channels)
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) to (B, out_channels, H, W)."""
        h = self.conv1(self.norm1(x, silu=True))
        h = self.conv2(self.dropout(self.norm2(h, silu=True)))
        return h.add_(self.shortcut(x))  # no gradient needs what the convolution gave, so no third map is made


class SelfAttention(nn.Module):
    """Single-head attention among all places of a feature map, with a residual connection."""

    def __init__(self, channels: int, norm_groups: int) -> None:
        super().__init__()
        self.norm = GroupNorm(norm_groups, channels, NORM_EPS)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same."""
        qkv = self.qkv(self.norm(x)).flatten(2).transpose(1, 2)
        q, k, v = qkv.unsqueeze(1).chunk(3, dim=-1)  # (B, 1 head, H * W, C)
        h = attend(q, k, v)[:, 0]
        h = h.transpose(1, 2).unflatten(2, x.shape[2:])
        if x.is_contiguous(memory_format=torch.channels_last):
            h = h.contiguous(memory_format=torch.channels_last)
        return self.out(h).add_(x)


class Downsample(nn.Module):
    """Halves the resolution: 3x3 convolution of stride 2, zeros added at the right and lower edge only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, H / 2, W / 2)."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Doubles the resolution: each pixel repeated twice in each direction, then a 3x3 convolution.

    Both are one transposed convolution of stride 2, whose 4x4 kernel is the 3x3 kernel convolved with 2x2 ones:
    4 products per output and pair of channels instead of 9, and no enlarged copy of the input.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, 2 H, 2 W)."""
        with torch.autocast(x.device.type, enabled=False):
            weight = self.conv.weight
            kernel = (weight.transpose(0, 1).flatten(2) @ _widening(weight)).unflatten(2, (4, 4))  # (in, out, 4, 4)
        return F.conv_transpose2d(x, kernel, self.conv.bias, stride=2, padding=1)


def _widening(like: Tensor) -> Tensor:
    """(9, 16): the linear map from a 3x3 kernel to the 4x4 kernel of `Upsample`, which is mirrored besides."""
    # Row p of the wide kernel, read backwards, sums rows p - 1 and p of the narrow one.
    sums = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 0], [1, 1, 0, 0]], dtype=like.dtype, device=like.device)
    return torch.kron(sums, sums)


class Level(nn.Module):
    """The blocks of one resolution, and the step to the next one (none at the end)."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_blocks: int,
        *,
        attention: bool,
        norm_groups: int,
        dropout: float,
        resample: nn.Module | None,
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList()
        self.attentions = nn.ModuleList()
        for index in range(num_blocks):
            width = in_channels if index == 0 else out_channels
            self.blocks.append(ResidualBlock(width, out_channels, norm_groups, dropout))
            self.attentions.append(SelfAttention(out_channels, norm_groups) if attention else nn.Identity())
        self.resample = resample if resample is not None else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) to (B, out_channels, H', W')."""
        for block, attention in zip(self.blocks, self.attentions, strict=True):
            x = attention(block(x))
        return self.resample(x)


class Encoder(nn.Module):
    """Images to features.

    Args:
        channels: base width; level i has channels * channel_multipliers[i].
        channel_multipliers: from the images' resolution down; one level each.
        num_blocks: residual blocks per level.
        attention: self-attention at the lowest resolution.
        norm_groups: groups of every normalisation; must divide every width.
        z_channels: width of the features.
        dropout: inside the residual blocks.
    """

    def __init__(
        self,
        *,
        channels: int,
        channel_multipliers: Sequence[int],
        num_blocks: int,
        attention: bool,
        norm_groups: int,
        z_channels: int,
        dropout: float,
    ) -> None:
        super().__init__()
        widths = [channels * multiplier for multiplier in channel_multipliers]
        self.conv_in = nn.Conv2d(3, channels, 3, padding=1)
        self.levels = nn.ModuleList()
        for index, width in enumerate(widths):
            last = index == len(widths) - 1
            self.levels.append(
                Level(
                    widths[index - 1] if index else channels,
                    width,
                    num_blocks,
                    attention=attention and last,
                    norm_groups=norm_groups,
                    dropout=dropout,
                    resample=None if last else Downsample(width),
                )
            )
        self.middle = _middle(widths[-1], attention, norm_groups, dropout)
        self.norm_out = GroupNorm(norm_groups, widths[-1], NORM_EPS)
        self.conv_out = nn.Conv2d(widths[-1], z_channels, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) to (B, z_channels, H/f, W/f)."""
        x = self.conv_in(images)
        for level in self.levels:
            x = level(x)
        x = self.middle(x)
        return self.conv_out(self.norm_out(x, silu=True))


class Decoder(nn.Module):
    """Features to images; the encoder's mirror image. Arguments as in `Encoder`."""

    def __init__(
        self,
        *,
        channels: int,
        channel_multipliers: Sequence[int],
        num_blocks: int,
        attention: bool,
        norm_groups: int,
        z_channels: int,
        dropout: float,
    ) -> None:
        super().__init__()
        widths = [channels * multiplier for multiplier in reversed(channel_multipliers)]
        self.conv_in = nn.Conv2d(z_channels, widths[0], 3, padding=1)
        self.middle = _middle(widths[0], attention, norm_groups, dropout)
        self.levels = nn.ModuleList()
        for index, width in enumerate(widths):
            self.levels.append(
                Level(
                    widths[max(index - 1, 0)],
                    width,
                    num_blocks,
                    attention=attention and index == 0,
                    norm_groups=norm_groups,
                    dropout=dropout,
                    resample=None if index == len(widths) - 1 else Upsample(width),
                )
            )
        self.norm_out = GroupNorm(norm_groups, widths[-1], NORM_EPS)
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, features: Tensor) -> Tensor:
        """(B, z_channels, H/f, W/f) to (B, 3, H, W)."""
        x = self.middle(self.conv_in(features))
        for level in self.levels:
            x = level(x)
        return self.conv_out(self.norm_out(x, silu=True))


def _middle(channels: int, attention: bool, norm_groups: int, dropout: float) -> nn.Sequential:
    blocks: list[nn.Module] = [ResidualBlock(channels, channels, norm_groups, dropout)]
    if attention:
        blocks.append(SelfAttention(channels, norm_groups))
    blocks.append(ResidualBlock(channels, channels, norm_groups, dropout))
    return nn.Sequential(*blocks)
