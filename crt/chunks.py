"""Work on many images kept on disk chunk by chunk, so that a stopped stage continues and processes share it.

A chunk is one safetensors file of arrays, rows in order. It appears in one rename, so a file that is there is whole.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from crt.distributed import World, barrier, raise_if_any_stopped
from crt.files import replacing
from crt.interrupt import raise_if_stopped
from crt.progress import Progress

_CHUNK_IMAGES = 2000


class ChunkStore:
    """Arrays of one pass over `count` images.

    Args:
        folder: where the chunks lie.
        count: images in all.
        batch_size: images worked on at once; chunks are a whole number of batches, so batches do not depend on
            the number of processes or on where a run was stopped.
        chunk_images: so many at most make a chunk, but a batch at least; 2000 unless given.
    """

    def __init__(self, folder: Path, count: int, batch_size: int, chunk_images: int | None = None) -> None:
        self.folder, self.count, self.batch_size = folder, count, batch_size
        size = batch_size * max((chunk_images or _CHUNK_IMAGES) // batch_size, 1)
        self.bounds = [(start, min(start + size, count)) for start in range(0, count, size)]

    def fill(self, label: str, work: Callable[[int, int], dict[str, np.ndarray]], world: World) -> None:
        """Do the work for every chunk that is not there yet; process r does every world.size-th chunk.

        Args:
            label: for the progress line.
            work: (start, stop) -> arrays of the images [start, stop), each with stop - start rows.
            world: the processes that share the work; all must call.

        Raises:
            Stopped: a signal arrived at any process; all of them raise, with finished chunks on disk.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        missing = {(start, stop): stop - start for start, stop in self.bounds if not self._path(start, stop).exists()}
        done = self.count - sum(missing.values())
        progress = Progress(label, self.count, "images", done)
        barrier()  # all have looked before any works
        for first in range(0, len(self.bounds), world.size):
            turn = self.bounds[first : first + world.size]
            if world.rank < len(turn) and turn[world.rank] in missing:
                self._compute(*turn[world.rank], work, progress if world.size == 1 else None)
            raise_if_any_stopped(world)
            done += sum(missing.get(bounds, 0) for bounds in turn)
            if done > progress.done:
                progress.update(done)

    def parts(self, name: str) -> Iterator[np.ndarray]:
        """One array, a chunk at a time, in the order of the images.

        Raises:
            Stopped: a signal arrived; the process must not be one of several that need each other.
        """
        for start, stop in self.bounds:
            raise_if_stopped()
            with safe_open(self._path(start, stop), "np") as file:
                yield file.get_tensor(name)

    def column(self, name: str, rows: np.ndarray | None = None) -> np.ndarray:
        """One array of all images, or of some rows, which must ascend."""
        if rows is None:
            return np.concatenate(list(self.parts(name)))
        kept = []
        for (start, stop), values in zip(self.bounds, self.parts(name), strict=True):
            kept.append(values[rows[(rows >= start) & (rows < stop)] - start])
        return np.concatenate(kept)

    def _compute(
        self, start: int, stop: int, work: Callable[[int, int], dict[str, np.ndarray]], progress: Progress | None
    ) -> None:
        parts = []
        for first in range(start, stop, self.batch_size):
            if progress is not None and first > start:  # the last batch is done when the chunk is on the disk
                progress.update(progress.done + self.batch_size)
            parts.append(work(first, min(first + self.batch_size, stop)))
        arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        path = self._path(start, stop)
        with replacing(path, path.with_name(f"{path.name}.{os.getpid()}.tmp")) as temporary:
            save_file(arrays, temporary)

    def _path(self, start: int, stop: int) -> Path:
        return self.folder / f"{start:09d}-{stop:09d}.safetensors"
