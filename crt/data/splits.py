"""Training and validation images: split by content, and never sharing an image."""

from __future__ import annotations

import numpy as np


def split_by_content(labels: np.ndarray, digests: np.ndarray, val_fraction: float) -> np.ndarray:
    """Choose the validation images of a source without a validation split of its own.

    In each class, images in the order of their digests (which is as good as random, and the same on every
    machine) go to validation until its share is reached. Equal images stay together, also across
    classes. A class with two or more distinct images has at least one on each side, as far as copies
    in earlier classes leave the choice. Where no class has two distinct images, all are split as one class.

    Args:
        labels: (n,) class indices.
        digests: (n, 32) uint8.
        val_fraction: share of images to set aside; 0 sets none aside.

    Returns:
        (n,) bool, true for validation.
    """
    if val_fraction == 0 or len(labels) == 0:
        return np.zeros(len(labels), bool)
    _, groups = np.unique(_keys(digests), return_inverse=True)
    if not has_class_to_split(labels, digests):
        labels = np.zeros_like(labels)
    side = np.full(groups.max() + 1, -1, np.int8)  # of each distinct image: 1 validation, 0 training, -1 open
    order = np.lexsort((groups, labels))
    for rows in np.split(order, np.flatnonzero(np.diff(labels[order])) + 1):
        _split_class(groups[rows], side, val_fraction)
    return side[groups] == 1


def has_class_to_split(labels: np.ndarray, digests: np.ndarray) -> bool:
    """Whether any class has two distinct images, (n,) labels and (n, 32) digests given, n > 0."""
    _, groups = np.unique(_keys(digests), return_inverse=True)
    pairs = np.unique(np.stack([labels, groups]), axis=1)
    return bool(np.bincount(pairs[0]).max() > 1)


def _split_class(groups: np.ndarray, side: np.ndarray, val_fraction: float) -> None:
    """Decide the open groups of one class; `groups` (m,) is sorted, which is the order of digests."""
    distinct, copies = np.unique(groups, return_counts=True)
    wanted = round(val_fraction * len(groups)) - int(copies[side[distinct] == 1].sum())
    is_open = side[distinct] < 0
    names, copies = distinct[is_open], copies[is_open]
    if not len(names):
        return
    taken = int(np.searchsorted(np.cumsum(copies), wanted)) + 1 if wanted > 0 else 0
    if len(distinct) > 1:
        has_val, has_train = (bool((side[distinct] == value).any()) for value in (1, 0))
        taken = min(max(taken, 0 if has_val else 1), len(names) if has_train else len(names) - 1)
    else:
        taken = 0
    side[names[:taken]], side[names[taken:]] = 1, 0


def shared_with(digests: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Which images also occur among others: (n, 32) and (m, 32) uint8 digests to (n,) bool."""
    return np.isin(_keys(digests), _keys(others))


def _keys(digests: np.ndarray) -> np.ndarray:
    """Digests (n, 32) as (n,) values that sort and compare; padding is by zero bytes, so no two digests meet."""
    return np.ascontiguousarray(digests).view("S32").reshape(-1)
