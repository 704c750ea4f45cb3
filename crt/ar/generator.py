"""Drawing codes from a trained stage-2 model, with classifier-free guidance and a key-value cache.

    from crt.ar.generator import Generator
    codes = Generator.load("out/ar").generate(labels=[0, 1, 2], guidance=2.0, seed=0)

Order of the operations on the logits: guidance, temperature, top-k, top-p, softmax, draw (as in LlamaGen).

What is reproducible: image `index` is drawn with its own T uniform numbers, a function of (seed, index), by inverting
the cumulative distribution of each code. So the batch's composition, the order, the number of processes and restarts
change no draw. The distribution itself is computed to the rounding of the precision, and matrix products round
differently at another batch size, number of threads or device. With those three fixed, an image is the same bit for
bit. In float32, changing one of them moves the cumulative distribution by about 1e-6, so that a draw that falls this
close to a boundary between two codes comes out differently: an image in thousands. In bfloat16 it moves it by about
1e-2, and many images differ in some codes (each is as good a draw). `generate` fills its last batch up, so that all
batches of one call have one size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from crt.ar.model import ARConfig, ARTransformer, load_model
from crt.errors import UserError
from crt.randomness import numpy_generator

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}


class Generator:
    """A trained model, ready to draw codes.

    Args:
        model: in evaluation mode, on the device and in the precision that it shall run in.
    """

    def __init__(self, model: ARTransformer) -> None:
        self.model = model

    @classmethod
    def load(
        cls, folder: str | Path, precision: str = "float32", device: str | torch.device | None = None
    ) -> Generator:
        """Read the output folder of `train_ar` or `import_llamagen`.

        Args:
            folder: holds config.json and model.safetensors.
            precision: "float32" or "bf16", of weights, activations and cache.
            device: None: the GPU if there is one.

        Raises:
            UserError: the folder is missing, damaged, or holds something else.
        """
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        return cls(load_model(folder, DTYPES[precision], device))

    @property
    def config(self) -> ARConfig:
        """Sizes of the model, and what its codes and classes stand for."""
        return self.model.config

    def generate(
        self,
        labels: Sequence[int] | np.ndarray | Tensor,
        guidance: float = 1.0,
        seed: int = 0,
        *,
        first_index: int = 0,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        batch_size: int | None = None,
    ) -> Tensor:
        """Draw the codes of one image per label.

        Args:
            labels: (B,) class indices.
            guidance: scale s of classifier-free guidance; 1 turns it off, and with it the unconditional pass.
            seed: of the draws.
            first_index: the images are numbers first_index, first_index + 1, ... of the seed.
            temperature: divides the logits.
            top_k: draw among the k most likely codes; 0: among all.
            top_p: draw among the fewest codes whose probabilities sum to p or more; 1: among all.
            batch_size: images in one pass; None: all at once.

        Returns:
            (B, T) int64 codes in raster order, on the CPU.

        Raises:
            UserError: a label that is no class of the model, or a setting out of range.
        """
        wanted = self._check_labels(labels)
        settings = DrawSettings(guidance, temperature, top_k, top_p)
        settings.check(self.config.codebook_size)
        size = batch_size or max(len(wanted), 1)
        drawn = torch.empty((len(wanted), self.config.num_tokens), dtype=torch.int64)
        for start in range(0, len(wanted), size):
            batch = wanted[start : start + size]
            padded = torch.cat((batch, batch[-1:].expand(size - len(batch))))
            codes = self._generate_batch(padded, settings, seed, first_index + start)
            drawn[start : start + len(batch)] = codes[: len(batch)]
        return drawn

    @torch.no_grad()
    def _generate_batch(self, labels: Tensor, settings: DrawSettings, seed: int, first_index: int) -> Tensor:
        """(B,) labels to (B, T) codes on the CPU."""
        device = self.model.head.weight.device
        num_images, num_tokens = len(labels), self.config.num_tokens
        uniforms = image_uniforms(seed, range(first_index, first_index + num_images), num_tokens).to(device)
        previous = labels.to(device)
        if settings.guided:
            previous = torch.cat((previous, torch.full_like(previous, self.config.null_class)))
        cache = self.model.empty_cache(len(previous))
        codes = torch.empty((num_images, num_tokens), dtype=torch.int64, device=device)
        for position in range(num_tokens):
            logits = self.model.next_logits(previous, position, cache).float()
            if settings.guided:
                conditional, unconditional = logits.chunk(2)
                logits = unconditional + settings.guidance * (conditional - unconditional)
            probabilities = distribution(logits, settings.temperature, settings.top_k, settings.top_p)
            code = draw(probabilities, uniforms[:, position])
            codes[:, position] = code
            previous = torch.cat((code, code)) if settings.guided else code
        return codes.cpu()

    def _check_labels(self, labels: Sequence[int] | np.ndarray | Tensor) -> Tensor:
        wanted = torch.as_tensor(labels, dtype=torch.int64).reshape(-1)
        wrong = wanted[(wanted < 0) | (wanted >= self.config.num_classes)]
        if len(wrong):
            raise UserError(f"label {int(wrong[0])}: the model has classes 0 to {self.config.num_classes - 1}")
        return wanted


@dataclass(frozen=True)
class DrawSettings:
    """From logits to draws; see `Generator.generate`."""

    guidance: float
    temperature: float
    top_k: int
    top_p: float

    @property
    def guided(self) -> bool:
        """Whether an unconditional pass is needed."""
        return self.guidance != 1.0

    def check(self, codebook_size: int) -> None:
        """Refuse what makes no distribution.

        Raises:
            UserError: a setting is out of range.
        """
        if not self.guidance >= 1:
            raise UserError(f"guidance {self.guidance}: must be 1 (none) or more")
        if not self.temperature > 0:
            raise UserError(f"temperature {self.temperature}: must be greater than 0")
        if not 0 <= self.top_k <= codebook_size:
            raise UserError(f"top_k {self.top_k}: must be 0 (off) to the codebook's size {codebook_size}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p {self.top_p}: must be greater than 0 and at most 1 (off)")


def image_uniforms(seed: int, indices: Sequence[int], num_tokens: int) -> Tensor:
    """The uniform numbers in [0, 1) that draw the codes of images `indices`: (B, T) float64."""
    return torch.from_numpy(np.stack([numpy_generator(seed, "sample", i).random(num_tokens) for i in indices]))


def distribution(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """Probabilities of the next code.

    Args:
        logits: (B, K) float32.
        temperature: divides the logits.
        top_k: keep the k largest logits (and those equal to the k-th); 0 keeps all.
        top_p: of what is left, keep the fewest codes, most likely first, whose probabilities reach p; 1 keeps all.

    Returns:
        (B, K), exactly 0 for what is not kept.
    """
    logits = logits / temperature
    if top_k:
        smallest = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        probabilities = ordered.softmax(-1)
        before = probabilities.cumsum(-1) - probabilities
        ordered = ordered.masked_fill(before >= top_p, -torch.inf)
        logits = torch.empty_like(logits).scatter_(-1, order, ordered)
    return logits.softmax(-1)


def draw(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """The first code whose cumulative probability exceeds the uniform number.

    Args:
        probabilities: (B, K), not necessarily summing to exactly 1.
        uniforms: (B,) float64 in [0, 1).

    Returns:
        (B,) int64; never a code of probability 0.
    """
    cumulative = probabilities.double().cumsum(-1)
    total = cumulative[:, -1:]
    # u * total may round up to total, beyond the last code: step below it.
    target = torch.minimum(uniforms[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, target, right=True)[:, 0]
