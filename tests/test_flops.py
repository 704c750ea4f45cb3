"""Counted FLOPs against closed forms and against the counter on real tensors."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from crt.ar.model import ARConfig, ARTransformer
from crt.distributed import world_size
from crt.flops import ar_flops_per_image, count_flops, matmul_rate, tokenizer_flops_per_image, tokenizer_training_flops
from crt.params import TrainTokenizer, load_params
from crt.tokenizer.model import Tokenizer, TokenizerConfig
from crt.tokenizer.objective import Objective
from crt.tokenizer.regularizer import build_regularizer
from tests.conftest import ROOT


def test_a_matrix_product_counts_two_per_multiply_and_add():
    layer = nn.Linear(30, 50, bias=False)
    assert count_flops(lambda: layer(torch.ones(7, 30))) == 2 * 7 * 30 * 50


def test_transformer_agrees_with_its_closed_form_and_with_real_tensors():
    config = ARConfig(2, 4, 64, 64, 1e-5, 1e4, 0.0, 0.02, 128, (4, 4), 10, None, None)
    tokens, width, ffn = config.num_tokens, config.width, config.ffn_width
    matrices = config.layers * (4 * width**2 + 3 * width * ffn) + width * config.codebook_size
    attention = config.layers * 2 * tokens * width  # scores and values, per token
    counted = ar_flops_per_image(config)
    # Forward, and twice as much backward; attention's backward also recomputes its scores.
    assert counted == pytest.approx(tokens * (6 * matrices + 7 * attention), rel=1e-3)
    model = ARTransformer(config)
    codes, labels = torch.zeros(1, tokens, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    assert counted == pytest.approx(count_flops(lambda: model(codes, labels).mean().backward()), rel=0.02)


@pytest.mark.parametrize("context", ["latents", "codes"])
def test_the_regularizer_adds_at_most_five_percent_at_the_papers_setting(context):
    params = load_params(ROOT / "presets/imagenet256.yaml").train_tokenizer
    params = params.model_copy(update={"regularizer": params.regularizer.model_copy(update={"context": context})})
    plain, regularized = (tokenizer_flops_per_image(params, with_it) for with_it in (False, True))
    assert plain < regularized <= 1.05 * plain


def changed(**sections) -> TrainTokenizer:
    """The default run's section with keys of its own sections changed."""
    params = load_params(ROOT / "params.yaml").train_tokenizer
    sections = {name: getattr(params, name).model_copy(update=keys) for name, keys in sections.items()}
    return params.model_copy(update=sections | {"steps": 10})


def test_a_batch_costs_what_the_counter_finds_for_all_its_images():
    # Attention over few tokens takes another path for one image than for several.
    params = changed(architecture={"attention": True}).model_copy(update={"steps": 1, "batch_size": 5})
    with FakeTensorMode():
        model = Tokenizer(TokenizerConfig.from_params(params))
        regularizer = build_regularizer(params.regularizer, 8, model.num_tokens, 64)
        objective = Objective(params, model, regularizer, None, perceptual=None, device=torch.device("cpu"))
        images, uniforms = torch.zeros(5, 3, 16, 16), torch.zeros(5, model.num_tokens)

        def step() -> None:
            objective.tokenizer_loss(images, uniforms, 1.0, False).total.backward()

        counted = count_flops(step)
    assert tokenizer_training_flops(params, True) == counted


def test_the_discriminator_counts_from_its_start():
    def flops(start: int) -> int:
        discriminator = {"kind": "patchgan", "channels": 8, "layers": 1, "start_step": start}
        return tokenizer_training_flops(changed(discriminator=discriminator), False)

    assert flops(10) == flops(1000) == tokenizer_training_flops(changed(), False)
    assert flops(4) - flops(10) == 0.6 * (flops(0) - flops(10)) > 0


def test_one_of_several_processes_counts_without_the_others(monkeypatch):
    params = changed(discriminator={"kind": "patchgan", "channels": 8, "layers": 1, "start_step": 0})
    alone = tokenizer_training_flops(params, True)
    sent = []
    monkeypatch.setattr(dist, "all_reduce", lambda *_: sent.append(1))
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        assert tokenizer_training_flops(params, True) == alone
        assert world_size() == 2
    finally:
        dist.destroy_process_group()
    assert not sent


def test_lpips_is_two_forward_passes_through_vgg_and_one_backward():
    side, channels, expected = 16, 3, 0
    for width, layers in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):  # Simonyan and Zisserman 2015, D
        for _ in range(layers):
            expected += 3 * 2 * side**2 * 9 * channels * width
            channels = width
        expected += 2 * 2 * side**2 * width  # the weights of the squared differences: one pass there and one back
        side //= 2
    params = changed(loss={"lpips_weight": 1.0})
    added = tokenizer_training_flops(params, False) - tokenizer_training_flops(changed(), False)
    assert load_params(ROOT / "params.yaml").train_tokenizer.image_size == 16
    assert added == params.steps * params.batch_size * expected


def test_rate_of_matrix_products_is_that_of_this_machine() -> None:
    """Oracle: a clock around one product; wide bounds, since the machine is shared."""
    rate = matmul_rate(torch.device("cpu"), "float32", seconds=0.5)
    assert 1e9 < rate < 1e13
