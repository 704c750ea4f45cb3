"""Oracles: the published parameter count, torch's BatchNorm, and independence of the images of a batch."""

from __future__ import annotations

import pytest
import torch

from crt.errors import UserError
from crt.params import load_params
from crt.tokenizer.discriminator import BatchNorm, PatchGAN, StyleGANDiscriminator
from tests.conftest import ROOT, write_params


def test_patchgan_has_the_published_parameter_count():
    assert sum(parameter.numel() for parameter in PatchGAN(64, 3).parameters()) == 2_765_633


@pytest.mark.parametrize(("size", "layers", "patches"), [(256, 3, 30), (32, 2, 6), (24, 3, 1), (16, 2, 2)])
def test_patchgan_judges_patches(size, layers, patches):
    assert PatchGAN(4, layers)(torch.rand(2, 3, size, size)).shape == (2, 1, patches, patches)


def test_batch_norm_is_torchs_in_training():
    ours, theirs = BatchNorm(6), torch.nn.BatchNorm2d(6).train()
    with torch.no_grad():
        theirs.weight.copy_(ours.weight)
        theirs.bias.copy_(ours.bias.normal_())
    x = torch.randn(4, 6, 5, 5)
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours.eval()(x), theirs(x))


def test_stylegan_judges_each_image_by_itself():
    torch.manual_seed(0)
    discriminator = StyleGANDiscriminator(24, 4, 2)
    images = torch.rand(3, 3, 24, 24)
    logits = discriminator(images)
    assert logits.shape == (3, 1)
    torch.testing.assert_close(logits, torch.cat([discriminator(image[None]) for image in images]))
    assert len(logits.unique()) == 3


def test_stylegan_halves_with_a_filter_that_keeps_constants():
    from crt.tokenizer.discriminator import _blur_and_halve

    constant = torch.full((1, 2, 8, 8), 3.0)
    torch.testing.assert_close(_blur_and_halve(constant)[..., 1:-1, 1:-1], torch.full((1, 2, 2, 2), 3.0))
    # The highest frequency that an image holds would alias to a constant without the filter.
    stripes = torch.tensor([1.0, -1.0]).repeat(4).expand(1, 2, 8, 8)
    assert _blur_and_halve(stripes)[..., 1:-1].abs().max() < 1e-6


@pytest.mark.parametrize(("kind", "layers"), [("patchgan", 3), ("stylegan", 5)])
def test_more_halvings_than_the_image_has_are_refused(tmp_path, kind, layers):
    discriminator = {"kind": kind, "layers": layers, "start_step": 0}
    changes = {f"train_tokenizer.discriminator.{key}": value for key, value in discriminator.items()}
    with pytest.raises(UserError, match=r"discriminator\.layers"):
        load_params(write_params(tmp_path / "params.yaml", changes, base=ROOT / "params.yaml"))
