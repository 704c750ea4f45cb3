"""Batches of images for training and for evaluation.

What a batch holds is a function of (seed, step) alone: not of the number of processes, of decoding
workers, or of where a run was resumed.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from functools import lru_cache, partial
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from crt.data.packed import PackedImages
from crt.data.pool import WORKER_KILLED, available_cpus, heed_only_parent
from crt.data.sampler import batch_rows, rank_slice
from crt.data.transforms import center_crop, crop_at
from crt.errors import LocalError, UserError
from crt.randomness import numpy_generator
from crt.system_errors import NO_SHARED_MEMORY, RUN_AGAIN, system_message

MAX_WORKERS = 16
# What a killed process takes to be gone, with its memory.
_DYING_SECONDS = 0.5


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
        min_crop: see `crt.data.transforms.crop_at`.
        horizontal_flip: mirror half of the images.
        seed: the run's seed.
        first_step: steps that are done already; any step starts equally fast.
        steps: where the sequence ends.
        rank, world_size: this process among those that share each batch.

    Yields:
        (batch_size / world_size, S, S, 3) uint8; those of workers in pinned memory where there is a GPU.

    Raises:
        UserError: the batch does not divide among the processes; an image is damaged, or a worker was killed.
    """
    share = rank_slice(batch_size, rank, world_size)

    def requests() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for step in range(first_step, steps):
            rows, epochs = batch_rows(len(images), batch_size, step, seed)
            yield rows[share], _draws(len(images), epochs[share], rows[share], seed)

    if images.are_small and images.image_size == image_size and min_crop == 1.0:
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

    Raises:
        UserError: an image is damaged, or a worker was killed.
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
    """Serve requests in order; all but small images are read, decoded and cropped in worker processes, a batch each."""
    if crops.images.are_small:
        yield from map(crops.__getitem__, requests)
        return
    yield from made_by_workers(crops, requests, world_size)


def made_by_workers(dataset: Dataset[torch.Tensor], requests: Iterable[Any], world_size: int) -> Iterator[torch.Tensor]:
    """Serve requests in order, each by one of this process's decoding workers; in pinned memory where there is a GPU.

    Args:
        dataset: makes the answer to a request.
        requests: its keys, read some way ahead.
        world_size: processes that share the machine's CPUs, see `num_workers`.

    Raises:
        UserError: one that the data set raised, or a worker was killed.
    """
    answers = iter(
        DataLoader(
            _Answers(dataset),
            batch_size=None,
            sampler=requests,
            num_workers=num_workers(world_size),
            worker_init_fn=_start_worker,
            pin_memory=torch.cuda.is_available(),
        )
    )
    _explain_killed_workers()
    failure = None
    try:
        for answer in answers:
            if isinstance(answer, UserError):
                raise answer
            yield answer
    except (RuntimeError, ConnectionError, EOFError) as error:
        failure = _explained(error)
    finally:
        del answers  # ends the workers, whoever keeps the error and with it this frame
    if failure is not None:
        raise failure  # only here, since PyTorch's own error holds the workers


class _Answers(Dataset[Any]):
    """A data set's answers, with errors among them: into the text of a raised one PyTorch would put a traceback.

    In shared memory at once: where that is full, the thread that sends an answer would drop it, and the reader wait for
    ever.
    """

    def __init__(self, dataset: Dataset[torch.Tensor]) -> None:
        self.dataset = dataset

    def __getitem__(self, request: Any) -> torch.Tensor | UserError:
        try:
            return self.dataset[request].share_memory_()
        except UserError as error:
            return error
        except (OSError, RuntimeError, MemoryError) as error:
            message = system_message(error, None)
            if message is None:
                raise
            return LocalError(message)


class _ExplainedHandler:
    """PyTorch's handler of SIGCHLD, which raises for a killed worker wherever the program happens to be."""

    def __init__(self, handler: Any) -> None:
        self.handler = handler

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        try:
            self.handler(signum, frame)
        except RuntimeError as error:
            raise _explained(error) from None


def _explain_killed_workers() -> None:
    """Have the handler that PyTorch set, once for all loaders, say what a user can do."""
    handler = signal.getsignal(signal.SIGCHLD)
    is_explained = isinstance(handler, _ExplainedHandler) or not callable(handler)
    if not is_explained and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, _ExplainedHandler(handler))


def _explained(error: Exception) -> Exception:
    """What PyTorch says of a killed worker, as a user needs it; other errors as they are."""
    text = str(error)
    if isinstance(error, RuntimeError):
        is_killed = text.startswith("DataLoader worker (pid")
    else:
        # The line to a dying worker breaks before PyTorch knows that it is dead.
        is_killed = "in DataLoader worker process" not in text
        time.sleep(_DYING_SECONDS)  # PyTorch's handler raises within this time, not while the error is reported
    if not is_killed:
        return error
    if "Bus error" in text:
        return LocalError(NO_SHARED_MEMORY + RUN_AGAIN)
    return LocalError(WORKER_KILLED)


def num_workers(world_size: int) -> int:
    """Decoding workers of this process: its share of the CPUs that it may use, less one for itself; at least one."""
    cpus = available_cpus()
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
