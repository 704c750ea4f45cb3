"""Sampling steps on a GPU: compiled, and recorded as CUDA graphs, so that no kernel waits for Python.

A step reads and writes fixed buffers only: the codes drawn last, the position, the caches. One graph stands for all
positions of a bucket of `crt.ar.decoder.BUCKET`, as attention reads the cache up to the bucket's end.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from crt.ar.decoder import BUCKET, Decoder

# Kernels choose their launch parameters in their first calls, which a recording must not see.
_WARMUP_CALLS = 3
Draw = Callable[[Tensor, Tensor, Tensor], Tensor]


class SteppedBatch:
    """The buffers of one batch, and the step on them; runs on any device, which is how it is tested.

    Args:
        decoder: with the model.
        num_images: images of the batch.
        num_sequences: twice as many under guidance.
        draw: logits (num_sequences, K), uniforms (num_images,) and scale () to codes (num_images,).
    """

    def __init__(self, decoder: Decoder, num_images: int, num_sequences: int, draw: Draw) -> None:
        self.decoder, self.draw, self.copies = decoder, draw, num_sequences // num_images
        device, num_tokens = decoder.device, decoder.config.num_tokens
        self.num_tokens = num_tokens
        self.previous = torch.zeros(num_sequences, dtype=torch.int64, device=device)
        self.position = torch.zeros(1, dtype=torch.int64, device=device)
        self.uniforms = torch.zeros((num_images, num_tokens), dtype=torch.float64, device=device)
        self.scales = torch.ones(num_tokens, device=device)
        self.codes = torch.zeros((num_images, num_tokens), dtype=torch.int64, device=device)
        decoder.resize(num_sequences)

    def begin(self, previous: Tensor, uniforms: Tensor, scales: Tensor) -> None:
        """Set the buffers for the first position."""
        self.previous.copy_(previous)
        self.uniforms.copy_(uniforms)
        self.scales.copy_(scales)
        self.position.zero_()

    def step(self, length: int, first: bool = False) -> None:
        """Draw the codes of one position and go on to the next; attention reads `length` positions of the cache."""
        logits = self.decoder.logits_at(self.previous, self.position, length, first)
        uniforms = self.uniforms.index_select(1, self.position)[:, 0]
        code = self.draw(logits, uniforms, self.scales.index_select(0, self.position)[0])
        self.codes.index_copy_(1, self.position, code[:, None])
        self.previous.copy_(code.repeat(self.copies))
        self.position.add_(1)

    def lengths(self) -> list[int]:
        """Where the buckets end."""
        return [min(stop, self.num_tokens) for stop in range(BUCKET, self.num_tokens + BUCKET, BUCKET)]


class GraphedSteps:
    """A batch whose steps are compiled and recorded.

    Args:
        decoder: on a GPU.
        num_images: images of a batch.
        num_sequences: twice as many under guidance.
        draw: see `SteppedBatch`.
        key: what the recording is good for; kept for the caller.
    """

    def __init__(self, decoder: Decoder, num_images: int, num_sequences: int, draw: Draw, key: tuple) -> None:
        self.key = key
        self._batch = SteppedBatch(decoder, num_images, num_sequences, draw)
        step = torch.compile(self._batch.step, fullgraph=True, dynamic=False)
        self._graphs = {length: self._record(step, length) for length in self._batch.lengths()}

    def run(self, previous: Tensor, uniforms: Tensor, scales: Tensor) -> Tensor:
        """Labels (num_sequences,), uniforms (num_images, T) and scales (T,) to codes (num_images, T)."""
        self._batch.begin(previous, uniforms, scales)
        # The first step reads labels and is not worth a graph of its own.
        self._batch.step(1, first=True)
        lengths = iter(self._graphs)
        length = next(lengths)
        for position in range(1, self._batch.num_tokens):
            if position >= length:
                length = next(lengths)
            self._graphs[length].replay()
        return self._batch.codes

    def _record(self, step: Callable[[int], None], length: int) -> torch.cuda.CUDAGraph:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARMUP_CALLS):
                self._batch.position.fill_(length - 1)
                step(length)
        torch.cuda.current_stream().wait_stream(stream)
        self._batch.position.fill_(length - 1)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step(length)
        return graph
