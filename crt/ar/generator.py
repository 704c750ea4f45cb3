"""Drawing codes from a trained stage-2 model, with classifier-free guidance and a key-value cache.

    from crt.ar.generator import Generator
    codes = Generator.load("out/ar").generate(labels=[0, 1, 2], guidance=2.0, seed=0)

Order of the operations on the logits: guidance, temperature, top-k, top-p, softmax, draw (as in LlamaGen).

What is reproducible: image `index` is drawn with its own T uniform numbers, a function of (seed, index), by inverting
the cumulative distribution of each code. So the batch's composition, the order, the number of processes and restarts
change no draw. The distribution itself is computed to the rounding of the precision. On a CPU it is the same bit for
bit whatever the batch and the number of threads, and so is the image; but for small models (`_LEAST_PRODUCTS`) and
partitioned ones. Elsewhere matrix products round differently at another batch size, number of threads or device; with
those three fixed, an image is the same bit for bit. In float32, changing one of them moves the cumulative distribution
by about 1e-6, so that a draw that falls this close to a boundary between two codes comes out differently: an image in
thousands. In bfloat16 it moves it by about 1e-2, and many images differ in some codes (each is as good a draw).
`generate` fills its last batch up, so that all batches of one call have one size.
"""

from __future__ import annotations

import math
import operator
import reprlib
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from crt.ar.decoder import Decoder, is_partitioned
from crt.ar.model import ARConfig, ARTransformer, load_model
from crt.cpu import is_cpu
from crt.errors import UserError
from crt.model_files import usable_device
from crt.params import LEAST_TEMPERATURE, MOST_GUIDANCE
from crt.randomness import numpy_generator
from crt.threads import alone

if TYPE_CHECKING:
    from crt.ar.cpu_decoder import CPUDecoder
    from crt.ar.gpu_decoder import GPUDecoder

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}
# Of an image: for fewer no kernels are compiled on a CPU, which takes 4 s; such a model draws hundreds of images in it.
_LEAST_PRODUCTS = 2**28
# Share of the guidance at a share x of the sequence.
GUIDANCE_SCHEDULES: dict[str, Callable[[Tensor], Tensor]] = {
    "constant": torch.ones_like,
    "linear": lambda x: x,
    "cosine": lambda x: (1 - torch.cos(torch.pi * x)) / 2,
}


class Generator:
    """A trained model, ready to draw codes.

    Each call of `generate` takes the model's weights as they then are, in their own precision, also under autocast.
    Several threads may call it at once; pickled or copied, it takes its model along.

    Args:
        model: in evaluation mode, on the device and in the precision that it shall run in.
        compile: on a GPU, record a step as a CUDA graph: seconds at first, several times faster then.
    """

    def __init__(self, model: ARTransformer, compile: bool = False) -> None:
        self.model = model
        self.compile = compile
        self._gpu_decoder: GPUDecoder | None = None
        self._decoding = threading.Lock()  # all that use its buffers

    def __reduce__(self) -> tuple[type[Generator], tuple[ARTransformer, bool]]:
        # Buffers, graphs and locks belong to one process.
        return type(self), (self.model, self.compile)

    @classmethod
    def load(
        cls,
        folder: str | Path,
        precision: str = "float32",
        device: str | torch.device | None = None,
        compile: bool = False,
    ) -> Generator:
        """Read the output folder of `train_ar` or `import_llamagen`.

        Args:
            folder: holds config.json and model.safetensors.
            precision: "float32" or "bf16", of weights, activations and cache.
            device: None: the GPU if there is one.
            compile: see the class.

        Raises:
            UserError: the folder is missing, damaged, or holds something else; or a precision or device that there is
                not.
        """
        if precision not in list(DTYPES):
            raise UserError(f"precision {_short(precision)}: use one of {', '.join(DTYPES)}")
        device = usable_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        return cls(load_model(folder, DTYPES[precision], device), compile)

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
        guidance_schedule: str = "constant",
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        batch_size: int | None = None,
    ) -> Tensor:
        """Draw the codes of one image per label.

        Args:
            labels: (B,) class indices; none make no images.
            guidance: scale s of classifier-free guidance; 1 turns it off, and with it the unconditional pass.
            seed: of the draws.
            first_index: the images are numbers first_index, first_index + 1, ... of the seed.
            guidance_schedule: how the scale runs over the positions, see `guidance_scales`.
            guidance_interval: shares of the sequence between which there is guidance.
            temperature: divides the logits.
            top_k: draw among the k most likely codes; 0: among all.
            top_p: draw among the fewest codes whose probabilities sum to p or more; 1: among all.
            batch_size: images in one pass; None: all at once.

        Returns:
            (B, T) int64 codes in raster order, on the CPU.

        Raises:
            UserError: a label that is not a class of the model, a setting of another type or out of range, or, on a
                CPU, weights that make no numbers.
        """
        wanted = self._check_labels(labels)
        settings = DrawSettings(
            _number("guidance", guidance),
            _number("temperature", temperature),
            _integer("top_k", top_k),
            _number("top_p", top_p),
            guidance_schedule,
            _interval(guidance_interval),
        )
        settings.check(self.config.codebook_size)
        seed, first_index = _integer("seed", seed), _integer("first_index", first_index)
        for name, value in (("seed", seed), ("first_index", first_index)):
            if value < 0:
                raise UserError(f"{name} {value}: must be 0 or more")
        size = max(len(wanted), 1) if batch_size is None else _integer("batch_size", batch_size)
        if size < 1:
            raise UserError(f"batch_size {size}: must be 1 or more, or None for all images at once")
        device = self.model.head.weight.device
        # Tensors of inference mode could be neither written to nor trained with after it.
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
            # Made for this call: it copies weights, which may have changed since the last, and threads call at once.
            decoder = None if self._takes_kernels() else self._decoder()
            drawn = torch.empty((len(wanted), self.config.num_tokens), dtype=torch.int64, device="cpu")
            for start in range(0, len(wanted), size):
                batch = wanted[start : start + size]
                padded = torch.cat((batch, batch[-1:].expand(size - len(batch))))
                codes = self._generate_batch(padded, settings, seed, first_index + start, decoder)
                drawn[start : start + len(batch)] = codes[: len(batch)]
        return drawn

    def _generate_batch(
        self, labels: Tensor, settings: DrawSettings, seed: int, first_index: int, decoder: Decoder | CPUDecoder | None
    ) -> Tensor:
        """(B,) labels to (B, T) codes on the CPU; without a decoder by the kernels for GPUs."""
        device = self.model.head.weight.device
        num_images, num_tokens = len(labels), self.config.num_tokens
        uniforms = image_uniforms(seed, range(first_index, first_index + num_images), num_tokens).to(device)
        scales = guidance_scales(settings, num_tokens)
        guided = bool((scales != 1).any())
        previous = labels.to(device)
        if guided:
            previous = torch.cat((previous, torch.full_like(previous, self.config.null_class)))
        if decoder is None:
            with self._decoding:
                return self._gpu_decoder_for(num_images, guided, settings).run(previous, uniforms, scales).cpu()
        codes = torch.empty((num_images, num_tokens), dtype=torch.int64, device=device)
        for position in range(num_tokens):
            scale, uniform = scales[position].item() if guided else None, uniforms[:, position]
            if settings.among_all and not isinstance(decoder, Decoder):
                code = decoder.next_codes(previous, position, uniform, scale, settings.temperature)
            else:
                draw = partial(draw_next, decoder.next_logits(previous, position), uniform, scale, settings)
                code = draw() if isinstance(decoder, Decoder) else alone(draw)
            if device.type == "cpu" and int(code.max()) >= self.config.codebook_size:
                raise UserError("the model's predictions are no numbers: its training diverged: train it again")
            codes[:, position] = code
            previous = torch.cat((code, code)) if guided else code
        return codes.cpu()

    def _takes_kernels(self) -> bool:
        on_gpu = self.model.head.weight.device.type == "cuda" and find_spec("triton") is not None
        return on_gpu and not is_partitioned(self.model)

    def _decoder(self) -> Decoder | CPUDecoder:
        products = sum(weight.numel() for weight in self.model.parameters()) * self.config.num_tokens
        if not is_cpu(self.model.head.weight) or is_partitioned(self.model) or products < _LEAST_PRODUCTS:
            return Decoder(self.model)
        from crt.ar.cpu_decoder import CPUDecoder  # Numba takes a second to import

        return CPUDecoder(self.model)

    def _gpu_decoder_for(self, num_images: int, guided: bool, settings: DrawSettings) -> GPUDecoder:
        """Buffers and steps for a GPU; those of the last call where they serve again."""
        from crt.ar.gpu_decoder import GPUDecoder
        from crt.ar.gpu_decoder_kernels import DRAW_LIMIT

        def draw_step(logits: Tensor, uniform: Tensor, scale: Tensor) -> Tensor:
            return draw_next(logits, uniform, scale if guided else None, settings)

        # A recorded graph reads where the weights lay: what they are may change, not where.
        places = tuple((weight.data_ptr(), weight.dtype) for weight in self.model.parameters())
        key = (num_images, guided, settings.temperature, settings.top_k, settings.top_p, places)
        if self._gpu_decoder is None or self._gpu_decoder.key != key:
            self._gpu_decoder = None  # its buffers go first
            among_all = settings.among_all and self.config.codebook_size <= DRAW_LIMIT
            self._gpu_decoder = GPUDecoder(
                self.model,
                num_images,
                num_images * (2 if guided else 1),
                temperature=settings.temperature,
                draw=None if among_all else draw_step,
                key=key,
            )
            if self.compile:
                self._gpu_decoder.record()
        return self._gpu_decoder

    def _check_labels(self, labels: Sequence[int] | np.ndarray | Tensor) -> Tensor:
        try:
            given = labels.detach().cpu() if isinstance(labels, Tensor) else _as_tensor(np.asarray(labels))
        except (TypeError, ValueError):  # text, objects, rows of several lengths
            given = None
        if given is not None and given.shape == (0,):
            return given.long()
        if given is None or given.is_floating_point() or given.is_complex() or given.dtype == torch.bool:
            raise UserError(f"labels {_short(labels)}: must be integers, the classes of the images, such as [3, 7]")
        if given.ndim != 1:
            raise UserError(f"labels of shape {tuple(given.shape)}: must be one class per image, such as [3, 7]")
        wanted = given.long()
        wrong = wanted[(wanted < 0) | (wanted >= self.config.num_classes)]
        if len(wrong):
            raise UserError(f"label {int(wrong[0])}: the model has classes 0 to {self.config.num_classes - 1}")
        return wanted


def _as_tensor(array: np.ndarray) -> Tensor:
    # torch takes neither reversed arrays nor another byte order, and warns of read-only ones.
    return torch.from_numpy(array.astype(np.int64, order="C") if array.dtype.kind in "iu" else array)


def _short(value: object) -> str:
    """`value` in a message of one line."""
    return " ".join(reprlib.repr(value).split())


def _integer(name: str, value: Any) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise UserError(f"{name} {_short(value)}: must be an integer") from None


def _number(name: str, value: Any) -> float:
    try:
        return float(value + 0)  # text would become a number, but has no sum
    except (TypeError, ValueError, RuntimeError):
        raise UserError(f"{name} {_short(value)}: must be a number") from None


def _interval(value: Any) -> tuple[float, float]:
    try:
        start, stop = value
    except (TypeError, ValueError):
        raise UserError(f"guidance_interval {_short(value)}: must be two shares from 0 to 1, (start, stop)") from None
    return _number("guidance_interval", start), _number("guidance_interval", stop)


@dataclass(frozen=True)
class DrawSettings:
    """From logits to draws; see `Generator.generate`."""

    guidance: float
    temperature: float
    top_k: int
    top_p: float
    schedule: str = "constant"
    interval: tuple[float, float] = (0.0, 1.0)

    @property
    def among_all(self) -> bool:
        """Whether any code may be drawn."""
        return not self.top_k and self.top_p == 1

    def check(self, codebook_size: int) -> None:
        """Refuse what makes no distribution.

        Raises:
            UserError: a setting is out of range.
        """
        if not 1 <= self.guidance <= MOST_GUIDANCE:
            raise UserError(f"guidance {self.guidance}: must be 1 (none) to {MOST_GUIDANCE:g}")
        if self.schedule not in list(GUIDANCE_SCHEDULES):
            raise UserError(f"guidance schedule {self.schedule!r}: use one of {', '.join(GUIDANCE_SCHEDULES)}")
        start, stop = self.interval
        if not 0 <= start <= stop <= 1:
            raise UserError(f"guidance interval {list(self.interval)}: must be two ascending shares from 0 to 1")
        if not LEAST_TEMPERATURE <= self.temperature < math.inf:
            raise UserError(
                f"temperature {self.temperature}: must be finite, {LEAST_TEMPERATURE:g} (the likeliest code) or more"
            )
        if not 0 <= self.top_k <= codebook_size:
            raise UserError(f"top_k {self.top_k}: must be 0 (off) to the codebook's size {codebook_size}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p {self.top_p}: must be greater than 0 and at most 1 (off)")


def guidance_scales(settings: DrawSettings, num_tokens: int) -> Tensor:
    """The scale of classifier-free guidance at each position: (T,) float32; 1 is none.

    `constant` holds the scale s. The others grow from 1 at the first position to s at the last, for early codes fix the
    layout and suffer most from guidance: `linear` as in MAR (arXiv 2406.11838), `cosine` as in RAR (arXiv 2411.00776,
    with power 1, whose own last step falls a T-th short of s). Outside the interval (in shares of the sequence) the
    scale is 1.
    """
    position = torch.arange(num_tokens, dtype=torch.float64)
    progress = GUIDANCE_SCHEDULES[settings.schedule](position / max(num_tokens - 1, 1))
    scales = 1 + (settings.guidance - 1) * progress
    start, stop = settings.interval
    inside = (position >= start * num_tokens) & (position < stop * num_tokens)
    return torch.where(inside, scales, 1.0).float()


def draw_next(logits: Tensor, uniforms: Tensor, scale: Tensor | float | None, settings: DrawSettings) -> Tensor:
    """From predictions to the next codes, without a look at any value: it can be recorded on a GPU.

    Args:
        logits: (B, K), or with a scale (2 B, K): with classes first, then without.
        uniforms: (B,) float64 in [0, 1).
        scale: of guidance at this position; None: no unconditional half.
        settings: temperature, top-k and top-p.

    Returns:
        (B,) int64.
    """
    logits = logits.float()
    if scale is not None:
        conditional, unconditional = logits.chunk(2)
        logits = unconditional + scale * (conditional - unconditional)
    return draw(distribution(logits, settings.temperature, settings.top_k, settings.top_p), uniforms)


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
    if temperature != 1:
        logits = logits / temperature
    if top_k:
        smallest = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        probabilities = ordered.softmax(-1)
        before = probabilities.cumsum(-1) - probabilities
        # The likeliest code stays, also where p is 0 in float32.
        ordered = ordered.masked_fill((before >= top_p) & (before > 0), -torch.inf)
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
    cumulative = probabilities.cumsum(-1, dtype=torch.float64)
    total = cumulative[:, -1:]
    # u * total may round up to total, beyond the last code: step below it.
    target = torch.minimum(uniforms[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, target, right=True)[:, 0]
