"""Figures of an evaluation, and the protocol that they were measured by, as metrics.json holds them: flat."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from crt.chunks import ChunkStore
from crt.evaluation.comparable import ALL_CLASSES_ALIKE, CLASSES, MOMENTS_OF_IMAGES, STORED_MOMENTS
from crt.evaluation.features import TENSORFLOW_RESIZE, FeatureNetwork
from crt.evaluation.frechet import (
    GaussianStatistics,
    GivenMoments,
    Moments,
    expected_distance,
    frechet_distance,
    kernel_distance,
    scarcity,
)
from crt.evaluation.passes import Networks, Passes, Sources
from crt.evaluation.precision_recall import class_agreement, inception_score, precision_recall
from crt.evaluation.sources import AdmBatch, ImageSource, SampleSource, SplitSource
from crt.params import Evaluate
from crt.randomness import numpy_generator
from crt.tokenizer.validation import collapse_warning
from crt.tokens.statistics import CodebookUse

Metrics = dict[str, float | int | str]
# Samples may differ from the reference in the classes of so many images, beside chance.
_OTHER_SHARES = 0.1
# Of section evaluate: what figures depend on besides images and networks.
_SETTINGS = {"neighbours", "pairwise_images", "kernel_subsets", "kernel_subset_size", "inception_score_splits"}


def reconstruction_metrics(networks: Networks, passes: Passes, warnings: list[str]) -> Metrics:
    """Reconstructions against their originals, over the whole validation split."""
    name = "fd_classifier_rec" if networks.features is networks.classifier else "rfid"
    dimension = networks.features.dimension
    copies = store_statistics(passes.copies, "features", dimension)
    originals = store_statistics(passes.val, "features", dimension)
    if originals.count <= dimension:
        # No floor to name: reconstructions are pairs with their originals, and perfect ones would score 0.
        warnings.append(scarcity(name, dimension, {"validation images": originals.count}))
    metrics: Metrics = {name: frechet_distance(copies, originals)}
    for score in networks.similarities():
        metrics[score] = float(passes.copies.column(score).mean())
    return metrics


@dataclass(frozen=True)
class Reference:
    """What samples are held against."""

    store: ChunkStore
    moments: Mapping[str, Moments]
    """By the name of the features, "features" and, where there are any, "spatial"."""


def stored_moments(source: ImageSource, network: FeatureNetwork) -> dict[str, Moments]:
    """Moments of the reference that its file holds: of the whole data set, as published distances are measured.

    They belong to TensorFlow's resize and to images of their own side, under which alone they are used.

    Args:
        source: the reference.
        network: whose features count.

    Returns:
        As `Reference.moments`; empty where there are none.

    Raises:
        UserError: they are damaged, or of other features.
    """
    if not isinstance(source, AdmBatch) or network.resize != TENSORFLOW_RESIZE:
        return {}
    if network.image_size not in (None, source.image_size):
        return {}
    given = {column: source.moments(column, size) for column, size in _columns(network).items()}
    return {column: moments for column, moments in given.items() if moments}


def open_reference(store: ChunkStore, network: FeatureNetwork, stored: Mapping[str, Moments]) -> Reference:
    """The reference, with moments taken from its images where none are stored."""
    taken = {c: store_statistics(store, c, size) for c, size in _columns(network).items() if c not in stored}
    return Reference(store, {**stored, **taken})


def _columns(network: FeatureNetwork) -> dict[str, int]:
    """Number of features by the array's name."""
    sizes = {"features": network.dimension, "spatial": network.spatial_dimension}
    return {column: size for column, size in sizes.items() if size}


def distances(
    store: ChunkStore, reference: Mapping[str, Moments], names: Mapping[str, str], images: str, warnings: list[str]
) -> dict[str, tuple[float, float]]:
    """The Frechet distance by each kind of features, and what as many perfect images would score.

    Args:
        store: the features of what is measured.
        reference: as `Reference.moments`.
        names: of the distance, by that of the features.
        images: how warnings call what is measured.
        warnings: that of too few images is added.
    """
    found = {}
    for column, real in reference.items():
        name, dimension = names[column], len(real.mean)
        made = store_statistics(store, column, dimension)
        expected = expected_distance(real, (made.count, real.count))
        found[name] = frechet_distance(made, real), expected
        if min(made.count, real.count) <= dimension:
            warnings.append(scarcity(name, dimension, {images: made.count, "reference images": real.count}, expected))
    return found


def generation_metrics(
    params: Evaluate,
    seed: int,
    networks: Networks,
    *,
    samples: ChunkStore,
    reference: Reference,
    warnings: list[str],
) -> Metrics:
    """Samples against the reference: distances, precision and recall, inception score."""
    inception = networks.features is not networks.classifier
    name, kernel_name = ("gfid", "kid") if inception else ("fd_classifier_gen", "kd_classifier_gen")
    metrics: Metrics = {}
    for figure, (distance, expected) in distances(
        samples, reference.moments, {"features": name, "spatial": "sfid"}, "samples", warnings
    ).items():
        metrics |= {figure: distance, f"{figure}_of_perfect_images": expected}
    stores = samples, reference.store
    x, y = (store.column("features", rows_of_pairs(store.count, params.pairwise_images, seed)) for store in stores)
    if min(len(x), len(y)) > params.neighbours:
        metrics[kernel_name] = kernel_distance(
            x, y, subsets=params.kernel_subsets, subset_size=params.kernel_subset_size, seed=seed
        )
        metrics["precision"], metrics["recall"] = precision_recall(x, y, params.neighbours, networks.device)
    else:
        warnings.append(f"{kernel_name}, precision and recall: left out, they need over {params.neighbours} images")
    if inception:
        probabilities = [networks.features.probabilities(features) for features in samples.parts("features")]
        metrics["inception_score"], metrics["inception_score_std"] = inception_score(
            np.concatenate(probabilities), params.inception_score_splits, seed
        )
    return metrics


def rows_of_pairs(count: int, wanted: int, seed: int) -> np.ndarray:
    """Up to `wanted` of `count` rows, drawn at random, ascending.

    Samples are of all classes in turn: of every so many of them some classes would come twice as often as others.
    """
    if wanted >= count:
        return np.arange(count)
    return np.sort(numpy_generator(seed, "images in pairs").choice(count, wanted, replace=False))


def code_metrics(counts: np.ndarray, tokens_per_image: int, stage2_val_loss: float, warnings: list[str]) -> Metrics:
    """Use of the codebook over the validation codes, and the size of an image: as stored, and entropy-coded.

    `bits_per_image_entropy` codes each token by its overall frequency, `bits_per_image_stage2` by the transformer's
    prediction from class and earlier tokens: the rate that stage 2 brings the image to.

    Args:
        counts: (codebook_size,) occurrences of each code.
        tokens_per_image: codes of an image.
        stage2_val_loss: of the transformer, in nats per token.
        warnings: that of a collapsed codebook is added.
    """
    use = CodebookUse(counts)
    collapse = collapse_warning(use)
    warnings += [collapse] if collapse else []
    return {
        "codebook_usage": use.share,
        "codebook_perplexity": use.perplexity,
        "tokens_per_image": tokens_per_image,
        "bits_per_image": tokens_per_image * math.log2(len(counts)),
        "bits_per_image_entropy": tokens_per_image * use.entropy,
        "bits_per_image_stage2": tokens_per_image * stage2_val_loss / math.log(2),
        "stage2_val_loss": stage2_val_loss,
    }


def sweep_row(source: SampleSource, store: ChunkStore, metrics: Metrics) -> dict[str, float]:
    """The figures of the samples at one scale of guidance, for a table of all scales.

    Args:
        source: the samples.
        store: what was measured of them.
        metrics: their `generation_metrics`.
    """
    agreement = class_agreement(store.column("predictions"), source.labels)
    figures = {name: value for name, value in metrics.items() if not isinstance(value, str)}
    return {"guidance_scale": source.guidance_scale, **figures, "class_agreement": agreement}


def class_metrics(networks: Networks, sources: Sources, passes: Passes, warnings: list[str]) -> Metrics:
    """Whether samples show the class asked for, by a classifier whose own accuracy bounds what that can mean.

    Images of one class are to be recognised as upright instead, and the result says so: `classifier_task`.
    """
    other_shares = other_shares_warning(sources.samples, sources.reference)
    warnings += [other_shares] if other_shares else []
    task = networks.classifier.task
    return ({"classifier_task": task} if task != CLASSES else {}) | {
        "class_agreement": class_agreement(passes.samples.column("predictions"), sources.samples.labels),
        "classifier_accuracy": class_agreement(passes.val.column("predictions"), sources.val.labels),
    }


def protocol(params: Evaluate, networks: Networks, sources: Sources, reference: Reference) -> Metrics:
    """All that another result must share to be compared with this one."""
    stored = isinstance(reference.moments["features"], GivenMoments)
    judges = {"classifier_sha256": networks.classifier.checksum, "lpips_sha256": networks.lpips_checksum}
    return {
        "features": networks.features.name,
        "features_sha256": networks.features.checksum,
        "features_image_size": networks.side,
        "features_resize": networks.features.resize,
        "features_precision": "float32, statistics float64",
        "reconstruction_reference": sources.val.name,
        "reconstruction_reference_sha256": sources.val.checksum,
        "reconstruction_reference_images": len(sources.val),
        "generation_reference": sources.reference.name,
        "generation_reference_sha256": sources.reference.checksum,
        "generation_reference_images": len(sources.reference),
        "generation_reference_moments": STORED_MOMENTS if stored else MOMENTS_OF_IMAGES,
        "generation_images": len(sources.samples),
        "generation_labels": drawn_labels(sources.samples),
        "guidance_scale": sources.samples.guidance_scale,
        **params.model_dump(include=_SETTINGS),
        **{name: checksum for name, checksum in judges.items() if checksum},
    }


def drawn_labels(samples: SampleSource) -> str:
    """In words, which labels the samples were drawn for."""
    counts = np.bincount(samples.labels, minlength=len(samples.class_names))
    if counts.max() - counts.min() <= 1:
        return ALL_CLASSES_ALIKE
    digest = hashlib.sha256(np.ascontiguousarray(counts, "<i8").tobytes()).hexdigest()
    return f"{(counts > 0).sum()} of {len(counts)} classes, numbers of SHA-256 {digest[:8]}"


def other_shares_warning(samples: SampleSource, reference: ImageSource) -> str:
    """That the samples are of other classes, or in other shares, than the images that they are held against, or "".

    A distance between sets grows by that however good each sample is. Where the reference has no labels nobody knows.
    """
    if not isinstance(reference, SplitSource):
        return ""
    counts = [np.bincount(labels, minlength=len(samples.class_names)) for labels in (samples.labels, reference.labels)]
    made, real = (count / count.sum() for count in counts)
    # Half the sum of differences is the share of images that another class would have to be asked for. The standard
    # deviation of the reference's shares is what chance does to few images.
    by_chance = np.sqrt(made * (1 - made) / len(reference)).sum() / 2
    differing = np.abs(made - real).sum() / 2
    if differing <= _OTHER_SHARES + by_chance:
        return ""
    worst = int(np.abs(made - real).argmax())
    return (
        f"sample.labels: the samples show other shares of the classes than {reference.name} (of "
        f"{samples.class_names[worst]} {made[worst]:.0%} instead of {real[worst]:.0%}), which adds to their distance: "
        "give sample.labels a list in which each class occurs as often as it should"
    )


def store_statistics(store: ChunkStore, column: str, dimension: int) -> GaussianStatistics:
    """Mean and covariance of an array (N, `dimension`), a chunk at a time."""
    statistics = GaussianStatistics(dimension)
    for features in store.parts(column):
        statistics.update(features)
    return statistics
