"""Oracles: the definitions of quantization and its losses, written out by brute force in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import crt.tokenizer.quantizer as quantizer_module
from crt.tokenizer.quantizer import CodebookUpkeep, VectorQuantizer, nearest_rows


def make(codebook_size=37, dim=5, l2=True, scale=1.0) -> VectorQuantizer:
    torch.manual_seed(1)
    quantizer = VectorQuantizer(codebook_size, dim, l2).double()
    with torch.no_grad():
        quantizer.codebook.copy_(scale * torch.randn(codebook_size, dim))
    return quantizer


def some_latents(quantizer, batch=3, rows=4, columns=2) -> torch.Tensor:
    torch.manual_seed(2)
    return quantizer.project(torch.randn(batch, quantizer.codebook.shape[1], rows, columns, dtype=torch.float64))


def brute_force(quantizer, latents):
    """Codes and vectors, one latent at a time."""
    vectors = quantizer.codebook.detach()
    if quantizer.l2_normalize:
        vectors = vectors / vectors.norm(dim=1, keepdim=True)
    batch, _, rows, columns = latents.shape
    codes = torch.empty(batch, rows, columns, dtype=torch.int64)
    for b in range(batch):
        for i in range(rows):
            for j in range(columns):
                codes[b, i, j] = min(
                    range(len(vectors)), key=lambda k: float((vectors[k] - latents[b, :, i, j]).norm())
                )
    return codes, torch.stack([vectors[codes[b]].permute(2, 0, 1) for b in range(batch)])


@pytest.mark.parametrize("l2", [True, False])
def test_codes_and_vectors_are_the_nearest(l2):
    quantizer = make(l2=l2)
    latents = some_latents(quantizer)
    codes, vectors = brute_force(quantizer, latents)
    result = quantizer(latents)
    assert torch.equal(result.codes, codes)
    torch.testing.assert_close(result.values, vectors)
    torch.testing.assert_close(quantizer.lookup(codes), vectors)
    assert torch.equal(quantizer.nearest(latents), codes)


def test_projection_normalises_and_only_where_asked():
    latents = torch.randn(2, 5, 3, 3, dtype=torch.float64)
    torch.testing.assert_close(make().project(latents).norm(dim=1), torch.ones(2, 3, 3, dtype=torch.float64))
    assert make(l2=False).project(latents) is latents


def test_equally_near_codes_go_to_the_lowest_index():
    vectors = torch.tensor([[9.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    assert nearest_rows(torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 3.0]]), vectors).tolist() == [1, 1, 2]


def test_chunks_change_nothing(monkeypatch):
    quantizer = make(codebook_size=100).float()
    latents = some_latents(quantizer).float().requires_grad_()
    whole = quantizer.nearest(latents), quantizer.entropy_loss(latents, 0.3)
    (gradient,) = torch.autograd.grad(whole[1], latents)
    monkeypatch.setattr(quantizer_module, "_CPU_CHUNK", 500)
    assert torch.equal(quantizer.nearest(latents), whole[0])
    loss = quantizer.entropy_loss(latents, 0.3)
    torch.testing.assert_close(loss, whole[1])
    torch.testing.assert_close(torch.autograd.grad(loss, latents)[0], gradient)


def test_a_codebook_of_131072_needs_no_matrix_of_all_distances():
    torch.manual_seed(0)
    vectors, latents = F.normalize(torch.randn(131_072, 8), dim=1), F.normalize(torch.randn(96, 8), dim=1)
    largest = 0

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                largest = max(largest, result.numel())
            return result

    with Largest():
        codes = nearest_rows(latents, vectors)
    assert largest < 96 * 131_072
    assert torch.equal(codes, (latents.double() @ vectors.double().T).argmax(1))


def test_gradient_passes_straight_through():
    """By definition d values / d latents is the identity, whatever the codes are."""
    quantizer = make()
    latents = some_latents(quantizer).requires_grad_()
    weights = torch.randn_like(latents)
    (quantizer(latents).values * weights).sum().backward()
    torch.testing.assert_close(latents.grad, weights)
    assert quantizer.codebook.grad is None


def test_losses_pull_the_codebook_and_the_latents_apart():
    quantizer = make(l2=False)
    latents = some_latents(quantizer).requires_grad_()
    codes, vectors = brute_force(quantizer, latents.detach())
    result = quantizer(latents)
    mean_square = (latents - vectors).square().sum() / latents.numel()
    torch.testing.assert_close(result.codebook_loss, mean_square)
    torch.testing.assert_close(result.commitment_loss, mean_square)

    latent_gradient, codebook_gradient = torch.autograd.grad(
        result.codebook_loss, (latents, quantizer.codebook), allow_unused=True
    )
    assert latent_gradient is None
    expected = torch.zeros_like(quantizer.codebook)
    for code, difference in zip(codes.flatten(), (vectors - latents).movedim(1, -1).reshape(-1, 5), strict=True):
        expected[code] += 2 * difference.detach() / latents.numel()
    torch.testing.assert_close(codebook_gradient, expected)

    latent_gradient, codebook_gradient = torch.autograd.grad(
        result.commitment_loss, (latents, quantizer.codebook), allow_unused=True
    )
    assert codebook_gradient is None
    torch.testing.assert_close(latent_gradient, 2 * (latents - vectors).detach() / latents.numel())


def test_given_codes_replace_the_nearest():
    quantizer = make()
    latents = some_latents(quantizer)
    codes = torch.randint(37, (3, 4, 2))
    result = quantizer(latents, codes)
    assert torch.equal(result.codes, codes)
    torch.testing.assert_close(result.values, quantizer.lookup(codes))


def test_autocast_does_not_touch_quantization():
    quantizer = make(codebook_size=4096, dim=8).float()
    latents = quantizer.project(torch.randn(4, 8, 8, 8))
    expected = quantizer(latents)
    with torch.autocast("cpu", torch.bfloat16):
        result = quantizer(latents)
        assert torch.equal(quantizer.nearest(latents), expected.codes)
    assert torch.equal(result.codes, expected.codes)
    assert result.values.dtype == result.codebook_loss.dtype == torch.float32
    assert torch.equal(result.values, expected.values)


def test_entropy_loss_is_its_definition():
    quantizer = make(codebook_size=20)
    latents = some_latents(quantizer)
    rows, vectors = latents.movedim(1, -1).reshape(-1, 5), F.normalize(quantizer.codebook.detach(), dim=1)
    distances = (rows[:, None] - vectors[None]).square().sum(-1)
    assignment = torch.softmax(-distances / 0.5, dim=1)

    def entropy(p):
        return -(p * p.log()).sum(-1)

    expected = entropy(assignment).mean() - entropy(assignment.mean(0))
    torch.testing.assert_close(quantizer.entropy_loss(latents, 0.5), expected)
    assert torch.autograd.gradcheck(lambda z: quantizer.entropy_loss(z, 0.5), latents.requires_grad_())


def test_entropy_loss_has_a_gradient_where_probabilities_vanish():
    quantizer = make(codebook_size=50).float()
    latents = quantizer.project(torch.ones(1, 5, 1, 1)).requires_grad_()
    loss = quantizer.entropy_loss(latents, 1e-4)
    loss.backward()
    assert latents.grad.isfinite().all()
    assert quantizer.codebook.grad.isfinite().all()


def test_moving_average_codebook_follows_its_recurrence():
    quantizer = make(codebook_size=3, dim=2, l2=False).float()
    start = quantizer.codebook.detach().clone()
    upkeep = CodebookUpkeep(quantizer, ema_decay=0.9, revive_after_steps=None, seed=0)
    assert not quantizer.codebook.requires_grad
    sizes, sums = [1.0] * 3, [start[k].tolist() for k in range(3)]
    for step in range(4):
        latents = torch.randn(1, 2, 2, 3)
        codes = torch.randint(2, (1, 2, 3))  # code 2 is never chosen
        upkeep.update(step, latents, codes, torch.bincount(codes.flatten(), minlength=3))
        for k in range(3):
            chosen = latents.movedim(1, -1)[codes == k]
            sizes[k] = 0.9 * sizes[k] + 0.1 * len(chosen)
            sums[k] = [0.9 * s + 0.1 * float(v) for s, v in zip(sums[k], chosen.sum(0), strict=True)]
        for k in range(3):
            torch.testing.assert_close(quantizer.codebook[k], torch.tensor(sums[k]) / sizes[k], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("l2", [True, False])
def test_a_code_that_nothing_chooses_keeps_its_average(l2):
    quantizer = make(codebook_size=3, dim=4, l2=l2).float()
    start = quantizer.vectors().detach().clone()
    upkeep = CodebookUpkeep(quantizer, ema_decay=0.5, revive_after_steps=None, seed=0)
    latents, codes = quantizer.project(torch.randn(1, 4, 2, 2)), torch.zeros(1, 2, 2, dtype=torch.int64)
    for step in range(200):  # 0.5 ** 200 is no float32
        upkeep.update(step, latents, codes, torch.tensor([4, 0, 0]))
    torch.testing.assert_close(quantizer.vectors()[1:], start[1:], rtol=0.02, atol=1e-6)
    assert quantizer.codebook[0].isfinite().all()
    # Chosen again, it follows what chose it at once.
    upkeep.update(200, latents, codes + 1, torch.tensor([0, 4, 0]))
    expected = latents.mean((0, 2, 3))
    torch.testing.assert_close(quantizer.codebook[1].detach(), expected, rtol=0.01, atol=0.01)


def test_dead_codes_become_latents_of_the_batch_as_seed_and_step_say():
    def train(seed):
        quantizer = make(codebook_size=8, dim=4).float()
        upkeep = CodebookUpkeep(quantizer, ema_decay=None, revive_after_steps=3, seed=seed)
        before = quantizer.codebook.detach().clone()
        revived = []
        for step in range(4):
            torch.manual_seed(step)
            latents = quantizer.project(torch.randn(2, 4, 3, 3))
            codes = torch.randint(6, (2, 3, 3))  # codes 6 and 7 are never chosen
            codes[0].view(-1)[:6] = torch.arange(6)
            counts = torch.bincount(codes.flatten(), minlength=8)
            revived.append(upkeep.update(step, latents, codes, counts).tolist())
        return quantizer.codebook.detach(), before, revived, upkeep

    codebook, before, revived, upkeep = train(seed=0)
    assert revived == [[], [], [6, 7], []]
    assert torch.equal(codebook[:6], before[:6])
    torch.manual_seed(2)
    rows = F.normalize(torch.randn(2, 4, 3, 3), dim=1).movedim(1, -1).reshape(-1, 4)
    for code in (6, 7):
        assert (rows == codebook[code]).all(1).any()
    assert upkeep.unused_steps.tolist() == [0] * 6 + [1, 1]
    assert torch.equal(train(seed=0)[0], codebook)
    assert not torch.equal(train(seed=5)[0], codebook)


def test_a_revived_code_stays_where_it_was_put_under_moving_averages():
    """Nothing chooses it at the next step, so its average is the latent that it became."""
    quantizer = make(codebook_size=4, dim=4).float()
    upkeep = CodebookUpkeep(quantizer, ema_decay=0.5, revive_after_steps=2, seed=0)
    latents, codes = quantizer.project(torch.randn(1, 4, 2, 2)), torch.zeros(1, 2, 2, dtype=torch.int64)
    counts = torch.tensor([4, 0, 0, 0])
    assert [upkeep.update(step, latents, codes, counts).tolist() for step in range(2)] == [[], [1, 2, 3]]
    put = quantizer.vectors().detach().clone()
    assert len(upkeep.update(2, latents, codes, counts)) == 0
    torch.testing.assert_close(quantizer.vectors()[1:].detach(), put[1:], rtol=1e-3, atol=1e-4)


def test_upkeep_continues_from_its_state():
    def steps(upkeep, quantizer, first, end):
        for step in range(first, end):
            torch.manual_seed(step)
            latents = quantizer.project(torch.randn(2, 4, 3, 3))
            codes = quantizer.nearest(latents)
            upkeep.update(step, latents, codes, torch.bincount(codes.flatten(), minlength=16))

    quantizer = make(codebook_size=16, dim=4).float()
    upkeep = CodebookUpkeep(quantizer, 0.9, 2, seed=0)
    steps(upkeep, quantizer, 0, 3)
    other = make(codebook_size=16, dim=4).float()
    continued = CodebookUpkeep(other, 0.9, 2, seed=0)
    other.load_state_dict(quantizer.state_dict())
    continued.load_state_dict({name: tensor.clone() for name, tensor in upkeep.state_dict().items()})
    steps(upkeep, quantizer, 3, 8)
    steps(continued, other, 3, 8)
    assert torch.equal(other.codebook, quantizer.codebook)
