"""Which images each training step sees: an endless sequence of permutations, addressable at any step.

Nothing is carried from step to step, so a resumed run and a run on another number of processes see
the same global batches.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from crt.errors import UserError
from crt.randomness import numpy_generator


def batch_rows(num_rows: int, batch_size: int, step: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The global batch of one step.

    Epoch after epoch is laid end to end, each a permutation of all rows of its own; step s takes the
    positions s * batch_size onwards, so a batch may straddle two epochs.

    Args:
        num_rows: rows of the data set.
        batch_size: over all processes.
        step: counted from 0.
        seed: the run's seed.

    Returns:
        (batch_size,) int64 rows and (batch_size,) int64 epochs that they belong to.

    Raises:
        ValueError: there are no rows.
    """
    if num_rows < 1:
        raise ValueError("no rows to sample from")
    epochs, places = np.divmod(step * batch_size + np.arange(batch_size, dtype=np.int64), num_rows)
    rows = np.empty(batch_size, np.int64)
    for epoch in range(epochs[0], epochs[-1] + 1):
        inside = epochs == epoch
        rows[inside] = _permutation(num_rows, epoch, seed)[places[inside]]
    return rows, epochs


def rank_slice(batch_size: int, rank: int, world_size: int) -> slice:
    """The contiguous part of the global batch that one process takes.

    Raises:
        UserError: the batch does not divide among the processes.
    """
    if batch_size % world_size:
        raise UserError(
            f"batch_size {batch_size} does not divide among {world_size} processes: "
            f"choose a multiple of {world_size}, or another number of processes"
        )
    share = batch_size // world_size
    return slice(rank * share, (rank + 1) * share)


@lru_cache(maxsize=2)
def _permutation(num_rows: int, epoch: int, seed: int) -> np.ndarray:
    order = numpy_generator(seed, "permutation", epoch).permutation(num_rows)
    order.flags.writeable = False
    return order
