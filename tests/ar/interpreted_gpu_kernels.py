"""The GPU's sampling kernels on this CPU, in Triton's interpreter: `test_gpu_decoder_kernels.py` runs this file.

Oracles: torch, and the CPU's way of sampling.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

from crt.ar import gpu_decoder_kernels as kernels
from crt.ar.decoder import Decoder
from crt.ar.generator import DrawSettings, Generator, draw_next, guidance_scales, image_uniforms
from crt.ar.gpu_decoder import GPUDecoder
from crt.ar.model import rotate
from tests.ar.conftest import CODEBOOK, small_model

DTYPES = [torch.float32, torch.bfloat16]
GRID = (2, 2)
LABELS = [0, 1, 2, 3, 4, 0, 1]
EPS = 1e-5


@pytest.fixture(autouse=True)
def mended_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton 3.6 gives the bound of a loop to Python as an array of one element, which NumPy 2.4 refuses, and cuts
    to bfloat16 instead of rounding. And nearly all time goes into preparing its language for each function that a
    kernel calls, not once a launch, and into combining numbers one by one.
    """
    patch, prepare, convert = interpreter._patch_lang_tensor, interpreter._patch_lang, interpreter._convert_float
    prepared: dict[str, Any] = {}

    def patch_tensor(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    def prepare_once(fn: Callable) -> Any:
        if fn.__module__ not in prepared:
            scope = prepared[fn.__module__] = prepare(fn)
            restore = scope.restore
            scope.restore = lambda: (restore(), prepared.clear())
        return prepared[fn.__module__]

    def convert_rounding(data: Any, source: Any, target: Any, mode: Any) -> Any:
        if (source, target) == (tl.float32, tl.bfloat16):
            return torch.from_numpy(np.ascontiguousarray(data)).bfloat16().view(torch.uint16).numpy()
        return convert(data, source, target, mode)

    def reduce_halves(self: Any, inputs: tuple) -> list:
        parts, dtypes = [tensor.handle.data for tensor in inputs], [tensor.dtype for tensor in inputs]
        while parts[0].shape[self.axis] > 1:
            lower, upper = zip(*(np.split(part, 2, self.axis) for part in parts), strict=True)
            halves = [self.to_tensor(*half) for half in zip(lower + upper, dtypes * 2, strict=True)]
            parts = [tensor.handle.data for tensor in self.combine_fn.fn(*halves)]
        return [self.to_tensor(part.squeeze(self.axis), dtype) for part, dtype in zip(parts, dtypes, strict=True)]

    monkeypatch.setattr(interpreter, "_convert_float", convert_rounding)
    monkeypatch.setattr(interpreter.ReduceOps, "generic_reduce", reduce_halves)
    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch_tensor)
    monkeypatch.setattr(interpreter, "_patch_lang", prepare_once)


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes long for each, however little it does."""
    monkeypatch.setattr(kernels, "_PROGRAMS", 1)
    monkeypatch.setattr(kernels, "_NORM_PROGRAMS", 1)
    monkeypatch.setattr(kernels, "_MOST_ROWS", 64)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many pieces in small tensors as in those of a real model."""
    monkeypatch.setattr(kernels, "_MOST_ROWS", 8)
    monkeypatch.setattr(kernels, "_LANES", 2)
    monkeypatch.setattr(kernels, "_MOST_WARPS", 4)


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_near(found: Tensor, expected: Tensor) -> None:
    """To the rounding of float32, or one or two of bfloat16: sums in another order."""
    assert found.dtype == expected.dtype
    tolerance = 2e-5 if found.dtype == torch.float32 else 2**-7
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("inputs", "outputs", "programs"), [(20, 7, 4), (100, 12, 1), (48, 33, 2)])
@pytest.mark.parametrize("sequences", [1, 2, 4])
@pytest.mark.usefixtures("small_blocks")
def test_products_of_few_rows(
    sequences: int, inputs: int, outputs: int, programs: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "_NORM_PROGRAMS", programs)
    x, gain = 3 * normal(sequences, inputs, dtype=dtype), normal(inputs, dtype=dtype, seed=1)
    weight, two = (normal(rows, inputs, seed=2).div(inputs**0.5).to(dtype) for rows in (outputs, 2 * outputs))
    residual = normal(sequences, outputs, dtype=dtype, seed=3)
    normalized = F.rms_norm(x, gain.shape, gain, EPS)
    assert_near(kernels.linear(x, weight), F.linear(x, weight))
    assert_near(kernels.linear(x, weight, gain=gain, eps=EPS), F.linear(normalized, weight))
    gate, up = F.linear(normalized, two).chunk(2, dim=-1)
    assert_near(kernels.linear(x, two, gain=gain, eps=EPS, gated=True), F.silu(gate) * up)
    expected = residual + F.linear(x, weight)
    result = kernels.linear(x, weight, residual=residual)
    assert result is residual
    assert_near(result, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [4, 12, 16, 20])
@pytest.mark.parametrize("position", [0, 1, 7, 33, 39])
@pytest.mark.usefixtures("small_blocks")
def test_attention_of_one_code(position: int, width: int, dtype: torch.dtype) -> None:
    sequences, heads, num_tokens = 2, 3, 40
    qkv = 2 * normal(sequences, 3 * heads * width, dtype=dtype)
    rotation = normal(num_tokens, width // 2, 2, seed=1)
    caches = [normal(sequences, heads, num_tokens, width, dtype=dtype, seed=2 + i) for i in range(2)]
    for cache in caches:
        cache[:, :, position:] = torch.nan  # nothing beyond is read
    keys, values = (cache.clone() for cache in caches)
    y = kernels.attend(qkv, rotation, keys, values, position=torch.tensor([position]))
    q, k, v = qkv.view(sequences, 3, heads, width).unbind(1)
    q, k = (rotate(part[:, None], rotation[position : position + 1])[:, 0] for part in (q, k))
    for cache, new, found in zip(caches, (k, v), (keys, values), strict=True):
        cache[:, :, position] = new
        torch.testing.assert_close(found, cache, equal_nan=True, atol=1e-6, rtol=0 if dtype == torch.float32 else 2**-7)
    all_k, all_v = (cache[:, :, : position + 1].float() for cache in caches)
    expected = F.scaled_dot_product_attention(q[:, :, None].float(), all_k, all_v)
    assert_near(y, expected.flatten(1).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [16, 20])
def test_norm_and_swiglu_of_many_rows(width: int, dtype: torch.dtype) -> None:
    x, more, gain = (normal(*shape, width, dtype=dtype, seed=i) for i, shape in enumerate([(6,), (6,), ()]))
    added = x + more
    assert_near(kernels.norm(x, gain, EPS), F.rms_norm(x, gain.shape, gain, EPS))
    gate, up = x.chunk(2, dim=-1)
    assert_near(kernels.swiglu(x), F.silu(gate) * up)
    assert_near(kernels.norm(x, gain, EPS, more), F.rms_norm(added, gain.shape, gain, EPS))
    assert torch.equal(x, added)


@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("codebook", [32, 50, 1000])
def test_draws_are_those_of_torch(codebook: int, guided: bool) -> None:
    images, num_tokens, position, temperature = 40, 3, 1, 0.8
    logits = 3 * normal(images * (2 if guided else 1), codebook)
    logits[:8] *= 100  # most probabilities underflow to 0
    uniforms = torch.rand(images, num_tokens, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    uniforms[::5, position], uniforms[1::5, position] = 0.0, 1 - 2.0**-53
    scales = torch.tensor([1.0, 1.7, 9.0])
    codes = torch.full((images, num_tokens), -1)
    previous = torch.full((len(logits),), -1)
    kernels.draw(
        logits, uniforms, scales, torch.tensor([position]), codes=codes, previous=previous, temperature=temperature
    )
    scale = scales[position] if guided else None
    expected = draw_next(logits, uniforms[:, position], scale, DrawSettings(1.7, temperature, 0, 1.0))
    assert torch.equal(codes[:, position], expected)
    assert (codes[:, [0, 2]] == -1).all()
    assert torch.equal(previous, expected.repeat(len(logits) // images))
    # Codes of weight 0 at both ends are never drawn.
    ends = torch.full((2, codebook), -1e4)
    ends[:, 5:9] = 0.0
    draws, u = torch.zeros(2, 1, dtype=torch.int64), torch.tensor([[0.0], [1 - 2.0**-53]], dtype=torch.float64)
    kernels.draw(
        ends, u, scales, torch.tensor([0]), codes=draws, previous=torch.zeros(2, dtype=torch.int64), temperature=1.0
    )
    assert draws.tolist() == [[5], [8]]


def gpu_decoder(model, labels: Tensor, guided: bool, **settings) -> tuple[GPUDecoder, Tensor]:
    """A batch, and what its first step reads."""
    previous = torch.cat((labels, torch.full_like(labels, 5))) if guided else labels
    return GPUDecoder(model, len(labels), len(previous), **settings), previous


@pytest.mark.parametrize(
    ("images", "changes"), [(1, {}), (2, {"layers": 1}), (2, {"layers": 1, "heads": 1, "width": 20}), (7, {})]
)
def test_steps_predict_and_draw_as_the_cpu_does(images: int, changes: dict) -> None:
    """Both ways, for few sequences and for many."""
    model, labels = small_model(scale=2.0, grid=GRID, **changes), torch.tensor(LABELS[:images])
    settings = DrawSettings(2.0, 1.0, 0, 1.0, "linear")
    uniforms, scales = image_uniforms(4, range(images), 4), guidance_scales(settings, 4)
    batch, previous = gpu_decoder(model, labels, guided=True)
    found: list[Tensor] = []
    logits = batch.logits

    def watched(first: bool = False) -> Tensor:
        found.append(logits(first))
        return found[-1]

    batch.logits = watched  # type: ignore[method-assign]
    codes = batch.run(previous, uniforms, scales)
    decoder = Decoder(model)
    for position in range(4):
        torch.testing.assert_close(found[position], decoder.next_logits(previous, position), atol=1e-4, rtol=0)
        previous = codes[:, position].repeat(2)
    assert torch.equal(codes, Generator(model).generate(labels, 2.0, seed=4, guidance_schedule="linear"))


@pytest.mark.parametrize(("images", "guided"), [(1, True), (1, False), (7, False)])
def test_a_batch_serves_again_and_with_any_draw(images: int, guided: bool) -> None:
    model, labels = small_model(scale=2.0, grid=GRID, layers=1), torch.tensor(LABELS[:images])
    settings = DrawSettings(2.0 if guided else 1.0, 0.9, 10, 0.95)
    expected = Generator(model).generate(labels, settings.guidance, seed=4, temperature=0.9, top_k=10, top_p=0.95)

    def draw(logits: Tensor, uniforms: Tensor, scale: Tensor) -> Tensor:
        return draw_next(logits, uniforms, scale if guided else None, settings)

    batch, previous = gpu_decoder(model, labels, guided, draw=draw)
    for _ in range(2):
        codes = batch.run(previous, image_uniforms(4, range(images), 4), guidance_scales(settings, 4))
        assert torch.equal(codes, expected)
    assert expected.max() < CODEBOOK


def test_a_generator_takes_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """`Generator` on what passes for a GPU; its batch is made anew where other settings need another."""
    model = small_model(scale=2.0, grid=GRID, layers=1)
    generator, plain = Generator(model), Generator(model)
    monkeypatch.setattr(generator, "_takes_kernels", lambda: True)
    made: list[object] = []
    calls: list[Callable[[Generator], Tensor]] = [
        lambda g: g.generate(LABELS[:2], 2.0, seed=1, batch_size=1),
        lambda g: g.generate(LABELS[:1], 3.0, seed=2),
        lambda g: g.generate(LABELS[:1], seed=2),
        lambda g: g.generate(LABELS[:1], 2.0, seed=2, temperature=0.7),
        lambda g: g.generate(LABELS[:1], 2.0, seed=2, top_k=3),
    ]
    for call in calls:
        assert torch.equal(call(generator), call(plain))
        made.append(generator._gpu_decoder)
    assert made[0] is made[1]
    assert len(set(map(id, made))) == 4
    model.load_state_dict(small_model(seed=1, scale=2.0, grid=GRID, layers=1).state_dict(), assign=True)
    assert torch.equal(calls[-1](generator), calls[-1](plain))
    assert generator._gpu_decoder is not made[-1]  # a graph would still read the weights that were


def test_bf16_steps_predict_nearly_as_the_cpu_does() -> None:
    model, labels = small_model(scale=1.0).to(torch.bfloat16), torch.tensor([1, 2])
    batch, previous = gpu_decoder(model, labels, guided=True)
    batch.previous.copy_(previous)
    torch.testing.assert_close(batch.logits(first=True), Decoder(model).next_logits(previous, 0), atol=0.05, rtol=0)
