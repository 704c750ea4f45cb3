"""Decoding with a key-value cache: predictions of one code after the other, at the cost of one position each.

What bounds it is memory traffic: each code reads every weight once, and the keys and values of all codes before it.
So no cache grows or is copied along the sequence, and attention reads the filled part only. This is the CPU's way,
`crt.ar.gpu_decoder` the GPU's (without Triton, a GPU takes this one):

- weights are in oneDNN's blocked layout, made once: plain ones are reordered at each call, which doubles the traffic;
- attention, from the products of queries, keys and values on, is one kernel of ours on a CPU
  (`crt.ar.attention_kernels`), and torch's own elsewhere.

Shapes: B sequences (images, twice as many under guidance), T codes, C width, H heads, D channels per head, K codes in
the codebook.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crt import cpu
from crt.ar.attention_kernels import attention_kernel
from crt.ar.model import ARTransformer, Block

Linear = Callable[[Tensor], Tensor]
Attend = Callable[[int, Tensor], Tensor]


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
        self._rotation = model.rotation(self.device)  # T, D/2, 2
        self.batch_size = 0

    def resize(self, batch_size: int) -> None:
        """Make room for so many sequences; caches of the right size are kept."""
        if batch_size == self.batch_size:
            return
        c, self.batch_size = self.config, batch_size
        self._keys = self._values = torch.empty(0)  # the old ones go before the new ones come
        shape = (c.layers, batch_size, c.heads, c.num_tokens, c.head_width)
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
        attend = self._attend_on_cpu if self.device.type == "cpu" else self._attend
        return self._forward(table(previous), lambda layer, qkv: attend(layer, qkv, position))

    def _attend(self, layer: int, qkv: Tensor, position: int) -> Tensor:
        """A position's queries, keys and values (B, 3 H, D) to (B, H, D), rotated, and with those in the cache."""
        heads = self.config.heads
        pairs = torch.view_as_complex(qkv[:, : 2 * heads].float().unflatten(-1, (-1, 2)))  # B, 2 H, D/2
        turned = torch.view_as_real(pairs * torch.view_as_complex(self._rotation[position])).flatten(-2).to(self.dtype)
        keys, values = self._keys[layer], self._values[layer]  # B, H, T, D
        keys[:, :, position], values[:, :, position] = turned[:, heads:], qkv[:, 2 * heads :]
        query, filled = turned[:, :heads, None], slice(position + 1)
        return F.scaled_dot_product_attention(query, keys[:, :, filled], values[:, :, filled])[:, :, 0]

    def _attend_on_cpu(self, layer: int, qkv: Tensor, position: int) -> Tensor:
        """`_attend` by one kernel, whose rows the threads share."""
        heads, width = self.config.heads, self.config.head_width
        as_bits = self.dtype == torch.bfloat16
        kernel = attention_kernel(width, as_bits)
        out = torch.empty(len(qkv), heads, width, dtype=self.dtype)
        arrays = [_flat(tensor, as_bits) for tensor in (qkv, self._keys[layer], self._values[layer])]
        arrays += [_flat(self._rotation[position], False), _flat(out, as_bits)]
        sizes = (np.uintp(position), np.uintp(heads), np.uintp(self.config.num_tokens))

        def work(first: int, last: int) -> None:
            scratch = np.empty(self.config.num_tokens + 2 * width, np.float32)
            kernel(*arrays, scratch, np.uintp(first), np.uintp(last), *sizes)

        cpu.share_among_threads(work, len(qkv) * heads, heads)
        return out

    def _forward(self, x: Tensor, attend: Attend) -> Tensor:
        """(B, C) to (B, K); `attend` makes (B, H, D) of a layer's index and (B, 3 H, D)."""
        heads, eps = self.config.heads, self.config.norm_eps
        for index, layer in enumerate(self._layers):
            qkv = layer.qkv(normalize(x, layer.attention_norm, eps)).unflatten(-1, (3 * heads, -1))
            x = x + layer.out(attend(index, qkv).flatten(1))
            gate, up = layer.gate_up(normalize(x, layer.ffn_norm, eps)).chunk(2, dim=-1)
            x = x + layer.down(F.silu(gate) * up)
        return self._head(normalize(x, self.model.norm.weight, eps))


def _flat(tensor: Tensor, as_bits: bool) -> np.ndarray:
    """The memory of a tensor; bfloat16, which numpy does not know, as uint16."""
    return (tensor.view(torch.uint16) if as_bits else tensor).numpy().reshape(-1)


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
