"""Attention as the autoencoder and the regularizer train with it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from crt import cpu


def attend(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False) -> Tensor:
    """Scaled dot-product attention (Vaswani et al. 2017): (B, heads, N, D) each, to the same."""
    # The backward pass of torch 2.11's fused kernel takes three to ten times as long in bf16 on a CPU.
    if q.dtype == torch.bfloat16 and cpu.is_cpu(q) and q.requires_grad:
        return cpu.attention(q, k, v, causal=causal)
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal)
