"""Oracles: the losses' formulas on small numbers, and the gradient norms that the adaptive weight must balance."""

from __future__ import annotations

import pytest
import torch

from crt.errors import UserError
from crt.tokenizer.losses import (
    PerceptualLoss,
    adaptive_weight,
    hinge_discriminator_loss,
    hinge_generator_loss,
    pixel_loss,
)


def test_hinge_losses_on_known_logits():
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-2.0, 0.0, 1.0])
    # mean(0, 0.5, 2) and mean(0, 1, 2)
    assert hinge_discriminator_loss(real, fake).item() == pytest.approx(0.5 * (2.5 / 3 + 1.0))
    assert hinge_generator_loss(fake).item() == pytest.approx(1 / 3)


def test_pixel_losses_are_means_in_full_precision():
    a, b = torch.zeros(2, 3, 4, 4), torch.full((2, 3, 4, 4), 0.5)
    assert pixel_loss(a, b, "l2").item() == 0.25
    assert pixel_loss(a, b, "l1").item() == 0.5
    assert pixel_loss(a.bfloat16(), b, "l2").dtype == torch.float32


def test_adaptive_weight_balances_the_gradients_on_the_last_layer():
    weight = torch.randn(3, 5, 1, 1, requires_grad=True)
    x = torch.randn(2, 5, 4, 4)
    output = torch.nn.functional.conv2d(x, weight)
    reconstruction, adversarial = output.square().mean(), 0.01 * output.sum()
    factor = adaptive_weight(reconstruction, adversarial, weight)
    first = torch.autograd.grad(reconstruction, weight, retain_graph=True)[0].norm()
    second = torch.autograd.grad(adversarial, weight)[0].norm()
    torch.testing.assert_close(factor, first / (second + 1e-4))
    assert not factor.requires_grad
    assert adaptive_weight((1e9 * weight).sum(), 0 * weight.sum(), weight) == 1e4


def vgg_file(path, channels_of_first=64):
    """A file with torchvision's names and shapes of VGG-16, random weights."""
    torch.manual_seed(0)
    widths = [64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512]
    state, index, previous = {}, 0, 3
    for width in widths:
        if width == 0:
            index += 1
            continue
        width = width if index else channels_of_first  # noqa: PLW2901
        state[f"features.{index}.weight"] = torch.randn(width, previous, 3, 3) / (3 * previous**0.5)
        state[f"features.{index}.bias"] = torch.zeros(width)
        index, previous = index + 2, width
    torch.save(state, path)
    return path


def test_lpips_weights_from_a_file_of_vgg(tmp_path):
    loss = PerceptualLoss(vgg_file(tmp_path / "vgg16.pth")).train()
    a, b = torch.rand(2, 3, 64, 64) * 2 - 1, torch.rand(2, 3, 64, 64) * 2 - 1
    assert loss(a, a).item() == 0.0
    assert loss(a, b).item() > 0.0
    # No dropout, whatever mode the trainer is in.
    assert torch.equal(loss(a, b), loss(a, b))
    assert not any(parameter.requires_grad for parameter in loss.parameters())
    torch.save(loss.network.state_dict(), tmp_path / "whole.pth")
    assert torch.equal(PerceptualLoss(tmp_path / "whole.pth")(a, b), loss(a, b))


@pytest.mark.parametrize("autocast", [False, True])
def test_lpips_is_the_package_s_own_in_value_and_gradient_compiled_or_not(tmp_path, autocast):
    loss = PerceptualLoss(vgg_file(tmp_path / "vgg16.pth"))
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    noisy = (images + 0.1 * torch.randn(2, 3, 64, 64)).requires_grad_()

    def value_and_gradient(distance):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            value = distance(noisy, images).float().mean()
        return value, *torch.autograd.grad(value, noisy)

    expected = value_and_gradient(loss.network)
    compiled = torch.compile(loss, backend="eager", fullgraph=True)
    for ours in (loss, compiled):
        for made, wanted in zip(value_and_gradient(ours), expected, strict=True):
            # The package's squares are of bfloat16 under a CPU's autocast, of float32 under a GPU's, as ours are.
            assert (made - wanted).norm() < (0.02 if autocast else 1e-5) * wanted.norm()


def test_unusable_lpips_weights_are_refused(tmp_path):
    (tmp_path / "text.pth").write_text("no weights")
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    for name in ("absent.pth", "text.pth", "other.pth"):
        with pytest.raises(UserError, match=name):
            PerceptualLoss(tmp_path / name)
    with pytest.raises(UserError, match=r"narrow\.pth"):
        PerceptualLoss(vgg_file(tmp_path / "narrow.pth", channels_of_first=32))
