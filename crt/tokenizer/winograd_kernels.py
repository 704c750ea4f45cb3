"""The transforms of Winograd's F(4x4, 3x3) for channels-last images on CPUs, compiled by Numba at first use.

Vectors run along the channels. LLVM vectorises only if it knows that arrays do not overlap and no index is negative,
hence kernels per width, whose distances are constants, flat arrays, and unsigned integers throughout. The coefficients
are those of the points 0, +-sqrt(1/2), +-sqrt(2) and infinity (`convolution.py`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from crt.cpu_kernels import as_is, compile_kernel, from_bits, to_bits

TILE, PATCH = 4, 6
"""Outputs and inputs of a tile along each side."""
TILES_AT_ONCE = 64
"""Tiles in one array of factors: with its products it stays in a core's second-level cache, or nearly."""

_ZERO, _ONE, _TILE, _PATCH = np.uintp(0), np.uintp(1), np.uintp(TILE), np.uintp(PATCH)
_LOW, _HIGH = np.float32(math.sqrt(0.5)), np.float32(math.sqrt(2))
_HALF, _TWO, _FIVE_HALVES = np.float32(0.5), np.float32(2), np.float32(2.5)


@compile_kernel
def _factors(a0: Any, a1: Any, a2: Any, a3: Any, a4: Any, a5: Any) -> Any:
    """The six factors of six inputs in a line."""
    even, odd = a4 - _TWO * a2, _LOW * a3 - _HIGH * a1
    even2, odd2 = a4 - _HALF * a2, _HIGH * a3 - _LOW * a1
    first, last = a0 - _FIVE_HALVES * a2 + a4, a1 - _FIVE_HALVES * a3 + a5
    return first, even + odd, even - odd, even2 + odd2, even2 - odd2, last


@compile_kernel
def _outputs(a0: Any, a1: Any, a2: Any, a3: Any, a4: Any, a5: Any) -> Any:
    """The four outputs of six products in a line."""
    even, odd, even2, odd2 = a1 + a2, _LOW * (a1 - a2), a3 + a4, _HIGH * (a3 - a4)
    return a0 + even + even2, odd + odd2, _HALF * even + _TWO * even2, _HALF * odd + _TWO * odd2 + a5


@compile_kernel
def _slopes(d0: Any, d1: Any, d2: Any, d3: Any) -> Any:
    """The slopes of six products by those of the four outputs in a line: `_outputs` transposed."""
    even, odd, even2, odd2 = d0 + _HALF * d2, _LOW * (d1 + _HALF * d3), d0 + _TWO * d2, _HIGH * (d1 + _TWO * d3)
    return d0, even + odd, even - odd, even2 + odd2, even2 - odd2, d3


@compile_kernel
def _put_six(array: Any, at: Any, distance: Any, values: Any) -> None:
    """Write six values to the element `at` and those that follow at a distance."""
    two = distance + distance
    array[at], array[at + distance] = values[0], values[1]
    array[at + two], array[at + two + distance] = values[2], values[3]
    array[at + two + two], array[at + two + two + distance] = values[4], values[5]


@compile_kernel
def _place(tile: Any, rows: Any, columns: Any) -> Any:
    """Image, row and column of a tile."""
    row = tile // columns
    return row // rows, row % rows, tile % columns


@functools.cache
def _column_kernel(channels: int, read: Callable[[Any], Any]) -> Callable[..., None]:
    """Factors along the columns of a patch of the source, into the second half of the scratch."""
    row, half = (np.uintp(PATCH * channels * n) for n in (1, 6))

    @compile_kernel
    def along_columns(source: Any, at: Any, stride: Any, scratch: Any) -> None:
        three = stride + stride + stride
        for k in range(row):
            i, j = at + k, at + three + k
            factors = _factors(
                read(source[i]), read(source[i + stride]), read(source[i + stride + stride]),
                read(source[j]), read(source[j + stride]), read(source[j + stride + stride]),
            )  # fmt: skip
            _put_six(scratch, half + k, row, factors)

    return along_columns


@functools.cache
def input_kernel(channels: int, as_bits: bool) -> Callable[..., None]:
    """Writes the factors of tiles: (images, factors, scratch, first tile, tiles, height, width), all arrays flat.

    Images are (B, H, W, C), bfloat16 where `as_bits`, factors (36, TILES_AT_ONCE, C), the scratch holds 72 C numbers.
    """
    read = from_bits if as_bits else as_is
    of_image, of_scratch = _column_kernel(channels, read), _column_kernel(channels, as_is)
    c, c2, c3, c4, c5 = (np.uintp(channels * n) for n in (1, 2, 3, 4, 5))
    row, half = (np.uintp(PATCH * channels * n) for n in (1, 6))  # of a patch
    f, f6 = (np.uintp(TILES_AT_ONCE * channels * n) for n in (1, 6))

    @compile_kernel
    def along_rows(scratch: Any, factors: Any, at: Any) -> None:
        for line in range(_PATCH):
            start, end = half + line * row, at + line * f6
            for k in range(c):
                i = start + k
                of_line = _factors(
                    scratch[i], scratch[i + c], scratch[i + c2], scratch[i + c3], scratch[i + c4], scratch[i + c5]
                )
                _put_six(factors, end + k, f, of_line)

    @compile_kernel
    def scatter(images: Any, factors: Any, scratch: Any, first: Any, count: Any, height: Any, width: Any) -> None:
        rows, columns, stride = height // _TILE, width // _TILE, width * c
        for tile in range(count):
            image, r, q = _place(first + tile, rows, columns)
            start = image * height * stride
            top, left = r * _TILE, q * _TILE  # of the outputs; the patch starts one above and one to the left
            if r > _ZERO and q > _ZERO and r + _ONE < rows and q + _ONE < columns:
                of_image(images, start + (top - _ONE) * stride + (left - _ONE) * c, stride, scratch)
            else:
                for i in range(_PATCH):
                    for j in range(_PATCH):
                        o, y, x = i * row + j * c, top + i, left + j  # y and x are one more than the image's
                        if _ZERO < y <= height and _ZERO < x <= width:
                            s = start + (y - _ONE) * stride + (x - _ONE) * c
                            for k in range(c):
                                scratch[o + k] = read(images[s + k])
                        else:
                            for k in range(c):
                                scratch[o + k] = np.float32(0)
                of_scratch(scratch, _ZERO, row, scratch)
            along_rows(scratch, factors, tile * c)

    return scatter


@functools.cache
def output_kernel(channels: int, as_bits: bool) -> Callable[..., None]:
    """Writes the outputs of tiles: (products, biases, images, scratch, first tile, tiles, height, width), arrays flat.

    Products are (36, TILES_AT_ONCE, C), biases the layer's four times over; images (B, H, W, C), bfloat16 where
    `as_bits`.
    """
    write = to_bits if as_bits else as_is
    c, c2, c3 = (np.uintp(channels * n) for n in (1, 2, 3))
    row, row2, row3, row4, row5 = (np.uintp(TILE * channels * n) for n in (1, 2, 3, 4, 5))
    f, f2, f3, f4, f5, f6 = (np.uintp(TILES_AT_ONCE * channels * n) for n in (1, 2, 3, 4, 5, 6))

    @compile_kernel
    def along_rows(products: Any, at: Any, scratch: Any) -> None:
        for line in range(_PATCH):
            start, end = at + line * f6, line * row
            for k in range(c):
                i, o = start + k, end + k
                scratch[o], scratch[o + c], scratch[o + c2], scratch[o + c3] = _outputs(
                    products[i], products[i + f], products[i + f2], products[i + f3], products[i + f4],
                    products[i + f5],
                )  # fmt: skip

    @compile_kernel
    def along_columns(scratch: Any, biases: Any, images: Any, at: Any, stride: Any) -> None:
        for k in range(row):
            bias, o = biases[k], at + k
            t0, t1, t2, t3 = _outputs(
                scratch[k], scratch[row + k], scratch[row2 + k], scratch[row3 + k], scratch[row4 + k],
                scratch[row5 + k],
            )  # fmt: skip
            images[o], images[o + stride] = write(t0 + bias), write(t1 + bias)
            o += stride + stride
            images[o], images[o + stride] = write(t2 + bias), write(t3 + bias)

    @compile_kernel
    def gather(
        products: Any, biases: Any, images: Any, scratch: Any, first: Any, count: Any, height: Any, width: Any
    ) -> None:
        rows, columns, stride = height // _TILE, width // _TILE, width * c
        for tile in range(count):
            image, r, q = _place(first + tile, rows, columns)
            along_rows(products, tile * c, scratch)
            along_columns(scratch, biases, images, (image * height + r * _TILE) * stride + q * _TILE * c, stride)

    return gather


@functools.cache
def slope_kernel(channels: int, as_bits: bool) -> Callable[..., None]:
    """Writes the slopes of tiles' products: (slopes of images, of products, scratch, first tile, tiles, height, width).

    The transposed of `output_kernel`, its arrays otherwise.
    """
    c, c2, c3 = (np.uintp(channels * n) for n in (1, 2, 3))
    row, f, f6 = np.uintp(TILE * channels), np.uintp(TILES_AT_ONCE * channels), np.uintp(6 * TILES_AT_ONCE * channels)
    read = from_bits if as_bits else as_is

    @compile_kernel
    def along_columns(images: Any, at: Any, stride: Any, scratch: Any) -> None:
        for k in range(row):
            i = at + k
            j = i + stride + stride
            slopes = _slopes(read(images[i]), read(images[i + stride]), read(images[j]), read(images[j + stride]))
            _put_six(scratch, k, row, slopes)

    @compile_kernel
    def along_rows(scratch: Any, products: Any, at: Any) -> None:
        for line in range(_PATCH):
            start, end = line * row, at + line * f6
            for k in range(c):
                i = start + k
                _put_six(products, end + k, f, _slopes(scratch[i], scratch[i + c], scratch[i + c2], scratch[i + c3]))

    @compile_kernel
    def spread(images: Any, products: Any, scratch: Any, first: Any, count: Any, height: Any, width: Any) -> None:
        rows, columns, stride = height // _TILE, width // _TILE, width * c
        for tile in range(count):
            image, r, q = _place(first + tile, rows, columns)
            along_columns(images, (image * height + r * _TILE) * stride + q * _TILE * c, stride, scratch)
            along_rows(scratch, products, tile * c)

    return spread
