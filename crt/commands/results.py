"""`python -m crt results`: the metrics of the current evaluation and the paths of its pictures."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from crt.commands.check import add_arguments  # noqa: F401
from crt.params import load_params
from crt.pipeline import load_stages
from crt.stage import read_current

# Name, unit or direction, in the order in which a reader wants them.
RESULTS = (
    ("rfid", "FID of reconstructions, lower is better"),
    ("fd_classifier_rec", "classifier distance of reconstructions, lower is better"),
    ("gfid", "FID of samples, lower is better"),
    ("fd_classifier_gen", "classifier distance of samples, lower is better"),
    ("psnr", "dB, higher is better"),
    ("ms_ssim", "higher is better"),
    ("ssim", "higher is better"),
    ("lpips", "lower is better"),
    ("codebook_usage", "share of codes in use"),
    ("bits_per_image", "size of an image's codes"),
    ("stage2_val_loss", "nats per token"),
    ("class_agreement", "share of samples recognised as the class asked for"),
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
    print()
    for name, meaning in RESULTS:
        if name in metrics:
            print(f"  {name:18} {metrics[name]:10.4g}   {meaning}")
    print(f"\n  all metrics        {stage.metrics[0]}")
    for picture in sorted(folder.glob("*.png")):
        print(f"  {picture.stem:18} {picture}")
    print()
    return 0
