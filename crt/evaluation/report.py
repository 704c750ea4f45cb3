"""The page of a run: one HTML file with everything in it, for people who have not read the code.

It holds no date and no path; of what it shows, only the stages' wall times differ where the same run is made again.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from crt.evaluation.metric_table import METRICS, RESULTS, title
from crt.evaluation.paper import PAPER_TABLE, PAPER_TABLE_COLUMNS, beside_paper
from crt.evaluation.wording import glossary, has_classes, meaning, protocol_text, shown
from crt.manifest import Manifest
from crt.pages import data_url, write_page
from crt.progress import duration, human_bytes

REPORT_FILE = "report.html"
_TILES = {
    "gfid": "FID of the samples: lower is better, perfect images would score {gfid_of_perfect_images:.2g}",
    "fd_classifier_gen": "distance of the samples from real images: lower is better, perfect images would score "
    "{fd_classifier_gen_of_perfect_images:.2g}",
    "class_agreement": "of the samples are recognised as the class asked for (of real images {accuracy:.1f}%)",
    "psnr": "PSNR of the reconstructions: higher is better",
    "stage2_val_loss": "nats per code, how hard the codes are to predict: lower is better",
    "codebook_usage": "of the {codebook_size:,} codes are in use",
}
_STAGES = {
    "prepare_data": "checks and packs the images",
    "train_tokenizer": "trains encoder, codebook and decoder",
    "tokenize": "turns the images into codes",
    "train_ar": "trains the transformer on the codes",
    "sample": "draws new images",
    "evaluate": "measures, and wrote this page",
}
_LARGE_SIDE = 64
# So few are not told in millions.
_FEW_PARAMETERS = 100_000


def write_report(
    folder: Path,
    metrics: Mapping[str, Any],
    sweep: Sequence[Mapping[str, float]],
    manifests: Mapping[str, Manifest],
    own: Manifest,
    *,
    seconds: Mapping[str, float | None],
) -> None:
    """Write report.html into a folder that holds the pictures.

    Args:
        folder: with samples.png, reconstructions.png, code_usage.png and, where made,
            curves_tokenizer.png, curves_transformer.png and guidance_sweep.png.
        metrics: the content of metrics.json.
        sweep: figures by guidance scale, the main one among them, as far as they are to be shown.
        manifests: of the earlier stages, by name.
        own: what is known of this stage's manifest before it is published.
        seconds: wall time by stage, as far as it is known.
    """
    pictures = {path.stem: data_url(path) for path in sorted(folder.glob("*.png"))}
    train, data = manifests["train_tokenizer"].params, manifests["prepare_data"].params["prepare_data"]
    side, classes = train["train_tokenizer"]["image_size"], has_classes(metrics)
    figures = shown(metrics, classes)
    write_page(
        folder / REPORT_FILE,
        "report.html.j2",
        title=f"Run report: {data['source']} at {side} px, lambda {train['lambda']:g}, seed {train['seed']}",
        lead=_lead(metrics, manifests, side),
        tiles=[
            {"value": _tile(name, metrics[name]), "text": _tile_text(text, metrics)}
            for name, text in _TILES.items()
            if name in figures
        ],
        glossary=glossary(metrics),
        warnings=[text for text in metrics.get("warnings", "").split("; ") if text],
        classes=classes,
        tokens=metrics["tokens_per_image"],
        enlarged=side < _LARGE_SIDE,
        pictures={"curves_tokenizer": None, "curves_transformer": None, "guidance_sweep": None, **pictures},
        results=[
            {
                "title": title(name),
                "name": name,
                "value": f"{metrics[name]:.4g}",
                "meaning": meaning(text, metrics),
            }
            for name, text in RESULTS.items()
            if name in figures
        ],
        protocol=protocol_text(metrics),
        paper=beside_paper(metrics, side, manifests) | {"columns": PAPER_TABLE_COLUMNS, "table": PAPER_TABLE},
        sweep=_sweep(metrics, sweep),
        stages=[_stage(name, manifest, seconds.get(name)) for name, manifest in {**manifests, "evaluate": own}.items()],
        params=_params_text([*manifests.values(), own]),
    )


def _lead(metrics: Mapping[str, Any], manifests: Mapping[str, Manifest], side: int) -> str:
    weight, parameters = manifests["train_tokenizer"].params["lambda"], manifests["train_ar"].summary.get("parameters")
    kind = (
        f"It was trained with the causal regularizer at weight {weight:g}, which makes each code easier to predict "
        "from those before it."
        if weight
        else "It was trained without the causal regularizer (lambda 0): the plain VQGAN, the method's baseline."
    )
    small = parameters is not None and parameters < _FEW_PARAMETERS
    count = f"{parameters:,}" if small else f"{(parameters or 0) / 1e6:,.1f} million"
    size = f" of {count} parameters" if parameters else ""
    return (
        f"A tokenizer turns an image of {side}x{side} pixels into {metrics['tokens_per_image']} codes, each one of "
        f"{_codebook_size(metrics):,} ({metrics['bits_per_image']:.0f} bits an image). {kind} A transformer{size} then "
        f"learned to write such codes, and drew {metrics['generation_images']:,} new images with them."
    )


def _tile(name: str, value: float) -> str:
    unit = METRICS[name].unit
    return f"{100 * value:.1f}%" if unit == "%" else f"{value:.3g} {unit}".strip()


def _tile_text(text: str, metrics: Mapping[str, Any]) -> str:
    accuracy = 100 * metrics["classifier_accuracy"]
    return meaning(text, metrics, accuracy=accuracy, codebook_size=_codebook_size(metrics))


def _codebook_size(metrics: Mapping[str, Any]) -> int:
    return round(2 ** (metrics["bits_per_image"] / metrics["tokens_per_image"]))


def _sweep(metrics: Mapping[str, Any], rows: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Nothing to show for a single scale."""
    header = ["guidance_scale", *(name for name in rows[0] if name in RESULTS)] if len(rows) > 1 else []
    return {
        "header": [title(name) for name in header],
        "rows": [
            {"chosen": row["guidance_scale"] == metrics["guidance_scale"], "values": [f"{row[n]:.4g}" for n in header]}
            for row in rows
            if header
        ],
        "images": f"{metrics['generation_images']:,}",
        "chosen": f"{metrics['guidance_scale']:g}",
    }


def _stage(name: str, manifest: Manifest, seconds: float | None) -> dict[str, str]:
    flops = manifest.summary.get("training_flops")
    size = sum(entry["bytes"] for entry in manifest.files.values())
    return {
        "name": name,
        "what": _STAGES[name],
        "time": "" if seconds is None else duration(seconds),
        "flops": f"{flops:.2e}" if flops else "",
        "bytes": human_bytes(size) if size else "",
        "recipe": manifest.fingerprint[:16],
    }


def _params_text(manifests: Sequence[Manifest]) -> str:
    """The params of all stages as one YAML text."""
    values: dict[str, Any] = {}
    for manifest in manifests:
        values |= manifest.params
    stream = io.StringIO()
    yaml = YAML()  # keeps the order of the keys
    yaml.dump(values, stream)
    return stream.getvalue()
