"""Stage evaluate: how well the tokenizer reconstructs, how well the pipeline generates, with pictures to look at.

Reads the prepared data, the tokenizer, its codes, the transformer's validation loss and the samples. Writes
`metrics.json` (flat: figures, and the protocol that they were measured by), `samples.png`, `reconstructions.png`,
`curves.png`, `code_usage.png` and `classifier.safetensors`.

Cost: one pass over the validation images (encode, decode, two feature networks), one over the samples, and one over
the reference if that is another set; the classifier's training before, and a matrix root of some seconds (128
features) to two minutes (2,048) after. Several processes share the passes. On the digits half a minute on two
cores; expect `classifier_accuracy` of 0.99 and `class_agreement` above 0.9.
"""

from __future__ import annotations

import hashlib
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from crt.data.transforms import to_uint8, to_unit_range
from crt.distributed import World, join_world, reported_once
from crt.errors import UserError
from crt.evaluation import reconstruction
from crt.evaluation.chunks import ChunkStore, raise_if_any_stopped
from crt.evaluation.classifier import ClassifierFeatures, train_classifier
from crt.evaluation.curves import plot_code_usage, plot_losses
from crt.evaluation.features import FeatureNetwork, InceptionFeatures
from crt.evaluation.frechet import (
    GaussianStatistics,
    expected_distance,
    frechet_distance,
    kernel_distance,
    scarcity,
)
from crt.evaluation.grids import image_grid, reconstruction_grid, rows_by_class, save_png
from crt.evaluation.precision_recall import class_agreement, inception_score, precision_recall
from crt.evaluation.sources import AdmBatch, ImageSource, SampleSource, SplitSource
from crt.interrupt import Stopped
from crt.progress import logger
from crt.stage import StageRun, forget_other_inputs, write_json
from crt.tokenizer.losses import PerceptualLoss
from crt.tokenizer.model import Tokenizer
from crt.tokens.cache import TokenCache

Metrics = dict[str, float | int | str]


@dataclass(frozen=True)
class Sources:
    """The images that are measured."""

    val: SplitSource
    samples: SampleSource
    reference: ImageSource
    """What the samples are compared with; may be `val` itself."""


@dataclass(frozen=True)
class Networks:
    """What measures them."""

    tokenizer: Tokenizer
    device: torch.device
    classifier: ClassifierFeatures
    features: FeatureNetwork
    """What distances are taken between; may be `classifier` itself."""
    lpips: PerceptualLoss | None

    @torch.inference_mode()
    def reconstruct(self, images: np.ndarray) -> np.ndarray:
        """uint8 (B, S, S, 3) -> the same through encoder, codes and decoder, in float32."""
        codes = self.tokenizer.encode(to_unit_range(torch.from_numpy(images).to(self.device)))
        return to_uint8(self.tokenizer.decode(codes)).cpu().numpy()


@dataclass(frozen=True)
class Passes:
    """What one look at each image left on disk."""

    val: ChunkStore
    samples: ChunkStore
    reference: ChunkStore


def run(run: StageRun) -> None:
    """Evaluate; see the module's text.

    Raises:
        UserError: a missing or wrong reference or Inception file, or sets of images that do not fit together.
    """
    with join_world() as world, reported_once(world):
        if world.is_main:
            forget_other_inputs(run)
        raise_if_any_stopped(world)  # the others wait here meanwhile
        tokenizer = Tokenizer.load(run.inputs["tokenizer"], world.device)
        sources = _open_sources(run, tokenizer.image_size)
        networks = _load_networks(run, world, tokenizer)
        passes = _measure(run, world, networks, sources)
        if world.is_main:
            _write_results(run, networks, sources, passes)


def _open_sources(run: StageRun, image_size: int) -> Sources:
    params = run.params.evaluate
    content = run.manifests["prepare_data"].content
    val = SplitSource(run.inputs["data"], "val", image_size, content)
    samples = SampleSource(run.inputs["samples"], run.manifests["sample"].content)
    reference: ImageSource = val
    if params.generation_reference == "train":
        reference = SplitSource(run.inputs["data"], "train", image_size, content)
    elif params.generation_reference == "adm_train":
        reference = AdmBatch(params.adm_reference)
    if reference.image_size != samples.image_size:
        raise UserError(
            f"evaluate.generation_reference: the images of {reference.name} have {reference.image_size} pixels a side, "
            f"the samples {samples.image_size}: choose a reference of that size"
        )
    for source in (val, samples, reference):
        if len(source) < 2:
            raise UserError(f"evaluate: {source.name} holds {len(source)} image, distances need two at least: add some")
    return Sources(val, samples, reference)


def _load_networks(run: StageRun, world: World, tokenizer: Tokenizer) -> Networks:
    params = run.params.evaluate
    # What may be missing comes before the classifier's training.
    features: FeatureNetwork | None = None
    if params.features == "inception":
        features = InceptionFeatures(params.inception_weights, params.inception_resize, world.device)
    lpips = None
    if params.lpips:
        try:
            lpips = PerceptualLoss(params.lpips_weights).to(world.device)
        except UserError as error:
            raise UserError(f"evaluate.lpips: true, but {error} (here: set evaluate.lpips to false)") from None
    classifier = _classifier(run, world, tokenizer.image_size)
    return Networks(tokenizer, world.device, classifier, features or classifier, lpips)


def _classifier_path(run: StageRun) -> Path:
    return run.work / "classifier" / "classifier.safetensors"


def _classifier(run: StageRun, world: World, image_size: int) -> ClassifierFeatures:
    """The classifier, trained by the main process unless it already is."""
    path = _classifier_path(run)
    if world.is_main and not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        train = SplitSource(run.inputs["data"], "train", image_size, run.manifests["prepare_data"].content)
        try:
            train_classifier(
                train.read_rows,
                labels=train.labels,
                classes=train.images.num_classes,
                image_size=image_size,
                params=run.params.evaluate.classifier,
                seed=run.params.seed,
                path=path,
                device=world.device,
            )
        except Stopped:
            if world.size == 1:
                raise
    raise_if_any_stopped(world)  # the others wait here meanwhile
    return ClassifierFeatures(path, world.device)


def _measure(run: StageRun, world: World, networks: Networks, sources: Sources) -> Passes:
    """Look at every image once; what is measured stays in the work folder, named by what measured it."""
    classifier, features_of = networks.classifier, networks.features
    similarity = _similarity(sources.val.image_size)

    def predictions(images: np.ndarray, features: np.ndarray) -> np.ndarray:
        own = features if features_of is classifier else classifier(images)
        return classifier.probabilities(own).argmax(axis=1)

    @torch.inference_mode()
    def lpips_of(x: torch.Tensor, y: torch.Tensor) -> dict[str, np.ndarray]:
        if networks.lpips is None:
            return {}
        distances = networks.lpips.network(to_unit_range(x), to_unit_range(y))  # (B, 1, 1, 1)
        return {"lpips": distances.flatten().double().cpu().numpy()}

    def measure_original(start: int, stop: int) -> dict[str, np.ndarray]:
        originals = sources.val.read(start, stop)
        copies = networks.reconstruct(originals)
        features = features_of(originals)
        x, y = (torch.from_numpy(images).to(world.device) for images in (originals, copies))
        return {
            "features": features,
            "copy_features": features_of(copies),
            "predictions": predictions(originals, features),
            "psnr": reconstruction.psnr(x, y).cpu().numpy(),
            similarity.__name__: similarity(x, y).cpu().numpy(),
            **lpips_of(x, y),
        }

    def measure_sample(start: int, stop: int) -> dict[str, np.ndarray]:
        images = sources.samples.read(start, stop)
        features = features_of(images)
        return {"features": features, "predictions": predictions(images, features)}

    def measure_reference(start: int, stop: int) -> dict[str, np.ndarray]:
        return {"features": features_of(sources.reference.read(start, stop))}

    def store(source: ImageSource) -> ChunkStore:
        # The weights and the ADM batch are files of the user's, which may be others today.
        made_of = hashlib.sha256(f"{source.checksum} {features_of.checksum}".encode()).hexdigest()
        return ChunkStore(run.work / f"{source.name}-{made_of[:16]}", len(source), run.params.evaluate.batch_size)

    val = store(sources.val)
    val.fill("reconstructions", measure_original, world)
    samples = store(sources.samples)
    samples.fill("samples", measure_sample, world)
    if sources.reference is sources.val:
        return Passes(val, samples, val)
    reference = store(sources.reference)
    reference.fill(f"reference {sources.reference.name}", measure_reference, world)
    return Passes(val, samples, reference)


def _write_results(run: StageRun, networks: Networks, sources: Sources, passes: Passes) -> None:
    """metrics.json, the pictures and the classifier, from what the passes measured."""
    logger.info("evaluate: distances")
    counts = _code_counts(run)
    warnings: list[str] = []
    metrics: Metrics = (
        _reconstruction_metrics(networks, passes, warnings)
        | _generation_metrics(run, networks, passes, warnings)
        | _code_metrics(run, networks.tokenizer, counts)
        | _class_metrics(sources, passes)
        | _protocol(networks, sources)
    )
    if warnings:
        metrics["warnings"] = "; ".join(warnings)
    for warning in warnings:
        logger.warning("warning: %s", warning)
    for name, value in metrics.items():
        if not isinstance(value, str) and not math.isfinite(value):
            raise FloatingPointError(f"{name} is {value}")
    write_json(run.staging / "metrics.json", metrics)
    run.summary.update({name: value for name, value in metrics.items() if not isinstance(value, str)})
    _draw(run, networks, sources, counts)
    shutil.copyfile(_classifier_path(run), run.staging / "classifier.safetensors")


def _similarity(image_size: int) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    return reconstruction.ms_ssim if image_size >= reconstruction.MS_SSIM_MIN_SIDE else reconstruction.ssim


def _statistics(store: ChunkStore, column: str, dimension: int) -> GaussianStatistics:
    statistics = GaussianStatistics(dimension)
    for features in store.parts(column):
        statistics.update(features)
    return statistics


def _reconstruction_metrics(networks: Networks, passes: Passes, warnings: list[str]) -> Metrics:
    """Reconstructions against their originals, over the whole validation split."""
    name = "fd_classifier_rec" if networks.features is networks.classifier else "rfid"
    dimension = networks.features.dimension
    copies = _statistics(passes.val, "copy_features", dimension)
    originals = _statistics(passes.val, "features", dimension)
    if originals.count <= dimension:
        expected = expected_distance(originals, (copies.count, originals.count))
        warnings.append(scarcity(name, dimension, expected, {"validation": originals.count}))
    metrics: Metrics = {name: frechet_distance(copies, originals)}
    for score in ("psnr", _similarity(networks.tokenizer.image_size).__name__, *(["lpips"] if networks.lpips else [])):
        metrics[score] = float(passes.val.column(score).mean())
    return metrics


def _generation_metrics(run: StageRun, networks: Networks, passes: Passes, warnings: list[str]) -> Metrics:
    """Samples against the reference: distances, precision and recall, inception score."""
    params, inception = run.params.evaluate, networks.features is not networks.classifier
    name, kernel_name = ("gfid", "kid") if inception else ("fd_classifier_gen", "kd_classifier_gen")
    dimension = networks.features.dimension
    made = _statistics(passes.samples, "features", dimension)
    real = _statistics(passes.reference, "features", dimension)
    expected = expected_distance(real, (made.count, real.count))
    metrics: Metrics = {name: frechet_distance(made, real), f"{name}_of_perfect_images": expected}
    if min(made.count, real.count) <= dimension:
        counts = {"samples": made.count, "reference": real.count}
        warnings.append(scarcity(name, dimension, expected, counts))

    x, y = (
        store.column("features", _spread(store.count, params.pairwise_images))
        for store in (passes.samples, passes.reference)
    )
    if min(len(x), len(y)) > params.neighbours:
        metrics[kernel_name] = kernel_distance(
            x, y, subsets=params.kernel_subsets, subset_size=params.kernel_subset_size, seed=run.params.seed
        )
        metrics["precision"], metrics["recall"] = precision_recall(x, y, params.neighbours, networks.device)
    else:
        warnings.append(f"{kernel_name}, precision and recall: left out, they need over {params.neighbours} images")
    if inception:
        probabilities = [networks.features.probabilities(features) for features in passes.samples.parts("features")]
        metrics["inception_score"], metrics["inception_score_std"] = inception_score(
            np.concatenate(probabilities), params.inception_score_splits, run.params.seed
        )
    return metrics


def _code_counts(run: StageRun) -> np.ndarray:
    """How often each code occurs in the centre views of the validation images; int64 (codebook_size,)."""
    cache = TokenCache(run.inputs["tokens"], "val")
    view = cache.views.index("center") if "center" in cache.views else 0
    counts = np.zeros(cache.codebook_size, np.int64)
    rows_at_once = 4096
    for start in range(0, len(cache), rows_at_once):
        rows = np.arange(start, min(start + rows_at_once, len(cache)))
        codes = cache.codes(rows, np.full(len(rows), view))
        counts += np.bincount(codes.ravel(), minlength=cache.codebook_size)
    return counts


def _code_metrics(run: StageRun, tokenizer: Tokenizer, counts: np.ndarray) -> Metrics:
    """Use of the codebook over the validation codes, and the size of an image: as stored, and entropy-coded.

    `bits_per_image_entropy` codes each token by its overall frequency, `bits_per_image_stage2` by the transformer's
    prediction from class and earlier tokens: the rate that stage 2 brings the image to.
    """
    shares = counts[counts > 0] / counts.sum()
    entropy = float(-(shares * np.log(shares)).sum())
    loss = float(run.manifests["train_ar"].summary["val_loss"])
    tokens = tokenizer.num_tokens
    return {
        "codebook_usage": len(shares) / len(counts),
        "codebook_perplexity": math.exp(entropy),
        "tokens_per_image": tokens,
        "bits_per_image": tokens * math.log2(len(counts)),
        "bits_per_image_entropy": tokens * entropy / math.log(2),
        "bits_per_image_stage2": tokens * loss / math.log(2),
        "stage2_val_loss": loss,
    }


def _class_metrics(sources: Sources, passes: Passes) -> Metrics:
    """Whether samples show the class asked for, by a classifier whose own accuracy bounds what that can mean."""
    return {
        "class_agreement": class_agreement(passes.samples.column("predictions"), sources.samples.labels),
        "classifier_accuracy": class_agreement(passes.val.column("predictions"), sources.val.labels),
    }


def _protocol(networks: Networks, sources: Sources) -> Metrics:
    """All that another result must share to be compared with this one."""
    return {
        "features": networks.features.name,
        "features_sha256": networks.features.checksum,
        "features_resize": networks.features.resize,
        "features_precision": "float32, statistics float64",
        "reconstruction_reference": sources.val.name,
        "reconstruction_reference_sha256": sources.val.checksum,
        "reconstruction_reference_images": len(sources.val),
        "generation_reference": sources.reference.name,
        "generation_reference_sha256": sources.reference.checksum,
        "generation_reference_images": len(sources.reference),
        "generation_images": len(sources.samples),
        "guidance_scale": sources.samples.guidance_scale,
    }


def _draw(run: StageRun, networks: Networks, sources: Sources, counts: np.ndarray) -> None:
    """The pictures."""
    params, samples = run.params.evaluate, sources.samples
    chosen = rows_by_class(samples.labels, params.grid_classes, params.grid_images_per_class)
    rows = [samples.read_rows(indices) for indices in chosen.values()]
    save_png(image_grid(rows, [samples.class_names[label] for label in chosen]), run.staging / "samples.png")
    originals = sources.val.read_rows(_spread(len(sources.val), params.grid_reconstructions))
    save_png(reconstruction_grid(originals, networks.reconstruct(originals)), run.staging / "reconstructions.png")
    plot_code_usage(counts, run.staging / "code_usage.png")
    plot_losses({"tokenizer": run.inputs["tokenizer"], "transformer": run.inputs["ar"]}, run.staging / "curves.png")


def _spread(count: int, wanted: int) -> np.ndarray:
    """Up to `wanted` of `count` rows, evenly spread and ascending: files are often in class order."""
    return np.unique(np.linspace(0, count - 1, min(wanted, count)).round().astype(np.int64))
