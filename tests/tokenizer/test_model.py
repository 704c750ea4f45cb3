"""Oracles: what was saved, and the definitions of encode and decode; every kind of bad file has its own line."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from crt import Tokenizer
from crt.errors import UserError
from tests.tokenizer.conftest import tiny_config


def images(batch=2, height=16, width=16) -> torch.Tensor:
    torch.manual_seed(5)
    return torch.rand(batch, 3, height, width) * 2 - 1


def test_two_lines_encode_and_decode(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "folder")
    loaded = Tokenizer.load(tmp_path / "folder")
    codes = loaded.encode(images())
    assert codes.shape == (2, 16)
    assert codes.dtype == torch.int64
    assert torch.equal(codes, tokenizer.encode(images()))
    assert torch.equal(loaded.decode(codes), tokenizer.decode(codes))
    assert not loaded.training
    assert loaded.config == tokenizer.config
    assert (loaded.grid, loaded.num_tokens, loaded.codebook_size, loaded.downsampling) == ((4, 4), 16, 64, 4)


def test_decode_of_encode_is_the_reconstruction(tokenizer):
    reconstructions, quantized = tokenizer(images())
    codes = tokenizer.encode(images())
    assert torch.equal(codes, quantized.codes.flatten(1))
    torch.testing.assert_close(tokenizer.decode(codes), reconstructions)


def test_codes_are_in_raster_order(tokenizer):
    latents = tokenizer.latents(images())
    vectors = torch.nn.functional.normalize(tokenizer.quantizer.codebook, dim=1)
    codes = tokenizer.encode(images())
    for row in range(4):
        for column in range(4):
            nearest = (latents[:, :, row, column] @ vectors.T).argmax(1)
            assert torch.equal(codes[:, row * 4 + column], nearest)


def test_other_image_sizes_and_what_is_refused(tokenizer):
    codes = tokenizer.encode(images(height=24, width=8))
    assert codes.shape == (2, 12)
    assert tokenizer.decode(codes, grid=(6, 2)).shape == (2, 3, 24, 8)
    for bad in (images(height=18), images()[:, :1], images()[0], (images() * 127).to(torch.uint8)):
        with pytest.raises(ValueError, match="expected"):
            tokenizer.encode(bad)
    with pytest.raises(ValueError, match="grid of 4 x 4"):
        tokenizer.decode(codes)
    with pytest.raises(ValueError, match="outside 0 to 63"):
        tokenizer.decode(torch.full((1, 16), 64))


def test_saving_twice_gives_the_same_bytes(tokenizer, tmp_path):
    for name in ("a", "b"):
        tokenizer.save(tmp_path / name)
    Tokenizer.load(tmp_path / "a").save(tmp_path / "c")
    for file in ("config.json", "model.safetensors"):
        assert len({(tmp_path / name / file).read_bytes() for name in "abc"}) == 1
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["config.json", "model.safetensors"]


def test_hub_mixin_saves_and_loads_the_same_folder(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "model")
    assert "2412.16326" in (tmp_path / "model" / "README.md").read_text()
    loaded = Tokenizer.from_pretrained(tmp_path / "model")
    assert torch.equal(loaded.encode(images()), tokenizer.encode(images()))
    assert torch.equal(Tokenizer.load(tmp_path / "model").encode(images()), tokenizer.encode(images()))


def refused(folder) -> str:
    with pytest.raises(UserError) as caught:
        Tokenizer.load(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def folder(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def test_weights_of_another_architecture_name_the_first_difference(folder):
    other = Tokenizer(tiny_config(decoder_channels=32))
    save_file(other.state_dict(), folder / "model.safetensors")
    message = refused(folder)
    assert "another architecture" in message
    assert "'decoder.conv_in.weight' has shape (64, 12, 3, 3), expected (32, 12, 3, 3)" in message


def test_missing_and_additional_weights_are_named(folder):
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, "surplus": torch.zeros(1)}, folder / "model.safetensors")
    assert "'surplus' is left over" in refused(folder)
    del weights["quantizer.codebook"]
    save_file(weights, folder / "model.safetensors")
    assert "'quantizer.codebook' is missing" in refused(folder)


@pytest.mark.parametrize("size", [0, 5, 100, 5000, -1])
def test_truncated_weights(folder, size):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    assert f"{path}: truncated or damaged" in refused(folder)


def test_missing_files(folder, tmp_path):
    assert "nowhere/config.json: not found" in refused(tmp_path / "nowhere")
    (folder / "model.safetensors").unlink()
    assert "model.safetensors: not found" in refused(folder)


def test_configs_of_another_kind(folder):
    path = folder / "config.json"
    values = json.loads(path.read_text())
    for changes, expected in (
        ({"format": "other"}, "no tokenizer"),
        ({"schema": 99}, "has schema 99"),
        ({"colour": 1}, "'colour' is unknown"),
    ):
        path.write_text(json.dumps({**values, **changes}))
        assert expected in refused(folder)
    path.write_text(json.dumps({name: value for name, value in values.items() if name != "z_channels"}))
    assert "'z_channels' is missing" in refused(folder)
    path.write_text(path.read_text()[:20])
    assert "damaged" in refused(folder)
