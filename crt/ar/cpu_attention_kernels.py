"""Causal attention of a training step on a CPU and its backward pass, by Numba at first use.

From what the projection makes of all heads, (B, T, 3 H D), to what the next one reads, (B, T, H D): rotated, weighed
and put back in one pass per image and head, whose operands stay in the second-level cache. torch's batched products
compute all scores, half of which a causal mask drops, and its softmax and rotation walk through memory each
(`benchmarks/stage2.md`).

Arrays are flat. Those of bfloat16 are given as their bits in pairs, uint32 (`as_bits`); scores and all sums are
float32, weights and their gradients are rounded to the tile's words. As in `crt.ar.cpu_product_kernels`, a tile of rows
and outputs stays in registers; sizes are constants, hence a kernel for each shape. Scratch beyond the T positions is
zero.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

from crt.ar.cpu_matrix_kernels import WORDS_AT_ONCE, matrix_product
from crt.ar.cpu_product_kernels import Tile, around_products, tile_product
from crt.cpu_kernels import compile_kernel, exp_of_negative, in_one_word, in_order
from crt.processor import has_matrix_registers, processor_features

_ZERO, _ONE, _TWO, _THREE = (np.uintp(number) for number in range(4))
_UNIT, _NOTHING, _LEAST = np.float32(1), np.float32(0), np.int32(-(2**31))
_HALF, _UPPER, _LOWER = np.uint32(16), np.uint32(0xFFFF0000), np.uint32(0xFFFF)


class Shape(NamedTuple):
    """What attention is compiled for."""

    length: int
    heads: int
    head_width: int
    tile: Tile
    as_bits: bool

    @property
    def rows(self) -> int:
        """Positions, up to a whole tile and to as many words as are taken at once."""
        unit = max(self.tile.rows, self.tile.at_once)
        return -(-self.length // unit) * unit

    @property
    def keys(self) -> int:
        """Positions, up to a whole panel."""
        return -(-self.length // self.tile.panel) * self.tile.panel

    @property
    def longest(self) -> int:
        """Positions, up to both."""
        return max(self.rows, self.keys)

    @property
    def words(self) -> int:
        """Of a head's channels."""
        return self.head_width // self.tile.channels

    @property
    def words_of_key(self) -> int:
        """From a key to the next one where words are queries; not the sizes of which 64 share their cache's places."""
        return self.longest // self.tile.channels + WORDS_AT_ONCE

    @property
    def panels(self) -> int:
        """Of a head's channels."""
        return -(-self.head_width // self.tile.panel)


def attention_tile(dtype: torch.dtype, head_width: int) -> Tile:
    """That of this processor, as `largest_tile`'s, but of an even number of rows and no wider than a head.

    AMX takes heads whose channels fill its registers.
    """
    features = processor_features()
    if dtype == torch.bfloat16 and head_width % 32 == 0 and has_matrix_registers():
        return Tile(rows=16, vectors=min(head_width // 16, 4), lanes=16, pairs=True, matrix=True)
    if "avx512f" not in features:
        return Tile(rows=6, vectors=2, lanes=8, pairs=False)
    vectors = min(-(-head_width // 16), 4)
    rows = {1: 12, 2: 12, 3: 8, 4: 6}[vectors]
    return Tile(rows, vectors, lanes=16, pairs=dtype == torch.bfloat16 and "avx512bf16" in features)


class _Operands(NamedTuple):
    """Kernels that bring a head's vectors to where products read them."""

    bring: Callable[..., None]
    outputs: Callable[..., None]
    channels: Callable[..., None]


@compile_kernel
def _read_bits(x: Any, pair: Any) -> Any:
    word = x[pair]
    return np.uint32(word << _HALF).view(np.float32), np.uint32(word & _UPPER).view(np.float32)


@compile_kernel
def _write_bits(x: Any, pair: Any, even: Any, odd: Any) -> None:
    x[pair] = in_one_word(even, odd)


@compile_kernel
def _read_floats(x: Any, pair: Any) -> Any:
    return x[_TWO * pair], x[_TWO * pair + _ONE]


@compile_kernel
def _write_floats(x: Any, pair: Any, even: Any, odd: Any) -> None:
    x[_TWO * pair], x[_TWO * pair + _ONE] = even, odd


def _pairs(as_bits: bool) -> tuple[Callable[..., Any], Callable[..., None]]:
    """Reads and writes a pair of neighbouring channels of an array: (x, pair) to two float32; (x, pair, even, odd)."""
    return (_read_bits, _write_bits) if as_bits else (_read_floats, _write_floats)


def _operands(shape: Shape) -> _Operands:
    """Those of a shape.

    Rows are words, uint32 (T, W): `bring(x, at, stride, rotates, cos, sin, rows)` writes them, rotated or not, from the
    pairs of channels of an array that start at `at`, `stride` from one position to the next. Panels are words, as
    `in_panels` leaves a weight: for `outputs(rows, panels)` positions are the outputs and channels the words, for
    `channels(rows, panels)` the reverse.
    """
    length, pairs_of_head = np.uintp(shape.length), np.uintp(shape.head_width // 2)
    words, panel, by_pairs = np.uintp(shape.words), np.uintp(shape.tile.panel), shape.tile.pairs
    panels, words_of_length = np.uintp(shape.panels), np.uintp(shape.longest // shape.tile.channels)
    width, half_panel = np.uintp(shape.head_width), np.uintp(shape.tile.panel // 2)
    (read, _), (_, write) = _pairs(shape.as_bits), _pairs(by_pairs)

    @compile_kernel
    def bring(x: Any, at: Any, stride: Any, rotates: Any, cos: Any, sin: Any, rows: Any) -> None:
        # A row's pairs lie beside each other in `rows` too, two words each where a word is a channel.
        as_stored = rows if by_pairs else rows.view(np.float32)
        for t in range(length):
            for pair in range(pairs_of_head):
                even, odd = read(x, at + t * stride + pair)
                if rotates:
                    c, s = cos[t * pairs_of_head + pair], sin[t * pairs_of_head + pair]
                    even, odd = even * c - odd * s, even * s + odd * c
                write(as_stored, t * pairs_of_head + pair, even, odd)

    @compile_kernel
    def outputs(rows: Any, panels_of: Any) -> None:
        for t in range(length):
            at = t // panel * words * panel + t % panel
            for word in range(words):
                panels_of[at + word * panel] = rows[t * words + word]

    @compile_kernel
    def channels(rows: Any, panels_of: Any) -> None:
        if by_pairs:
            for pair in range((length + _ONE) // _TWO):
                for number in range(panels):
                    at, from_ = (number * words_of_length + pair) * panel, _TWO * pair * words + number * half_panel
                    for word in range(min(half_panel, words - number * half_panel)):
                        one, other = rows[from_ + word], rows[from_ + words + word]
                        panels_of[at + _TWO * word] = (one & _LOWER) | (other << _HALF)
                        panels_of[at + _TWO * word + _ONE] = (one >> _HALF) | (other & _UPPER)
        else:
            for t in range(length):
                for number in range(panels):
                    at, from_ = (number * words_of_length + t) * panel, t * words + number * panel
                    for k in range(min(panel, width - number * panel)):
                        panels_of[at + k] = rows[from_ + k]

    return _Operands(bring, outputs, channels)


def _word_writers(shape: Shape) -> tuple[Callable[..., None], Callable[..., None]]:
    """Write float32 of a tile's rows, (tile.rows, keys) as products leave them, as words; the first `count` of a row.

    Returns:
        Functions of (values, row, count, out), whose words are along the row, (tile.rows, words of T), and of (values,
        first row, count, out), whose words are along the rows, for all of the tile: (words of T, T), for AMX
        (T, `words_of_key`).
    """
    height, keys, by_pairs = np.uintp(shape.tile.rows), np.uintp(shape.keys), shape.tile.pairs
    words = np.uintp(shape.keys // shape.tile.channels)
    longest, matrix, words_of_key = np.uintp(shape.longest), shape.tile.matrix, np.uintp(shape.words_of_key)

    @compile_kernel
    def along_row(values: Any, row: Any, count: Any, out: Any) -> None:
        at, to = row * keys, row * words
        if by_pairs:
            for word in range(count // _TWO):
                out[to + word] = in_one_word(values[at + _TWO * word], values[at + _TWO * word + _ONE])
        else:
            for key in range(count):
                out[to + key] = np.float32(values[at + key]).view(np.uint32)

    @compile_kernel
    def along_rows(values: Any, first: Any, count: Any, out: Any) -> None:
        if matrix:
            for key in range(count):
                to = key * words_of_key + first // _TWO
                for pair in range(height // _TWO):
                    at = _TWO * pair * keys + key
                    out[to + pair] = in_one_word(values[at], values[at + keys])
        elif by_pairs:
            for pair in range(height // _TWO):
                at, to = _TWO * pair * keys, (first // _TWO + pair) * longest
                for key in range(count):
                    out[to + key] = in_one_word(values[at + key], values[at + keys + key])
        else:
            for row in range(height):
                at, to = row * keys, (first + row) * longest
                for key in range(count):
                    out[to + key] = np.float32(values[at + key]).view(np.uint32)

    return along_row, along_rows


def _products(shape: Shape) -> tuple[Any, Any, Any]:
    """Those of rows whose words are channels, keys, and queries; see `tile_product`."""
    tile, words_of_keys = shape.tile, shape.keys // shape.tile.channels
    if tile.matrix:
        by_channels = matrix_product(tile.vectors, shape.words, shape.keys)
        by_keys, by_queries = (matrix_product(tile.vectors, stride) for stride in (words_of_keys, shape.words_of_key))
    else:
        by_channels = tile_product(tile, (shape.words, 1), shape.keys)
        by_keys, by_queries = (tile_product(tile, strides) for strides in ((words_of_keys, 1), (1, shape.longest)))
    return by_channels, by_keys, by_queries


@functools.cache
def attention_kernels(shape: Shape) -> tuple[Callable[..., None], Callable[..., None]]:
    """Attention and its backward pass; see `crt.ar.cpu_training.causal_attention`.

    Returns:
        Functions of (qkv, cos, sin, out, logarithms, first, last) and of (qkv, cos, sin, logarithms, gradient, out,
        first, last): qkv (B, T, 3 H D), unrotated, and in the second one out, its gradient; cos and sin float32
        (T, D / 2); out of the first one and its gradient (B, T, H D); logarithms float32 (B, H, T), of the sums of
        exponentials. Heads of images [first, last) of all B H.
    """
    length, heads, tile = np.uintp(shape.length), np.uintp(shape.heads), shape.tile
    height, panel, channels = np.uintp(tile.rows), np.uintp(tile.panel), np.uintp(tile.channels)
    words, panels_of_head = np.uintp(shape.words), np.uintp(shape.panels)
    pairs, half_panel = np.uintp(shape.head_width // 2), np.uintp(tile.panel // 2)
    pairs_of_row = np.uintp(shape.heads * shape.head_width // 2)
    stride = _THREE * pairs_of_row  # from one position to the next in qkv
    rows, keys = np.uintp(shape.rows), np.uintp(shape.keys)
    words_of_keys, words_of_longest = keys // channels, np.uintp(shape.longest // tile.channels)
    scale = np.float32(shape.head_width**-0.5)
    bring, outputs_first, channels_first = _operands(shape)
    along_row, along_rows = _word_writers(shape)
    by_channels, by_keys, by_queries = _products(shape)
    begin, end_of_products = around_products(tile)
    at_once = np.uintp(tile.at_once)
    from_key, from_query = (shape.words_of_key, 1) if tile.matrix else (1, shape.longest)
    to_next_key, to_next_query = np.uintp(from_key), np.uintp(from_query)
    size_of_weights = shape.longest * shape.words_of_key if tile.matrix else shape.longest**2 // tile.channels
    _, write = _pairs(shape.as_bits)

    @compile_kernel
    def hide(scores: Any, row: Any, count: Any, width: Any, value: Any) -> None:
        """Give all keys but the first `count` of a row a value: vectors then need no mask."""
        for key in range(count, width):
            scores[row * keys + key] = value

    @compile_kernel
    def weigh(scores: Any, row: Any, count: Any, width: Any) -> Any:
        """A row's scores to exponentials, of the first `count` keys; their sum's inverse and its logarithm."""
        at = row * keys
        hide(scores, row, count, width, scores[at])
        bits, largest = scores.view(np.int32), _LEAST
        for key in range(width):
            largest = np.int32(max(largest, in_order(bits[at + key])))
        most, total, every = np.int32(in_order(largest)).view(np.float32), _NOTHING, _NOTHING
        for key in range(width):
            value = scores[at + key]
            every += value
            scores[at + key] = exp_of_negative((value - most) * scale)
        hide(scores, row, count, width, _NOTHING)
        for key in range(width):
            total += scores[at + key]
        total += every * _NOTHING  # no number where a score is none or infinite
        return _UNIT / total, most * scale + np.log(total)

    @compile_kernel
    def put(sums: Any, row: Any, number: Any, factor: Any, out: Any, to: Any) -> None:
        """A panel of a row's sums, times a factor."""
        start = number * half_panel
        for pair in range(min(half_panel, pairs - start)):
            even, odd = sums[row * panel + _TWO * pair], sums[row * panel + _TWO * pair + _ONE]
            write(out, to + start + pair, even * factor, odd * factor)

    @compile_kernel
    def forward(qkv: Any, cos: Any, sin: Any, out: Any, logarithms: Any, first: Any, last: Any) -> None:
        vectors, q_rows = np.zeros(rows * words, np.uint32), np.zeros(rows * words, np.uint32)
        k_panels = np.zeros(keys * words, np.uint32)
        v_panels = np.zeros(panels_of_head * words_of_longest * panel, np.uint32)
        weights, scores = np.zeros(height * words_of_keys, np.uint32), np.zeros(height * keys, np.float32)
        sums, inverses = np.zeros(height * panel, np.float32), np.zeros(height, np.float32)
        begin()
        for index in range(first, last):
            image, head = index // heads, index % heads
            at = (image * length * _THREE * heads + head) * pairs
            bring(qkv, at, stride, True, cos, sin, q_rows)
            bring(qkv, at + pairs_of_row, stride, True, cos, sin, vectors)
            outputs_first(vectors, k_panels)
            bring(qkv, at + _TWO * pairs_of_row, stride, False, cos, sin, vectors)
            channels_first(vectors, v_panels)
            for start in range(_ZERO, length, height):
                end = min(start + height, length)
                width = (end + panel - _ONE) // panel * panel
                for key in range(_ZERO, width, panel):
                    by_channels(q_rows, k_panels, scores, start * words, key * words, key, words, _ZERO)
                for t in range(start, end):
                    row = t - start
                    inverses[row], logarithms[index * length + t] = weigh(scores, row, t + _ONE, width)
                    along_row(scores, row, width, weights)
                for number in range(panels_of_head):
                    place = number * words_of_longest * panel
                    by_keys(weights, v_panels, sums, _ZERO, place, _ZERO, (end + channels - _ONE) // channels, _ZERO)
                    for t in range(start, end):
                        to = ((image * length + t) * heads + head) * pairs
                        put(sums, t - start, number, inverses[t - start], out, to)
        end_of_products()

    @compile_kernel
    def slopes(scores: Any, slopes_of: Any, row: Any, count: Any, width: Any, logarithm: Any) -> None:
        """A row's scores to weights, and the weights' gradients to those of the products of queries and keys.

        Where a score was no number, neither is the logarithm, nor anything here.
        """
        at, dot = row * keys, _NOTHING
        for key in range(width):
            scores[at + key] = exp_of_negative(scores[at + key] * scale - logarithm)
        hide(scores, row, count, width, _NOTHING)
        for key in range(width):
            dot += scores[at + key] * slopes_of[at + key]
        for key in range(width):
            slopes_of[at + key] = scores[at + key] * (slopes_of[at + key] - dot) * scale

    @compile_kernel
    def turn_back(sums: Any, row: Any, number: Any, cos: Any, sin: Any, t: Any, out: Any, to: Any) -> None:
        """A panel of the gradient of a rotated vector to that of the vector."""
        start = number * half_panel
        for pair in range(min(half_panel, pairs - start)):
            even, odd = sums[row * panel + _TWO * pair], sums[row * panel + _TWO * pair + _ONE]
            c, s = cos[t * pairs + start + pair], sin[t * pairs + start + pair]
            write(out, to + start + pair, even * c + odd * s, odd * c - even * s)

    @compile_kernel
    def scores_and_queries(
        q_rows: Any, g_rows: Any, k_outputs: Any, v_outputs: Any, k_panels: Any, logarithms: Any, cos: Any, sin: Any,
        weights: Any, of_scores: Any, out: Any, index: Any, at: Any,
    ) -> None:  # fmt: skip
        """Gradients of a head's queries; for its keys and values all weights and gradients of scores."""
        scores, slopes_of = np.empty(height * keys, np.float32), np.empty(height * keys, np.float32)
        along, sums = np.empty(height * words_of_keys, np.uint32), np.empty(height * panel, np.float32)
        for start in range(_ZERO, rows, height):
            end = min(start + height, length)
            width, used = (end + panel - _ONE) // panel * panel, (end + channels - _ONE) // channels
            for key in range(_ZERO, width, panel):
                by_channels(q_rows, k_outputs, scores, start * words, key * words, key, words, _ZERO)
                by_channels(g_rows, v_outputs, slopes_of, start * words, key * words, key, words, _ZERO)
            for row in range(height):
                t = start + row
                count, logarithm = (t + _ONE, logarithms[index * length + t]) if t < length else (_ZERO, _NOTHING)
                slopes(scores, slopes_of, row, count, width, logarithm)
                along_row(slopes_of, row, width, along)
            along_rows(scores, start, width, weights)
            along_rows(slopes_of, start, width, of_scores)
            for number in range(panels_of_head):
                by_keys(along, k_panels, sums, _ZERO, number * words_of_longest * panel, _ZERO, used, _ZERO)
                for t in range(start, end):
                    turn_back(sums, t - start, number, cos, sin, t, out, at + t * stride)

    @compile_kernel
    def keys_and_values(
        q_panels: Any, g_panels: Any, cos: Any, sin: Any, weights: Any, of_scores: Any, out: Any, at: Any
    ) -> None:
        """Gradients of a head's keys and values: sums over the places that see them."""
        sums = np.empty(height * panel, np.float32)
        k_at, v_at = at + pairs_of_row, at + _TWO * pairs_of_row
        for start in range(_ZERO, length, height):
            # From the first queries that are taken together; those before the tile have no weight.
            end, before = min(start + height, length), start // at_once * at_once // channels
            seeing = rows // channels - before
            for number in range(panels_of_head):
                place = (number * words_of_longest + before) * panel
                there = before * to_next_query + start * to_next_key
                by_queries(of_scores, q_panels, sums, there, place, _ZERO, seeing, _ZERO)
                for t in range(start, end):
                    turn_back(sums, t - start, number, cos, sin, t, out, k_at + t * stride)
                by_queries(weights, g_panels, sums, there, place, _ZERO, seeing, _ZERO)
                for t in range(start, end):
                    put(sums, t - start, number, _UNIT, out, v_at + t * stride)

    @compile_kernel
    def backward(qkv: Any, cos: Any, sin: Any, logarithms: Any, gradient: Any, out: Any, first: Any, last: Any) -> None:
        q_rows, g_rows = np.zeros(rows * words, np.uint32), np.zeros(rows * words, np.uint32)
        vectors = np.zeros(rows * words, np.uint32)
        k_outputs, v_outputs = np.zeros(keys * words, np.uint32), np.zeros(keys * words, np.uint32)
        size = panels_of_head * words_of_longest * panel
        q_panels, k_panels, g_panels = np.zeros(size, np.uint32), np.zeros(size, np.uint32), np.zeros(size, np.uint32)
        weights, of_scores = np.empty(size_of_weights, np.uint32), np.empty(size_of_weights, np.uint32)
        begin()
        for index in range(first, last):
            image, head = index // heads, index % heads
            at = (image * length * _THREE * heads + head) * pairs
            bring(qkv, at, stride, True, cos, sin, q_rows)
            channels_first(q_rows, q_panels)
            bring(qkv, at + pairs_of_row, stride, True, cos, sin, vectors)
            outputs_first(vectors, k_outputs)
            channels_first(vectors, k_panels)
            bring(qkv, at + _TWO * pairs_of_row, stride, False, cos, sin, vectors)
            outputs_first(vectors, v_outputs)
            bring(gradient, (image * length * heads + head) * pairs, pairs_of_row, False, cos, sin, g_rows)
            channels_first(g_rows, g_panels)
            scores_and_queries(
                q_rows, g_rows, k_outputs, v_outputs, k_panels, logarithms, cos, sin, weights, of_scores, out, index, at
            )
            keys_and_values(q_panels, g_panels, cos, sin, weights, of_scores, out, at)
        end_of_products()

    return forward, backward
