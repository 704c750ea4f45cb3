"""3x3 convolutions at the speed that large images on a CPU ask for.

There, and where the network is wide, they go by Winograd's minimal filtering F(4x4, 3x3) (Lavin and Gray 2016, arXiv
1509.09308): a tile of 4x4 outputs takes 36 products per pair of channels instead of 144. Tiles are transformed by
kernels that Numba compiles (`winograd_kernels.py`); the products between are torch's batched matrix product.

With the usual points of evaluation (0, 1, -1, 2, -2) rounding is four times that of the direct convolution. With 0,
+-sqrt(1/2) and +-sqrt(2) it is less than twice that, and what the encoder gives is as exact as before.

Under autocast to bfloat16 only what goes in and comes out is rounded. A processor without matrix units multiplies
bfloat16 at twice the rate of float32, and a quarter of the products takes less time than that saves.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from crt.cpu import flat
from crt.processor import processor_features
from crt.threads import share_among_threads

# Narrower ones gain too little, and of wider ones the transformed weights are larger than what passes through them.
_WIDTHS = range(64, 257, 16)
_LEAST_PIXELS = 32 * 32  # of one image, so that what it becomes does not depend on those beside it
_PIXELS_AT_ONCE = 2048  # so that a sum's copy in float32 stays in the cache
_POINTS = (0.0, math.sqrt(0.5), -math.sqrt(0.5), math.sqrt(2), -math.sqrt(2))


class Convolution(nn.Conv2d):
    """3x3 convolution of stride 1 with zeros around the image."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1)
        self._factors: tuple[NDArray[np.float32], Tensor] | None = None  # copy of the weights, what they became

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) to (B, out_channels, H, W)."""
        autocast = torch.is_autocast_enabled("cpu")
        by_tiles, training = self._by_tiles(x, autocast), torch.is_grad_enabled()
        if self._factors is not None and (training or not by_tiles):
            self._factors = None  # weights that change, or another device
        if not by_tiles:
            return super().forward(x)
        assert self.bias is not None
        if autocast:
            x = x.to(torch.bfloat16)
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

    def _by_tiles(self, x: Tensor, autocast: bool) -> bool:
        if torch.compiler.is_compiling():  # first: what follows would break the compiler's graph
            return False
        if x.device.type != "cpu" or self.weight.dtype != torch.float32 or isinstance(x, FakeTensor):
            return False
        if torch.jit.is_tracing() or is_in_torch_dispatch_mode():  # recorders see nothing of what Numba's kernels do
            return False
        if not (_serves_autocast(x) if autocast else x.dtype == torch.float32):
            return False
        height, width = x.shape[2:]
        return (
            self.in_channels in _WIDTHS
            and self.out_channels in _WIDTHS
            and height % 4 == width % 4 == 0
            and height * width >= _LEAST_PIXELS
            and x.is_contiguous(memory_format=torch.channels_last)
        )


def _serves_autocast(x: Tensor) -> bool:
    """Whether tiles are the faster way on this processor to what autocast asks for."""
    if torch.get_autocast_dtype("cpu") != torch.bfloat16 or x.dtype not in {torch.float32, torch.bfloat16}:
        return False
    return "avx2" in processor_features() and "amx-bf16" not in processor_features()


class _ByTiles(torch.autograd.Function):
    """The same with gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return convolve_by_tiles(x, transform_weights(weight), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        of_x, of_weight, of_bias = ctx.needs_input_grad
        if torch.is_grad_enabled():  # to be differentiated again: by what torch can differentiate
            gradients = torch.ops.aten.convolution_backward(
                gradient, x, weight.to(x.dtype), [weight.shape[0]], [1, 1], [1, 1], [1, 1], False, [0, 0], 1,
                [of_x, of_weight, of_bias],
            )  # fmt: skip
            return gradients[0], *(t if t is None else t.to(weight.dtype) for t in gradients[1:])
        x_gradient = weight_gradient = bias_gradient = None
        if of_x:
            mirrored = weight.transpose(0, 1).flip(2, 3)
            x_gradient = convolve_by_tiles(gradient, transform_weights(mirrored), weight.new_zeros(weight.shape[1]))
        if of_weight:
            weight_gradient = weight_gradient_by_tiles(x, gradient)
        if of_bias:
            # Piece by piece: torch makes a copy of all of it in float32 first.
            rows = gradient.permute(0, 2, 3, 1).flatten(0, 2).split(_PIXELS_AT_ONCE)
            bias_gradient = torch.stack([some.float().sum(0) for some in rows]).sum(0)
        return x_gradient, weight_gradient, bias_gradient


@functools.cache
def _weight_transform() -> Tensor:
    """(36, 9) float64: the weights of a pair of channels to its factors."""
    denominators = [math.prod(p - q for q in _POINTS if q != p) for p in _POINTS]
    rows = [[p**power / over for power in range(3)] for p, over in zip(_POINTS, denominators, strict=True)]
    line = torch.tensor([*rows, [0.0, 0.0, 1.0]], dtype=torch.float64)  # the last point is infinity
    return torch.kron(line, line)


def transform_weights(weight: Tensor) -> Tensor:
    """(O, C, 3, 3) weights to the (36, C, O) factors that `convolve_by_tiles` takes, float32."""
    outputs, channels = weight.shape[:2]
    lines = weight.detach().permute(2, 3, 1, 0).reshape(9, -1).double()
    return (_weight_transform() @ lines).float().view(36, channels, outputs)


def convolve_by_tiles(x: Tensor, factors: Tensor, bias: Tensor) -> Tensor:
    """3x3 convolution of stride 1 with zeros around the image; the same bits with any number of threads.

    Args:
        x: (B, C, H, W) float32 or bfloat16 on the CPU, channels last; H and W multiples of 4.
        factors: (36, C, O), by `transform_weights`.
        bias: (O,).

    Returns:
        (B, O, H, W) in the type of x, channels last.
    """
    from crt.tokenizer.winograd_kernels import output_kernel

    batch, _, height, width = x.shape
    outputs = factors.shape[2]
    y = torch.empty((batch, outputs, height, width), dtype=x.dtype, memory_format=torch.channels_last)
    target, biases = _flat_pixels(y), flat(bias.repeat(4))
    gather = output_kernel(outputs, x.dtype == torch.bfloat16)

    def work(block: _Block) -> None:
        torch.bmm(block.inputs, factors, out=block.products)
        gather(flat(block.all_products), biases, target, block.scratch, *block.place)

    _for_each_block(x, outputs, work)
    return y


def weight_gradient_by_tiles(x: Tensor, gradient: Tensor) -> Tensor:
    """Gradient of the weights of `convolve_by_tiles`, likewise with 36 products for 144.

    Args:
        x: (B, C, H, W), what was convolved.
        gradient: (B, O, H, W) of the result, in the type of x, channels last.

    Returns:
        (O, C, 3, 3) float32. Each thread adds up its tiles, so that the bits depend on the number of threads.
    """
    from crt.tokenizer.winograd_kernels import slope_kernel

    channels, outputs = x.shape[1], gradient.shape[1]
    slopes, spread = _flat_pixels(gradient), slope_kernel(outputs, x.dtype == torch.bfloat16)
    sums = {0: torch.zeros((36, channels, outputs))}  # by the first tile of a thread

    def work(block: _Block) -> None:
        spread(slopes, flat(block.all_products), block.scratch, *block.place)
        if block.share not in sums:
            sums[block.share] = torch.zeros((36, channels, outputs))
        sums[block.share].baddbmm_(block.inputs.transpose(1, 2), block.products)

    _for_each_block(x, outputs, work)
    wide = functools.reduce(Tensor.add_, (sums[share] for share in sorted(sums)))
    lines = _weight_transform().T.float() @ wide.flatten(1)
    return lines.view(3, 3, channels, outputs).permute(3, 2, 0, 1)


class _Block(NamedTuple):
    """Some tiles: the factors of their inputs, and room for their products."""

    share: int
    """First tile of those that the same thread works on."""
    place: tuple[np.uintp, ...]
    """First tile, number of tiles, height, width, as the kernels take them."""
    inputs: Tensor
    """(36, tiles, C), float32."""
    products: Tensor
    """(36, tiles, O), float32."""
    all_products: Tensor
    """The array that they lie in, which has room for more tiles."""
    scratch: NDArray[np.float32]


def _for_each_block(x: Tensor, outputs: int, work: Callable[[_Block], None]) -> None:
    """Call work for all tiles of images (B, C, H, W), some at once, in torch's number of threads."""
    from crt.tokenizer.winograd_kernels import TILES_AT_ONCE, input_kernel

    batch, channels, height, width = x.shape
    source, scatter = _flat_pixels(x), input_kernel(channels, x.dtype == torch.bfloat16)

    def work_on(first: int, last: int) -> None:
        inputs = torch.empty((36, TILES_AT_ONCE, channels))
        products = torch.empty((36, TILES_AT_ONCE, outputs))
        scratch = np.empty(72 * max(channels, outputs), np.float32)
        for start in range(first, last, TILES_AT_ONCE):
            count = min(TILES_AT_ONCE, last - start)
            place = tuple(map(np.uintp, (start, count, height, width)))
            scatter(source, flat(inputs), scratch, *place)
            work(_Block(first, place, inputs[:, :count], products[:, :count], products, scratch))

    share_among_threads(work_on, batch * (height // 4) * (width // 4), TILES_AT_ONCE)


def _flat_pixels(images: Tensor) -> NDArray[Any]:
    """The memory of channels-last images (B, C, H, W)."""
    return flat(images.permute(0, 2, 3, 1))
