"""Oracles: published parameter counts; each block written out with torch's elementary operations in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from crt.tokenizer.autoencoder import Downsample, GroupNorm, ResidualBlock, SelfAttention, Upsample
from crt.tokenizer.model import Tokenizer, TokenizerConfig
from tests.tokenizer.conftest import tiny_config


@pytest.mark.parametrize(
    ("multipliers", "parameters"), [((1, 1, 2, 2, 4), 71_883_403), ((1, 2, 2, 4), 70_109_835)], ids=["VQ-16", "VQ-8"]
)
def test_llamagen_sizes_have_the_published_parameter_counts(multipliers, parameters):
    config = TokenizerConfig(
        image_size=256, encoder_channels=128, decoder_channels=128, channel_multipliers=multipliers,
        encoder_blocks=2, decoder_blocks=3, attention=True, norm_groups=32, z_channels=256, dropout=0.0,
        codebook_size=16384, codebook_dim=8, l2_normalize=True,
    )  # fmt: skip
    with torch.device("meta"):
        model = Tokenizer(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


@pytest.mark.parametrize("size", [16, 20, 24])
@pytest.mark.parametrize("attention", [True, False])
def test_shapes_for_other_sizes_and_widths(size, attention):
    model = Tokenizer(tiny_config(image_size=size, attention=attention, encoder_channels=4, decoder_channels=20)).eval()
    images = torch.rand(2, 3, size, size)
    assert model.latents(images).shape == (2, 4, size // 4, size // 4)
    assert model(images)[0].shape == images.shape
    assert model.grid == (size // 4, size // 4)
    assert any(".qkv." in name for name in model.state_dict()) == attention


def test_upsample_is_repetition_then_convolution():
    block = Upsample(3).double()
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64, requires_grad=True)
    expected = block.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
    result = block(x)
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)
    weights = torch.randn_like(result)
    variables = (x, block.conv.weight, block.conv.bias)
    for ours, theirs in zip(
        torch.autograd.grad((result * weights).sum(), variables),
        torch.autograd.grad((expected * weights).sum(), variables),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_downsample_pads_right_and_below():
    block = Downsample(1).double()
    x = torch.randn(1, 1, 4, 4, dtype=torch.float64)
    kernel = block.conv.weight[0, 0]
    padded = torch.zeros(5, 5, dtype=torch.float64)
    padded[:4, :4] = x[0, 0]
    expected = torch.stack([(padded[i : i + 3, j : j + 3] * kernel).sum() for i in (0, 2) for j in (0, 2)]).view(2, 2)
    torch.testing.assert_close(block(x)[0, 0], expected + block.conv.bias)


def test_attention_is_a_softmax_over_all_places():
    block = SelfAttention(8, 4).double()
    x = torch.randn(2, 8, 3, 2, dtype=torch.float64)
    normal = F.group_norm(x, 4, block.norm.weight, block.norm.bias, 1e-6).flatten(2)
    q, k, v = (block.qkv.weight[:, :, 0, 0] @ normal + block.qkv.bias[:, None]).chunk(3, dim=1)
    attention = (q.transpose(1, 2) @ k / 8**0.5).softmax(-1)
    mixed = v @ attention.transpose(1, 2)
    expected = x + (block.out.weight[:, :, 0, 0] @ mixed + block.out.bias[:, None]).view_as(x)
    torch.testing.assert_close(block(x), expected)
    channels_last = x.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(block(channels_last), expected)


def test_residual_block_is_its_formula():
    block = ResidualBlock(4, 8, 4, 0.0).double()
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)

    def normal_silu(h, norm):
        h = F.group_norm(h, 4, norm.weight, norm.bias, 1e-6)
        return h * torch.sigmoid(h)

    h = block.conv1(normal_silu(x, block.norm1))
    expected = block.conv2(normal_silu(h, block.norm2)) + block.shortcut(x)
    torch.testing.assert_close(block(x), expected)


def test_normalisation_under_autocast_keeps_the_precision_of_its_input():
    norm = GroupNorm(2, 4, 1e-6)
    x = torch.randn(2, 4, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert norm(x).dtype == torch.float32
        half = norm(x.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), norm(x), rtol=0.02, atol=0.02)
