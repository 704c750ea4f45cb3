"""Sampling steps on a GPU: our kernels on fixed buffers, recorded as a CUDA graph so that none waits for Python.

A step reads and writes fixed buffers only: the codes drawn last, the position, the caches. All positions after the
first share one graph, as the kernels (`crt.ar.gpu_decoder_kernels`, which need Triton) read the position from memory.

Shapes: B images, M sequences (as many, or twice as many under guidance), T codes of an image, C width, K codes in the
codebook.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from crt.ar import gpu_decoder_kernels as kernels
from crt.ar.model import ARTransformer, Block

# Kernels are loaded, and libraries choose theirs, in first calls, which a recording must not see.
_WARMUP_CALLS = 2
Draw = Callable[[Tensor, Tensor, Tensor], Tensor]


class GPUDecoder:
    """Decodes batches of one size: the buffers of a batch, and the step on them.

    Args:
        model: in evaluation mode, on a GPU (or anywhere in Triton's interpreter, which is how it is tested).
        num_images: B.
        num_sequences: M.
        temperature: divides the logits of a draw among all codes.
        draw: any other draw: logits (M, K), uniforms (B,) and scale () to codes (B,).
        key: what the batch is good for; kept for the caller.
    """

    def __init__(
        self,
        model: ARTransformer,
        num_images: int,
        num_sequences: int,
        *,
        temperature: float = 1.0,
        draw: Draw | None = None,
        key: tuple = (),
    ) -> None:
        self.model, self.key, self._temperature, self._draw = model, key, temperature, draw
        c, weight = model.config, model.head.weight
        device, self.num_tokens = weight.device, c.num_tokens
        self._copies = num_sequences // num_images
        self.previous = torch.zeros(num_sequences, dtype=torch.int64, device=device)
        self.position = torch.zeros(1, dtype=torch.int64, device=device)
        self.uniforms = torch.zeros((num_images, c.num_tokens), dtype=torch.float64, device=device)
        self.scales = torch.ones(c.num_tokens, device=device)
        self.codes = torch.zeros((num_images, c.num_tokens), dtype=torch.int64, device=device)
        shape = (c.layers, num_sequences, c.heads, c.num_tokens, c.head_width)
        self._keys, self._values = (torch.zeros(shape, dtype=weight.dtype, device=device) for _ in range(2))
        self._rotation = model.rotation(device)  # T, D/2, 2
        self._graph: torch.cuda.CUDAGraph | None = None

    @torch.no_grad()
    def run(self, previous: Tensor, uniforms: Tensor, scales: Tensor) -> Tensor:
        """Labels (M,), uniforms (B, T) and scales (T,) to codes (B, T)."""
        with self._device():
            self.previous.copy_(previous)
            self.uniforms.copy_(uniforms)
            self.scales.copy_(scales)
            self.position.zero_()
            # The first step reads labels and is not worth a graph of its own.
            self.step(first=True)
            for _ in range(1, self.num_tokens):
                if self._graph is None:
                    self.step()
                else:
                    self._graph.replay()
        return self.codes

    @torch.no_grad()
    def record(self) -> None:
        """Let `run` replay a graph from now on."""
        with self._device():
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(_WARMUP_CALLS):
                    self.position.zero_()
                    self.step()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.step()
        self._graph = graph

    def step(self, first: bool = False) -> None:
        """Draw the codes of one position and go on to the next.

        Args:
            first: whether `previous` holds labels.
        """
        logits = self.logits(first)
        if self._draw is None:
            kernels.draw(
                logits, self.uniforms, self.scales, self.position,
                codes=self.codes, previous=self.previous, temperature=self._temperature,
            )  # fmt: skip
        else:
            uniforms = self.uniforms.index_select(1, self.position)[:, 0]
            code = self._draw(logits, uniforms, self.scales.index_select(0, self.position)[0])
            self.codes.index_copy_(1, self.position, code[:, None])
            self.previous.copy_(code.repeat(self._copies))
        self.position.add_(1)

    def logits(self, first: bool = False) -> Tensor:
        """Predictions (M, K) of the codes at `position`, from the labels or the codes before."""
        table = self.model.class_embedding if first else self.model.code_embedding
        x = table(self.previous)
        return self._few(x) if len(x) <= kernels.FEW else self._many(x)

    def _few(self, x: Tensor) -> Tensor:
        eps = self.model.config.norm_eps
        for block, keys, values in zip(self._blocks(), self._keys, self._values, strict=True):
            attention, ffn = block.attention, block.ffn
            qkv = kernels.linear(x, attention.qkv.weight, gain=block.attention_norm.weight, eps=eps)
            y = kernels.attend(qkv, self._rotation, keys, values, position=self.position)
            kernels.linear(y, attention.out.weight, residual=x)
            y = kernels.linear(x, ffn.gate_up.weight, gain=block.ffn_norm.weight, eps=eps, gated=True)
            kernels.linear(y, ffn.down.weight, residual=x)
        return kernels.linear(x, self.model.head.weight, gain=self.model.norm.weight, eps=eps)

    def _many(self, x: Tensor) -> Tensor:
        eps, branch = self.model.config.norm_eps, None  # what the residual stream still lacks
        for block, keys, values in zip(self._blocks(), self._keys, self._values, strict=True):
            attention, ffn = block.attention, block.ffn
            qkv = F.linear(kernels.norm(x, block.attention_norm.weight, eps, branch), attention.qkv.weight)
            y = kernels.attend(qkv, self._rotation, keys, values, position=self.position)
            branch = F.linear(y, attention.out.weight)
            y = kernels.swiglu(F.linear(kernels.norm(x, block.ffn_norm.weight, eps, branch), ffn.gate_up.weight))
            branch = F.linear(y, ffn.down.weight)
        return F.linear(kernels.norm(x, self.model.norm.weight, eps, branch), self.model.head.weight)

    def _device(self) -> AbstractContextManager:
        # Triton launches on the current GPU, wherever its tensors are.
        return torch.cuda.device_of(self.position)

    def _blocks(self) -> list[Block]:
        return cast("list[Block]", list(self.model.blocks))
