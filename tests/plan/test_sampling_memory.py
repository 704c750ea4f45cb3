"""The derived memory of sampling against the buffers that it allocates, and what the command says of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from crt.__main__ import main
from crt.ar.decoder import Decoder
from crt.ar.gpu_decoder import GPUDecoder
from crt.ar.model import ARTransformer, count_parameters
from crt.params import load_params
from crt.plan.sampling_memory import SamplingMemory, sampling_memory
from crt.plan.work import ar_config
from crt.tokenizer.model import Tokenizer, TokenizerConfig
from tests.conftest import ROOT, write_params

PRESET = ROOT / "presets/imagenet256.yaml"


def memory_of(**changes: object) -> SamplingMemory:
    params = load_params(PRESET)
    params = params.model_copy(update={"sample": params.sample.model_copy(update=changes)})
    return sampling_memory(params, ar_config(params, 1000))


@pytest.mark.parametrize(("scale", "sequences"), [(2.0, 2), (1.0, 1)])
@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("float32", torch.float32)])
def test_caches_are_those_of_both_samplers(scale, sequences, precision, dtype) -> None:
    """Oracle: the keys and values that the CPU's and the GPU's sampler allocate, on a device without memory."""
    config = ar_config(load_params(PRESET), 1000)
    with torch.device("meta"):
        model = ARTransformer(config).to(dtype)
    images = 3
    decoder = Decoder(model)
    decoder.resize(images * sequences)
    on_gpu = GPUDecoder(model, images, images * sequences)
    derived = memory_of(guidance_scale=scale, guidance_sweep=[], precision=precision).cache_per_image
    for sampler in (decoder, on_gpu):
        assert images * derived == sampler._keys.nbytes + sampler._values.nbytes


def test_the_scale_of_a_sweep_that_needs_most_counts() -> None:
    swept = memory_of(guidance_scale=1.0, guidance_sweep=[2.0])
    assert swept == memory_of(guidance_scale=2.0, guidance_sweep=[1.0])
    assert swept.cache_per_image == 2 * memory_of(guidance_scale=1.0, guidance_sweep=[]).cache_per_image


def test_weights_are_those_of_both_models() -> None:
    params = load_params(PRESET)
    with torch.device("meta"):
        tokenizer = Tokenizer(TokenizerConfig.from_params(params.train_tokenizer))
    stage1 = sum(parameter.numel() for parameter in tokenizer.parameters())
    memory = memory_of(precision="bf16")
    assert memory.weights == 2 * count_parameters(ar_config(params, 1000)) + 4 * stage1


def test_decoding_needs_some_feature_maps_of_the_full_resolution() -> None:
    """Oracle: a residual block holds its input and three maps beside it, and one's statistics or copy."""
    width, pixels = load_params(PRESET).train_tokenizer.architecture.decoder_channels, 256 * 256
    one_map = 16 * width * pixels * 4
    assert 3 * one_map < memory_of().decode < 6 * one_map
    one, two = (memory_of(batch_size=images).decode for images in (1, 2))
    # The kernels that double the resolution are made once for all images.
    assert memory_of().decode == pytest.approx(one + 15 * (two - one), rel=0.01)
    assert one == pytest.approx(memory_of().decode / 16, rel=0.1)


def test_more_is_needed_to_draw_among_fewer() -> None:
    """A sort holds values and indices of all codes."""
    assert memory_of(top_p=0.9).draw_per_image > memory_of(top_p=1.0, top_k=0).draw_per_image


def test_the_largest_batch_is_the_last_that_fits() -> None:
    memory = SamplingMemory(weights=100, cache_per_image=10, draw_per_image=3, decode=50)
    for available in range(0, 1000, 7):
        fits = [size for size in range(1, 200) if memory.peak(size) <= available]
        assert memory.largest_batch(available) == max(fits, default=0)


@pytest.mark.parametrize(("gpu_memory", "remedy"), [("20", "set sample.batch_size to 128 or less"), ("6", "use GPUs")])
def test_command_tells_what_does_not_fit(capsys, tmp_path: Path, gpu_memory: str, remedy: str) -> None:
    # train_ar may fit; of 16 GB some 12 are left for keys and values. A small tokenizer is counted sooner.
    changes = {"train_ar.zero_stage": 1, "train_ar.micro_batch_size": 1}
    blocks = {f"train_tokenizer.architecture.{part}_blocks": 1 for part in ("encoder", "decoder")}
    params = write_params(tmp_path / "params.yaml", changes | blocks, base=PRESET)
    assert main(["plan", "--params", str(params), "--gpus", "64", "--gpu-memory", gpu_memory]) == 1
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("does not fit: sample")]
    assert remedy in line
