"""Attention of the autoencoder and the regularizer: which form runs where."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from crt import cpu
from crt.tokenizer.attention import attend


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("dtype", "training"), [(torch.bfloat16, True), (torch.bfloat16, False), (torch.float32, True)]
)
def test_the_fused_kernel_gives_way_to_bf16_training_alone(dtype: torch.dtype, training: bool, causal: bool) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(3, 2, 20, 16, dtype=dtype, requires_grad=training) for _ in range(3))
    result = attend(q, k, v, causal=causal)
    fused = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    own = cpu.attention(q, k, v, causal=causal)
    assert not torch.equal(own, fused)
    assert torch.equal(result, own if dtype == torch.bfloat16 and training else fused)
