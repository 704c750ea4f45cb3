"""Products of a step's rows with a weight on a CPU, by Numba.

A step of decoding reads every weight for as many rows as there are sequences. oneDNN's product reaches two thirds of
the rate of large products at 16 rows, and adds in an order that depends on their number. Here a tile of rows and
outputs stays in registers while the channels pass, the next panel of weights is on its way meanwhile, and each output
adds its channels in their order, whatever else is in the batch (`benchmarks/sampling.md`).

A word is what an instruction takes of a row: a float32, or a pair of bfloat16, whose two products AVX512-BF16 adds at
once. AMX takes 16 such words of all rows at once (`crt/ar/cpu_matrix_kernels.py`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic
from torch import Tensor

from crt.ar.cpu_matrix_kernels import WORDS_AT_ONCE, configure, matrix_product, release
from crt.cpu_kernels import advance, compile_kernel, generate_prefetch, in_one_word
from crt.processor import has_matrix_registers, processor_features


class Tile(NamedTuple):
    """What stays in registers: sums of `rows` of the batch by `vectors` of outputs; beside them weights and a word."""

    rows: int
    vectors: int
    lanes: int
    pairs: bool
    """Whether a word is a pair of bfloat16."""
    matrix: bool = False
    """Whether these registers are those of AMX."""

    @property
    def panel(self) -> int:
        """Outputs of a tile."""
        return self.vectors * self.lanes

    @property
    def channels(self) -> int:
        """Channels of a word."""
        return 2 if self.pairs else 1

    @property
    def at_once(self) -> int:
        """Channels that an instruction takes of each row."""
        return self.channels * (WORDS_AT_ONCE if self.matrix else 1)

    def words(self, channels: int) -> int:
        """Words of a row, up to as many as are taken at once."""
        return -(-channels // self.at_once) * self.at_once // self.channels


def largest_tile(dtype: torch.dtype) -> Tile:
    """That of this processor: of 32 registers of 64 bytes with AVX-512, else of 16 of 32 bytes; for bfloat16 of AMX."""
    features = processor_features()
    if dtype == torch.bfloat16 and has_matrix_registers():
        return Tile(rows=16, vectors=4, lanes=16, pairs=True, matrix=True)
    if "avx512f" not in features:
        return Tile(rows=4, vectors=3, lanes=8, pairs=False)
    return Tile(rows=8, vectors=3, lanes=16, pairs=dtype == torch.bfloat16 and "avx512bf16" in features)


def in_panels(weight: Tensor, tile: Tile, width: int | None = None) -> Tensor:
    """A weight (N, K) as the kernel reads it: panel by panel, word by word.

    Args:
        weight: float32 or bfloat16.
        tile: of the kernel.
        width: channels to fill up to with zeros, whole words; None: as few as can be.

    Returns:
        (panels, words, tile.panel, tile.channels), for AMX (panels, words / 16, tile.vectors, 16, tile.lanes,
        tile.channels); the last panel ends with zeros.
    """
    outputs, channels = weight.shape
    missing = (tile.words(channels) * tile.channels if width is None else width) - channels
    padded = F.pad(weight.detach(), (0, missing, 0, -outputs % tile.panel))
    panels = padded.view(-1, tile.panel, padded.shape[1] // tile.channels, tile.channels).transpose(1, 2)
    if tile.matrix:
        panels = panels.unflatten(2, (tile.vectors, tile.lanes)).unflatten(1, (-1, WORDS_AT_ONCE)).transpose(2, 3)
    return panels.contiguous()


@functools.cache
def row_writer(tile: Tile) -> Callable[..., None]:
    """Writes some of a row's channels where products read them.

    For registers of vectors words of a tile's rows lie beside each other, for those of AMX words of a row.

    Returns:
        Function of (values, first, words, out, row, word, width): values float32, words of them from element `first`
        on, are the row's from `word` on; out uint32 (tiles, width, tile.rows), or (tiles, tile.rows, width).
    """
    height, pairs, matrix = np.uintp(tile.rows), tile.pairs, tile.matrix
    one, two = np.uintp(1), np.uintp(2)

    @compile_kernel
    def write(values: Any, first: Any, words: Any, out: Any, row: Any, word: Any, width: Any) -> None:
        if matrix:
            at, stride = row * width + word, one
        else:
            at, stride = (row // height * width + word) * height + row % height, height
        for k in range(words):
            if pairs:
                out[at + k * stride] = in_one_word(values[first + two * k], values[first + two * k + one])
            else:
                out[at + k * stride] = np.float32(values[first + k]).view(np.uint32)

    return write


@compile_kernel
def _nothing() -> None:
    pass


def around_products(tile: Tile) -> tuple[Callable[[], None], Callable[[], None]]:
    """What compiled code calls before a tile's products and after them, in their thread."""
    return (configure(tile.rows), release) if tile.matrix else (_nothing, _nothing)


@functools.cache
def product_kernel(tile: Tile, prefetches: int, as_bits: bool, finish: Callable[..., None]) -> Callable[..., None]:
    """Multiplies all rows with some panels of a weight.

    Args:
        tile: of the kernel.
        prefetches: vectors of the next panel that are asked for with each word of a tile: with so many tiles as there
            are, all of them once.
        as_bits: whether weights are bfloat16, given as uint16.
        finish: takes the products of a tile, see below.

    Returns:
        Function of (rows, tiles, words, panels, at, first, last, sums, sums_at, out, width): rows as `row_writer`
        leaves them; panels as `in_panels` does, the weight's first at element `at`, of which it takes [first, last);
        sums float32, a scratch of tile.rows * tile.panel from sums_at on; finish(sums, sums_at, tile's number, panel,
        out, width) is called for each tile.
    """
    begin, end = around_products(tile)
    if tile.matrix:
        multiply_tile = matrix_product(tile.vectors, prefetches=prefetches, in_blocks=True)
    else:
        multiply_tile = tile_product(tile, (1, tile.rows), None, prefetches, as_bits)
    height, vectors, asked = np.uintp(tile.rows), np.uintp(tile.vectors), np.uintp(prefetches)
    panel_size, zero = np.uintp(tile.panel * tile.channels), np.uintp(0)

    @compile_kernel
    def multiply(
        rows: Any, tiles: Any, words: Any, panels: Any, at: Any, first: Any, last: Any,
        sums: Any, sums_at: Any, out: Any, width: Any,
    ) -> None:  # fmt: skip
        begin()
        for panel in range(first, last):
            for index in range(zero, tiles):
                # Each tile asks for its share of the next panel; after the third there is none left.
                ahead = vectors + min(index * asked, vectors - asked)
                weights = at + panel * panel_size * words
                multiply_tile(rows, panels, sums, index * height * words, weights, sums_at, words, ahead * words)
                finish(sums, sums_at, index, panel, out, width)
        end()

    return multiply


def tile_product(
    tile: Tile, strides: tuple[int, int], width: int | None = None, prefetches: int = 0, as_bits: bool = False
) -> Any:
    """Multiplies a tile's rows with one panel.

    Args:
        tile: of the kernel.
        strides: elements from a row to the next one, and from a word to the next one.
        width: of the sums, of which a panel is filled; None: a panel's.
        prefetches: vectors that are asked for with each word.
        as_bits: whether panels are bfloat16, given as uint16, of single channels too.

    Returns:
        Function for compiled code, of (rows, panels, sums, rows_at, panels_at, sums_at, words, ahead), which fills
        (tile.rows, tile.panel) of sums (tile.rows, width); the `at`s are elements before the tile's, `ahead` vectors
        from the panel's first to those that are asked for.
    """
    return intrinsic(_tile_type(tile, strides, tile.panel if width is None else width, prefetches, as_bits))


def _tile_type(
    tile: Tile, strides: tuple[int, int], width: int, prefetches: int, as_bits: bool
) -> Callable[..., tuple[Any, Callable[..., Any]]]:
    word, lane = ir.IntType(32), ir.FloatType()
    sum_type = ir.VectorType(lane, tile.lanes)
    factor_type = ir.VectorType(word, tile.lanes) if tile.pairs else sum_type
    stored_type = ir.VectorType(ir.IntType(16), tile.lanes) if as_bits and not tile.pairs else factor_type
    unknown, first_lane = ir.Constant(factor_type, ir.Undefined), ir.Constant(ir.VectorType(word, tile.lanes), None)

    def as_factor(builder: Any, stored: Any) -> Any:
        if stored_type == factor_type:
            return stored
        wide = builder.zext(stored, ir.VectorType(word, tile.lanes))
        return builder.bitcast(builder.shl(wide, ir.Constant(wide.type, [16] * tile.lanes)), factor_type)

    def add_product(builder: Any, total: Any, row: Any, factor: Any) -> Any:
        if tile.pairs:
            name, arguments = "llvm.x86.avx512bf16.dpbf16ps.512", (total, row, factor)
        else:
            name, arguments = f"llvm.fma.v{tile.lanes}f32", (row, factor, total)
        function_type = ir.FunctionType(sum_type, [argument.type for argument in arguments])
        return builder.call(cgutils.get_or_insert_function(builder.module, function_type, name), arguments)

    def tile_type(
        _: Any, rows: Any, panels: Any, sums: Any, rows_at: Any, panels_at: Any, sums_at: Any, words: Any, ahead: Any
    ) -> tuple[Any, Callable[..., Any]]:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            size = args[3].type

            offset = functools.partial(advance, builder, size)
            row_data, weights, sums_data = (
                builder.bitcast(offset(context.make_array(kind)(context, builder, array).data, at), to.as_pointer())
                for kind, array, at, to in zip(
                    signature.args[:3], args[:3], args[3:6], (factor_type.element, stored_type, lane), strict=True
                )
            )
            # They live in registers in the end.
            totals = [
                [cgutils.alloca_once_value(builder, ir.Constant(sum_type, None)) for _ in range(tile.vectors)]
                for _ in range(tile.rows)
            ]
            with cgutils.for_range(builder, args[6], intp=size) as loop:
                here = offset(weights, builder.mul(loop.index, size(tile.vectors)))
                factors = [
                    as_factor(builder, builder.load(offset(here, vector), align=2)) for vector in range(tile.vectors)
                ]
                asked = offset(weights, args[7], builder.mul(loop.index, size(prefetches)))
                for vector in range(prefetches):
                    generate_prefetch(builder, offset(asked, vector))
                column = offset(row_data, builder.mul(loop.index, size(strides[1])))
                for row, totals_of_row in enumerate(totals):
                    of_row = builder.load(offset(column, row * strides[0]))
                    single = builder.insert_element(unknown, of_row, word(0))
                    spread = builder.shuffle_vector(single, unknown, first_lane)
                    for factor, total in zip(factors, totals_of_row, strict=True):
                        builder.store(add_product(builder, builder.load(total), spread, factor), total)
            for row, totals_of_row in enumerate(totals):
                of_row = builder.bitcast(offset(sums_data, row * width), sum_type.as_pointer())
                for index, total in enumerate(totals_of_row):
                    builder.store(builder.load(total), offset(of_row, index), align=4)
            return context.get_dummy_value()

        return types.void(rows, panels, sums, rows_at, panels_at, sums_at, words, ahead), generate

    return tile_type
