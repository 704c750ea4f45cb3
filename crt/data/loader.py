"""Batches of images for training and for evaluation.

What a batch holds is a function of (seed, step) alone: not of the number of processes, of decoding
workers, or of where a run was resumed.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from crt.data.packed import PackedImages
from crt.data.pool import heed_only_parent
from crt.data.sampler import batch_rows, rank_slice
from crt.data.transforms import center_crop, crop_at
from crt.randomness import numpy_generator

MAX_WORKERS = 16


def training_batches(
    images: PackedImages,
    *,
    image_size: int,
    batch_size: int,
    min_crop: float,
    horizontal_flip: bool,
    seed: int,
    first_step: int,
    steps: int,
    rank: int,
    world_size: int,
) -> Iterator[torch.Tensor]:
    """This process's share of the training batches of steps `first_step` to `steps` - 1.

    Args:
        images: the split to draw from.
        image_size: side S of the crops.
        batch_size: over all processes.
        min_crop: see `crt.data.transforms.random_crop`.
        horizontal_flip: mirror half of the images.
        seed: the run's seed.
        first_step: steps that are done already; any step starts equally fast.
        steps: where the sequence ends.
        rank, world_size: this process among those that share each batch.

    Yields:
        (batch_size / world_size, S, S, 3) uint8, in pinned memory where there is a GPU.

    Raises:
        UserError: the batch does not divide among the processes.
    """
    share = rank_slice(batch_size, rank, world_size)

    def requests() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for step in range(first_step, steps):
            rows, epochs = batch_rows(len(images), batch_size, step, seed)
            yield rows[share], _draws(len(images), epochs[share], rows[share], seed)

    if images.storage == "pixels" and images.image_size == image_size and min_crop == 1.0:
        for rows, draws in requests():
            batch = images.pixels(rows)
            if horizontal_flip:
                mirrored = draws[:, 3] < 0.5
                batch[mirrored] = batch[mirrored, :, ::-1]
            yield torch.from_numpy(batch)
    else:
        cropped = _Crops(images, partial(_training_crop, size=image_size, min_crop=min_crop, flip=horizontal_flip))
        yield from _decoded(cropped, requests(), world_size)


def eval_batches(
    images: PackedImages, image_size: int, batch_size: int, rank: int = 0, world_size: int = 1
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """All images of a split once, centre-cropped, in order; each process takes a contiguous share of them.

    The shares differ by one image at most, so the processes' numbers of batches may differ by one.

    Args:
        image_size: side S of the crops.
        batch_size: per process; the last batch may be smaller.

    Yields:
        (b, S, S, 3) uint8 and the images' (b,) int64 indices.
    """
    first, end = (len(images) * part // world_size for part in (rank, rank + 1))
    batches = [np.arange(start, min(start + batch_size, end)) for start in range(first, end, batch_size)]
    if images.storage == "pixels" and images.image_size == image_size:
        pixels: Iterable[torch.Tensor] = (torch.from_numpy(images.pixels(rows)) for rows in batches)
    else:
        cropped = _Crops(images, partial(_eval_crop, size=image_size))
        pixels = _decoded(cropped, ((rows, np.empty((len(rows), 0))) for rows in batches), world_size)
    for rows, batch in zip(batches, pixels, strict=True):
        yield batch, torch.from_numpy(rows)


class _Crops(Dataset[torch.Tensor]):
    """Batches by (rows, draws): (b,) indices and (b, 4) uniform draws to a (b, S, S, 3) uint8 tensor."""

    def __init__(self, images: PackedImages, crop: Any) -> None:
        self.images, self.crop = images, crop

    def __getitem__(self, request: tuple[np.ndarray, np.ndarray]) -> torch.Tensor:
        rows, draws = request
        crops = [self.crop(self.images.image(row), draws=draw) for row, draw in zip(rows, draws, strict=True)]
        return torch.from_numpy(np.stack(crops))


def _training_crop(image: np.ndarray, draws: np.ndarray, size: int, min_crop: float, flip: bool) -> np.ndarray:
    return crop_at(image, size, min_crop, flip, draws)


def _eval_crop(image: np.ndarray, draws: np.ndarray, size: int) -> np.ndarray:
    return center_crop(image, size)


def _decoded(
    crops: _Crops, requests: Iterable[tuple[np.ndarray, np.ndarray]], world_size: int
) -> Iterator[torch.Tensor]:
    """Serve requests in order; image files are decoded in worker processes, a batch each."""
    if crops.images.storage == "pixels":
        yield from map(crops.__getitem__, requests)
        return
    yield from DataLoader(
        crops,
        batch_size=None,
        sampler=requests,
        num_workers=num_workers(world_size),
        worker_init_fn=_start_worker,
        pin_memory=torch.cuda.is_available(),
    )


def num_workers(world_size: int) -> int:
    """Decoding workers of this process: its share of the CPUs that it may use, less one for itself; at least one."""
    cpus = len(os.sched_getaffinity(0))
    # srun usually binds each task to CPUs of its own; processes of one machine share all that the node gives.
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1" if "SLURM_CPUS_PER_TASK" in os.environ else str(world_size)))
    return min(max(cpus // local - 1, 1), MAX_WORKERS)


def _start_worker(worker: int) -> None:
    heed_only_parent()


def _draws(num_rows: int, epochs: np.ndarray, rows: np.ndarray, seed: int) -> np.ndarray:
    """(b, 4) uniform draws in [0, 1) of images `rows` in `epochs`: those of `crop_at`."""
    draws = np.empty((len(rows), 4))
    for epoch in np.unique(epochs):
        inside = epochs == epoch
        draws[inside] = _epoch_draws(num_rows, int(epoch), seed)[rows[inside]]
    return draws


@lru_cache(maxsize=2)
def _epoch_draws(num_rows: int, epoch: int, seed: int) -> np.ndarray:
    return numpy_generator(seed, "augment", epoch).random((num_rows, 4), np.float32)
