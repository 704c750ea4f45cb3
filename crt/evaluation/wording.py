"""What the figures of metrics.json mean, in words: for the terminal and for the page of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Name and what a reader must know of it, in the order in which they want them.
RESULTS = (
    ("rfid", "FID of reconstructions, lower is better"),
    ("fd_classifier_rec", "classifier distance of reconstructions, lower is better"),
    ("gfid", "FID of samples, lower is better; {gfid_of_perfect_images:.3g} for perfect ones"),
    (
        "fd_classifier_gen",
        "classifier distance of samples, lower is better; {fd_classifier_gen_of_perfect_images:.3g} for perfect ones",
    ),
    (
        "sfid",
        "FID of samples by the layout of their parts, lower is better; {sfid_of_perfect_images:.3g} for perfect ones",
    ),
    ("kid", "kernel distance of samples, 0 for perfect ones"),
    ("kd_classifier_gen", "kernel distance of samples, 0 for perfect ones"),
    ("inception_score", "of samples, higher is better"),
    ("precision", "share of samples among the real images"),
    ("recall", "share of real images among the samples"),
    (
        "class_agreement",
        "share of samples recognised as the class asked for; real images: {classifier_accuracy:.4g}",
    ),
    ("psnr", "dB, reconstructions, higher is better"),
    ("ms_ssim", "reconstructions, 1 is best"),
    ("ssim", "reconstructions, 1 is best"),
    ("lpips", "reconstructions, lower is better"),
    ("codebook_usage", "share of codes in use"),
    ("bits_per_image", "as stored; {bits_per_image_stage2:.4g} by the transformer's predictions"),
    ("stage2_val_loss", "nats per token"),
)
_PROTOCOL = (
    "{generation_images} samples at guidance {guidance_scale:g} against the {generation_reference_images} images "
    "of {generation_reference}; reconstructions of the {reconstruction_reference_images} images of "
    "{reconstruction_reference}; features of {features} ({features_sha256:.8}), resize {features_resize}"
)


def protocol_text(metrics: Mapping[str, Any]) -> str:
    """What the figures were measured by, in one sentence."""
    return _PROTOCOL.format(**metrics)
