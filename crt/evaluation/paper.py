"""The paper's published figures (arXiv 2412.16326), and which of them a result may be held against."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from crt.evaluation.comparable import ALL_CLASSES_ALIKE, STORED_MOMENTS
from crt.evaluation.features import TENSORFLOW_RESIZE
from crt.manifest import Manifest

PAPER_TABLE_COLUMNS = ("rFID", "gFID, 111M", "gFID, 340M", "gFID, 775M", "gFID, 3.1B")
PAPER_TABLE = {
    "baseline": ("2.21", "4.90", "2.89", "2.55", ""),
    "CRT": ("2.36", "4.34", "2.75", "2.35", ""),
    "CRT_opt": ("", "", "2.45", "2.18", ""),
    "LlamaGen, 576 tokens": ("0.94", "", "", "2.62", "2.18"),
}
_SIDE, _TOKENS, _IMAGES = 256, 256, 50_000
# Tokenizers of the table by their codebook's size.
_TOKENIZERS = {16_384: ("baseline", "CRT"), 131_072: ("CRT_opt",)}
# (layers, width) of the transformers, with their column: parameters depend on the codebook's size too.
_TRANSFORMERS = {(12, 768): 1, (24, 1024): 2, (36, 1280): 3}


def beside_paper(metrics: Mapping[str, Any], image_size: int, manifests: Mapping[str, Manifest]) -> dict[str, Any]:
    """Rows of this run beside the paper's, and the reasons why others are missing.

    Args:
        metrics: the content of metrics.json.
        image_size: side of the images.
        manifests: of the earlier stages, by name.

    Returns:
        `tokenizers`: of the paper's, with which this run compares; `rows`: name, ours, and the published figure of each
        of those, as texts; `reasons`: sentences without a full stop.
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
    if not reasons and (tokens != _TOKENS or codebook not in _TOKENIZERS):
        sizes = " or ".join(f"{size:,}" for size in _TOKENIZERS)
        reasons.append(f"they are for {_TOKENS} tokens of {sizes} codes, this run has {tokens} of {codebook:,}")
    if reasons:
        return {"tokenizers": (), "rows": [], "reasons": reasons}
    tokenizers = _TOKENIZERS[codebook]
    rows = []
    if metrics["reconstruction_reference_images"] == _IMAGES:
        rows.append(_row(metrics["rfid"], 0, tokenizers))
    else:
        reasons.append(f"rFID is for all {_IMAGES:,} validation images")
    model = manifests["train_ar"].params["train_ar"]["model"]
    column = _TRANSFORMERS.get((model["layers"], model["width"]))
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
        rows.append(_row(metrics["gfid"], column, tokenizers))
    rows = [row for row in rows if any(row["published"])]
    return {"tokenizers": tokenizers, "rows": rows, "reasons": reasons}


def _row(ours: float, column: int, tokenizers: tuple[str, ...]) -> dict[str, Any]:
    published = [PAPER_TABLE[tokenizer][column] for tokenizer in tokenizers]
    return {"name": PAPER_TABLE_COLUMNS[column], "ours": f"{ours:.2f}", "published": published}
