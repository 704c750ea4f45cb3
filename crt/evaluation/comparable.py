"""Whether two results were measured in the same way: figures of different protocols must not be compared."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# What the distances depend on besides the images that were made: by the field of metrics.json, in words.
PROTOCOL_FIELDS = {
    "features": "features",
    "features_sha256": "weights of the feature network",
    "features_image_size": "side to which images are brought first",
    "features_resize": "resize before the feature network",
    "features_precision": "precision of features",
    "reconstruction_reference": "reference of reconstructions",
    "reconstruction_reference_sha256": "images of the reference of reconstructions",
    "reconstruction_reference_images": "number of reconstructions",
    "generation_reference": "reference of samples",
    "generation_reference_sha256": "images of the reference of samples",
    "generation_reference_images": "number of reference images",
    "generation_reference_moments": "mean and covariance of the reference of samples",
    "generation_images": "number of samples",
    "generation_labels": "classes of the samples",
    "neighbours": "k of precision and recall",
    "pairwise_images": "images of kernel distance, precision and recall",
    "kernel_subsets": "subsets of the kernel distance",
    "kernel_subset_size": "size of these subsets",
    "inception_score_splits": "splits of the inception score",
    "classifier_sha256": "classifier that judges classes",
    "lpips_sha256": "weights of the perceptual distance",
}
# Where the reference's mean and covariance come from.
MOMENTS_OF_IMAGES = "of its images"
STORED_MOMENTS = "of the whole data set, stored in the file"
# Which labels samples are drawn for.
ALL_CLASSES_ALIKE = "all classes alike"
# What the classifier learned to tell apart.
CLASSES, QUARTER_TURNS = "classes", "quarter turns"
# What results without the field were measured by.
_EARLIER = {"generation_reference_moments": MOMENTS_OF_IMAGES, "generation_labels": ALL_CLASSES_ALIKE}
_DIGEST_DIGITS = 8


def protocol_differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """In what two results were measured differently, each as "what: value of a, value of b"; empty if in nothing.

    Args:
        a: content of a metrics.json.
        b: content of another.
    """
    a, b = _EARLIER | dict(a), _EARLIER | dict(b)
    differing = [name for name in PROTOCOL_FIELDS if a.get(name) != b.get(name)]
    # Another reference has other images: said once.
    implied = {f"{name}_sha256" for name in differing}
    return [
        f"{PROTOCOL_FIELDS[name]}: {_short(a.get(name))}, {_short(b.get(name))}"
        for name in differing
        if name not in implied
    ]


def protocol_warning(names: tuple[str, str], differences: list[str]) -> str:
    """One line that says so."""
    return (
        f"{names[0]} and {names[1]} were measured differently ({'; '.join(differences)}): their figures do not compare"
    )


def _short(value: Any) -> str:
    text = "not recorded" if value is None else str(value)
    is_digest = len(text) == 64 and not set(text) - set("0123456789abcdef")
    return text[:_DIGEST_DIGITS] if is_digest else text
