"""Decoding with a key-value cache: predictions of one code after the other, at the cost of one position each.

What bounds it is memory traffic: each code reads every weight once, and the keys and values of all codes before it.
So no cache grows or is copied along the sequence, and attention reads the filled part only. `Decoder` is the plain
form, on any device and in any precision; `crt.ar.cpu_decoder` and `crt.ar.gpu_decoder` are the fast ones.

Shapes: B sequences (images, twice as many under guidance), T codes, C width, H heads, D channels per head, F width of
the feed-forward layer, K codes in the codebook.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crt.ar.model import ARTransformer, Block

Linear = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class _Layer:
    """What a block multiplies with."""

    attention_norm: Tensor
    qkv: Linear
    out: Linear
    ffn_norm: Tensor
    gate_up: Linear
    down: Linear


class Decoder:
    """A model with caches for `batch_size` sequences.

    Call `next_logits` for positions 0 to T - 1 in order; position 0 begins anew, whatever the caches hold.

    Args:
        model: in evaluation mode; its weights are shared, or copied to a faster layout.
    """

    def __init__(self, model: ARTransformer) -> None:
        self.model, self.config = model, model.config
        weight = model.head.weight
        self.device, self.dtype = weight.device, weight.dtype
        self._layers = [
            _Layer(
                block.attention_norm.weight,
                self._linear(block.attention.qkv),
                self._linear(block.attention.out),
                block.ffn_norm.weight,
                self._linear(block.ffn.gate_up),
                self._linear(block.ffn.down),
            )
            for block in cast("list[Block]", list(model.blocks))
        ]
        self._head = self._linear(model.head)
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
        x, addend = table(previous), None
        for index, layer in enumerate(self._layers):
            qkv = layer.qkv(self._normalize(x, addend, layer.attention_norm))
            addend = layer.out(self._attend(index, qkv, position))
            gate_up = layer.gate_up(self._normalize(x, addend, layer.ffn_norm))
            addend = layer.down(self._swiglu(gate_up))
        return self._head(self._normalize(x, addend, self.model.norm.weight))

    def _linear(self, module: nn.Linear) -> Linear:
        return module

    def _normalize(self, x: Tensor, addend: Tensor | None, gain: Tensor) -> Tensor:
        """RMSNorm of (B, C), to which the addend (B, C) is added in place before."""
        if addend is not None:
            x += addend
        return F.rms_norm(x, gain.shape, gain, self.config.norm_eps)

    def _attend(self, layer: int, qkv: Tensor, position: int) -> Tensor:
        """A position's queries, keys and values (B, 3 C) to (B, C): rotated, and with those of the cache."""
        heads = self.config.heads
        qkv = qkv.unflatten(-1, (3 * heads, -1))  # B, 3 H, D
        pairs = torch.view_as_complex(qkv[:, : 2 * heads].float().unflatten(-1, (-1, 2)))  # B, 2 H, D/2
        turned = torch.view_as_real(pairs * torch.view_as_complex(self._rotation[position])).flatten(-2).to(self.dtype)
        keys, values = self._keys[layer], self._values[layer]  # B, H, T, D
        keys[:, :, position], values[:, :, position] = turned[:, heads:], qkv[:, 2 * heads :]
        query, filled = turned[:, :heads, None], slice(position + 1)
        return F.scaled_dot_product_attention(query, keys[:, :, filled], values[:, :, filled]).flatten(1)

    def _swiglu(self, gate_up: Tensor) -> Tensor:
        """(B, 2 F) to (B, F)."""
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up


def is_partitioned(model: ARTransformer) -> bool:
    """Whether ZeRO 3 holds the weights: it gathers those of a module when that is called, and only then."""
    return hasattr(model.head.weight, "ds_id")
