"""Decoding on a CPU: one kernel of ours for all layers of a step, run by all threads together.

A sequence has the same bits with any number of threads and whatever else is in the batch.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from crt.ar.cpu_decoder_kernels import Shape, draw_kernel, step_kernel
from crt.ar.cpu_product_kernels import Tile, in_panels, largest_tile
from crt.ar.model import ARTransformer, Block
from crt.cpu import flat
from crt.cpu_kernels import NO_WAITING

# Products and sums that are worth a thread: some ten microseconds of them.
_PRODUCTS_OF_A_THREAD = 2**20


class CPUDecoder:
    """A `Decoder` of a model in float32 or bfloat16, from a copy of its weights.

    Args:
        model: in evaluation mode.
        tile: the largest of the kernels; None: what serves this processor best.
    """

    def __init__(self, model: ARTransformer, tile: Tile | None = None) -> None:
        self.model, self.config = model, model.config
        self._dtype = model.head.weight.dtype
        self._largest = largest_tile(self._dtype) if tile is None else tile
        half = self._largest.panel // 2
        self._hidden_panels = -(-self.config.ffn_width // half)
        blocks = cast("list[Block]", list(model.blocks))
        hidden_width = self._hidden_panels * half
        self._weights = (
            _joined((in_panels(b.attention.qkv.weight, self._largest) for b in blocks), len(blocks)),
            _joined((in_panels(b.attention.out.weight, self._largest) for b in blocks), len(blocks)),
            _joined((in_panels(_by_halves(b.ffn.gate_up.weight, half), self._largest) for b in blocks), len(blocks)),
            _joined((in_panels(b.ffn.down.weight, self._largest, hidden_width) for b in blocks), len(blocks)),
            _joined([in_panels(model.head.weight, self._largest)], 1),
        )
        norms = [norm for block in blocks for norm in (block.attention_norm, block.ffn_norm)] + [model.norm]
        self._gains = flat(torch.cat([norm.weight.float() for norm in norms]))
        self._turns = model.rotation(torch.device("cpu")).flatten(1).numpy()  # T, D
        self.batch_size = 0

    def resize(self, batch_size: int) -> None:
        """Set the number of sequences; a new one costs new caches."""
        if batch_size == self.batch_size:
            return
        c, self.batch_size = self.config, batch_size
        tiles = -(-batch_size // self._largest.rows)
        tile = self._largest._replace(rows=-(-batch_size // tiles))  # the fewest rows in vain
        as_bits = self._dtype == torch.bfloat16
        self._step = step_kernel(Shape(c.heads, c.head_width, tile, -(-tile.vectors // tiles), as_bits))
        self._caches: tuple[NDArray[Any], ...] = ()  # the old ones go before the new ones come
        size = c.layers * batch_size * c.num_tokens * c.width
        self._caches = tuple(np.zeros(size, np.uint16 if as_bits else np.float32) for _ in range(2))
        mixed, hidden = (
            np.zeros(tiles * tile.rows * tile.words(channels), np.uint32)
            for channels in (c.width, self._hidden_panels * tile.panel // 2)
        )
        self._arrays = mixed, np.empty(batch_size * 3 * c.width, np.float32), hidden
        products = batch_size * sum(weight.size for weight in self._weights)
        self._threads = max(1, min(torch.get_num_threads(), products // _PRODUCTS_OF_A_THREAD))
        needed = max(2 * c.head_width + c.num_tokens, c.width, tile.rows * tile.panel)
        self._scratch = np.empty(self._threads * -(-needed // 16) * 16, np.float32)
        # Its own: threads that wait for each other must all be there.
        self._pool = ThreadPoolExecutor(max(self._threads - 1, 1), "crt")

    def next_logits(self, previous: Tensor, position: int) -> Tensor:
        """Predictions for the code at a position, as of `Decoder`, in float32."""
        logits = torch.empty(len(previous), self.config.codebook_size)
        self._run(previous, position, flat(logits), None)
        return logits

    def next_codes(
        self, previous: Tensor, position: int, uniforms: Tensor, scale: float | None, temperature: float
    ) -> Tensor:
        """The codes at a position, drawn among all of the codebook: `crt.ar.generator.draw_next` of the predictions.

        Args:
            previous, position: as of `next_logits`; with a scale, first the sequences with classes, then those without.
            uniforms: (B,) float64 in [0, 1), one for each image.
            scale: of guidance; None: no unconditional half.
            temperature: divides the logits.

        Returns:
            (B,) int64.
        """
        codes = torch.empty(len(uniforms), dtype=torch.int64)
        logits = np.empty(len(previous) * self.config.codebook_size, np.float32)
        settings = scale is not None, np.float32(scale or 1), np.float32(temperature)
        self._run(previous, position, logits, (flat(uniforms.contiguous()), flat(codes), *settings))
        return codes

    @torch.no_grad()
    def _run(
        self, previous: Tensor, position: int, logits: NDArray[np.float32], drawing: tuple[Any, ...] | None
    ) -> None:
        """Have all threads fill the logits (B K,), and draw if told how."""
        self.resize(len(previous))
        c = self.config
        table = self.model.class_embedding if position == 0 else self.model.code_embedding
        x = flat(table(previous).float())
        mixed, qkv, hidden = self._arrays
        arrived: NDArray[np.int64] = np.zeros(1, np.int64)
        sizes = c.layers, position, c.num_tokens, c.codebook_size, self._hidden_panels

        def work(thread: int) -> None:
            try:
                self._step(
                    thread, self._threads, arrived, self._weights, self._gains, *self._caches,
                    self._turns[position], (x, mixed, qkv, hidden, logits), self._scratch, sizes, c.norm_eps,
                )  # fmt: skip
                if drawing is not None:
                    draw_kernel(thread, self._threads, arrived, logits, *drawing)
            except BaseException:  # Ctrl-C among them
                arrived[0] = NO_WAITING
                raise

        try:
            others = [self._pool.submit(work, thread) for thread in range(1, self._threads)]
            work(0)
        except BaseException:
            arrived[0] = NO_WAITING
            raise
        for other in others:
            other.result()


def _joined(weights: Iterable[Tensor], count: int) -> NDArray[Any]:
    """Those of all layers, which are of one size, in one array; one at a time beside it.

    NumPy asks for huge pages, torch does not: a stream of weights is a tenth faster on them.
    """
    joined: NDArray[Any] = np.empty(0)
    for index, weight in enumerate(map(flat, weights)):
        if not index:
            joined = np.empty(count * weight.size, weight.dtype)
        joined[index * weight.size : (index + 1) * weight.size] = weight
    return joined


def _by_halves(weight: Tensor, half: int) -> Tensor:
    """Gates and what passes them (2 F, K), in turns of `half` rows, filled up with zeros."""
    gates, ups = weight.detach().chunk(2)
    missing = -len(gates) % half
    parts = (F.pad(part, (0, 0, 0, missing)).unflatten(0, (-1, half)) for part in (gates, ups))
    return torch.stack(tuple(parts), dim=1).flatten(0, 2)
