"""How near a reconstruction is to its original: PSNR, SSIM and MS-SSIM, one value per image, in float64."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from crt.params import MS_SSIM_MIN_SIDE

WINDOW = 11
SIGMA = 1.5
# Wang, Simoncelli and Bovik 2003, section 3.2: weights of the scales, finest first.
SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
_MAX_PSNR = 100.0


def psnr(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio in dB; an identical image, where it is infinite, counts as 100 dB.

    Args:
        a: uint8 (B, H, W, 3) or (B, 3, H, W).
        b: likewise.

    Returns:
        float64 (B,).
    """
    error = (a.double() - b.double()).square().mean(dim=(1, 2, 3))
    return (10 * torch.log10(255.0**2 / error)).clamp(max=_MAX_PSNR)


def ssim(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Structural similarity (Wang et al. 2004): 11x11 Gaussian window, sigma 1.5, K = (0.01, 0.03), whole windows only.

    Taken per colour channel and averaged. Images of less than 11 pixels a side get the largest odd window that fits.

    Args:
        a: uint8 (B, H, W, 3).
        b: likewise.

    Returns:
        float64 (B,).
    """
    luminance, contrast = _ssim_terms(_channels_first(a), _channels_first(b))
    return (luminance * contrast).mean(dim=(1, 2, 3))


def ms_ssim(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Structural similarity over five scales (Wang et al. 2003, eq. 7), per colour channel and averaged.

    Each scale halves the last by averaging 2x2 pixels. A negative mean, which has no real power, counts as 0.

    Args:
        a: uint8 (B, H, W, 3) of `MS_SSIM_MIN_SIDE` pixels a side at least.
        b: likewise.

    Returns:
        float64 (B,).
    """
    if min(a.shape[1:3]) < MS_SSIM_MIN_SIDE:
        raise ValueError(f"MS-SSIM needs {MS_SSIM_MIN_SIDE} pixels a side, got {tuple(a.shape[1:3])}")
    x, y = _channels_first(a), _channels_first(b)
    product = torch.ones(x.shape[:2], dtype=torch.float64, device=x.device)
    for scale, weight in enumerate(SCALE_WEIGHTS):
        if scale:
            x, y = F.avg_pool2d(x, 2), F.avg_pool2d(y, 2)
        luminance, contrast = _ssim_terms(x, y)
        last = scale == len(SCALE_WEIGHTS) - 1
        term = (luminance * contrast if last else contrast).mean(dim=(2, 3))
        product = product * term.clamp(min=0) ** weight
    return product.mean(dim=1)


def _ssim_terms(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Luminance l and contrast-structure cs of each window; (B, 3, H, W) -> two (B, 3, H', W')."""
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    window = min(WINDOW, min(x.shape[2:]) - (min(x.shape[2:]) + 1) % 2)
    mean_x, mean_y, xx, yy, xy = (_blur(maps, window) for maps in (x, y, x * x, y * y, x * y))
    variance_x, variance_y, covariance = xx - mean_x**2, yy - mean_y**2, xy - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    contrast = (2 * covariance + c2) / (variance_x + variance_y + c2)
    return luminance, contrast


def _blur(maps: torch.Tensor, window: int) -> torch.Tensor:
    """Gaussian mean over each whole window, rows then columns; (B, C, H, W) -> (B, C, H - w + 1, W - w + 1)."""
    positions = torch.arange(window, dtype=maps.dtype, device=maps.device) - window // 2
    kernel = torch.exp(-positions.square() / (2 * SIGMA**2))
    kernel = (kernel / kernel.sum()).expand(maps.shape[1], 1, window)
    maps = F.conv2d(maps, kernel[..., None], groups=maps.shape[1])
    return F.conv2d(maps, kernel[:, :, None], groups=maps.shape[1])


def _channels_first(images: torch.Tensor) -> torch.Tensor:
    return images.double().permute(0, 3, 1, 2)
