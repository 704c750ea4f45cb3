"""Scores that look at single images: precision and recall, inception score, agreement with the class asked for."""

from __future__ import annotations

import numpy as np
import torch

from crt.interrupt import raise_if_stopped
from crt.randomness import numpy_generator

_BLOCK_ROWS = 2048


def precision_recall(
    samples: np.ndarray, reference: np.ndarray, neighbours: int, device: torch.device | str = "cpu"
) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al. 2019, eq. 1 and 2), blockwise: memory grows with N + M.

    A set's manifold is the union of balls around its images, each reaching to its k-th nearest other image.
    Precision is the share of samples on the reference's manifold, recall the share of the reference on the samples'.

    Args:
        samples: features (N, D), N > k.
        reference: features (M, D), M > k.
        neighbours: k.
        device: where distances are computed, in float64.

    Returns:
        (precision, recall).

    Raises:
        Stopped: a signal arrived between two blocks, which take minutes in all on a CPU.
    """
    for features in (samples, reference):
        if len(features) <= neighbours:
            raise ValueError(f"{neighbours} neighbours need more images than {len(features)}")
    # Distances do not change with the origin, and cancel least about the mean.
    centre = reference.mean(axis=0, dtype=np.float64)
    x, y = (torch.from_numpy(features - centre).to(device) for features in (samples, reference))
    return _share_inside(x, y, _squared_radii(y, neighbours)), _share_inside(y, x, _squared_radii(x, neighbours))


def _squared_radii(points: torch.Tensor, neighbours: int) -> torch.Tensor:
    """Squared distance of each point to its k-th nearest other point; (N, D) -> (N,)."""
    radii = []
    for start in range(0, len(points), _BLOCK_ROWS):
        raise_if_stopped()
        block = points[start : start + _BLOCK_ROWS]
        distances = _squared_distances(block, points)
        rows = torch.arange(len(block), device=points.device)
        distances[rows, start + rows] = torch.inf  # a point is no neighbour of itself
        radii.append(distances.kthvalue(neighbours, dim=1).values)
    return torch.cat(radii)


def _share_inside(points: torch.Tensor, centres: torch.Tensor, squared_radii: torch.Tensor) -> float:
    """Share of points (N, D) that lie in at least one ball about the centres (M, D)."""
    inside = 0
    for start in range(0, len(points), _BLOCK_ROWS):
        raise_if_stopped()
        distances = _squared_distances(points[start : start + _BLOCK_ROWS], centres)
        inside += int((distances <= squared_radii).any(dim=1).sum())
    return inside / len(points)


def _squared_distances(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a.square().sum(dim=1)[:, None] + b.square().sum(dim=1)[None, :] - 2 * (a @ b.T)).clamp_(min=0)


def inception_score(probabilities: np.ndarray, splits: int, seed: int) -> tuple[float, float]:
    """Inception score (Salimans et al. 2016): exp of the mean divergence of p(class | image) from p(class).

    Images are shuffled first: a file in class order has splits of few classes each, which scores far too low.

    Args:
        probabilities: (N, classes), rows summing to 1.
        splits: number of equal parts, each scored by itself.
        seed: of the shuffle.

    Returns:
        Mean and standard deviation over the splits.
    """
    order = numpy_generator(seed, "inception score").permutation(len(probabilities))
    scores = []
    for part in np.array_split(order, min(splits, len(order))):
        p = np.asarray(probabilities[part], np.float64)
        marginal = p.mean(axis=0)
        tiny = np.finfo(np.float64).tiny  # 0 log 0 = 0
        divergences = (p * (np.log(np.maximum(p, tiny)) - np.log(np.maximum(marginal, tiny)))).sum(axis=1)
        scores.append(np.exp(divergences.mean()))
    return float(np.mean(scores)), float(np.std(scores))


def class_agreement(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Share of images that a classifier names as the class asked for; on real images this is its accuracy."""
    if len(predictions) != len(labels) or not len(labels):
        raise ValueError(f"{len(predictions)} predictions for {len(labels)} labels")
    return float(np.mean(np.asarray(predictions) == np.asarray(labels)))
