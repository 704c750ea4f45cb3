"""Counted FLOPs against closed forms and against the counter on real tensors."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from crt.ar.model import ARConfig, ARTransformer
from crt.flops import ar_flops_per_image, count_flops, tokenizer_flops_per_image
from crt.params import load_params
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
