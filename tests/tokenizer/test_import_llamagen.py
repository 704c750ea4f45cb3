"""Oracle: LlamaGen's tokenizer as its weights describe it, written out with elementary operations on its own names.

The reference computes in float64 on the foreign state dict, so neither our networks nor our renaming play a part in it.
"""

from __future__ import annotations

import argparse

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

from crt.__main__ import main
from crt.data.transforms import center_crop, to_unit_range
from crt.tokenizer.import_llamagen import is_llamagen_tokenizer
from crt.tokenizer.model import Tokenizer

CHANNELS, MULTIPLIERS, Z, DIM, CODES = 32, (1, 2), 16, 8, 128


def llamagen_state(seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights under LlamaGen's names: 2 blocks per level in the encoder, 3 in the decoder."""
    generator = torch.Generator().manual_seed(seed)
    state: dict[str, torch.Tensor] = {}

    def conv(name, inputs, outputs, kernel):
        state[f"{name}.weight"] = torch.randn(outputs, inputs, kernel, kernel, generator=generator) / (
            inputs**0.5 * kernel
        )
        state[f"{name}.bias"] = 0.1 * torch.randn(outputs, generator=generator)

    def norm(name, width):
        state[f"{name}.weight"] = 1 + 0.2 * torch.randn(width, generator=generator)
        state[f"{name}.bias"] = 0.2 * torch.randn(width, generator=generator)

    def res(name, inputs, outputs):
        norm(f"{name}.norm1", inputs)
        conv(f"{name}.conv1", inputs, outputs, 3)
        norm(f"{name}.norm2", outputs)
        conv(f"{name}.conv2", outputs, outputs, 3)
        if inputs != outputs:
            conv(f"{name}.nin_shortcut", inputs, outputs, 1)

    def attn(name, width):
        norm(f"{name}.norm", width)
        for part in ("q", "k", "v", "proj_out"):
            conv(f"{name}.{part}", width, width, 1)

    def side(name, order, blocks, resample):
        width = CHANNELS if name == "encoder" else CHANNELS * MULTIPLIERS[-1]
        for index, level in enumerate(order):
            for block in range(blocks):
                res(f"{name}.conv_blocks.{index}.res.{block}", width, CHANNELS * MULTIPLIERS[level])
                width = CHANNELS * MULTIPLIERS[level]
                if level == len(MULTIPLIERS) - 1:
                    attn(f"{name}.conv_blocks.{index}.attn.{block}", width)
            if index < len(order) - 1:
                conv(f"{name}.conv_blocks.{index}.{resample}.conv", width, width, 3)
        middle = CHANNELS * MULTIPLIERS[-1]
        for index in (0, 2):
            res(f"{name}.mid.{index}", middle, middle)
        attn(f"{name}.mid.1", middle)
        norm(f"{name}.norm_out", width)
        return width

    conv("encoder.conv_in", 3, CHANNELS, 3)
    conv("encoder.conv_out", side("encoder", (0, 1), 2, "downsample"), Z, 3)
    conv("decoder.conv_in", Z, CHANNELS * MULTIPLIERS[-1], 3)
    conv("decoder.conv_out", side("decoder", (1, 0), 3, "upsample"), 3, 3)
    conv("quant_conv", Z, DIM, 1)
    conv("post_quant_conv", DIM, Z, 1)
    state["quantize.embedding.weight"] = torch.randn(CODES, DIM, generator=generator)
    state["quantize.codebook_used"] = torch.zeros(65536)
    return state


class Reference:
    """LlamaGen's forward pass in float64."""

    def __init__(self, state):
        self.w = {name: tensor.double() for name, tensor in state.items()}

    def conv(self, name, x, **options):
        return F.conv2d(x, self.w[f"{name}.weight"], self.w[f"{name}.bias"], **options)

    def norm(self, name, x):
        return F.group_norm(x, 32, self.w[f"{name}.weight"], self.w[f"{name}.bias"], 1e-6)

    def res(self, name, x):
        h = self.conv(f"{name}.conv1", F.silu(self.norm(f"{name}.norm1", x)), padding=1)
        h = self.conv(f"{name}.conv2", F.silu(self.norm(f"{name}.norm2", h)), padding=1)
        return h + (self.conv(f"{name}.nin_shortcut", x) if f"{name}.nin_shortcut.weight" in self.w else x)

    def attn(self, name, x):
        h = self.norm(f"{name}.norm", x)
        q, k, v = (self.conv(f"{name}.{part}", h).flatten(2) for part in "qkv")
        weights = torch.einsum("bci,bcj->bij", q, k).div(q.shape[1] ** 0.5).softmax(-1)
        h = torch.einsum("bij,bcj->bci", weights, v).view_as(x)
        return x + self.conv(f"{name}.proj_out", h)

    def blocks(self, name, x, index, count):
        for block in range(count):
            x = self.res(f"{name}.conv_blocks.{index}.res.{block}", x)
            if f"{name}.conv_blocks.{index}.attn.{block}.q.weight" in self.w:
                x = self.attn(f"{name}.conv_blocks.{index}.attn.{block}", x)
        return x

    def middle(self, name, x):
        return self.res(f"{name}.mid.2", self.attn(f"{name}.mid.1", self.res(f"{name}.mid.0", x)))

    def encode(self, images):
        x = self.blocks("encoder", self.conv("encoder.conv_in", images.double(), padding=1), 0, 2)
        x = self.conv("encoder.conv_blocks.0.downsample.conv", F.pad(x, (0, 1, 0, 1)), stride=2)
        x = self.middle("encoder", self.blocks("encoder", x, 1, 2))
        x = self.conv("encoder.conv_out", F.silu(self.norm("encoder.norm_out", x)), padding=1)
        latents = F.normalize(self.conv("quant_conv", x), dim=1)
        return torch.einsum("bdij,kd->bijk", latents, F.normalize(self.w["quantize.embedding.weight"])).argmax(-1)

    def decode(self, codes):
        vectors = F.normalize(self.w["quantize.embedding.weight"])[codes].permute(0, 3, 1, 2)
        x = self.conv("decoder.conv_in", self.conv("post_quant_conv", vectors), padding=1)
        x = self.blocks("decoder", self.middle("decoder", x), 0, 3)
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        x = self.blocks("decoder", self.conv("decoder.conv_blocks.0.upsample.conv", x, padding=1), 1, 3)
        return self.conv("decoder.conv_out", F.silu(self.norm("decoder.norm_out", x)), padding=1)


@pytest.fixture
def images(imagenet_sample) -> torch.Tensor:
    files = sorted(imagenet_sample.rglob("*.JPEG"))[:2]
    crops = [center_crop(np.asarray(Image.open(file).convert("RGB")), 32) for file in files]
    return to_unit_range(torch.from_numpy(np.stack(crops)))


def imported(tmp_path, checkpoint, name="checkpoint.pt") -> Tokenizer:
    torch.save(checkpoint, tmp_path / name)
    assert main(["import_llamagen", str(tmp_path / name), str(tmp_path / f"{name}.imported")]) == 0
    return Tokenizer.load(tmp_path / f"{name}.imported")


def test_codes_are_identical_and_pixels_agree_on_real_images(tmp_path, images):
    state = llamagen_state()
    # As LlamaGen's trainer writes it, command line included.
    tokenizer = imported(tmp_path, {"model": state, "steps": 7, "args": argparse.Namespace(vq_model="VQ-16")})
    reference = Reference(state)
    codes = reference.encode(images)
    assert len(codes.unique()) > 20
    assert torch.equal(tokenizer.encode(images), codes.flatten(1))
    torch.testing.assert_close(
        tokenizer.decode(codes.flatten(1), (16, 16)).double(), reference.decode(codes), rtol=0, atol=1e-4
    )


def test_sizes_are_read_off_the_weights(tmp_path):
    config = imported(tmp_path, llamagen_state()).config
    assert (config.encoder_channels, config.decoder_channels, config.channel_multipliers) == (32, 32, (1, 2))
    assert (config.encoder_blocks, config.decoder_blocks, config.z_channels, config.attention) == (2, 3, 16, True)
    assert (config.codebook_size, config.codebook_dim, config.l2_normalize) == (128, 8, True)


def test_averaged_weights_come_first(tmp_path):
    plain, averaged = llamagen_state(0), llamagen_state(1)
    tokenizer = imported(tmp_path, {"model": plain, "ema": averaged})
    assert torch.equal(tokenizer.quantizer.codebook, averaged["quantize.embedding.weight"])
    only = imported(tmp_path, {"state_dict": plain}, "only.pt")
    assert torch.equal(only.quantizer.codebook, plain["quantize.embedding.weight"])


def test_weights_lie_under_any_usual_key_and_name(tmp_path):
    state = llamagen_state()
    for number, (key, prefix) in enumerate(
        [("ema", "module."), ("model", "_orig_mod."), ("state_dict", "module._orig_mod."), ("module", ""), (None, "")]
    ):
        weights = {prefix + name: tensor for name, tensor in state.items()}
        checkpoint = {key: weights, "ema": weights if key == "ema" else {}} if key else weights
        tokenizer = imported(tmp_path, checkpoint, f"{number}.pt")
        assert torch.equal(tokenizer.quantizer.codebook, state["quantize.embedding.weight"])


def test_files_of_safetensors_are_read(tmp_path, capsys):
    state = llamagen_state()
    save_file(state, tmp_path / "vq.safetensors")
    assert main(["import_llamagen", str(tmp_path / "vq.safetensors"), str(tmp_path / "imported")]) == 0
    codebook = Tokenizer.load(tmp_path / "imported").quantizer.codebook
    assert torch.equal(codebook, state["quantize.embedding.weight"])
    capsys.readouterr()
    for size in (0, 500):
        (tmp_path / "cut.safetensors").write_bytes((tmp_path / "vq.safetensors").read_bytes()[:size])
        assert main(["import_llamagen", str(tmp_path / "cut.safetensors"), str(tmp_path / "bad")]) == 2
        message = capsys.readouterr().err
        assert "cut.safetensors: truncated or damaged" in message and message.count("\n") == 1


def test_a_folder_is_no_checkpoint(tmp_path, capsys):
    assert main(["import_llamagen", str(tmp_path), str(tmp_path / "bad")]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path}: is a folder: name the checkpoint's file in it\n"


def refused(tmp_path, capsys, checkpoint) -> str:
    file = tmp_path / "bad.pt"
    if isinstance(checkpoint, bytes):
        file.write_bytes(checkpoint)
    elif checkpoint is not None:
        torch.save(checkpoint, file)
    assert main(["import_llamagen", str(file), str(tmp_path / "bad")]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert str(file) in message
    assert not list(tmp_path.glob("bad") or tmp_path.glob("bad.tmp"))
    return message


class Foreign:
    def __reduce__(self):
        return (print, ("code from the pickle ran",))


def test_bad_checkpoints_have_one_clear_line(tmp_path, capsys):
    state = llamagen_state()
    assert "not found" in refused(tmp_path, capsys, None)
    assert "neither" in refused(tmp_path, capsys, {"model": {"layer.weight": torch.zeros(2)}})
    assert "list" in refused(tmp_path, capsys, [1, 2])
    assert "no readable checkpoint" in refused(tmp_path, capsys, b"text")
    torch.save({"model": state}, tmp_path / "good.pt")
    whole = (tmp_path / "good.pt").read_bytes()
    assert "no readable checkpoint" in refused(tmp_path, capsys, whole[: len(whole) // 2])
    for name in ("encoder.conv_in.weight", "decoder.mid.1.k.bias", "decoder.norm_out.bias"):
        message = refused(tmp_path, capsys, {"model": {key: state[key] for key in state if key != name}})
        assert name in message
        assert "missing" in message
    for name, wrong, words in [
        ("encoder.mid.1.k.weight", "text", "'encoder.mid.1.k.weight' is str, no tensor"),
        ("encoder.mid.1.k.weight", state["encoder.mid.1.k.weight"].int(), "weight' holds int32, expected floats"),
        ("encoder.mid.1.k.weight", state["encoder.mid.1.k.weight"].to("meta"), "weight' holds no values"),
        (3, torch.zeros(1), "weight '3' is left over: name one of LlamaGen's files"),
        ("encoder.conv_in.weight", torch.tensor(1.0), "'encoder.conv_in.weight' holds no weights"),
        ("quantize.embedding.weight", torch.zeros(8), "the codebook has shape (8,)"),
    ]:
        assert words in refused(tmp_path, capsys, {"model": {**state, name: wrong}})
    assert "another architecture" in refused(tmp_path, capsys, {"model": {**state, "extra.weight": torch.zeros(1)}})


def test_a_foreign_pickle_runs_no_code(tmp_path, capsys):
    message = refused(tmp_path, capsys, {"model": llamagen_state(), "args": Foreign()})
    assert "print beside its weights" in message and "save the weights alone" in message
    assert "code from the pickle ran" not in capsys.readouterr().out


def test_an_existing_folder_is_left_alone(tmp_path, capsys):
    torch.save({"model": llamagen_state()}, tmp_path / "good.pt")
    (tmp_path / "mine").mkdir()
    assert main(["import_llamagen", str(tmp_path / "good.pt"), str(tmp_path / "mine")]) == 2
    assert "exists" in capsys.readouterr().err
    assert not list((tmp_path / "mine").iterdir())


def test_an_image_size_is_for_transformers(tmp_path, capsys):
    torch.save({"model": llamagen_state()}, tmp_path / "good.pt")
    command = ["import_llamagen", str(tmp_path / "good.pt"), str(tmp_path / "imported")]
    assert main([*command, "--image-size", "384"]) == 2
    message = capsys.readouterr().err
    assert f"{tmp_path / 'good.pt'}: a tokenizer" in message and "leave out --image-size" in message
    assert message.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["good.pt"]


def test_kinds_are_told_apart():
    assert is_llamagen_tokenizer({"model": llamagen_state()})
    assert not is_llamagen_tokenizer({"model": {"tok_embeddings.weight": torch.zeros(2)}})
