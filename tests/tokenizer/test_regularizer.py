"""Oracles: causality by perturbation, finite differences, and processes whose conditional variance is known."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from crt.params import load_params
from crt.tokenizer.model import Tokenizer, TokenizerConfig
from crt.tokenizer.regularizer import (
    CausalTransformer,
    NextCodeCrossEntropy,
    NextLatentL2,
    StochasticCrossEntropy,
    annealed_lambda,
    build_regularizer,
    scale_gradient,
)
from tests.conftest import ROOT
from tests.tokenizer.conftest import tiny_config

SIZES = {"layers": 2, "width": 16, "heads": 2}
LAYERS = [0, 1, 2, 12]


def some_latents(batch=3, positions=6, dim=4) -> torch.Tensor:
    torch.manual_seed(0)
    return F.normalize(torch.randn(batch, positions, dim, dtype=torch.float64), dim=-1)


def enliven(module: torch.nn.Module) -> torch.nn.Module:
    """Double precision, and no weight at a special initial value."""
    torch.manual_seed(1)
    module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module


@pytest.mark.parametrize("layers", LAYERS)
def test_a_prediction_sees_all_earlier_latents_and_no_others(layers):
    model = enliven(CausalTransformer(4, 6, 5, layers=layers, width=16, heads=2))
    latents = some_latents(batch=1)
    before = model(latents)
    for changed in range(6):
        other = latents.clone()
        other[:, changed] += 1.0
        moved = (model(other) - before).abs().amax((0, 2)) > 1e-9
        sees = [i > changed if layers else i == changed + 1 for i in range(6)]
        assert moved.tolist() == sees, f"latent {changed}"


def test_zero_layers_are_one_linear_map():
    model = enliven(CausalTransformer(4, 6, 4, layers=0, width=16, heads=2))
    latents = some_latents()
    assert {name for name, _ in model.named_parameters()} == {"start", "head.weight", "head.bias"}
    for i in range(6):
        previous = latents[:, i - 1] if i else model.start.expand(3, 4)
        torch.testing.assert_close(model(latents)[:, i], previous @ model.head.weight.T + model.head.bias)


@pytest.mark.parametrize("layers", [0, 2])
def test_l2_is_the_equation(layers):
    """mean_i || z_i - f(z_<i) ||^2, where f sees a context that is cut off at i."""
    regularizer = enliven(NextLatentL2(4, 6, layers=layers, width=16, heads=2))
    latents = some_latents()
    errors = []
    for image in latents:
        for i in range(6):
            context = image.clone()
            context[i:] = 0.0
            prediction = regularizer.predictor(context[None])[0, i]
            errors.append((image[i] - prediction).square().sum())
    torch.testing.assert_close(regularizer(latents, None, None), torch.stack(errors).mean())


@pytest.mark.parametrize("layers", [0, 2])
@pytest.mark.parametrize("kind", ["l2", "cross_entropy"])
def test_gradient_to_the_latents_equals_finite_differences(kind, layers):
    sizes = SIZES | {"layers": layers}
    codes = torch.randint(10, (3, 6))
    regularizer = NextLatentL2(4, 6, **sizes) if kind == "l2" else NextCodeCrossEntropy(4, 6, 10, **sizes)
    enliven(regularizer)
    latents = some_latents().requires_grad_()
    assert torch.autograd.gradcheck(lambda z: regularizer(z, codes, None), latents)
    # L2 reaches every latent, as target; cross-entropy only contexts, so not the last.
    (gradient,) = torch.autograd.grad(regularizer(latents, codes, None), latents)
    reached = gradient.abs().amax((0, 2)) > 0
    assert reached.tolist() == [True] * 5 + [kind == "l2"]


def test_gradient_reaching_the_encoder_equals_finite_differences():
    """d (lambda R) / d theta for weights of a whole encoder, against central differences of lambda R."""
    torch.manual_seed(0)
    tokenizer = Tokenizer(tiny_config()).double()
    regularizer = enliven(NextLatentL2(4, 16, **SIZES))
    images = torch.rand(2, 3, 16, 16, dtype=torch.float64) * 2 - 1
    lambda_ = 0.7

    def term(factor):
        raster = tokenizer.latents(images).flatten(2).transpose(1, 2)
        return regularizer(scale_gradient(raster, factor), None, None)

    term(lambda_).backward()
    for weight in (tokenizer.encoder.conv_in.weight, tokenizer.encoder.levels[1].blocks[0].conv2.weight):
        for index in (0, 7, 50):
            flat, step = weight.detach().view(-1), 1e-5
            values = []
            for sign in (1, -1):
                flat[index] += sign * step
                values.append(lambda_ * term(1.0).item())
                flat[index] -= sign * step
            expected = (values[0] - values[1]) / (2 * step)
            assert weight.grad.view(-1)[index].item() == pytest.approx(expected, rel=1e-5, abs=1e-10)


def test_lambda_scales_what_reaches_the_encoder_and_not_what_reaches_the_predictor():
    regularizer = enliven(NextLatentL2(4, 6, **SIZES))
    gradients = {}
    for factor in (0.0, 1.0, 2.5):
        latents = some_latents().requires_grad_()
        regularizer.zero_grad()
        regularizer(scale_gradient(latents, factor), None, None).backward()
        gradients[factor] = latents.grad, [parameter.grad.clone() for parameter in regularizer.parameters()]
    for factor in (0.0, 2.5):
        torch.testing.assert_close(gradients[factor][0], factor * gradients[1.0][0])
        for ours, theirs in zip(gradients[factor][1], gradients[1.0][1], strict=True):
            assert torch.equal(ours, theirs)


def test_lambda_rises_along_a_line():
    values = [annealed_lambda(step, 4.0, 1000) for step in (0, 1, 250, 999, 1000, 5000)]
    assert values == pytest.approx([0.0, 0.004, 1.0, 3.996, 4.0, 4.0])
    assert annealed_lambda(0, 4.0, 0) == 4.0


@pytest.mark.parametrize("kind", ["l2", "cross_entropy"])
def test_a_context_of_codes_is_their_vectors_with_the_gradient_passed_straight_through(kind):
    """Its value is the equation's on the vectors; its gradient finite differences', moved onto the vectors."""
    torch.manual_seed(2)
    codes, vectors = torch.randint(10, (3, 6)), torch.randn(10, 4, dtype=torch.float64, requires_grad=True)
    if kind == "l2":
        regularizer = enliven(NextLatentL2(4, 6, "codes", **SIZES))
    else:
        regularizer = enliven(NextCodeCrossEntropy(4, 6, 10, "codes", **SIZES))
    latents = some_latents().requires_grad_()
    loss = regularizer(latents, codes, vectors)
    gradient, of_vectors = torch.autograd.grad(loss, (latents, vectors), allow_unused=True)
    assert of_vectors is None  # the codebook is not moved

    moved = (vectors[codes] - latents).detach()

    def expected(z):
        outputs = regularizer.predictor(z + moved)
        if kind == "cross_entropy":
            return F.cross_entropy(outputs.flatten(0, 1), codes.flatten())
        return (z - outputs).square().sum(-1).mean()

    torch.testing.assert_close(loss, expected(latents))
    assert torch.autograd.gradcheck(expected, latents)
    torch.testing.assert_close(gradient, *torch.autograd.grad(expected(latents), latents))


def fit(regularizer, draw, steps, rate, quantize=lambda latents: (None, None)) -> float:
    """Train on fresh draws and return the loss on a large one."""
    optimizer = torch.optim.AdamW(regularizer.parameters(), lr=rate, weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
        latents = draw(generator, 128)
        loss = regularizer(latents, *quantize(latents))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        latents = draw(generator, 8192)
        return regularizer(latents, *quantize(latents)).item()


def test_loss_falls_to_the_conditional_variance_of_an_autoregressive_process():
    """z_i = A z_(i-1) + noise: given the past, z_i has the noise's variance; at the first place its own."""
    dim, positions, sigma = 3, 6, 0.5
    rotation = torch.linalg.qr(torch.randn(dim, dim, generator=torch.Generator().manual_seed(3)))[0]
    matrix = 0.9 * rotation
    stationary = sigma**2 / (1 - 0.9**2)

    def draw(generator, batch):
        noise = torch.randn(positions, batch, dim, generator=generator)
        z = [stationary**0.5 * noise[0]]
        for i in range(1, positions):
            z.append(z[-1] @ matrix.T + sigma * noise[i])
        return torch.stack(z, dim=1)

    conditional = dim * (stationary + (positions - 1) * sigma**2) / positions
    torch.manual_seed(0)
    regularizer = NextLatentL2(dim, positions, layers=0, width=1, heads=1)
    loss = fit(regularizer, draw, steps=150, rate=0.1)
    assert loss == pytest.approx(conditional, rel=0.02)
    torch.testing.assert_close(regularizer.predictor.head.weight.detach(), matrix, rtol=0, atol=0.05)


def test_only_attention_finds_an_order_that_spans_rows():
    """On a grid each latent is a mean of its left and upper neighbours plus noise; the upper one lies a row back."""
    side, dim = 3, 2
    neighbours = torch.zeros(side**2, side**2)
    for i in range(side**2):
        if i % side:
            neighbours[i, i - 1] = 0.7
        if i >= side:
            neighbours[i, i - side] = 0.7
    # z = M z + noise, so z = (1 - M)^-1 noise; M is strictly lower triangular in raster order.
    mixing = torch.linalg.inv(torch.eye(side**2) - neighbours)

    def draw(generator, batch):
        return mixing @ torch.randn(batch, side**2, dim, generator=generator)

    conditional = dim * 1.0
    losses = {}
    for layers, steps, rate in ((0, 100, 0.1), (1, 400, 1e-2)):
        torch.manual_seed(0)
        regularizer = NextLatentL2(dim, side**2, layers=layers, width=16, heads=2)
        losses[layers] = fit(regularizer, draw, steps, rate)
    # Less than the conditional variance would mean that it sees what it predicts.
    assert 0.97 * conditional < losses[1] < 1.05 * conditional
    assert losses[0] > 1.2 * conditional


def test_what_hides_below_the_quantizer_helps_only_who_reads_latents():
    """Independent signs, each with a faint copy of the next that rounding to a sign takes away: codes tell nothing."""
    positions, faint = 6, 0.1

    def draw(generator, batch):
        signs = torch.randint(2, (batch, positions + 1, 1), generator=generator) * 2.0 - 1
        return signs[:, :-1] + faint * signs[:, 1:]

    def quantize(latents):
        return (latents[..., 0] > 0).long(), torch.tensor([[-1.0], [1.0]])

    losses = {}
    for context in ("latents", "codes"):
        torch.manual_seed(0)
        regularizer = NextLatentL2(1, positions, context, layers=1, width=16, heads=2)
        losses[context] = fit(regularizer, draw, 400, 1e-2, quantize)
    # The first is never known, and no latent's own faint copy.
    assert losses["latents"] < 0.4
    assert losses["codes"] == pytest.approx(1 + faint**2, rel=0.02)


def test_stochastic_cross_entropy_is_a_straight_through_one_hot():
    """Value and gradients against explicit one-hot codes y = onehot + q - q.detach()."""
    regularizer = enliven(StochasticCrossEntropy(4, 6, 10, temperature=0.2, **SIZES))
    vectors = torch.randn(10, 4, dtype=torch.float64, requires_grad=True)  # of any length: l2_normalize may be off
    latents = some_latents().requires_grad_()
    codes = torch.randint(10, (3, 6))
    loss = regularizer(latents, codes, vectors)
    assert torch.autograd.grad(loss, vectors, retain_graph=True, allow_unused=True) == (None,)

    distances = (latents[:, :, None] - vectors).square().sum(-1)
    q = torch.softmax(-distances / (2 * 0.2), dim=-1)
    y = F.one_hot(codes, 10) + q - q.detach()
    expected = -(y * regularizer.predictor(y @ vectors).log_softmax(-1)).sum(-1).mean()
    torch.testing.assert_close(loss, expected)
    variables = (latents, *regularizer.parameters())
    for ours, theirs in zip(
        torch.autograd.grad(loss, variables), torch.autograd.grad(expected, variables), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_stochastic_codes_have_the_frequencies_of_their_distribution():
    regularizer = StochasticCrossEntropy(2, 1, 3, temperature=0.5, layers=0, width=1, heads=1)
    vectors = F.normalize(torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.3]]), dim=1)
    latent = F.normalize(torch.tensor([1.0, 0.5]), dim=0)
    draws = 20_000
    uniforms = torch.rand(draws, 1, generator=torch.Generator().manual_seed(0))
    codes = regularizer.draw_codes(latent.expand(draws, 1, 2), vectors, uniforms)
    frequencies = torch.bincount(codes.flatten(), minlength=3) / draws
    torch.testing.assert_close(frequencies, torch.softmax(vectors @ latent / 0.5, 0), rtol=0, atol=0.015)
    edges = regularizer.draw_codes(latent.expand(2, 1, 2), vectors, torch.tensor([[0.0], [1 - 2**-24]]))
    assert edges.flatten().tolist() == [0, 2]


def test_regularizer_adds_at_most_five_percent_of_training_flops_at_vq16():
    """Counted per image, so for any batch, and without a discriminator, which would only lower the share."""
    params = load_params(ROOT / "presets/imagenet256.yaml").train_tokenizer
    with FakeTensorMode(), sdpa_kernel(SDPBackend.MATH):  # shapes only; the counter knows plain attention
        tokenizer = Tokenizer(TokenizerConfig.from_params(params))
        regularizer = build_regularizer(params.regularizer, 8, 256, 16384)
        with FlopCounterMode(display=False) as base:
            reconstructions, quantized = tokenizer(torch.empty(1, 3, 256, 256))
            (reconstructions.square().mean() + quantized.codebook_loss + quantized.commitment_loss).backward()
        with FlopCounterMode(display=False) as extra:
            regularizer(torch.empty(1, 256, 8, requires_grad=True), None, None).backward()
    assert base.get_total_flops() > 1e12
    assert 0 < extra.get_total_flops() / base.get_total_flops() < 0.05
