"""What the figures of metrics.json mean, in words: for the terminal and for the page of a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from crt.evaluation.comparable import CLASSES, STORED_MOMENTS

# The axis of figures over the codes of an image, counted as in loss_per_position.csv.
POSITION = "place of the code in the image, row by row from 0"
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


def protocol_text(metrics: Mapping[str, Any]) -> str:
    """What the figures were measured by, in one sentence."""
    stored = metrics.get("generation_reference_moments") == STORED_MOMENTS
    return _PROTOCOL.format(**metrics, moments=f", mean and covariance {STORED_MOMENTS}" if stored else "")


def glossary(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Terms that a page with these figures uses, with their meaning."""
    entries = YAML(typ="safe", pure=True).load(_GLOSSARY_FILE)
    return [(entry["term"], entry["text"]) for entry in entries if set(entry.get("figures", metrics)) & set(metrics)]
