"""`python -m crt results`: the metrics of the current evaluation, what they were measured by, and the pictures."""

from __future__ import annotations

import argparse
import json
import textwrap
from pathlib import Path
from typing import Any

from crt.commands.check import add_arguments  # noqa: F401
from crt.params import load_params
from crt.pipeline import load_stages
from crt.stage import read_current

_WIDTH = 110
# Name and what a reader must know of it, in the order in which they want them.
RESULTS = (
    ("rfid", "FID of reconstructions, lower is better"),
    ("fd_classifier_rec", "classifier distance of reconstructions, lower is better"),
    ("gfid", "FID of samples, lower is better; {gfid_of_perfect_images:.3g} for perfect ones"),
    (
        "fd_classifier_gen",
        "classifier distance of samples, lower is better; {fd_classifier_gen_of_perfect_images:.3g} for perfect ones",
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


def run(args: argparse.Namespace) -> int:
    """Print the table.

    Raises:
        UserError: the evaluation is missing or was made with other params.
    """
    stage = load_stages()["evaluate"]
    read_current(stage.output, load_params(args.params).model_dump(by_alias=True), args.params)
    folder = Path(stage.output)
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    print("\n".join(["", *table(metrics), ""]))
    width = max(len(name) for name, _ in RESULTS)
    print(f"  {'all metrics':{width}} {stage.metrics[0]}")
    for picture in sorted(folder.glob("*.png")):
        print(f"  {picture.stem:{width}} {picture}")
    print()
    return 0


def table(metrics: dict[str, Any]) -> list[str]:
    """Lines for a person: figures with their meaning, then what they were measured by, then warnings."""
    width = max(len(name) for name, _ in RESULTS)
    lines = [
        f"  {name:{width}} {metrics[name]:10.4g}   {meaning.format(**metrics)}"
        for name, meaning in RESULTS
        if name in metrics
    ]
    reference = (
        "{generation_images} samples at guidance {guidance_scale:g} against the {generation_reference_images} images "
        "of {generation_reference}; reconstructions of the {reconstruction_reference_images} images of "
        "{reconstruction_reference}; features of {features} ({features_sha256:.8}), resize {features_resize}"
    )
    notes = [("measured by", reference.format(**metrics))]
    notes += [("warning", warning) for warning in metrics.get("warnings", "").split("; ") if warning]
    for name, text in notes:
        first = f"  {name:{width}} "
        lines += ["", textwrap.fill(text, _WIDTH, initial_indent=first, subsequent_indent=" " * len(first))]
    return lines
