"""Decoding with a key-value cache: predictions of one code after the other, at the cost of one position each.

What bounds it is memory traffic: each code reads every weight once, and the keys and values of all codes before it.
So no cache grows or is copied along the sequence, and attention reads the filled part only, rounded up to a bucket of
`BUCKET` positions. This is the CPU's way, `crt.ar.gpu_decoder` the GPU's (without Triton, a GPU takes this one):

- weights are in oneDNN's blocked layout, made once: plain ones are reordered at each call, which doubles the traffic;
- attention is batched products over buckets that each lie in one piece: the fused kernel takes several times as long
  for a single query in bfloat16, and a product with a cut of a cache copies it.

Shapes: B sequences (images, twice as many under guidance), T codes, C width, H heads, D channels per head, K codes in
the codebook.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crt.ar.model import ARTransformer, Block

BUCKET = 64
Linear = Callable[[Tensor], Tensor]
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


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
        packs = self.device.type == "cpu" and _can_pack(self.dtype) and not is_partitioned(model)
        linear = _packed if packs else _plain
        self._layers = [
            _Layer(
                block.attention_norm.weight,
                linear(block.attention.qkv),
                linear(block.attention.out),
                block.ffn_norm.weight,
                linear(block.ffn.gate_up),
                linear(block.ffn.down),
            )
            for block in cast("list[Block]", list(model.blocks))
        ]
        self._head = linear(model.head)
        num_tokens = self.config.num_tokens
        self._bucket = min(BUCKET, num_tokens)
        self._buckets = -(-num_tokens // self._bucket)
        # Rotation as one product of complex numbers, into which the queries' scale goes as well: T, 2 H, D/2.
        turn = torch.view_as_complex(model.rotation(self.device))[:, None].expand(-1, self.config.heads, -1)
        self._turn = torch.cat((turn * self.config.head_width**-0.5, turn), dim=1)
        self.batch_size = 0

    def resize(self, batch_size: int) -> None:
        """Make room for so many sequences; caches of the right size are kept."""
        if batch_size == self.batch_size:
            return
        c, self.batch_size = self.config, batch_size
        self._keys = self._values = torch.empty(0)  # the old ones go before the new ones come
        shape = (c.layers, self._buckets, batch_size * c.heads, self._bucket, c.head_width)
        self._keys, self._values = (torch.zeros(shape, dtype=self.dtype, device=self.device) for _ in range(2))

    @torch.no_grad()
    def next_logits(self, previous: Tensor, position: int) -> Tensor:
        """Predictions of the code at `position` alone.

        Args:
            previous: (B,) int64: the labels at position 0, else the codes at `position - 1`.
            position: 0 to T - 1.

        Returns:
            (B, K), in the model's precision.
        """
        self.resize(len(previous))
        table = self.model.class_embedding if position == 0 else self.model.code_embedding
        bucket, place = divmod(position, self._bucket)

        def turn(qk: Tensor) -> Tensor:
            pairs = torch.view_as_complex(qk.float().unflatten(-1, (-1, 2)))  # B, 2 H, D/2
            return torch.view_as_real(pairs * self._turn[position]).flatten(-2).to(self.dtype)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = self._keys[layer], self._values[layer]  # buckets, B H, positions of a bucket, D
            keys[bucket, :, place] = k.flatten(0, 1)
            values[bucket, :, place] = v.flatten(0, 1)
            query = q.flatten(0, 1)[:, None]
            scores = [torch.bmm(query, piece.transpose(1, 2)) for piece in keys[: bucket + 1]]  # B H, 1, positions
            joined = torch.cat(scores, dim=-1).float()
            joined[..., position + 1 :] = -torch.inf
            weights = joined.softmax(-1).to(self.dtype).split(self._bucket, dim=-1)
            y = torch.bmm(weights[0], values[0])
            for share, piece in zip(weights[1:], values[1:], strict=False):
                y += torch.bmm(share, piece)
            return y.view_as(q)

        return self._forward(table(previous), turn, attend)

    def _forward(self, x: Tensor, turn: Linear, attend: Attend) -> Tensor:
        """(B, C) to (B, K); `turn` rotates (B, 2 H, D), `attend` makes (B, H, D) of a layer's index, q, k and v."""
        heads, eps = self.config.heads, self.config.norm_eps
        for index, layer in enumerate(self._layers):
            qkv = layer.qkv(normalize(x, layer.attention_norm, eps)).unflatten(-1, (3 * heads, -1))
            qk, v = qkv.split((2 * heads, heads), dim=1)
            q, k = turn(qk).chunk(2, dim=1)
            x = x + layer.out(attend(index, q, k, v).flatten(1))
            gate, up = layer.gate_up(normalize(x, layer.ffn_norm, eps)).chunk(2, dim=-1)
            x = x + layer.down(F.silu(gate) * up)
        return self._head(normalize(x, self.model.norm.weight, eps))


def normalize(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`F.rms_norm` of (B, C) over the channels in fewer kernels, which count at one position a call."""
    squares = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32).square_()
    return (x * squares.div_(x.shape[-1]).add_(eps).rsqrt_()).to(x.dtype) * weight


def is_partitioned(model: ARTransformer) -> bool:
    """Whether ZeRO 3 holds the weights: it gathers those of a module when that is called, and only then."""
    return hasattr(model.head.weight, "ds_id")


def _plain(module: nn.Linear) -> Linear:
    return module


def _packed(module: nn.Linear) -> Linear:
    """The product with a weight in oneDNN's own layout."""
    weight = torch.ops.mkldnn._reorder_linear_weight(module.weight.detach(), None)
    multiply = torch.ops.mkldnn._linear_pointwise
    return lambda x: multiply(x, weight, None, "none", [], "")


def _can_pack(dtype: torch.dtype) -> bool:
    """Whether torch was built with oneDNN, and the processor has its instructions for `dtype`."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    return dtype == torch.float32 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
