"""Training batches of codes: which rows and which view of each, as a function of (seed, step) alone."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from crt.data.sampler import batch_rows, rank_slice
from crt.errors import UserError
from crt.randomness import draw_seed
from crt.tokens.cache import TokenCache

# SplitMix64 (Steele, Lea & Flood 2014): increment and the two multipliers of its finaliser.
_INCREMENT = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLIERS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


def draw_views(rows: np.ndarray, epochs: np.ndarray, num_views: int, seed: int) -> np.ndarray:
    """The view of each row in each epoch, uniform and independent: a hash of (seed, epoch, row).

    Args:
        rows: (B,) int64.
        epochs: (B,) int64, the epoch that each row is drawn in.
        num_views: views to choose from.
        seed: the run's seed.

    Returns:
        (B,) int64 in [0, num_views).
    """
    first = int(epochs.min())
    keys = np.array([_epoch_key(seed, epoch) for epoch in range(first, int(epochs.max()) + 1)], np.uint64)
    # Unsigned arithmetic on arrays wraps around, as the hash wants it.
    state = keys[epochs - first] + (rows.astype(np.uint64) + np.uint64(1)) * _INCREMENT
    for shift, multiplier in zip((30, 27), _MULTIPLIERS, strict=True):
        state = (state ^ (state >> np.uint64(shift))) * multiplier
    state ^= state >> np.uint64(31)
    # The upper 32 bits as a fraction of the views: even to within views / 2^32.
    return ((state >> np.uint64(32)) * np.uint64(num_views) >> np.uint64(32)).astype(np.int64)


def training_batches(
    cache: TokenCache,
    *,
    batch_size: int,
    seed: int,
    first_step: int,
    steps: int,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """One process's share of the batches of steps first_step to steps - 1.

    The global batch of a step is the same for any number of processes and wherever the run was resumed;
    a memory-mapped cache needs no worker processes to keep a GPU busy.

    Args:
        cache: the training split.
        batch_size: over all processes.
        seed: the run's seed.
        first_step: where to start, in constant time.
        steps: of the whole run.
        rank, world_size: this process among all.

    Yields:
        (b, num_tokens) int64 codes and (b,) int64 labels, b = batch_size / world_size.

    Raises:
        UserError: the batch does not divide among the processes.
    """
    dataset = TokenDataset(cache, seed)
    keys_by_step = BatchKeys(
        len(cache),
        batch_size=batch_size,
        seed=seed,
        first_step=first_step,
        steps=steps,
        rank=rank,
        world_size=world_size,
    )
    for keys in keys_by_step:
        yield dataset.batch(keys)


class BatchKeys(Sampler):
    """What a process reads at each step: for each row of its share (epoch, row), as one (b, 2) int64 array.

    A `batch_sampler` for `torch.utils.data.DataLoader` over a `TokenDataset`.
    """

    def __init__(
        self,
        num_rows: int,
        *,
        batch_size: int,
        seed: int,
        first_step: int,
        steps: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.num_rows, self.batch_size, self.seed = num_rows, batch_size, seed
        self.range = range(first_step, steps)
        self.share = rank_slice(batch_size, rank, world_size)

    def __len__(self) -> int:
        return len(self.range)

    def __iter__(self) -> Iterator[np.ndarray]:
        for step in self.range:
            rows, epochs = batch_rows(self.num_rows, self.batch_size, step, self.seed)
            yield np.stack([epochs[self.share], rows[self.share]], axis=1)


class TokenDataset(Dataset):
    """Rows of a cache addressed by (epoch, row), which decide the view: for a DataLoader with worker processes.

    Use `DataLoader(TokenDataset(cache, seed), batch_sampler=BatchKeys(...), collate_fn=as_batch)`; forked and
    spawned workers both do. A row alone is that of epoch 0, always of the same view, so that it serves as any other
    data set too: `DataLoader(TokenDataset(cache, seed), batch_size=64, shuffle=True)`.
    """

    def __init__(self, cache: TokenCache, seed: int) -> None:
        if seed < 0:
            raise UserError(f"seed {seed}: must be 0 or more")
        self.cache, self.seed = cache, seed

    def __len__(self) -> int:
        return len(self.cache)

    def batch(self, keys: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes (b, num_tokens) and labels (b,), int64, of (b, 2) keys (epoch, row)."""
        epochs, rows = keys[:, 0], keys[:, 1]
        views = draw_views(rows, epochs, self.cache.num_views, self.seed)
        return torch.from_numpy(self.cache.codes(rows, views)), torch.from_numpy(self.cache.labels[rows])

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes (num_tokens,) and label () of one (epoch, row), or of a row."""
        (sample,) = self._samples(np.asarray(key, np.int64).reshape(1, -1))
        return sample

    def __getitems__(
        self, keys: np.ndarray | list[int]
    ) -> tuple[torch.Tensor, torch.Tensor] | list[tuple[torch.Tensor, torch.Tensor]]:
        """A whole batch at once, which DataLoader prefers where it is offered; of rows alone, a list of samples."""
        keys = np.asarray(keys, np.int64)
        return self._samples(keys[:, None]) if keys.ndim == 1 else self.batch(keys)

    def _samples(self, keys: np.ndarray) -> list[tuple[torch.Tensor, torch.Tensor]]:
        if keys.shape[1] == 1:
            keys = np.concatenate([np.zeros_like(keys), keys], axis=1)
        return list(zip(*self.batch(keys), strict=True))


@lru_cache(maxsize=8)
def _epoch_key(seed: int, epoch: int) -> int:
    return draw_seed(seed, "view", epoch)


def as_batch(batch: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """`collate_fn` of a DataLoader over a TokenDataset, whose batches are batches already."""
    return batch
