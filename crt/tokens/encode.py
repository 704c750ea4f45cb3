"""Images to codes: views made in worker processes, encoded in batches whose make-up depends on the rows alone.

Floating-point results depend, in the last bit, on the shape of a batch and on how many threads share a
sum, and a last bit can decide between two codes. So batches never depend on ranks, restarts or cores.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType

import numpy as np
import torch
from torch.utils.data import Dataset

from crt.data.loader import made_by_workers
from crt.data.packed import PackedImages
from crt.data.transforms import to_unit_range
from crt.distributed import world_size
from crt.launch import keep_freed_memory
from crt.precision import autocast
from crt.tokenizer.model import Tokenizer
from crt.tokens.views import render_batch, render_views

# Less than a second's work on a GPU, some minutes' on a CPU: what a kill costs at most.
BLOCK_IMAGES = 512
# Pixels that one thread of a CPU encodes at once: one image of 256 px. More at once is no faster.
_PIECE_PIXELS = 256 * 256


def rows_per_unit(num_views: int, batch_size: int) -> int:
    """Rows whose views are made and encoded together: whole rows, at most `batch_size` views where that is possible."""
    return max(1, batch_size // num_views)


def rows_per_block(num_views: int, batch_size: int) -> int:
    """Rows between two points at which work is safe on disk: whole units, of BLOCK_IMAGES views or a little more."""
    unit = rows_per_unit(num_views, batch_size)
    return unit * -(-BLOCK_IMAGES // (unit * num_views))


def units(block: range, num_views: int, batch_size: int) -> list[range]:
    """The units of one block of rows, in order."""
    size = rows_per_unit(num_views, batch_size)
    return [range(start, min(start + size, block.stop)) for start in block[::size]]


def unit_pixels(images: PackedImages, rows: Sequence[range], views: Sequence[str], size: int) -> Iterator[torch.Tensor]:
    """The views of each unit in turn; image files are decoded in worker processes, some units ahead.

    Args:
        images: the split.
        rows: the units.
        views: names of single views.
        size: side of the views.

    Yields:
        (rows * views, size, size, 3) uint8, the views of a row side by side.

    Raises:
        UserError: an image is damaged, or a worker was killed.
    """
    dataset = _Units(images, rows, views, size)
    if images.storage == "pixels":
        yield from map(dataset.__getitem__, range(len(rows)))
    else:
        yield from made_by_workers(dataset, range(len(rows)), world_size())


class _Units(Dataset[torch.Tensor]):
    """Views of units of rows: item i is (rows * views, size, size, 3) uint8."""

    def __init__(self, images: PackedImages, rows: Sequence[range], views: Sequence[str], size: int) -> None:
        self.images, self.rows, self.views, self.size = images, rows, views, size

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> torch.Tensor:
        if self.images.storage == "pixels":
            views = render_batch(self.images.pixels(self.rows[index]), self.views, self.size)
        else:
            views = np.stack([render_views(self.images.image(row), self.views, self.size) for row in self.rows[index]])
        return torch.from_numpy(views).flatten(0, 1)


class Encoder:
    """A tokenizer's encoder, to be used in a `with` block.

    On a CPU a batch is cut into pieces of one size, and each is encoded by one thread: the codes are the same
    on any number of cores, and it is faster than several threads on one piece. On a GPU the convolution
    algorithms are fixed; float32 leaves PyTorch's default in force, which is TF32 within convolutions.

    Args:
        tokenizer: in evaluation mode, on its device.
        precision: "float32" or "bf16" (autocast).
        batch_size: images encoded at once at most.
    """

    def __init__(self, tokenizer: Tokenizer, precision: str, batch_size: int) -> None:
        self.tokenizer, self.precision = tokenizer, precision
        self.device = next(tokenizer.parameters()).device
        if self.device.type == "cpu":
            batch_size = min(batch_size, max(1, _PIECE_PIXELS // tokenizer.image_size**2))
        self.batch_size = batch_size

    def __enter__(self) -> Encoder:
        self._threads = torch.get_num_threads()
        self._cudnn = (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic)
        torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = False, True
        if self.device.type == "cpu":
            torch.set_num_threads(1)
            keep_freed_memory()
            self._pool = ThreadPoolExecutor(self._threads, initializer=torch.set_num_threads, initargs=(1,))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.device.type == "cpu":
            self._pool.shutdown()
            torch.set_num_threads(self._threads)
        torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = self._cudnn

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """Codes of images.

        Args:
            pixels: (B, S, S, 3) uint8.

        Returns:
            (B, num_tokens) int64, on the tokenizer's device.
        """
        pieces = pixels.split(self.batch_size)
        if self.device.type == "cpu":
            return torch.cat(list(self._pool.map(self._encode, pieces)))
        return torch.cat([self._encode(piece) for piece in pieces])

    def _encode(self, pixels: torch.Tensor) -> torch.Tensor:
        # Both modes hold per thread.
        with torch.inference_mode(), autocast(self.device, self.precision):
            return self.tokenizer.nearest_codes(to_unit_range(pixels.to(self.device, non_blocking=True)))
