"""Crops, and pixels as the models see them.

Resampling follows ADM's preprocessing, which LlamaGen uses too (Dhariwal & Nichol 2021): halve by box
filter while the shorter side is at least twice the target, then bicubic. An image smaller than the
crop is enlarged by the same bicubic filter. NumPy images are (H, W, 3) uint8 RGB.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from PIL import Image


def resize_shorter_side(image: np.ndarray, side: int) -> np.ndarray:
    """Resize so that the shorter side has `side` pixels: box-halving, then bicubic.

    Args:
        image: (H, W, 3) uint8.

    Returns:
        (h, w, 3) uint8 with min(h, w) = side; the image itself where it already is so.
    """
    if min(image.shape[:2]) == side:
        return image
    picture = Image.fromarray(image)
    while min(picture.size) >= 2 * side:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    scale = side / min(picture.size)
    picture = picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.Resampling.BICUBIC)
    return np.array(picture)


def center_crop(image: np.ndarray, size: int) -> np.ndarray:
    """The central square of the image whose shorter side was resized to `size`.

    Args:
        image: (H, W, 3) uint8.

    Returns:
        (size, size, 3) uint8; an image of that size comes back unchanged.
    """
    resized = resize_shorter_side(image, size)
    top, left = ((side - size) // 2 for side in resized.shape[:2])
    return resized[top : top + size, left : left + size]


def crop_at(image: np.ndarray, size: int, min_crop: float, flip: bool, draws: np.ndarray) -> np.ndarray:
    """Random resized crop as ADM and LlamaGen train on, for four uniform draws: scale, row, column, mirror.

    The shorter side becomes one of the integers from `size` to ceil(size / min_crop), all equally
    likely; the window's place is uniform too.

    Args:
        image: (H, W, 3) uint8.
        size: side of the crop.
        min_crop: smallest share of the shorter side that a crop may cover, in (0, 1].
        flip: mirror left and right with probability one half.
        draws: (4,) in [0, 1).

    Returns:
        (size, size, 3) uint8.
    """
    largest = math.ceil(size / min_crop)
    scale, row, column, mirror = (float(draw) for draw in draws)
    resized = resize_shorter_side(image, size + int(scale * (largest - size + 1)))
    top, left = int(row * (resized.shape[0] - size + 1)), int(column * (resized.shape[1] - size + 1))
    window = resized[top : top + size, left : left + size]
    return window[:, ::-1] if flip and mirror < 0.5 else window


def ten_crop(image: np.ndarray, size: int, resize_range: float) -> np.ndarray:
    """Ten views of one image: four corners and centre, then the same of the mirrored image.

    The image is first centre-cropped to a square of side floor(size * resize_range), as LlamaGen's code
    extraction does; the order is torchvision's.

    Args:
        image: (H, W, 3) uint8.
        size: side of each view.
        resize_range: side of the square that the views are cut from, relative to `size`; at least 1.

    Returns:
        (10, size, size, 3) uint8.
    """
    # The small term keeps 1.15 * 100 = 114.99999999999999 at the 115 that was meant.
    side = int(size * resize_range + 1e-6)
    square = center_crop(image, side)
    far, middle = side - size, round((side - size) / 2)
    corners = [(0, 0), (0, far), (far, 0), (far, far), (middle, middle)]
    return np.stack([view[y : y + size, x : x + size] for view in (square, square[:, ::-1]) for y, x in corners])


def to_unit_range(images: torch.Tensor) -> torch.Tensor:
    """Pixels for a model: uint8 (B, H, W, 3) to float32 (B, 3, H, W) in [-1, 1]."""
    return images.permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Pixels of a model: float (B, 3, H, W), clamped to [-1, 1], to uint8 (B, H, W, 3), halves rounded to even."""
    scaled = images.float().add(1.0).mul_(127.5).round_().clamp_(0, 255)
    return scaled.to(torch.uint8).permute(0, 2, 3, 1).contiguous()
