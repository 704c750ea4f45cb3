"""What training shows of a tokenizer: figures over the whole validation split, and a picture."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from crt.data.loader import eval_batches
from crt.data.packed import PackedImages
from crt.data.transforms import center_crop, to_uint8, to_unit_range
from crt.distributed import World, stop_signal, sum_over_ranks
from crt.evaluation.reconstruction import psnr
from crt.interrupt import stop_requested
from crt.pictures import reconstruction_grid, spread
from crt.progress import logger
from crt.tokenizer.model import Tokenizer
from crt.tokenizer.regularizer import Regularizer
from crt.tokens.statistics import CodebookUse

_PICTURE_IMAGES = 16
# A codebook with a smaller share of its codes in use is told to have collapsed.
_COLLAPSED_SHARE = 0.05


@torch.no_grad()
def validate(
    model: Tokenizer, regularizer: Regularizer | None, images: PackedImages, batch_size: int, world: World
) -> dict[str, float] | None:
    """Reconstruct a whole split in float32 (on a GPU: TF32 in convolutions), with the nearest codes. A collective call.

    Args:
        model: in evaluation mode.
        regularizer: to measure too, if there is one.
        images: the split; each process takes a share of it.
        batch_size: per process.
        world: the processes.

    Returns:
        mse: mean squared error of pixels in [-1, 1];
        psnr: mean over images, in dB, of pixels rounded to 0..255;
        codebook_usage: share of the codes that occur at all;
        code_entropy: of the codes' frequencies, in bits per token;
        perplexity: 2 ** code_entropy, the number of equally frequent codes that would have this entropy;
        regularizer: its mean over images, if there is one.
        None where a process was asked to stop meanwhile.
    """
    counts = torch.zeros(model.codebook_size, dtype=torch.int64, device=world.device)
    sums = torch.zeros(3, dtype=torch.float64, device=world.device)
    for pixels, _ in eval_batches(images, model.image_size, batch_size, world.rank, world.size):
        if stop_requested():  # each process by itself: there is no collective before the end
            break
        originals = to_unit_range(pixels.to(world.device))
        latents = model.latents(originals)
        quantized = model.quantizer(latents)
        reconstructions = model.reconstruct(quantized.values)
        sums[0] += (reconstructions - originals).double().square().mean((1, 2, 3)).sum()
        sums[1] += psnr(to_uint8(reconstructions), pixels.to(world.device)).sum()
        counts += torch.bincount(quantized.codes.flatten(), minlength=len(counts))
        if regularizer is not None:
            raster = latents.flatten(2).transpose(1, 2)
            loss = regularizer(raster, quantized.codes.flatten(1), model.quantizer.vectors())
            sums[2] += loss.double() * len(pixels)
    if stop_signal(world):
        return None
    mse, psnr_mean, loss_mean = (sum_over_ranks(sums) / len(images)).tolist()
    use = CodebookUse(sum_over_ranks(counts).cpu().numpy())
    figures = {"mse": mse, "psnr": psnr_mean, "codebook_usage": use.share}
    figures |= {"perplexity": use.perplexity, "code_entropy": use.entropy}
    collapse = collapse_warning(use)
    if collapse and world.is_main:
        logger.warning("train_tokenizer: %s", collapse)
    return figures if regularizer is None else {**figures, "regularizer": loss_mean}


def collapse_warning(use: CodebookUse) -> str:
    """What to tell of a codebook of which hardly any code is in use, or ""."""
    possible = min(len(use.counts), int(use.counts.sum()))
    if use.codes_used >= _COLLAPSED_SHARE * possible:
        return ""
    return (
        f"codebook_usage: {use.codes_used} of {len(use.counts)} codes are in use: the codebook has collapsed: "
        "lower lambda, or replace unused codes (sooner), see train_tokenizer.quantizer.revive_after_steps"
    )


@torch.no_grad()
def reconstruction_picture(model: Tokenizer, images: PackedImages, device: torch.device) -> Image.Image:
    """Images from all over the split above their reconstructions."""
    shown = spread(len(images), _PICTURE_IMAGES)
    originals = np.stack([center_crop(images.image(row), model.image_size) for row in shown])
    unit = to_unit_range(torch.from_numpy(originals).to(device))
    reconstructions = torch.cat([model(image[None])[0] for image in unit])
    return reconstruction_grid(originals, to_uint8(reconstructions).cpu().numpy())
