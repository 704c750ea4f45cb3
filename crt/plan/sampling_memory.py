"""Memory of one process of `sample`, derived from the params.

Weights and caches are arithmetic; what drawing a code and decoding images need at once is followed on fake tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from crt.ar.generator import DTYPES, DrawSettings, draw_next
from crt.ar.model import ARConfig, count_parameters
from crt.params import Params
from crt.plan.live_bytes import LiveBytes
from crt.stages.sample import images_decoded_at_once
from crt.tokenizer.model import Tokenizer, TokenizerConfig


@dataclass(frozen=True)
class SamplingMemory:
    """Bytes of one process."""

    weights: int
    """Of the stage-2 model and the tokenizer."""
    cache_per_image: int
    """Keys and values of all layers and codes, of both sequences under guidance."""
    draw_per_image: int
    """Needed at once to draw one code."""
    decode: int
    """Needed at once to decode images, when all codes are drawn."""

    def peak(self, batch_size: int) -> int:
        """The fuller of the two moments, with so many images drawn at once."""
        return self.weights + batch_size * self.cache_per_image + max(batch_size * self.draw_per_image, self.decode)

    def largest_batch(self, available: int) -> int:
        """Images drawn at once that fit into `available` bytes; 0: the weights alone do not fit, or no image."""
        left = available - self.weights
        drawing = left // (self.cache_per_image + self.draw_per_image)
        return max(min(drawing, (left - self.decode) // self.cache_per_image), 0)


def sampling_memory(params: Params, config: ARConfig) -> SamplingMemory:
    """All of it; the guidance scale that needs most counts, as each scale is drawn by itself."""
    sample, stage1, dtype = params.sample, params.train_tokenizer, DTYPES[params.sample.precision]
    guided = any(scale != 1 for scale in sample.scales)
    sequences = 2 if guided else 1
    settings = DrawSettings(max(sample.scales), sample.temperature, sample.top_k, sample.top_p)
    with FakeTensorMode(), torch.device("cuda:0"), torch.no_grad():
        logits = torch.zeros(sequences, config.codebook_size, dtype=dtype)
        uniforms = torch.zeros(1, dtype=torch.float64)
        draw = _most_bytes(partial(draw_next, logits, uniforms, settings.guidance if guided else None, settings))
        tokenizer = Tokenizer(TokenizerConfig.from_params(stage1)).eval()
        images = min(images_decoded_at_once(stage1.image_size**2), sample.batch_size)
        values = torch.zeros(images, stage1.quantizer.codebook_dim, *tokenizer.grid)
        decode = _most_bytes(partial(tokenizer.reconstruct, values))
        tokenizer_bytes = sum(parameter.nbytes for parameter in tokenizer.parameters())
    return SamplingMemory(
        weights=dtype.itemsize * count_parameters(config) + tokenizer_bytes,
        cache_per_image=sequences * 2 * config.layers * config.num_tokens * config.width * dtype.itemsize,
        draw_per_image=logits.nbytes + draw,
        decode=decode,
    )


def _most_bytes(call: Callable[[], object]) -> int:
    """Held at once by what a call makes."""
    with LiveBytes() as live:
        call()
    return live.peak
