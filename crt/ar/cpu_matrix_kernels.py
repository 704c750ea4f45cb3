"""Products in the matrix registers of AMX, for Numba's kernels.

Four hold sums of up to 16 rows by 16 outputs each, one the words of rows, one weights: the processor renames it, so
that the next ones are on their way meanwhile. Denormal numbers count as zero.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from crt.cpu_kernels import advance, generate_prefetch

WORDS_AT_ONCE = 16
"""Pairs of channels that an instruction takes of each row."""

_WORD, _REGISTER_ROW = 4, 64  # bytes
_BYTE, _HALF = ir.IntType(8), ir.IntType(16)
_SUMS, _WEIGHTS, _ROWS = (0, 1, 2, 3), 4, 5
_PALETTE = 1


def configure(rows: int) -> Any:
    """Function for compiled code, of (): gives the registers their sizes for products of so many rows.

    To be called once before products, in their thread, and `release` after them.
    """
    sizes = dict.fromkeys((*_SUMS, _ROWS), rows) | {_WEIGHTS: WORDS_AT_ONCE}
    # As LDTILECFG reads it: bytes of a row of each of 16 registers from byte 16 on, their rows from byte 48 on.
    kinds = ir.ArrayType(_BYTE, 16), ir.ArrayType(_HALF, 16), ir.ArrayType(_BYTE, 16)
    bytes_of_row = [_REGISTER_ROW if register in sizes else 0 for register in range(16)]
    contents = [_PALETTE] + [0] * 15, bytes_of_row, [sizes.get(register, 0) for register in range(16)]
    setting = ir.Constant(ir.LiteralStructType(kinds), [kind(part) for kind, part in zip(kinds, contents, strict=True)])

    def configure_type(_: Any) -> tuple[Any, Callable[..., Any]]:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            place = cgutils.global_constant(builder, f"tiles_of_{rows}_rows", setting)
            _call(builder, "ldtilecfg", builder.bitcast(place, cgutils.voidptr_t))
            return context.get_dummy_value()

        return types.void(), generate

    return intrinsic(configure_type)


def _release_type(_: Any) -> tuple[Any, Callable[..., Any]]:
    """Leave the registers to others, who would have to save them."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _call(builder, "tilerelease")
        return context.get_dummy_value()

    return types.void(), generate


release: Any = intrinsic(_release_type)


def matrix_product(
    vectors: int, stride: int | None = None, width: int | None = None, prefetches: int = 0, in_blocks: bool = False
) -> Any:
    """Multiplies a tile's rows with one panel, as `crt.ar.cpu_product_kernels.tile_product` does.

    Args:
        vectors: a panel's outputs by 16s, 4 at most.
        stride: words from a row to the next one; None: as many as are multiplied.
        width: of the sums, of which a panel is filled; None: a panel's.
        prefetches: lines that are asked for with each word.
        in_blocks: whether panels are (words / 16, vectors, 16, 16) words: what fills a register lies together; if not,
            (words, vectors, 16).

    Returns:
        Function for compiled code, of (rows, panels, sums, rows_at, panels_at, sums_at, words, ahead), which fills
        (rows, panel) of sums (rows, width); words, up to a multiple of `WORDS_AT_ONCE`, of each of the setting's rows;
        `ahead` lines from the panel's first to those that are asked for.
    """
    block, row_of_panel = WORDS_AT_ONCE * _REGISTER_ROW, vectors * _REGISTER_ROW
    sums_row = row_of_panel if width is None else width * _WORD
    to_next_vector, weights_stride = (block, _REGISTER_ROW) if in_blocks else (_REGISTER_ROW, row_of_panel)

    def product_type(
        _: Any, rows: Any, panels: Any, sums: Any, rows_at: Any, panels_at: Any, sums_at: Any, words: Any, ahead: Any
    ) -> tuple[Any, Callable[..., Any]]:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            size = args[3].type

            further = partial(advance, builder, size)
            row_data, weights, target = (
                builder.bitcast(further(context.make_array(kind)(context, builder, array).data, at), cgutils.voidptr_t)
                for kind, array, at in zip(signature.args[:3], args[:3], args[3:6], strict=True)
            )
            rows_stride = builder.mul(args[6], size(_WORD)) if stride is None else size(stride * _WORD)
            blocks = builder.udiv(builder.add(args[6], size(WORDS_AT_ONCE - 1)), size(WORDS_AT_ONCE))
            for vector in range(vectors):
                _call(builder, "tilezero", _BYTE(_SUMS[vector]))
            with cgutils.for_range(builder, blocks, intp=size) as loop:
                here = further(weights, builder.mul(loop.index, size(vectors * block)))
                asked = further(
                    weights,
                    builder.mul(args[7], size(_REGISTER_ROW)),
                    builder.mul(loop.index, size(prefetches * block)),
                )
                place = further(row_data, builder.mul(loop.index, size(WORDS_AT_ONCE * _WORD)))
                _call(builder, "tileloadd64", _BYTE(_ROWS), place, rows_stride)
                for vector in range(vectors):
                    place = further(here, vector * to_next_vector)
                    _call(builder, "tileloadd64", _BYTE(_WEIGHTS), place, size(weights_stride))
                    _call(builder, "tdpbf16ps", _BYTE(_SUMS[vector]), _BYTE(_ROWS), _BYTE(_WEIGHTS))
                    for line in range(vector, WORDS_AT_ONCE * prefetches, vectors):
                        generate_prefetch(builder, further(asked, line * _REGISTER_ROW))
            for vector in range(vectors):
                _call(
                    builder,
                    "tilestored64",
                    _BYTE(_SUMS[vector]),
                    further(target, vector * _REGISTER_ROW),
                    size(sums_row),
                )
            return context.get_dummy_value()

        return types.void(rows, panels, sums, rows_at, panels_at, sums_at, words, ahead), generate

    return intrinsic(product_type)


def _call(builder: Any, name: str, *arguments: Any) -> None:
    """One instruction of AMX; registers are given by their numbers."""
    function_type = ir.FunctionType(ir.VoidType(), [argument.type for argument in arguments])
    builder.call(cgutils.get_or_insert_function(builder.module, function_type, f"llvm.x86.{name}"), arguments)
