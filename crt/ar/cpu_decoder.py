"""Decoding on a CPU: linear layers by oneDNN, everything between them by kernels of ours.

Weights are in oneDNN's blocked layout, made once: plain ones are reordered at each call, which doubles the traffic.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from crt.ar.cpu_decoder_kernels import attention_kernel, norm_kernel, swiglu_kernel
from crt.ar.decoder import Decoder, Linear, is_partitioned
from crt.ar.model import ARTransformer
from crt.cpu import flat, share_among_threads

# A thread costs as much as some ten thousand elements of an activation.
_ELEMENTS_OF_A_THREAD = 2**16


class CPUDecoder(Decoder):
    """A `Decoder` of a model in float32 or bfloat16; the same bits with any number of threads between the products."""

    def __init__(self, model: ARTransformer) -> None:
        super().__init__(model)
        self._as_bits = self.dtype == torch.bfloat16
        self._turns = [flat(turn) for turn in self._rotation]
        self._scratch_size = self.config.num_tokens + 2 * self.config.head_width

    def _linear(self, module: nn.Linear) -> Linear:
        return _packed(module) if _can_pack(self.dtype) and not is_partitioned(self.model) else module

    def _normalize(self, x: Tensor, addend: Tensor | None, gain: Tensor) -> Tensor:
        out = torch.empty_like(x)
        added = x.new_empty(0) if addend is None else addend
        kernel = norm_kernel(x.shape[-1], self._as_bits)
        kernel(*(flat(t) for t in (x, added, gain, out)), np.uintp(len(x)), self.config.norm_eps)
        return out

    def _attend(self, layer: int, qkv: Tensor, position: int) -> Tensor:
        heads, width = self.config.heads, self.config.head_width
        kernel = attention_kernel(width, self._as_bits)
        out = torch.empty(len(qkv), heads * width, dtype=self.dtype)
        given, keys, values, target = (flat(t) for t in (qkv, self._keys[layer], self._values[layer], out))
        sizes = np.uintp(position), np.uintp(heads), np.uintp(self.config.num_tokens)

        def work(first: int, last: int) -> None:
            scratch = np.empty(self._scratch_size, np.float32)
            kernel(given, keys, values, self._turns[position], target, scratch, np.uintp(first), np.uintp(last), *sizes)

        share_among_threads(work, len(qkv) * heads, heads)
        return out

    def _swiglu(self, gate_up: Tensor) -> Tensor:
        width = gate_up.shape[-1] // 2
        kernel = swiglu_kernel(width, self._as_bits)
        out = torch.empty(len(gate_up), width, dtype=self.dtype)
        source, target = flat(gate_up), flat(out)
        share_among_threads(
            lambda first, last: kernel(source, target, np.uintp(first), np.uintp(last)),
            len(gate_up),
            -(-_ELEMENTS_OF_A_THREAD // width),
        )
        return out


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
