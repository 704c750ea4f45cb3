"""Decoding with a key-value cache: predictions of one code after the other, at the cost of one position each.

What bounds it is memory traffic: each code reads every weight once, and the keys and values of all codes before it.
So no cache grows or is copied along the sequence, and attention reads the filled part only. `Decoder` is the plain
form, on any device and in any precision; `crt.ar.cpu_decoder` and `crt.ar.gpu_decoder` are the fast ones.

Shapes: B sequences (images, twice as many under guidance), T codes, C width, H heads, D channels per head, K codes in
the codebook.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from crt.ar.model import ARTransformer, Attention, Block


class Decoder:
    """A model with caches for `batch_size` sequences.

    Call `next_logits` for positions 0 to T - 1 in order; position 0 begins anew, whatever the caches hold.

    Args:
        model: in evaluation mode; its weights are shared.
    """

    def __init__(self, model: ARTransformer) -> None:
        self.model, self.config = model, model.config
        weight = model.head.weight
        self.device, self.dtype = weight.device, weight.dtype
        self._rotation = model.rotation(self.device)  # T, D/2, 2
        self.batch_size = 0

    def resize(self, batch_size: int) -> None:
        """Set the number of sequences; a new one costs new caches."""
        if batch_size == self.batch_size:
            return
        c, self.batch_size = self.config, batch_size
        self._keys = self._values = torch.empty(0)  # the old ones go before the new ones come
        shape = (c.layers, batch_size, c.heads, c.num_tokens, c.head_width)
        self._keys, self._values = (torch.zeros(shape, dtype=self.dtype, device=self.device) for _ in range(2))

    @torch.no_grad()
    def next_logits(self, previous: Tensor, position: int) -> Tensor:
        """Predictions for the code at a position, given the one before it.

        Args:
            previous: (B,) int64, the codes at position - 1; at position 0 the labels, or the null class.
            position: 0 to T - 1.

        Returns:
            (B, K) logits in the model's precision.
        """
        self.resize(len(previous))
        table = self.model.class_embedding if position == 0 else self.model.code_embedding
        x = table(previous)
        for layer, block in enumerate(cast("list[Block]", list(self.model.blocks))):
            x = x + self._attend(layer, block.attention, block.attention_norm(x), position)
            x = x + block.ffn(block.ffn_norm(x))
        return self.model.head(self.model.norm(x))

    def _attend(self, layer: int, attention: Attention, x: Tensor, position: int) -> Tensor:
        """(B, C) to (B, C), with the keys and values of the cache, to which the position's are added."""
        q, k, v = attention.project(x[:, None], self._rotation[position, None])  # B, H, 1, D
        keys, values, filled = self._keys[layer], self._values[layer], slice(position + 1)  # B, H, T, D
        keys[:, :, position], values[:, :, position] = k[:, :, 0], v[:, :, 0]
        y = F.scaled_dot_product_attention(q, keys[:, :, filled], values[:, :, filled])
        return attention.out(y.flatten(1))


def is_partitioned(model: ARTransformer) -> bool:
    """Whether ZeRO 3 holds the weights: it gathers those of a module when that is called, and only then."""
    return hasattr(model.head.weight, "ds_id")
