"""A CPU's kernels of a step of decoding, each against torch's operations; the decoder they make up."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from crt.ar.cpu_decoder import CPUDecoder
from crt.ar.cpu_decoder_kernels import attention_kernel, norm_kernel, swiglu_kernel
from crt.ar.decoder import Decoder
from crt.ar.generator import Generator
from crt.ar.model import ARTransformer
from crt.cpu import flat
from tests.ar.conftest import CODEBOOK, small_model

PRECISIONS = [torch.float32, torch.bfloat16]
# To half a unit in the last place of what was computed in float32 from the same inputs.
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2**-8}


def close(found: Tensor, expected: Tensor, precision: torch.dtype) -> None:
    assert found.dtype == precision
    torch.testing.assert_close(found.float(), expected, atol=1e-6, rtol=ROUNDING[precision])


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("width", [4, 20, 48, 64, 100])
def test_attention_is_rotation_softmax_and_weighted_sum(width: int, precision: torch.dtype) -> None:
    """Oracle: complex products, and all positions at once in float64; sharp scores too, whose weights vanish."""
    batch, heads, length = 3, 2, 7
    torch.manual_seed(0)
    qkv = torch.randn(length, batch, 3 * heads, width).mul_(3).to(precision)
    turn = torch.polar(torch.ones(length, width // 2), torch.rand(length, width // 2).mul_(6))
    keys, values = (torch.full((batch * heads, length, width), torch.nan, dtype=precision) for _ in range(2))
    out, scratch = torch.empty(length, batch * heads, width, dtype=precision), np.empty(length + 2 * width, np.float32)
    kernel = attention_kernel(width, precision == torch.bfloat16)
    for position in range(length):
        turned = torch.view_as_real(turn[position]).numpy().reshape(-1)
        for first, last in ((0, 2), (2, batch * heads)):
            kernel(
                flat(qkv[position]), flat(keys), flat(values), turned, flat(out[position]), scratch,
                *(np.uintp(n) for n in (first, last, position, heads, length)),
            )  # fmt: skip

    q, k, v = qkv.float().split(heads, dim=2)  # T, B, H, D
    q, k = (
        torch.view_as_real(torch.view_as_complex(x.contiguous().unflatten(-1, (-1, 2))) * turn[:, None, None]).flatten(
            -2
        )
        for x in (q, k)
    )
    for cache, stored in ((keys, k), (values, v)):
        close(cache, stored.flatten(1, 2).transpose(0, 1), precision)
    q, k, v = (
        x.double().permute(1, 2, 0, 3) for x in (q, keys.view(batch, heads, length, width).permute(2, 0, 1, 3), v)
    )
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # B, H, T, D
    found = out.view(length, batch, heads, width).permute(1, 2, 0, 3)
    torch.testing.assert_close(found.double(), expected, atol=3 * ROUNDING[precision], rtol=ROUNDING[precision])


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("width", [4, 20, 96])
def test_norm_adds_to_the_stream_in_place(width: int, precision: torch.dtype) -> None:
    torch.manual_seed(0)
    x, addend, gain = (torch.randn(size).to(precision) for size in ((5, width), (5, width), (width,)))
    stream, out = x.clone(), torch.empty_like(x)
    kernel, eps = norm_kernel(width, precision == torch.bfloat16), 0.3
    kernel(flat(stream), flat(addend), flat(gain), flat(out), np.uintp(5), eps)
    assert torch.equal(stream, x + addend)
    close(out, F.rms_norm(stream.float(), (width,), gain.float(), eps), precision)
    kernel(flat(stream), flat(addend[:0]), flat(gain), flat(out), np.uintp(5), eps)
    assert torch.equal(stream, x + addend)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_swiglu(precision: torch.dtype) -> None:
    """From gates so low that nothing passes to gates that pass all."""
    gate = torch.linspace(-120, 120, 3 * 40).view(3, 40).to(precision)
    up, out = torch.randn(3, 40).to(precision), torch.full((3, 40), 7.0, dtype=precision)
    kernel = swiglu_kernel(40, precision == torch.bfloat16)
    kernel(flat(torch.cat((gate, up), dim=1)), flat(out), np.uintp(1), np.uintp(3))
    assert bool((out[0] == 7).all())
    close(out[1:], (F.silu(gate.float()) * up.float())[1:], precision)


@pytest.fixture(scope="module", params=PRECISIONS)
def model(request: pytest.FixtureRequest) -> ARTransformer:
    return small_model(scale=2.0, heads=2, width=48, num_classes=5).to(request.param)


def all_logits(decoder: Decoder, batch: int = 6) -> Tensor:
    """(T, B, K) of codes drawn beforehand."""
    codes = torch.randint(CODEBOOK, (16, 6), generator=torch.Generator().manual_seed(0))[:, :batch]
    return torch.stack([decoder.next_logits(codes[t] if t else codes[0] % 5, t) for t in range(16)])


def test_logits_are_those_of_the_plain_decoder(model: ARTransformer) -> None:
    plain, ours = all_logits(Decoder(model)), all_logits(CPUDecoder(model))
    assert plain.std() > 0.3
    tolerance = 1e-5 if model.head.weight.dtype == torch.float32 else 0.1
    torch.testing.assert_close(ours, plain, atol=tolerance, rtol=0)
    # Rounded once where the plain one rounds several times, ours is no further from float32.
    exact = all_logits(Decoder(copy.deepcopy(model).float()))
    assert (ours - exact).square().mean() < 1.1 * (plain - exact).square().mean() + 1e-10


def test_threads_and_the_rest_of_the_batch_change_no_bit(model: ARTransformer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("crt.ar.cpu_decoder._ELEMENTS_OF_A_THREAD", 1)
    before = torch.get_num_threads()
    found = {}
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found[threads] = all_logits(CPUDecoder(model))
    finally:
        torch.set_num_threads(before)
    tolerance = 1e-5 if model.head.weight.dtype == torch.float32 else 0.05  # of the products, oneDNN's
    torch.testing.assert_close(found[2], found[1], atol=tolerance, rtol=0)
    torch.testing.assert_close(found[3], found[1], atol=tolerance, rtol=0)
    torch.testing.assert_close(all_logits(CPUDecoder(model), 2), found[1][:, :2], atol=tolerance, rtol=0)


def test_several_callers_at_once(model: ARTransformer) -> None:
    generator = Generator(model)
    expected = [generator.generate([0, 1, 2], guidance=2.0, seed=seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda seed: generator.generate([0, 1, 2], guidance=2.0, seed=seed), range(4)))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_another_precision_goes_the_plain_way() -> None:
    codes = Generator(small_model(scale=2.0).double()).generate([0, 1, 2], seed=1)
    assert torch.equal(codes, Generator(small_model(scale=2.0)).generate([0, 1, 2], seed=1))


def test_weights_that_can_be_trained_are_read_all_the_same() -> None:
    trainable = small_model(scale=2.0).requires_grad_(True)
    assert torch.equal(Generator(trainable).generate([0, 1]), Generator(small_model(scale=2.0)).generate([0, 1]))
