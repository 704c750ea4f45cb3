"""Oracles: the sum of the terms as the params weight them, and whom each loss's gradient reaches."""

from __future__ import annotations

import pytest
import torch

from crt.params import load_params
from crt.tokenizer.losses import hinge_discriminator_loss, pixel_loss
from crt.tokenizer.objective import Objective, TokenizerLoss
from crt.tokenizer.state import TrainingState

# Every term has a weight of its own.
WEIGHTED = {
    "loss__pixel_weight": 2.0,
    "loss__lpips_weight": 0.3,
    "loss__codebook_weight": 0.7,
    "loss__commitment_weight": 0.2,
    "loss__entropy_weight": 0.1,
    "loss__entropy_temperature": 0.5,
    "discriminator__kind": "patchgan",
    "discriminator__channels": 4,
    "discriminator__layers": 1,
    "discriminator__weight": 0.4,
    "discriminator__start_step": 3,
}
LAMBDA = 0.6


class Case:
    """An objective of freshly drawn networks, and a batch."""

    def __init__(self, params_file, **changes) -> None:
        changes = {f"train_tokenizer__{key}": value for key, value in (WEIGHTED | changes).items()}
        self.params = load_params(params_file(**changes)).train_tokenizer
        self.state = TrainingState(self.params, LAMBDA, 0, torch.device("cpu"))
        self.objective = Objective(
            self.params,
            self.state.model,
            self.state.regularizer,
            self.state.discriminator,
            perceptual=lambda reconstructions, images: (reconstructions - images).abs().mean(),
            device=torch.device("cpu"),
        )
        draws = torch.Generator().manual_seed(0)
        self.images = torch.rand(4, 3, 16, 16, generator=draws) * 2 - 1

    def loss(self, lambda_: float = LAMBDA, adversarial: bool = True) -> TokenizerLoss:
        uniforms = torch.full((4, self.state.model.num_tokens), 0.5)
        return self.objective.tokenizer_loss(self.images, uniforms, lambda_, adversarial)


@pytest.mark.parametrize("update", ["gradient", "ema"])
def test_the_loss_is_the_weighted_sum_of_its_terms(params_file, update):
    made = Case(params_file, quantizer__update=update).loss()
    terms = {name: figure.item() for name, figure in made.figures.items()}
    weights = {
        "pixel": 2.0, "lpips": 0.3, "commitment": 0.2, "entropy": 0.1, "adversarial": 0.4, "regularizer": LAMBDA,
        "codebook": 0.7 if update == "gradient" else 0.0,  # a moving average descends nothing
    }  # fmt: skip
    assert terms.keys() == weights.keys() | {"loss", "adaptive_weight"}
    assert terms["loss"] == pytest.approx(sum(weights[name] * terms[name] for name in weights), rel=1e-5)
    # What is derived holds the regularizer as it is: lambda scales only its gradient to the encoder.
    unscaled = terms["loss"] + (1 - LAMBDA) * terms["regularizer"]
    assert made.total.item() == pytest.approx(unscaled, rel=1e-5)


def test_lambda_weights_what_the_encoder_follows_and_not_what_the_predictor_does(params_file):
    gradients = {}
    for lambda_ in (0.0, 1.0, 3.0):
        case = Case(params_file)
        case.loss(lambda_).total.backward()
        weights = case.state.model.to_latent.weight, case.state.regularizer.predictor.head.weight
        gradients[lambda_] = [weight.grad for weight in weights]
    (plain, own), (one, own_at_one), (three, own_at_three) = gradients.values()
    assert own.norm() > 0
    assert torch.equal(own, own_at_one) and torch.equal(own, own_at_three)
    torch.testing.assert_close(three - plain, 3 * (one - plain), rtol=1e-3, atol=1e-6)
    assert (one - plain).norm() > 1e-3 * plain.norm()


def test_the_discriminator_learns_from_its_own_loss_alone_and_that_reaches_nothing_else(params_file):
    case = Case(params_file)
    discriminator, made = case.state.discriminator, case.loss()
    made.total.backward()
    assert all(parameter.grad is None and parameter.requires_grad for parameter in discriminator.parameters())
    case.state.model.zero_grad()
    loss = case.objective.discriminator_loss(case.images, made.reconstructions)
    torch.testing.assert_close(
        loss, hinge_discriminator_loss(discriminator(case.images), discriminator(made.reconstructions))
    )
    loss.backward()
    assert all(parameter.grad is not None for parameter in discriminator.parameters())
    assert all(parameter.grad is None for parameter in case.state.model.parameters())


def test_the_adaptive_weight_balances_what_reaches_the_decoders_last_layer(params_file):
    case = Case(params_file, discriminator__adaptive_weight=True)
    made = case.loss()
    reconstruction = 2.0 * pixel_loss(made.reconstructions, case.images, "l2") + 0.3 * made.figures["lpips"]
    last = case.state.model.decoder.conv_out.weight
    first, second = (
        torch.autograd.grad(loss, last, retain_graph=True)[0].norm()
        for loss in (reconstruction, made.figures["adversarial"])
    )
    torch.testing.assert_close(made.figures["adaptive_weight"], 0.4 * first / (second + 1e-4))


def test_the_discriminator_takes_part_from_its_start_step_on(params_file):
    objective = Case(params_file).objective
    assert [objective.is_adversarial(step) for step in (0, 2, 3, 4)] == [False, False, True, True]
    objective.discriminator = None
    assert not objective.is_adversarial(3)
