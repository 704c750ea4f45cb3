"""Oracles: loops over the definitions of PSNR (mean squared error), SSIM (Wang et al. 2004) and MS-SSIM (2003)."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from crt.evaluation.reconstruction import SCALE_WEIGHTS, WINDOW, ms_ssim, psnr, ssim
from crt.params import MS_SSIM_MIN_SIDE


def pair(side: int, noise: float, count: int = 2, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Smooth images and noisy copies, uint8 (count, side, side, 3)."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:side, :side] / side
    waves = np.stack([np.sin(5 * x + k) * np.cos(4 * y - k) for k in range(3)], axis=-1)
    images = 128 + 90 * waves[None] * rng.uniform(0.5, 1, (count, 1, 1, 1))
    copies = images + rng.normal(size=images.shape) * noise
    return tuple(torch.from_numpy(np.clip(np.round(a), 0, 255).astype(np.uint8)) for a in (images, copies))


def terms_by_loops(x: np.ndarray, y: np.ndarray, window: int = 11) -> tuple[float, float]:
    """Mean of l * cs and of cs over all whole windows of two float planes."""
    offsets = np.arange(window) - window // 2
    weights = np.exp(-(offsets[:, None] ** 2 + offsets[None, :] ** 2) / (2 * 1.5**2))
    weights /= weights.sum()
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    both, contrast = [], []
    for i in range(x.shape[0] - window + 1):
        for j in range(x.shape[1] - window + 1):
            a, b = x[i : i + window, j : j + window], y[i : i + window, j : j + window]
            mean_a, mean_b = (weights * a).sum(), (weights * b).sum()
            var_a, var_b = (weights * (a - mean_a) ** 2).sum(), (weights * (b - mean_b) ** 2).sum()
            cov = (weights * (a - mean_a) * (b - mean_b)).sum()
            cs = (2 * cov + c2) / (var_a + var_b + c2)
            both.append((2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1) * cs)
            contrast.append(cs)
    return float(np.mean(both)), float(np.mean(contrast))


def test_psnr_is_the_definition_and_100_for_identical_images():
    a, b = pair(16, 20)
    for value, x, y in zip(psnr(a, b), a.numpy().astype(float), b.numpy().astype(float), strict=True):
        assert value.item() == pytest.approx(10 * math.log10(255**2 / ((x - y) ** 2).mean()))
    assert psnr(a, a).tolist() == [100, 100]
    black, white = torch.zeros(1, 8, 8, 3, dtype=torch.uint8), torch.full((1, 8, 8, 3), 255, dtype=torch.uint8)
    assert psnr(black, white).item() == 0


@pytest.mark.parametrize(("side", "window"), [(20, 11), (11, 11), (8, 7), (9, 9)])
def test_ssim_is_the_definition(side, window):
    a, b = pair(side, 25)
    for value, x, y in zip(ssim(a, b), a.numpy().astype(float), b.numpy().astype(float), strict=True):
        expected = np.mean([terms_by_loops(x[..., c], y[..., c], window)[0] for c in range(3)])
        assert value.item() == pytest.approx(expected, rel=1e-9)
    assert ssim(a, a).tolist() == pytest.approx([1, 1])


def test_ms_ssim_is_the_definition():
    assert WINDOW * 2 ** (len(SCALE_WEIGHTS) - 1) == MS_SSIM_MIN_SIDE  # the coarsest scale holds one whole window
    a, b = pair(MS_SSIM_MIN_SIDE, 25, count=1)
    x, y = (image[0, :, :, 0].numpy().astype(float) for image in (a, b))  # one channel by loops is slow enough
    product = 1.0
    for scale, weight in enumerate(SCALE_WEIGHTS):
        if scale:
            half = x.shape[0] // 2
            x, y = (plane[: 2 * half, : 2 * half].reshape(half, 2, half, 2).mean(axis=(1, 3)) for plane in (x, y))
        both, contrast = terms_by_loops(x, y)
        product *= (both if scale == 4 else contrast) ** weight
    single = [
        ms_ssim(*(image[..., [channel] * 3].contiguous() for image in (a, b))).item() for channel in range(a.shape[3])
    ]
    assert single[0] == pytest.approx(product, rel=1e-9)
    assert len({round(value, 6) for value in single}) == 3
    assert ms_ssim(a, b).item() == pytest.approx(np.mean(single), rel=1e-9)
    assert ms_ssim(a, a).item() == pytest.approx(1)


def test_an_inverted_image_counts_as_no_similarity_instead_of_nan():
    noise = np.random.default_rng(0).integers(0, 256, (1, MS_SSIM_MIN_SIDE, MS_SSIM_MIN_SIDE, 3), np.uint8)
    a = torch.from_numpy(noise)
    assert ms_ssim(a, 255 - a).item() == 0
    assert ssim(a, 255 - a).item() < 0


def test_small_images_are_refused_by_ms_ssim():
    a, b = pair(MS_SSIM_MIN_SIDE - 1, 5)
    with pytest.raises(ValueError, match="176 pixels"):
        ms_ssim(a, b)
