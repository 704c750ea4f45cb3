"""Decoding on a CPU: the kernels of a step against torch's operations, and the decoder that they make up."""

from __future__ import annotations

import copy
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from crt.ar.cpu_decoder import CPUDecoder
from crt.ar.cpu_decoder_kernels import Shape, activating, attention_kernel, norm_kernel
from crt.ar.cpu_product_kernels import Tile, in_panels, largest_tile, product_kernel, row_writer
from crt.ar.decoder import Decoder
from crt.ar.generator import DrawSettings, Generator, draw_next
from crt.ar.model import ARTransformer
from crt.cpu import flat
from crt.cpu_kernels import compile_kernel
from crt.errors import UserError
from tests.ar.conftest import CODEBOOK, small_model

PRECISIONS = [torch.float32, torch.bfloat16]
# To half a unit in the last place of what was computed in float32 from the same inputs.
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2**-8}


# What processors without AVX-512 get; any processor can run it.
NARROW = Tile(rows=4, vectors=3, lanes=8, pairs=False)


def tiles(precision: torch.dtype) -> list[Tile]:
    """Those of this processor, and what it would have with fewer kinds of registers."""
    with pytest.MonkeyPatch.context() as patch:
        largest = largest_tile(precision)
        patch.setattr("crt.ar.cpu_product_kernels.has_matrix_registers", lambda: False)
        return list(dict.fromkeys((largest, largest_tile(precision), NARROW)))


def read_rows(words: np.ndarray, tile: Tile, rows: int, width: int) -> Tensor:
    """What `row_writer` wrote, (rows, width) float32; rows and words to fill up are zero."""
    by_row = torch.from_numpy(words)
    if tile.matrix:
        by_row = by_row.view(-1, tile.words(width))
    else:
        by_row = by_row.view(-1, tile.words(width), tile.rows).transpose(1, 2).contiguous().flatten(0, 1)
    values = (by_row.view(torch.bfloat16) if tile.pairs else by_row.view(torch.float32)).float()
    assert not values[rows:].any()
    assert not values[:, width:].any()
    return values[:rows, :width]


def empty_rows(tile: Tile, rows: int, width: int) -> np.ndarray:
    return np.zeros(-(-rows // tile.rows) * tile.rows * tile.words(width), np.uint32)


@compile_kernel
def keep_products(sums, at, index, panel, out, width):  # type: ignore[no-untyped-def]
    """All of a tile: out (tiles, panels, the tile's size)."""
    size = np.uintp(width)
    for k in range(size):
        out[(index * np.uintp(out.size) // size // np.uintp(2) + panel) * size + k] = sums[at + k]


@pytest.mark.parametrize("rows", [1, 5, 8])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_product_of_every_row_and_output(precision: torch.dtype, rows: int) -> None:
    """Two tiles of rows, two panels of outputs that are no whole ones; oracle in float64."""
    for largest in tiles(precision):
        tile = largest._replace(rows=min(rows, largest.rows))
        outputs, width, batch = tile.panel + 5, 38, 2 * tile.rows
        torch.manual_seed(0)
        weight, x = torch.randn(outputs, width).to(precision), torch.randn(batch, width).to(precision)
        panels, words = in_panels(weight, tile), tile.words(width)
        arranged, write = empty_rows(tile, batch, width), row_writer(tile)
        for row in range(batch):
            numbers = (0, width // tile.channels), (row, 0, words)
            before, after = ([np.uintp(n) for n in part] for part in numbers)
            write(flat(x[row].float()), *before, arranged, *after)
        out, sums = (np.full(n * tile.rows * tile.panel, np.nan, np.float32) for n in (4, 2))
        size = tile.rows * tile.panel
        for prefetches in (1, 3):
            multiply = product_kernel(tile, prefetches, precision == torch.bfloat16, keep_products)
            for first, last in ((0, 1), (1, 2)):
                multiply(
                    arranged, *(np.uintp(n) for n in (2, words)), flat(panels),
                    *(np.uintp(n) for n in (0, first, last)), sums, np.uintp(size), out, np.uintp(size),
                )  # fmt: skip
            found = torch.from_numpy(out).view(2, 2, tile.rows, tile.panel).transpose(1, 2).reshape(batch, -1)
            torch.testing.assert_close(
                found[:, :outputs].double(), x.double() @ weight.double().T, atol=2e-5, rtol=1e-5
            )
            assert not found[:, outputs:].any()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("width", [4, 20, 48, 64, 100])
def test_attention_is_rotation_softmax_and_weighted_sum(width: int, precision: torch.dtype) -> None:
    """Oracle: complex products, and all positions at once in float64; sharp scores too, whose weights vanish."""
    batch, heads, length = 3, 2, 7
    torch.manual_seed(0)
    qkv = torch.randn(length, batch, 3 * heads, width).mul_(3)
    turn = torch.polar(torch.ones(length, width // 2), torch.rand(length, width // 2).mul_(6))
    # Another layer's lie before them.
    keys, values = (torch.full((2, batch * heads, length, width), torch.nan, dtype=precision) for _ in range(2))
    tile = largest_tile(precision)._replace(rows=2)
    scratch, at = np.empty(2 * (length + 2 * width), np.float32), length + 2 * width
    kernel = attention_kernel(Shape(heads, width, tile, 1, precision == torch.bfloat16))
    out = []
    for position in range(length):
        turned = torch.view_as_real(turn[position]).numpy().reshape(-1)
        words = empty_rows(tile, batch, heads * width)
        for first, last in ((0, 3), (3, batch * heads)):
            kernel(
                flat(qkv[position]), flat(keys), flat(values), np.uintp(keys[0].numel()), turned, words, scratch,
                *(np.uintp(n) for n in (at, first, last, position, length)),
            )  # fmt: skip
        out.append(read_rows(words, tile, batch, heads * width))

    q, k, v = qkv.split(heads, dim=2)  # T, B, H, D
    q, k = (
        torch.view_as_real(torch.view_as_complex(x.contiguous().unflatten(-1, (-1, 2))) * turn[:, None, None]).flatten(
            -2
        )
        for x in (q, k)
    )
    assert bool(keys[0].isnan().all() and values[0].isnan().all())
    for cache, stored in ((keys[1], k), (values[1], v)):
        close(cache, stored.flatten(1, 2).transpose(0, 1), precision)
    q, k, v = (
        x.double().permute(1, 2, 0, 3)
        for x in (q, *(cache[1].view(batch, heads, length, width).permute(2, 0, 1, 3) for cache in (keys, values)))
    )
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # B, H, T, D
    found = torch.stack(out).view(length, batch, heads, width).permute(1, 2, 0, 3)
    torch.testing.assert_close(found.double(), expected, atol=3 * ROUNDING[precision], rtol=ROUNDING[precision])


def close(found: Tensor, expected: Tensor, precision: torch.dtype) -> None:
    torch.testing.assert_close(found.float(), expected, atol=1e-6, rtol=ROUNDING[precision])


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("width", [4, 20, 96])
def test_norm_of_some_rows(width: int, precision: torch.dtype) -> None:
    torch.manual_seed(0)
    x, gains, eps = torch.randn(5, width), torch.randn(2, width), 0.3
    tile = largest_tile(precision)._replace(rows=3)
    words, scratch = empty_rows(tile, 5, width), np.empty(2 * width, np.float32)
    kernel = norm_kernel(Shape(1, width, tile, 1, precision == torch.bfloat16))
    for first, last in ((3, 5), (0, 2)):
        kernel(flat(x), flat(gains), np.uintp(width), words, scratch, *(np.uintp(n) for n in (width, first, last)), eps)
    found, expected = read_rows(words, tile, 5, width), F.rms_norm(x, (width,), gains[1], eps)
    assert not found[2].any()
    expected[2] = 0
    close(found, expected, precision)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_swiglu_of_a_tile(precision: torch.dtype) -> None:
    """From gates so low that nothing passes to gates that pass all; the second of two tiles and panels."""
    for tile in tiles(precision):
        half, size = tile.panel // 2, tile.rows * tile.panel
        gate, up = torch.linspace(-120, 120, size // 2).view(tile.rows, half), torch.randn(tile.rows, half)
        sums = torch.cat((torch.zeros(size), torch.cat((gate, up), dim=1).flatten()))
        words = empty_rows(tile, 2 * tile.rows, tile.panel)
        one, width = np.uintp(1), np.uintp(tile.words(tile.panel))
        activating(tile)(flat(sums), np.uintp(size), one, one, words, width)
        found = read_rows(words, tile, 2 * tile.rows, tile.panel)
        close(found[tile.rows :, half:], F.silu(gate) * up, precision)
        assert not found[: tile.rows].any()
        assert not found[:, :half].any()


@pytest.fixture(scope="module", params=PRECISIONS)
def model(request: pytest.FixtureRequest) -> ARTransformer:
    return small_model(scale=2.0, heads=2, width=48, num_classes=5).to(request.param)


def all_logits(decoder: Decoder | CPUDecoder, batch: int = 6) -> Tensor:
    """(T, B, K) float32, of codes drawn beforehand."""
    codes = torch.randint(CODEBOOK, (16, 6), generator=torch.Generator().manual_seed(0))[:, :batch]
    return torch.stack([decoder.next_logits(codes[t] if t else codes[0] % 5, t).float() for t in range(16)])


def test_logits_are_those_of_the_plain_decoder(model: ARTransformer) -> None:
    precision = model.head.weight.dtype
    plain, exact = all_logits(Decoder(model)), all_logits(Decoder(copy.deepcopy(model).float()))
    assert plain.std() > 0.3
    for tile in tiles(precision):
        ours = all_logits(CPUDecoder(model, tile))
        torch.testing.assert_close(ours, plain, atol=1e-5 if precision == torch.float32 else 0.1, rtol=0)
        # Rounded less often than the plain one's.
        assert (ours - exact).square().mean() < 1.1 * (plain - exact).square().mean() + 1e-10


def test_threads_and_the_rest_of_the_batch_change_no_bit(model: ARTransformer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads that have no row, panel or head of their own among them; batches of one tile and of several."""
    monkeypatch.setattr("crt.ar.cpu_decoder._PRODUCTS_OF_A_THREAD", 1)
    before = torch.get_num_threads()
    found = {}
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            found[threads] = all_logits(CPUDecoder(model))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(logits, found[1]) for logits in found.values())
    for tile in tiles(model.head.weight.dtype):
        whole = all_logits(CPUDecoder(model, tile))
        for rows, batch in ((tile.rows, 1), (tile.rows, 2), (4, 6), (1, 6), (1, 5)):
            assert torch.equal(all_logits(CPUDecoder(model, tile._replace(rows=rows)), batch), whole[:, :batch])


def test_an_image_is_the_same_to_the_bit_whatever_the_batch(
    model: ARTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("crt.ar.generator._LEAST_PRODUCTS", 0)
    generator, labels = Generator(model), [0, 1, 2, 3, 4, 0, 1]
    whole = generator.generate(labels, guidance=3.0, seed=1)
    assert len(whole.unique()) > 10
    for size in (1, 2, 5):
        assert torch.equal(generator.generate(labels, guidance=3.0, seed=1, batch_size=size), whole)
    assert torch.equal(generator.generate(labels[3:], guidance=3.0, seed=1, first_index=3), whole[3:])


@pytest.mark.parametrize("scale", [None, 2.5])
@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_draws_are_those_of_draw_next(model: ARTransformer, scale: float | None, temperature: float) -> None:
    decoder, images = CPUDecoder(model), 200
    previous = torch.arange(5).repeat(images // 5)
    if scale is not None:
        previous = torch.cat((previous, torch.full_like(previous, 5)))
    edges = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    uniforms = torch.cat(
        (edges, torch.rand(images - 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    )
    found = decoder.next_codes(previous, 0, uniforms, scale, temperature)
    settings = DrawSettings(scale or 1.0, temperature, 0, 1.0)
    expected = draw_next(decoder.next_logits(previous, 0), uniforms, scale, settings)
    assert len(found.unique()) > 5
    assert torch.equal(found, expected)


def test_a_failure_of_one_thread_leaves_none_waiting(model: ARTransformer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("crt.ar.cpu_decoder._PRODUCTS_OF_A_THREAD", 1)
    monkeypatch.setattr("torch.get_num_threads", lambda: 3)
    decoder = CPUDecoder(model)
    previous = torch.zeros(4, dtype=torch.int64)
    expected, step = decoder.next_logits(previous, 0), decoder._step
    for fails in (0, 2):

        def failing(thread: int, *args: object, fails: int = fails) -> None:
            if thread == fails:
                time.sleep(0.1)  # the others wait by then
                raise KeyboardInterrupt
            step(thread, *args)

        decoder._step = failing
        with pytest.raises(KeyboardInterrupt):
            decoder.next_logits(previous, 0)
    decoder._step = step
    assert torch.equal(decoder.next_logits(previous, 0), expected)


def test_several_callers_at_once(model: ARTransformer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("crt.ar.generator._LEAST_PRODUCTS", 0)
    monkeypatch.setattr("crt.ar.cpu_decoder._PRODUCTS_OF_A_THREAD", 1)
    generator = Generator(model)
    expected = [generator.generate([0, 1, 2], guidance=2.0, seed=seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda seed: generator.generate([0, 1, 2], guidance=2.0, seed=seed), range(4)))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_another_precision_goes_the_plain_way() -> None:
    codes = Generator(small_model(scale=2.0).double()).generate([0, 1, 2], seed=1)
    assert torch.equal(codes, Generator(small_model(scale=2.0)).generate([0, 1, 2], seed=1))


def test_weights_that_can_be_trained_are_read_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("crt.ar.generator._LEAST_PRODUCTS", 0)
    trainable = small_model(scale=2.0).requires_grad_(True)
    assert torch.equal(Generator(trainable).generate([0, 1]), Generator(small_model(scale=2.0)).generate([0, 1]))


def test_small_models_wait_for_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model(scale=2.0)
    plain = Generator(model).generate([0, 1, 2], guidance=2.0)
    monkeypatch.setattr("crt.ar.cpu_decoder.CPUDecoder.__init__", None)
    assert torch.equal(Generator(model).generate([0, 1, 2], guidance=2.0), plain)
    monkeypatch.setattr("crt.ar.generator._LEAST_PRODUCTS", 0)
    with pytest.raises(TypeError):
        Generator(model).generate([0, 1, 2], guidance=2.0)


@pytest.mark.parametrize("least", [0, 2**28])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_diverged_model_is_told_as_such(monkeypatch: pytest.MonkeyPatch, least: int, value: float) -> None:
    monkeypatch.setattr("crt.ar.generator._LEAST_PRODUCTS", least)
    model = small_model(scale=2.0)
    with torch.no_grad():
        model.head.weight[3, 5] = value
    with pytest.raises(UserError, match="diverged: train it again"):
        Generator(model).generate([0, 1, 2, 3], guidance=2.0)
