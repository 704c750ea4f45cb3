"""Oracles: what was saved, and the definitions of encode and decode; every kind of bad file has its own line."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from crt import Tokenizer
from crt.ar.generator import Generator
from crt.ar.model import save_model
from crt.errors import UserError
from tests.ar.conftest import small_model
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


def test_other_image_sizes(tokenizer):
    codes = tokenizer.encode(images(height=24, width=8))
    assert codes.shape == (2, 12)
    assert tokenizer.decode(codes, grid=(6, 2)).shape == (2, 3, 24, 8)
    assert tokenizer.encode(images()[:0]).shape == (0, 16)
    assert tokenizer.decode(torch.zeros(0, 16, dtype=torch.int64)).shape == (0, 3, 16, 16)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_floats_of_any_type_are_taken(tokenizer, dtype):
    """Oracle: the same values in float32."""
    rounded = images().to(dtype)
    assert torch.equal(tokenizer.encode(rounded), tokenizer.encode(rounded.float()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_a_tokenizer_of_any_type_works(tokenizer, dtype):
    """Oracle: most codes are those in float32, and its pixels are near."""
    codes, pixels = tokenizer.encode(images()), tokenizer.decode(tokenizer.encode(images()))
    other = tokenizer.to(dtype)
    assert (other.encode(images()) == codes).float().mean() > 0.8
    assert other.decode(codes).dtype == dtype
    torch.testing.assert_close(other.decode(codes).float(), pixels, rtol=0, atol=0.1)
    assert other(images().to(dtype))[0].shape == (2, 3, 16, 16)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8, torch.uint16])
def test_integers_of_any_type_are_codes(tokenizer, dtype):
    codes = tokenizer.encode(images())
    assert torch.equal(tokenizer.decode(codes.to(dtype)), tokenizer.decode(codes))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: (x * 127).to(torch.uint8), r"images of type torch.uint8: .* images / 127.5 - 1"),
        (lambda x: x + 0j, "images of type torch.complex64"),
        (lambda x: x.numpy(), r"images of type ndarray: .* torch.from_numpy\(images\)"),
        (lambda x: [x], "images of type list"),
        (lambda x: x[:, :1], r"images of shape \(2, 1, 16, 16\): expected \(B, 3, H, W\)"),
        (lambda x: x[0], r"images of shape \(3, 16, 16\): expected \(B, 3, H, W\)"),
        (lambda x: x[:, :1], r"images of shape \(2, 1, 16, 16\): .*: use images.expand\(-1, 3, -1, -1\) for grey ones"),
        (lambda x: x.permute(0, 2, 3, 1), r"images of shape \(2, 16, 16, 3\): .* images.permute\(0, 3, 1, 2\)"),
        (lambda x: x[..., :14], r"images of shape \(2, 3, 16, 14\): expected H and W divisible by 4"),
        (lambda x: x[..., :0], r"images of shape \(2, 3, 16, 0\)"),
        (lambda x: x * 127.5 + 127.5, r"images reach from \S+ to 25\S+: expected floats in \[-1, 1\]"),
        (lambda x: (x / 2 + 0.5 - 0.485) / 0.229, "images reach from -2.1"),
        (lambda x: x.masked_fill(x > 0.9, torch.inf), "images reach from .* to inf"),
        (lambda x: x.double().masked_fill(x > 0.9, torch.nan), "images contain NaN"),
    ],
)
def test_images_that_are_refused(tokenizer, change, message):
    with pytest.raises(ValueError, match=f"^{message}") as caught:
        tokenizer.encode(change(images()))
    assert "\n" not in str(caught.value)


def test_edges_that_resampling_overshot_are_images(tokenizer):
    sharp = images(height=8, width=8).sign()
    large = torch.nn.functional.interpolate(sharp, size=(16, 16), mode="bicubic")
    assert large.abs().max() > 1.5
    assert torch.equal(tokenizer.encode(large), tokenizer.nearest_codes(large))


@pytest.mark.parametrize(
    ("codes", "grid", "message"),
    [
        (torch.zeros(2, 16), None, "codes of type torch.float32: expected integers"),
        (torch.zeros(2, 16, dtype=torch.bool), None, "codes of type torch.bool"),
        (np.zeros((2, 16), np.int64), None, "codes of type ndarray: .* torch.as_tensor"),
        ([[0] * 16], None, "codes of type list: .* torch.as_tensor"),
        (torch.zeros(16).long(), None, r"codes of shape \(16,\): expected \(B, N\): use codes.reshape\(-1, 16\)"),
        (torch.zeros(2, 4, 4).long(), None, r"codes of shape \(2, 4, 4\): expected \(B, N\)"),
        (torch.zeros(2, 12).long(), None, r"codes of shape \(2, 12\): expected \(B, 16\) for a grid of 4 x 4"),
        (torch.full((1, 16), 64), None, "codes from 64 to 64 reach outside 0 to 63"),
        (torch.full((1, 16), -1), None, "codes from -1 to -1 reach outside 0 to 63"),
        (torch.zeros(2, 16).long(), (4,), r"grid \(4,\): expected two integers"),
        (torch.zeros(2, 16).long(), 16, "grid 16: expected two integers"),
        (torch.zeros(2, 16).long(), (-4, -4), r"grid \(-4, -4\): expected two integers"),
        (torch.zeros(2, 16).long(), (2.0, 8), r"grid \(2.0, 8\): expected two integers"),
    ],
)
def test_codes_that_are_refused(tokenizer, codes, grid, message):
    with pytest.raises(ValueError, match=f"^{message}") as caught:
        tokenizer.decode(codes, grid)
    assert "\n" not in str(caught.value)


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


def test_the_mixin_loads_what_the_hub_gave(tokenizer, tmp_path):
    """From a cache in the Hub's own layout, without a network."""
    revision, repository = "0" * 40, tmp_path / "models--user--name"
    tokenizer.save(repository / "snapshots" / revision)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)

    def load() -> Tokenizer:
        return Tokenizer.from_pretrained("user/name", cache_dir=tmp_path, local_files_only=True)

    assert torch.equal(load().encode(images()), tokenizer.encode(images()))
    (repository / "snapshots" / revision / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"^user/name: config.json on the Hub is damaged .*: upload it again$"):
        load()


def refused(folder) -> str:
    messages = []
    for load in (Tokenizer.load, Tokenizer.from_pretrained):
        with pytest.raises(UserError) as caught:
            load(folder)
        messages.append(str(caught.value))
        assert "\n" not in messages[-1]
    assert messages[0] == messages[1]
    return messages[0]


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


@pytest.mark.parametrize("device", ["gpu", "cuda:99"])
def test_a_device_that_there_is_not_is_named_in_one_line(folder, device):
    for load in (Tokenizer.load, Tokenizer.from_pretrained, Generator.load):
        with pytest.raises(UserError, match=rf"^device {device}: cannot be used here \(.*\): name another") as caught:
            load(folder, **{"map_location" if load == Tokenizer.from_pretrained else "device": device})
        assert "\n" not in str(caught.value)


def test_a_file_in_the_place_of_the_folder_is_not_written_over(folder, tokenizer):
    with pytest.raises(UserError, match=r"config.json: is not a folder: move it away"):
        tokenizer.save(folder / "config.json")


def test_missing_files(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "empty/config.json: not found: name the folder" in refused(tmp_path / "empty")
    with pytest.raises(UserError, match=r"nowhere/config.json: not found: name the folder"):
        Tokenizer.load(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"nowhere: not found: .* user/name$"):
        Tokenizer.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"^nobody/nothing: no folder here, and the Hub does not give it") as caught:
        Tokenizer.from_pretrained("nobody/nothing", local_files_only=True, cache_dir=tmp_path / "cache")
    assert "\n" not in str(caught.value)
    assert "config.json: is a file: name the folder" in refused(folder / "config.json")
    (folder / "model.safetensors").unlink()
    assert "model.safetensors: not found" in refused(folder)


def test_configs_of_another_kind(folder):
    path = folder / "config.json"
    values = json.loads(path.read_text())
    for changes, expected in (
        ({"format": "other"}, "describes no tokenizer (format 'other', not 'crt-tokenizer')"),
        ({"codebook_size": "64"}, "key 'codebook_size' is '64'"),
        ({"codebook_size": -1}, "key 'codebook_size' is -1"),
        ({"channel_multipliers": 2}, "key 'channel_multipliers' is 2"),
        ({"channel_multipliers": []}, "key 'channel_multipliers' is []"),
        ({"attention": "yes"}, "key 'attention' is 'yes'"),
        ({"dropout": 1.5}, "key 'dropout' is 1.5"),
        ({"norm_groups": 3}, "config.json: describes no possible tokenizer (num_channels"),
        ({"schema": 99}, "has schema 99"),
        ({"colour": 1}, "'colour' is unknown"),
    ):
        path.write_text(json.dumps({**values, **changes}))
        assert expected in refused(folder)
    path.write_text(json.dumps({name: value for name, value in values.items() if name != "z_channels"}))
    assert "'z_channels' is missing" in refused(folder)
    for text in (path.read_text()[:20], "[" * 100_000):
        path.write_text(text)
        assert "damaged" in refused(folder)


def test_folders_of_other_stages_are_named(folder):
    (folder / "config.json").unlink()
    (folder / "manifest.json").write_text('{"stage": "prepare_data"}')
    assert "tokenizer: holds what prepare_data made, no model: name the folder" in refused(folder)
    model = small_model()
    save_model(model.state_dict(), model.config, folder)
    assert "tokenizer: holds a transformer of stage 2, for crt.Generator.load: name the folder" in refused(folder)


def test_integers_are_no_weights(folder):
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, "to_latent.bias": torch.zeros(4).int()}, folder / "model.safetensors")
    assert "weight 'to_latent.bias' is of type torch.int32, expected floats" in refused(folder)
