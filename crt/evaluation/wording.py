"""What the figures of metrics.json mean, in words: for the terminal and for the page of a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from crt.evaluation.comparable import CLASSES, STORED_MOMENTS

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
    ("kid", "kernel distance of samples, lower is better; perfect ones score 0, give or take chance"),
    ("kd_classifier_gen", "kernel distance of samples, lower is better; perfect ones score 0, give or take chance"),
    ("inception_score", "of samples, higher is better"),
    ("precision", "share of samples that look like real images, higher is better"),
    ("recall", "share of real images whose like is among the samples, higher is better"),
    (
        "class_agreement",
        "share of samples recognised as the class asked for; real images: {classifier_accuracy:.4g}",
    ),
    ("psnr", "dB, reconstructions, higher is better"),
    ("ms_ssim", "reconstructions, higher is better, 1 at most"),
    ("ssim", "reconstructions, higher is better, 1 at most"),
    ("lpips", "reconstructions, lower is better"),
    ("codebook_usage", "share of codes in use"),
    ("bits_per_image", "bits, as stored; {bits_per_image_stage2:.4g} by the transformer's predictions"),
    ("stage2_val_loss", "nats per code, how hard the codes are to predict, lower is better"),
)
# Names for people.
TITLES = {
    "rfid": "rFID",
    "fd_classifier_rec": "classifier distance of reconstructions",
    "gfid": "gFID",
    "sfid": "sFID",
    "fd_classifier_gen": "classifier distance of samples",
    "kid": "KID",
    "kd_classifier_gen": "kernel distance of samples",
    "inception_score": "Inception score",
    "precision": "precision",
    "recall": "recall",
    "class_agreement": "agreement with the class",
    "psnr": "PSNR",
    "ms_ssim": "MS-SSIM",
    "ssim": "SSIM",
    "lpips": "LPIPS",
    "codebook_usage": "codebook usage",
    "bits_per_image": "bits per image",
    "stage2_val_loss": "stage 2 loss",
}
# What an axis of a figure needs besides: of which images, in which unit.
_AXIS_TITLES = {
    "class_agreement": "share of samples recognised as their class",
    "psnr": "PSNR of reconstructions (dB)",
    "codebook_usage": "share of codes in use",
    "bits_per_image": "bits per image, as stored",
    "bits_per_image_entropy": "bits per image, by the codes' frequencies",
    "bits_per_image_stage2": "bits per image, by the transformer's predictions",
    "stage2_val_loss": "validation loss of stage 2 (nats per code)",
    "stage1_training_flops": "training FLOPs of stage 1",
    "stage2_training_flops": "training FLOPs of stage 2",
    "training_flops": "training FLOPs of both stages",
}
# The axis of figures over the codes of an image, counted as in loss_per_position.csv.
POSITION = "place of the code in the image, row by row from 0"
LOWER_IS_BETTER = {"gfid", "sfid", "fd_classifier_gen", "kid", "kd_classifier_gen"}
_GLOSSARY_FILE = Path(__file__).with_name("glossary.yaml")
_PROTOCOL = (
    "{generation_images} samples at guidance {guidance_scale:g} against the {generation_reference_images} images "
    "of {generation_reference}{moments}; reconstructions of the {reconstruction_reference_images} images of "
    "{reconstruction_reference}; features of {features} ({features_sha256:.8}), resize {features_resize}"
)


def meaning(text: str, metrics: Mapping[str, Any], **others: float) -> str:
    """A text with the figures that it mentions in braces: of metrics.json, or given besides."""
    return text.format(**metrics, **others)


def has_classes(metrics: Mapping[str, Any]) -> bool:
    """Whether the images are of several classes."""
    return metrics.get("classifier_task", CLASSES) == CLASSES


def shown(figures: Mapping[str, Any], classes: bool) -> dict[str, Any]:
    """Figures, less those that a person is not to see: agreement with the class where there is but one."""
    return {name: value for name, value in figures.items() if classes or name != "class_agreement"}


def axis_title(name: str) -> str:
    """A figure of metrics.json as a picture names it."""
    return _AXIS_TITLES.get(name) or TITLES.get(name) or name.replace("_", " ")


def protocol_text(metrics: Mapping[str, Any]) -> str:
    """What the figures were measured by, in one sentence."""
    stored = metrics.get("generation_reference_moments") == STORED_MOMENTS
    return _PROTOCOL.format(**metrics, moments=f", mean and covariance {STORED_MOMENTS}" if stored else "")


def glossary(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Terms that a page with these figures uses, with their meaning."""
    entries = YAML(typ="safe", pure=True).load(_GLOSSARY_FILE)
    return [(entry["term"], entry["text"]) for entry in entries if set(entry.get("figures", metrics)) & set(metrics)]
