"""3x3 convolutions at the speed that large images in float32 on a CPU ask for.

There, and where the network is wide, they go by Winograd's minimal filtering F(4x4, 3x3) (Lavin and Gray 2016, arXiv
1509.09308): a tile of 4x4 outputs takes 36 products per pair of channels instead of 144. Tiles are transformed by
kernels that Numba compiles (`winograd_kernels.py`); the products between are torch's batched matrix product.

With the usual points of evaluation (0, 1, -1, 2, -2) rounding is four times that of the direct convolution. With 0,
+-sqrt(1/2) and +-sqrt(2) it is less than twice that, and what the encoder gives is as exact as before.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from crt.cpu import flat, share_among_threads

# Narrower ones gain too little, and of wider ones the transformed weights are larger than what passes through them.
_WIDTHS = range(64, 257, 16)
_LEAST_PIXELS = 32 * 32  # of one image, so that what it becomes does not depend on those beside it
_POINTS = (0.0, math.sqrt(0.5), -math.sqrt(0.5), math.sqrt(2), -math.sqrt(2))


class Convolution(nn.Conv2d):
    """3x3 convolution of stride 1 with zeros around the image."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1)
        self._factors: tuple[NDArray[np.float32], Tensor] | None = None  # copy of the weights, what they became

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) to (B, out_channels, H, W)."""
        by_tiles, training = self._by_tiles(x), torch.is_grad_enabled()
        if self._factors is not None and (training or not by_tiles):
            self._factors = None  # weights that change, or another device
        if not by_tiles:
            return super().forward(x)
        assert self.bias is not None
        if training:
            return _ByTiles.apply(x, self.weight, self.bias)
        return convolve_by_tiles(x, self._current_factors(), self.bias)

    def _current_factors(self) -> Tensor:
        # The values are compared: versions miss what fused optimizers, `.data` and inference mode change. By NumPy,
        # since torch's threads hang in a fork of a process that used them.
        weight, factors = self.weight.detach(), self._factors  # other threads may forget or renew those
        if factors is None or not np.array_equal(factors[0], weight.numpy()):
            factors = self._factors = weight.numpy().copy("K"), transform_weights(weight)
        return factors[1]

    def _by_tiles(self, x: Tensor) -> bool:
        if x.device.type != "cpu" or x.dtype != torch.float32:
            return False
        if torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling() or isinstance(x, FakeTensor):
            return False
        if torch.jit.is_tracing() or is_in_torch_dispatch_mode():  # recorders see nothing of what Numba's kernels do
            return False
        height, width = x.shape[2:]
        return (
            self.in_channels in _WIDTHS
            and self.out_channels in _WIDTHS
            and height % 4 == width % 4 == 0
            and height * width >= _LEAST_PIXELS
            and x.is_contiguous(memory_format=torch.channels_last)
        )


class _ByTiles(torch.autograd.Function):
    """The same with gradients; that of the weights is torch's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return convolve_by_tiles(x, transform_weights(weight), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        by_tiles = ctx.needs_input_grad[0] and not torch.is_grad_enabled()  # not where it is to be differentiated again
        x_gradient, weight_gradient, bias_gradient = torch.ops.aten.convolution_backward(
            gradient, x, weight, [weight.shape[0]], [1, 1], [1, 1], [1, 1], False, [0, 0], 1,
            [ctx.needs_input_grad[0] and not by_tiles, *ctx.needs_input_grad[1:]],
        )  # fmt: skip
        if by_tiles:
            mirrored = weight.transpose(0, 1).flip(2, 3)
            x_gradient = convolve_by_tiles(gradient, transform_weights(mirrored), weight.new_zeros(weight.shape[1]))
        return x_gradient, weight_gradient, bias_gradient


def transform_weights(weight: Tensor) -> Tensor:
    """(O, C, 3, 3) weights to the (36, C, O) factors that `convolve_by_tiles` takes, float32."""
    denominators = [math.prod(p - q for q in _POINTS if q != p) for p in _POINTS]
    rows = [[p**power / over for power in range(3)] for p, over in zip(_POINTS, denominators, strict=True)]
    transform = torch.tensor([*rows, [0.0, 0.0, 1.0]], dtype=torch.float64)  # the last point is infinity
    wide = torch.einsum("ai,ocij,bj->abco", transform, weight.detach().double(), transform)
    return wide.flatten(0, 1).float().contiguous()


def convolve_by_tiles(x: Tensor, factors: Tensor, bias: Tensor) -> Tensor:
    """3x3 convolution of stride 1 with zeros around the image; the same bits with any number of threads.

    Args:
        x: (B, C, H, W) float32 on the CPU, channels last; H and W multiples of 4.
        factors: (36, C, O), by `transform_weights`.
        bias: (O,).

    Returns:
        (B, O, H, W), channels last.
    """
    from crt.tokenizer.winograd_kernels import TILES_AT_ONCE, input_kernel, output_kernel

    batch, channels, height, width = x.shape
    outputs = factors.shape[2]
    y = torch.empty((batch, outputs, height, width), memory_format=torch.channels_last)
    source, target = (flat(t.permute(0, 2, 3, 1)) for t in (x, y))
    biases = flat(bias.repeat(4))
    tiles = batch * (height // 4) * (width // 4)
    size = np.uintp(height), np.uintp(width)
    scatter, gather = input_kernel(channels), output_kernel(outputs)

    def work(first: int, last: int) -> None:
        inputs = torch.empty((36, TILES_AT_ONCE, channels))
        products = torch.empty((36, TILES_AT_ONCE, outputs))
        scratch = np.empty(72 * max(channels, outputs), np.float32)
        for start in range(first, last, TILES_AT_ONCE):
            count = min(TILES_AT_ONCE, last - start)
            place = np.uintp(start), np.uintp(count), *size
            scatter(source, flat(inputs), scratch, *place)
            torch.bmm(inputs[:, :count], factors, out=products[:, :count])
            gather(flat(products), biases, target, scratch, *place)

    share_among_threads(work, tiles, TILES_AT_ONCE)
    return y
