"""A step of decoding on a CPU, all layers in one kernel that each thread runs its share of, by Numba at first use.

Torch's batched products of a single query take several times as long as the memory needs to bring keys and values;
rotation, softmax, the writing of the cache, norms and activations are dozens of operations of a few microseconds that
all start anew; and its threads spin between them.

Arrays are flat. Weights and caches of bfloat16 are given as their bits, uint16 (`as_bits`); what is summed, and the
residual stream, are float32. As in `crt.tokenizer.winograd_kernels`, LLVM vectorises only with constant sizes and
unsigned indices, hence a kernel for each width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from crt.ar.cpu_product_kernels import Tile, product_kernel, row_writer
from crt.cpu_kernels import compile_kernel, conversions, exp_of_negative, prefetch, wait_for_all

_UNIT = np.float32(1)
_ZERO, _ONE, _TWO, _THREE, _FOUR = (np.uintp(number) for number in range(5))
_CACHE_LINE = 64  # bytes
_BLOCK = np.uintp(64)  # codes


class Shape(NamedTuple):
    """What a step is compiled for."""

    heads: int
    head_width: int
    tile: Tile
    prefetches: int
    """See `product_kernel`."""
    as_bits: bool

    @property
    def width(self) -> int:
        """Channels of the residual stream."""
        return self.heads * self.head_width

    @property
    def words(self) -> int:
        """Words of a row of the residual stream."""
        return self.tile.words(self.width)


@functools.cache
def attention_kernel(shape: Shape) -> Callable[..., None]:
    """Attends at one position, for some of the pairs of a sequence and a head.

    Returns:
        Function of (qkv, keys, values, cached, turn, out, scratch, at, first, last, position, length): qkv float32
        (B, 3 H, D), the position's own, unrotated; keys and values (B H, length, D) from the element `cached` on, of
        which it writes the position's; turn float32 (D,), cosine and sine by pair; out as `row_writer` leaves it;
        scratch float32, 2 D + length of it from the element `at` on; pairs [first, last).
    """
    head_width, heads, as_bits = shape.head_width, np.uintp(shape.heads), shape.as_bits
    words, words_of_row = np.uintp(shape.head_width // shape.tile.channels), np.uintp(shape.words)
    write = row_writer(shape.tile)
    d, pairs = np.uintp(head_width), np.uintp(head_width // 2)
    step = np.uintp(_CACHE_LINE // (2 if as_bits else 4))
    steps = (d + step - _ONE) // step
    scale = np.float32(head_width**-0.5)
    load, store = conversions(as_bits)

    @compile_kernel
    def scores_of(keys: Any, values: Any, start_of: Any, scratch: Any, at: Any, count: Any) -> Any:
        """Products of the query with the row's keys, into the scratch from 2 D on; the largest.

        The row's values are on their way meanwhile: the processor itself foresees one array only, page by page.
        """
        highest = np.float32(-np.inf)
        for t in range(count):
            start = start_of + t * d
            for line in range(steps):
                prefetch(values, start + line * step)
            total = np.float32(0)
            for k in range(d):
                total += scratch[at + k] * load(keys[start + k])
            scratch[at + _TWO * d + t] = total
            highest = max(highest, total)
        return highest

    @compile_kernel
    def weigh(scratch: Any, first: Any, count: Any, highest: Any) -> Any:
        """Scores to exponentials; their sum."""
        total = np.float32(0)
        for t in range(first, first + count):
            weight = exp_of_negative(scratch[t] - highest)
            scratch[t] = weight
            total += weight
        return total

    @compile_kernel
    def sum_values(keys: Any, values: Any, start_of: Any, following: Any, scratch: Any, at: Any, count: Any) -> None:
        """The row's values by their weights, into the scratch from D on; four at a time: fewer stores of the sum.

        The keys of the row that follows are on their way meanwhile.
        """
        for k in range(d):
            scratch[at + d + k] = np.float32(0)
        weights, whole = at + _TWO * d, count // _FOUR * _FOUR
        for t in range(_ZERO, whole, _FOUR):
            for line in range(_FOUR * steps):
                prefetch(keys, following + t * d + line * step)
            v0 = start_of + t * d
            v1, v2, v3 = v0 + d, v0 + _TWO * d, v0 + _THREE * d
            w0, w1 = scratch[weights + t], scratch[weights + t + _ONE]
            w2, w3 = scratch[weights + t + _TWO], scratch[weights + t + _THREE]
            for k in range(d):
                scratch[at + d + k] += (w0 * load(values[v0 + k]) + w1 * load(values[v1 + k])) + (
                    w2 * load(values[v2 + k]) + w3 * load(values[v3 + k])
                )
        for t in range(whole, count):
            v0, w0 = start_of + t * d, scratch[weights + t]
            for k in range(d):
                scratch[at + d + k] += w0 * load(values[v0 + k])

    @compile_kernel
    def attend(
        qkv: Any, keys: Any, values: Any, cached: Any, turn: Any, out: Any, scratch: Any, at: Any,
        first: Any, last: Any, position: Any, length: Any,
    ) -> None:  # fmt: skip
        for row in range(first, last):
            sequence, head = row // heads, row % heads
            q = (sequence * _THREE * heads + head) * d
            k_new, v_new = q + heads * d, q + _TWO * heads * d
            start, following = cached + row * length * d, cached + min(row + _ONE, last - _ONE) * length * d
            new = start + position * d
            for pair in range(pairs):
                even, odd = _TWO * pair, _TWO * pair + _ONE
                cos, sin = turn[even], turn[odd]
                a, b = qkv[q + even], qkv[q + odd]
                scratch[at + even], scratch[at + odd] = (a * cos - b * sin) * scale, (a * sin + b * cos) * scale
                a, b = qkv[k_new + even], qkv[k_new + odd]
                keys[new + even], keys[new + odd] = store(a * cos - b * sin), store(a * sin + b * cos)
            for k in range(d):
                values[new + k] = store(qkv[v_new + k])
            count = position + _ONE
            highest = scores_of(keys, values, start, scratch, at, count)
            total = weigh(scratch, at + _TWO * d, count, highest)
            sum_values(keys, values, start, following, scratch, at, count)
            for k in range(d):
                scratch[at + d + k] /= total
            write(scratch, at + d, words, out, sequence, head * words, words_of_row)

    return attend


@functools.cache
def norm_kernel(shape: Shape) -> Callable[..., None]:
    """RMSNorm of some rows.

    Returns:
        Function of (x, gains, gain, out, scratch, at, first, last, eps): x float32 (B, C); gains, of which it takes C
        from the element `gain` on; out as `row_writer` leaves it; scratch float32, C of it from `at` on; rows
        [first, last).
    """
    c, write = np.uintp(shape.width), row_writer(shape.tile)
    words, words_of_row = np.uintp(shape.width // shape.tile.channels), np.uintp(shape.words)

    @compile_kernel
    def normalize(
        x: Any, gains: Any, gain: Any, out: Any, scratch: Any, at: Any, first: Any, last: Any, eps: Any
    ) -> None:
        for row in range(first, last):
            start = row * c
            squares = np.float32(0)
            for k in range(c):
                squares += x[start + k] * x[start + k]
            factor = _UNIT / np.sqrt(squares / np.float32(c) + np.float32(eps))
            for k in range(c):
                scratch[at + k] = x[start + k] * factor * gains[gain + k]
            write(scratch, at, words, out, row, _ZERO, words_of_row)

    return normalize


@compile_kernel
def _swiglu(gate: Any, up: Any) -> Any:
    """silu(gate) up."""
    power = exp_of_negative(-abs(gate))
    return gate * (_UNIT if gate >= 0 else power) / (_UNIT + power) * up


# What becomes of a tile's products; see `product_kernel`.


@functools.cache
def _storing(tile: Tile, onto: bool) -> Callable[..., None]:
    """They are the result, or are added `onto` what is there: out float32 (B, width)."""
    height, panel_size = np.uintp(tile.rows), np.uintp(tile.panel)

    @compile_kernel
    def store(sums: Any, at: Any, index: Any, panel: Any, out: Any, width: Any) -> None:
        column, rows = panel * panel_size, np.uintp(out.size) // width
        columns = min(panel_size, width - column)
        for row in range(index * height, min((index + _ONE) * height, rows)):
            source, target = at + (row - index * height) * panel_size, row * width + column
            for c in range(columns):
                if onto:
                    out[target + c] += sums[source + c]
                else:
                    out[target + c] = sums[source + c]

    return store


@functools.cache
def activating(tile: Tile) -> Callable[..., None]:
    """Half of them are gates, the other half what passes: out as `row_writer` leaves it, with `width` words a row."""
    height, half, write = np.uintp(tile.rows), np.uintp(tile.panel // 2), row_writer(tile)
    words = np.uintp(tile.panel // 2 // tile.channels)

    @compile_kernel
    def activate(sums: Any, at: Any, index: Any, panel: Any, out: Any, width: Any) -> None:
        for row in range(height):
            source = at + row * _TWO * half
            for c in range(half):
                sums[source + c] = _swiglu(sums[source + c], sums[source + half + c])
            write(sums, source, words, out, index * height + row, panel * words, width)

    return activate


@compile_kernel
def _share(size: Any, thread: Any, threads: Any) -> Any:
    """The thread's part of `size`, from and to."""
    return size * thread // threads, size * (thread + _ONE) // threads


@functools.cache
def step_kernel(shape: Shape) -> Callable[..., None]:
    """Predictions for the codes at one position; each thread calls it once, with the same arrays.

    Returns:
        Function of (thread, threads, arrived, weights, gains, keys, values, turn, arrays, scratch, sizes, eps):
        arrived int64 (1,), zero; weights, as `in_panels` leaves them, those of qkv, out, gate and up by halves of a
        panel, and down, each of all layers in turn, and of the head; gains float32 (2 L + 1, C), in the order of the
        norms; keys and values (L, B, H, T, D); turn float32 (D,), the rotation at the position; arrays x float32
        (B, C), normed and attended uint32, qkv float32 (B, 3 C), hidden uint32, logits float32 (B, K); scratch float32
        (threads, any); sizes layers, position, T, codes, panels of a hidden layer.
    """
    tile, c, heads, height = shape.tile, *(np.uintp(n) for n in (shape.width, shape.heads, shape.tile.rows))
    attend, normalize = attention_kernel(shape), norm_kernel(shape)
    stored, added, activated = (
        product_kernel(tile, shape.prefetches, shape.as_bits, finish)
        for finish in (_storing(tile, onto=False), _storing(tile, onto=True), activating(tile))
    )
    channels, panel_size, half = (np.uintp(n) for n in (tile.channels, tile.panel, tile.panel // 2))
    words = np.uintp(shape.words)
    qkv_panels, out_panels = (np.uintp(-(-n * shape.width // tile.panel)) for n in (3, 1))

    @compile_kernel
    def step(
        thread: Any, threads: Any, arrived: Any, weights: Any, gains: Any, keys: Any, values: Any, turn: Any,
        arrays: Any, scratch: Any, sizes: Any, eps: Any,
    ) -> None:  # fmt: skip
        qkv_weights, out_weights, gate_up_weights, down_weights, head_weights = weights
        x, mixed, qkv, hidden, logits = arrays
        layers, position, length, codes, hidden_panels = sizes
        batch, me, all_threads = np.uintp(x.size) // c, np.uintp(thread), np.uintp(threads)
        tiles, at = (batch + height - _ONE) // height, np.uintp(scratch.size) // all_threads * me
        hidden_words = np.uintp(hidden_panels) * half // channels
        first_row, last_row = _share(batch, me, all_threads)
        first_pair, last_pair = _share(batch * heads, me, all_threads)
        first_qkv, last_qkv = _share(qkv_panels, me, all_threads)
        first_out, last_out = _share(out_panels, me, all_threads)
        first_hidden, last_hidden = _share(np.uintp(hidden_panels), me, all_threads)
        panel = panel_size * channels  # elements of one, a word
        for layer in range(np.uintp(layers)):
            normalize(x, gains, _TWO * layer * c, mixed, scratch, at, first_row, last_row, eps)
            wait_for_all(arrived, threads)
            start = layer * qkv_panels * words * panel
            stored(mixed, tiles, words, qkv_weights, start, first_qkv, last_qkv, scratch, at, qkv, _THREE * c)
            wait_for_all(arrived, threads)
            cached = layer * batch * c * np.uintp(length)
            attend(
                qkv, keys, values, cached, turn, mixed, scratch, at,
                first_pair, last_pair, np.uintp(position), np.uintp(length),
            )  # fmt: skip
            wait_for_all(arrived, threads)
            start = layer * out_panels * words * panel
            added(mixed, tiles, words, out_weights, start, first_out, last_out, scratch, at, x, c)
            wait_for_all(arrived, threads)
            normalize(x, gains, (_TWO * layer + _ONE) * c, mixed, scratch, at, first_row, last_row, eps)
            wait_for_all(arrived, threads)
            start = layer * np.uintp(hidden_panels) * words * panel
            activated(
                mixed,
                tiles,
                words,
                gate_up_weights,
                start,
                first_hidden,
                last_hidden,
                scratch,
                at,
                hidden,
                hidden_words,
            )
            wait_for_all(arrived, threads)
            start = layer * out_panels * hidden_words * panel
            added(hidden, tiles, hidden_words, down_weights, start, first_out, last_out, scratch, at, x, c)
            wait_for_all(arrived, threads)
        normalize(x, gains, _TWO * np.uintp(layers) * c, mixed, scratch, at, first_row, last_row, eps)
        wait_for_all(arrived, threads)
        width = np.uintp(codes)
        first, last = _share((width + panel_size - _ONE) // panel_size, me, all_threads)
        stored(mixed, tiles, words, head_weights, _ZERO, first, last, scratch, at, logits, width)

    return step


@compile_kernel
def draw_kernel(
    thread: Any, threads: Any, arrived: Any, logits: Any, uniforms: Any, codes: Any,
    guided: Any, guidance: Any, divisor: Any,
) -> None:  # fmt: skip
    """Draws among all codes, as `crt.ar.generator.draw_next` does; each thread calls it once, after the step.

    Args:
        thread, threads, arrived: those of the step.
        logits: float32 (B, K), or guided (2 B, K): with classes first, then without. What they are is lost.
        uniforms: float64 (B,).
        codes: int64 (B,), is written; K where a logit is not finite.
        guided: whether there is an unconditional half.
        guidance, divisor: scale and temperature, float32.
    """
    wait_for_all(arrived, threads)
    images = np.uintp(uniforms.size)
    size = np.uintp(logits.size) // (_TWO * images if guided else images)
    first, last = _share(images, np.uintp(thread), np.uintp(threads))
    for image in range(first, last):
        start, unconditional = image * size, (images + image) * size
        highest, nothing = np.float32(-np.inf), np.float32(0)
        for k in range(size):
            value = logits[start + k]
            if guided:
                value = logits[unconditional + k] + guidance * (value - logits[unconditional + k])
            value /= divisor
            logits[start + k] = value
            highest = max(highest, value)
            nothing += value * np.float32(0)  # or not a number
        if nothing != 0:
            codes[image] = size
            continue
        total = np.float64(0)
        for k in range(size):
            weight = exp_of_negative(logits[start + k] - highest)
            logits[start + k] = weight
            total += weight
        # Whole blocks first: most codes need not be added one by one.
        goal = min(uniforms[image] * total, np.nextafter(total, 0.0))
        reached, code = np.float64(0), np.uintp(size)  # not found yet
        for block in range(_ZERO, size, _BLOCK):
            end = min(block + _BLOCK, size)
            of_block = np.float64(0)
            for k in range(block, end):
                of_block += logits[start + k]
            if reached + of_block <= goal:
                reached += of_block
                continue
            for k in range(block, end):
                reached += logits[start + k]
                if reached > goal:
                    code = np.uintp(k)
                    break
            if code < size:
                break
        # The sums' rounding may leave the goal beyond the last one.
        code = min(code, size - _ONE)
        codes[image] = code
