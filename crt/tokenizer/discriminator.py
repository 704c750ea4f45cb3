"""Adversaries of the decoder: images (B, 3, S, S) in [-1, 1] to logits, positive for images taken for real.

PatchGAN (Isola et al. 2017) judges overlapping patches, a StyleGAN-like one (Karras et al. 2020) the image as
a whole.
"""

from __future__ import annotations

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crt.distributed import mean_over_ranks, world_size
from crt.params import Discriminator as DiscriminatorParams

_SLOPE = 0.2
_MAX_WIDENING = 8


class BatchNorm(nn.Module):
    """Batch normalisation over the images of all processes, so that their number changes no result.

    It always normalises by the batch at hand: a discriminator only ever runs in training, so there are no
    running averages.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels).normal_(1.0, 0.02))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.eps = 1e-5

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same."""
        if world_size() == 1:
            return F.batch_norm(x, None, None, self.weight, self.bias, training=True, eps=self.eps)
        with torch.autocast(x.device.type, enabled=False):
            full = x.float()
            centred = full - mean_over_ranks(full.mean((0, 2, 3)))[:, None, None]
            variance = mean_over_ranks(centred.square().mean((0, 2, 3)))
            scale = self.weight * (variance + self.eps).rsqrt()
            return (centred * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)


class PatchGAN(nn.Module):
    """One logit per patch: `layers` convolutions of stride 2, one of stride 1, one to the logits, all 4x4.

    Args:
        channels: width after the first convolution; each further one doubles it, up to 8 times.
        layers: halvings of the resolution.
    """

    def __init__(self, channels: int, layers: int) -> None:
        super().__init__()
        widths = [channels * min(2**index, _MAX_WIDENING) for index in range(layers + 1)]
        modules: list[nn.Module] = [nn.Conv2d(3, channels, 4, stride=2, padding=1), nn.LeakyReLU(_SLOPE)]
        for index in range(1, layers + 1):
            stride = 2 if index < layers else 1
            modules += [
                nn.Conv2d(widths[index - 1], widths[index], 4, stride=stride, padding=1, bias=False),
                BatchNorm(widths[index]),
                nn.LeakyReLU(_SLOPE),
            ]
        modules.append(nn.Conv2d(widths[-1], 1, 4, padding=1))
        self.layers = nn.Sequential(*modules)
        for module in modules:
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) to (B, 1, s, s)."""
        return self.layers(images)


class StyleGANBlock(nn.Module):
    """Residual block that halves the resolution, blurring before it does (Zhang 2019)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, in_channels, 3, padding=1)
        self.conv2 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, H, W) to (B, out, H / 2, W / 2)."""
        h = F.leaky_relu(self.conv1(x), _SLOPE)
        h = F.leaky_relu(_blur_and_halve(self.conv2(h)), _SLOPE)
        # Both branches have one variance: keep it.
        return (self.shortcut(_blur_and_halve(x)) + h) * math.sqrt(0.5)


class StyleGANDiscriminator(nn.Module):
    """One logit per image, without anything that mixes the images of a batch.

    Args:
        image_size: S, divisible by 2 ** layers.
        channels: width at full resolution; each halving doubles it, up to 8 times.
        layers: halvings of the resolution.
    """

    def __init__(self, image_size: int, channels: int, layers: int) -> None:
        super().__init__()
        widths = [channels * min(2**index, _MAX_WIDENING) for index in range(layers + 1)]
        self.conv_in = nn.Conv2d(3, channels, 1)
        self.blocks = nn.Sequential(*(StyleGANBlock(narrow, wide) for narrow, wide in itertools.pairwise(widths)))
        self.conv_out = nn.Conv2d(widths[-1], widths[-1], 3, padding=1)
        side = image_size // 2**layers
        self.hidden = nn.Linear(widths[-1] * side**2, widths[-1])
        self.logit = nn.Linear(widths[-1], 1)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight, a=_SLOPE)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) to (B, 1)."""
        x = F.leaky_relu(self.conv_in(images), _SLOPE)
        x = F.leaky_relu(self.conv_out(self.blocks(x)), _SLOPE)
        return self.logit(F.leaky_relu(self.hidden(x.flatten(1)), _SLOPE))


def build_discriminator(params: DiscriminatorParams, image_size: int) -> PatchGAN | StyleGANDiscriminator | None:
    """The discriminator that the params name; None for kind "none"."""
    if params.kind == "patchgan":
        return PatchGAN(params.channels, params.layers)
    if params.kind == "stylegan":
        return StyleGANDiscriminator(image_size, params.channels, params.layers)
    return None


def _blur_and_halve(x: Tensor) -> Tensor:
    """Binomial filter [1 3 3 1] x [1 3 3 1] / 64 of stride 2: (B, C, H, W) to (B, C, H / 2, W / 2)."""
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0], device=x.device, dtype=x.dtype) / 8
    kernel = torch.outer(taps, taps).expand(x.shape[1], 1, 4, 4)
    return F.conv2d(x, kernel, stride=2, padding=1, groups=x.shape[1])
