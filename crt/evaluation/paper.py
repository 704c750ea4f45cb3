"""The paper's published figures (arXiv 2412.16326), and which of them a result may be held against."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from crt.evaluation.comparable import ALL_CLASSES_ALIKE, STORED_MOMENTS
from crt.evaluation.features import TENSORFLOW_RESIZE
from crt.manifest import Manifest

# The table is of this setting.
_TOKENS, _CODEBOOK = 256, 16_384
PAPER_TABLE_COLUMNS = ("rFID", "gFID, 111M", "gFID, 340M", "gFID, 775M")
PAPER_TABLE = {
    "baseline": ("2.21", "4.90", "2.89", "2.55"),
    "CRT": ("2.36", "4.34", "2.75", "2.35"),
    "CRT, optimised": ("", "", "2.45", "2.18"),
}
_SIDE, _IMAGES = 256, 50_000
# Parameters of the transformers, in the order of the table's columns.
_SIZES = {111e6: 1, 343e6: 2, 775e6: 3}
_SIZE_TOLERANCE = 0.05


def beside_paper(metrics: Mapping[str, Any], image_size: int, manifests: Mapping[str, Manifest]) -> dict[str, Any]:
    """Rows of this run beside the paper's, and the reasons why others are missing.

    Args:
        metrics: the content of metrics.json.
        image_size: side of the images.
        manifests: of the earlier stages, by name.

    Returns:
        `rows`: name, ours, baseline and crt as texts; `reasons`: sentences without a full stop.
    """
    reasons = []
    source = manifests["prepare_data"].params["prepare_data"]["source"]
    if source != "imagenet" or image_size != _SIDE:
        reasons.append(f"they are for ImageNet at {_SIDE} px, this run is on {source} at {image_size} px")
    if "rfid" not in metrics:
        reasons.append("they are FID, on Inception features, this run was measured with a classifier of its own")
    elif metrics["features_resize"] != TENSORFLOW_RESIZE:
        reasons.append(
            f"they are measured under resize {TENSORFLOW_RESIZE}, this run under {metrics['features_resize']}"
        )
    elif metrics["features_image_size"] != _SIDE:
        reasons.append(f"they are measured at {_SIDE} px, this run at {metrics['features_image_size']}")
    tokens = metrics["tokens_per_image"]
    codebook = round(2 ** (metrics["bits_per_image"] / tokens))
    if not reasons and (tokens, codebook) != (_TOKENS, _CODEBOOK):
        reasons.append(f"they are for {_TOKENS} tokens of {_CODEBOOK:,} codes, this run has {tokens} of {codebook:,}")
    if reasons:
        return {"rows": [], "reasons": reasons}
    rows = []
    if metrics["reconstruction_reference_images"] == _IMAGES:
        rows.append(_row("rFID", metrics["rfid"], 0))
    else:
        reasons.append(f"rFID is for all {_IMAGES:,} validation images")
    column = _column(manifests["train_ar"].summary.get("parameters"))
    stored = metrics.get("generation_reference_moments") == STORED_MOMENTS
    if metrics["generation_reference"] != "adm_train" or metrics["generation_images"] != _IMAGES:
        reasons.append(f"gFID is for {_IMAGES:,} samples against the ADM batch")
    elif not stored:
        reasons.append("gFID is for the moments that the ADM batch file holds, under resize legacy_tensorflow")
    elif metrics.get("generation_labels", ALL_CLASSES_ALIKE) != ALL_CLASSES_ALIKE:
        reasons.append("gFID is for samples of all classes alike")
    elif column is None:
        reasons.append("gFID is for transformers of 111M, 340M and 775M parameters")
    else:
        rows.append(_row(PAPER_TABLE_COLUMNS[column], metrics["gfid"], column))
    return {"rows": rows, "reasons": reasons}


def _row(name: str, ours: float, column: int) -> dict[str, str]:
    return {
        "name": name,
        "ours": f"{ours:.2f}",
        "baseline": PAPER_TABLE["baseline"][column],
        "crt": PAPER_TABLE["CRT"][column],
    }


def _column(parameters: float | None) -> int | None:
    for size, column in _SIZES.items():
        if parameters and abs(parameters / size - 1) < _SIZE_TOLERANCE:
            return column
    return None
