"""Stage `sample`: class-conditional images, drawn code by code with classifier-free guidance and decoded.

Reads the tokenizer and the stage-2 model. Writes `samples.h5`: `images` (N, S, S, 3) uint8, `labels` (N,) int64 and
`codes` (N, T), with the settings and class names as attributes. By default image i has class i modulo the number of
classes. Each further scale of `sample.guidance_sweep` makes a file of its own, `samples_guidance_SCALE.h5`, drawn from
nothing but its own scale: the same file as if that were `guidance_scale`. `sample.export` adds other formats, see
`crt.evaluation.export`.

The images are made in chunks of `sample.batch_size`: chunk c holds the images from c * batch_size on, whoever makes it,
and the last one is drawn in full before it is cut. So an image depends on (seed, index) and on nothing that a restart
or the number of processes changes (see `crt.ar.generator` for what holds at another batch size), and the first images
of a larger run are those of a smaller one. Each chunk is safe on disk before the next one starts, and so is each file
that is made of them: stopped at any moment, the stage continues there and ends with the same bytes.

Cost: 2 x parameters FLOPs per code, twice that with guidance; from some hundred images in a batch on this bounds the
speed, below it reading the weights once per code does.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from crt.ar.generator import Generator
from crt.ar.model import ARConfig
from crt.chunks import ChunkStore
from crt.data.transforms import to_uint8
from crt.distributed import World, gpu_memory, join_world, reported_once
from crt.errors import UserError
from crt.evaluation.export import export_samples
from crt.files import replacing
from crt.hdf5_frame import hdf5_frame
from crt.params import Sample
from crt.precision import announce_precision, autocast
from crt.progress import Progress
from crt.stage import StageRun
from crt.tokenizer.model import Tokenizer

SAMPLES_FILE = "samples.h5"
SCHEMA = 1
# Pixels decoded at once: 16 images of 256 px. The decoder's activations need some thousand bytes for each.
_PIECE_PIXELS = 16 * 256 * 256


def run(run: StageRun) -> None:
    """Draw `sample.num_images` images.

    Raises:
        UserError: the model's codes are not the tokenizer's, a label is not a class of the model, or too little GPU
            memory.
        Stopped: a signal arrived at any process; finished chunks and files are kept.
    """
    params = run.params.sample
    remedy = "lower sample.batch_size, or set sample.precision to bf16"
    with join_world() as world, reported_once(world), gpu_memory(run.name, remedy):
        # Left to itself cuDNN may take algorithms that add in varying order: a chunk made again would be another.
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
        announce_precision(run.name, world.device, params.precision)
        generator = Generator.load(run.inputs["ar"], params.precision, world.device, params.compile)
        tokenizer = Tokenizer.load(run.inputs["tokenizer"], world.device)
        check_same_codes(generator.config, tokenizer, run.manifests["train_tokenizer"].content)
        check_labels(params, generator.config)
        for scale in params.scales:
            _draw_all(run, world, generator, tokenizer, scale)
    # The others do not wait for the files: tens of thousands of PNG outlast a collective's patience.
    if world.is_main:
        for scale in params.scales:
            path = run.staging / samples_file(params, scale)
            if not path.exists():  # complete or absent, as the exports are
                _write_samples(path, run, generator.config, scale)
            export_samples(path, params.export)
        run.summary.update({"num_images": params.num_images, "guidance_scale": params.guidance_scale})


def samples_file(params: Sample, scale: float) -> str:
    """Name of the file with the images drawn at a guidance scale."""
    return SAMPLES_FILE if scale == params.guidance_scale else f"samples_guidance_{scale}.h5"


def _draw_all(run: StageRun, world: World, generator: Generator, tokenizer: Tokenizer, scale: float) -> None:
    """Make the chunks of one guidance scale that are not there yet.

    Raises:
        Stopped: a signal arrived at any process.
    """
    params = run.params.sample

    def draw(start: int, stop: int) -> dict[str, np.ndarray]:
        indices = np.arange(start, start + params.batch_size)  # the last batch, too, is drawn in full before it is cut
        codes = generator.generate(
            labels_of(indices, params, generator.config),
            scale,
            run.params.seed,
            first_index=start,
            guidance_schedule=params.guidance_schedule,
            guidance_interval=tuple(params.guidance_interval),
            temperature=params.temperature,
            top_k=params.top_k,
            top_p=params.top_p,
        )
        images = decode(tokenizer, codes.to(world.device), generator.config.grid, params.precision)
        return {"codes": codes.numpy()[: stop - start], "images": images[: stop - start]}

    _chunks(run, scale).fill(f"sample at guidance {scale:g}" if params.guidance_sweep else "sample", draw, world)


def labels_of(indices: np.ndarray, params: Sample, config: ARConfig) -> np.ndarray:
    """The class of each image: `sample.labels` repeated, or all classes in turn: (B,) to (B,) int64."""
    wanted = np.arange(config.num_classes) if params.labels is None else np.asarray(params.labels)
    return wanted[indices % len(wanted)].astype(np.int64)


def check_labels(params: Sample, config: ARConfig) -> None:
    """Refuse labels that the model does not know.

    Raises:
        UserError: there is one.
    """
    wrong = [label for label in params.labels or [] if label >= config.num_classes]
    if wrong:
        raise UserError(
            f"sample.labels: {wrong[0]} is not a class: the model has classes 0 to {config.num_classes - 1}"
        )


def check_same_codes(config: ARConfig, tokenizer: Tokenizer, tokenizer_content: str | None) -> None:
    """Refuse a model that was trained on another tokenizer's codes: its images would be noise.

    Args:
        config: of the stage-2 model.
        tokenizer: which is to decode.
        tokenizer_content: digest in the manifest of the tokenizer's folder; None if it has none.

    Raises:
        UserError: codebooks or digests differ.
    """
    if config.codebook_size != tokenizer.codebook_size:
        raise UserError(
            f"the model was trained on {config.codebook_size} codes, the tokenizer has {tokenizer.codebook_size}: "
            "give the tokenizer that made the model's token cache"
        )
    known = config.tokenizer_content is not None and tokenizer_content is not None
    if known and config.tokenizer_content != tokenizer_content:
        raise UserError(
            "the model was trained on the codes of another tokenizer: give that one, or renew the model with train_ar"
        )


def decode(tokenizer: Tokenizer, codes: Tensor, grid: tuple[int, int], precision: str) -> np.ndarray:
    """Images of codes, some at a time: (B, T) int64 to (B, S, S, 3) uint8.

    Args:
        tokenizer: on the codes' device.
        codes: in raster order.
        grid: their rows and columns.
        precision: "float32", or "bf16" for autocast.
    """
    size = images_decoded_at_once(grid[0] * grid[1] * tokenizer.downsampling**2)
    with autocast(codes.device, precision):
        pieces = [to_uint8(tokenizer.decode(p, grid).float()) for p in codes.split(size)]
    return torch.cat(pieces).cpu().numpy()


def images_decoded_at_once(pixels: int) -> int:
    """Images of so many pixels that the decoder takes at a time."""
    return max(1, _PIECE_PIXELS // pixels)


def _chunks(run: StageRun, scale: float) -> ChunkStore:
    """The images of one guidance scale: `codes` (B, T) int64 and `images` (B, S, S, 3) uint8, a batch in each chunk."""
    params = run.params.sample
    folder = run.work / "chunks" / f"guidance_{scale}"
    return ChunkStore(folder, params.num_images, params.batch_size, chunk_images=params.batch_size)


def _write_samples(path: Path, run: StageRun, config: ARConfig, scale: float) -> None:
    """Join the chunks to one HDF5 file, in bounded memory.

    Raises:
        Stopped: a signal arrived.
    """
    params, chunks = run.params.sample, _chunks(run, scale)
    names = config.class_names or tuple(map(str, range(config.num_classes)))
    num_images = params.num_images
    code_type = np.uint16 if config.codebook_size <= 2**16 else np.uint32
    size = next(chunks.parts("images")).shape[1:]
    rows = {"images": np.dtype((np.uint8, size)), "codes": np.dtype((code_type, config.num_tokens))}
    least_bytes = num_images * sum(row.itemsize for row in rows.values())
    with replacing(path) as temporary:
        offsets = {}
        with hdf5_frame(temporary, least_bytes, libver=("v110", "v110")) as file:
            file.attrs["schema"] = SCHEMA
            file.attrs["class_names"] = json.dumps(names, ensure_ascii=False)
            file.attrs["seed"] = run.params.seed
            file.attrs["guidance_scale"] = scale
            for name in ("guidance_schedule", "guidance_interval", "temperature", "top_k", "top_p", "precision"):
                file.attrs[name] = getattr(params, name)
            for name, row in rows.items():
                file.create_dataset(name, (num_images, *row.shape), row.base)
            file.create_dataset("labels", data=labels_of(np.arange(num_images), params, config))
            for name in rows:
                file[name][0] = 0  # gives the array its place in the file
                offsets[name] = file[name].id.get_offset()
            file.attrs["complete"] = True
        progress = Progress(f"write {path.name}", num_images, "images")
        with open(temporary, "r+b") as target:
            for (start, stop), *parts in zip(chunks.bounds, *map(chunks.parts, rows), strict=True):
                for (name, row), values in zip(rows.items(), parts, strict=True):
                    target.seek(offsets[name] + start * row.itemsize)
                    target.write(values.astype(row.base).tobytes())
                progress.update(stop)
