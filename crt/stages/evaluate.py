"""Stage evaluate: how well the tokenizer reconstructs, how well the pipeline generates, with pictures to look at.

Reads the prepared data, the tokenizer, its codes, the transformer's validation loss and the samples. Writes
`report.html` (a page with everything in it), `metrics.json` (flat: figures, and the protocol that they were measured
by), `guidance_sweep.csv` (generation figures at each scale of guidance), pictures, and `classifier.safetensors`.

What was measured is on disk chunk by chunk, the figures of each scale as soon as they are taken: stopped at any moment,
the stage continues there and ends with the same bytes.

Cost: one pass over the samples of each scale; once for all evaluations of a tokenizer, one over the validation images
(encode, decode, two feature networks); once for all of the same data, one over the real images and the classifier's
training; then for each scale, on one thread, 13 to 18 s for a matrix root of 2,048 features (twice with sFID; a moment
with the classifier's 128), and up to a minute for the kernel distance's subsets. Several processes share the passes;
the first one does the rest. Inception's features of real images and reconstructions stay on disk, 16 kB and 8 kB for
each. On the digits half a minute on two cores; expect `classifier_accuracy` of 0.99 and `class_agreement` above 0.9.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np

from crt.chunks import ChunkStore
from crt.distributed import World, gpu_memory, join_world, main_alone, raise_if_any_stopped, reported_once
from crt.errors import UserError
from crt.evaluation.classifier import CLASSIFIER_FILE, ClassifierFeatures, train_classifier
from crt.evaluation.curves import plot_code_usage, plot_losses, plot_sweep
from crt.evaluation.features import FeatureNetwork, InceptionFeatures
from crt.evaluation.frechet import Moments
from crt.evaluation.metrics import (
    Metrics,
    Reference,
    class_metrics,
    code_metrics,
    generation_metrics,
    open_reference,
    protocol,
    reconstruction_metrics,
    stored_moments,
    sweep_row,
)
from crt.evaluation.passes import Networks, Passes, Sources, measure
from crt.evaluation.report import REPORT_FILE, write_report
from crt.evaluation.shared import shared_path
from crt.evaluation.sources import AdmBatch, ImageSource, SampleSource, SplitSource
from crt.evaluation.wording import has_classes, shown
from crt.files import write_json
from crt.history import write_rows
from crt.interrupt import Stopped, raise_if_stopped
from crt.locks import exclusively
from crt.pictures import image_grid, lines_by_class, reconstruction_grid, save_png, spread
from crt.progress import Progress, logger
from crt.stage import StageRun, read_seconds
from crt.stages.sample import SAMPLES_FILE
from crt.tokenizer.losses import PerceptualLoss
from crt.tokenizer.model import Tokenizer
from crt.tokens.cache import TokenCache


def run(run: StageRun) -> None:
    """Evaluate; see the module's text.

    Raises:
        UserError: a missing or wrong reference or Inception file, sets of images that do not fit together, or too
            little GPU memory.
        Stopped: a signal arrived at any process; what was measured is kept.
    """
    with (
        join_world() as world,
        reported_once(world),
        gpu_memory(run.name, "lower evaluate.batch_size, or free the GPU of other work"),
    ):
        tokenizer = Tokenizer.load(run.inputs["tokenizer"], world.device)
        sources = _open_sources(run, tokenizer.image_size)
        networks = _load_networks(run, world, tokenizer)
        stored = stored_moments(sources.reference, networks.features)  # refused before the work, if at all
        passes = measure(
            run.work, run.shared, run.params.evaluate.batch_size, world, networks=networks, sources=sources
        )
    # The others do not wait for the figures: matrix roots of a long sweep outlast a collective's patience.
    if world.is_main:
        with gpu_memory(run.name, "lower evaluate.pairwise_images, or free the GPU of other work"):
            _write_results(run, networks, sources, passes, stored)


def _open_sources(run: StageRun, image_size: int) -> Sources:
    params = run.params.evaluate
    content = run.manifests["prepare_data"].content
    val = SplitSource(run.inputs["data"], "val", image_size, content)
    drawn = run.manifests["sample"]
    samples, *sweep = (
        SampleSource(run.inputs["samples"], drawn.content, name)
        for name in sorted(
            (name for name in drawn.files if name.endswith(".h5")), key=lambda name: name != SAMPLES_FILE
        )
    )
    reference: ImageSource = val
    if params.generation_reference == "train":
        reference = SplitSource(run.inputs["data"], "train", image_size, content)
    elif params.generation_reference == "adm_train":
        reference = AdmBatch(params.adm_reference)
    if params.image_size is None and reference.image_size != samples.image_size:
        raise UserError(
            f"evaluate.generation_reference: the images of {reference.name} have {reference.image_size} pixels a side, "
            f"the samples {samples.image_size}: set evaluate.image_size to {reference.image_size}, "
            "to which both are brought then"
        )
    # Of val, prepare_data makes sure.
    for key, source, remedy in (
        ("sample.num_images", samples, "raise it"),
        ("evaluate.generation_reference", reference, "choose another"),
    ):
        if len(source) < 2:
            raise UserError(f"{key}: {source.name} holds {len(source)} image, distances need two at least: {remedy}")
    return Sources(val, samples, reference, tuple(sweep))


def _load_networks(run: StageRun, world: World, tokenizer: Tokenizer) -> Networks:
    params = run.params.evaluate
    # What may be missing comes before the classifier's training.
    features: FeatureNetwork | None = None
    if params.features == "inception":
        features = InceptionFeatures(
            params.inception_weights, params.inception_resize, world.device, image_size=params.image_size
        )
    lpips = None
    if params.lpips:
        lpips = PerceptualLoss(params.lpips_weights, "evaluate.lpips_weights").to(world.device)
    classifier = _classifier(run, world, tokenizer.image_size)
    content = run.manifests["train_tokenizer"].content
    return Networks(tokenizer, content, world.device, classifier, features or classifier, lpips)


def _classifier(run: StageRun, world: World, image_size: int) -> ClassifierFeatures:
    """The classifier of these data, params and seed, trained by the main process unless some run has already."""
    params, seed, content = run.params.evaluate.classifier, run.params.seed, run.manifests["prepare_data"].content
    recipe = {"data": content, "image_size": image_size, "params": params.model_dump(), "seed": seed}
    path = shared_path(run.shared, "classifier", recipe) / CLASSIFIER_FILE
    with main_alone(world), suppress(Stopped):  # all processes stop together, below
        if world.is_main and not path.exists():
            _train_classifier(run, world, image_size, path)
    raise_if_any_stopped(world)
    return ClassifierFeatures(path, world.device)


def _train_classifier(run: StageRun, world: World, image_size: int, path: Path) -> None:
    """Train it, unless another run has while this one waited for it."""
    with exclusively(path.parent), gpu_memory(run.name, "lower evaluate.classifier.batch_size"):
        if path.exists():
            return
        train = SplitSource(run.inputs["data"], "train", image_size, run.manifests["prepare_data"].content)
        path.parent.mkdir(exist_ok=True)
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


def _write_results(
    run: StageRun, networks: Networks, sources: Sources, passes: Passes, stored: Mapping[str, Moments]
) -> None:
    """metrics.json, the pictures and the classifier, from what the passes measured."""
    logger.info("evaluate: distances")
    counts = _code_counts(run)
    warnings: list[str] = []
    reference = open_reference(passes.reference, networks.features, stored)
    params = run.params.evaluate
    generated = _generation(run, networks, passes.samples, reference, warnings)
    metrics: Metrics = (
        _kept(run, (passes.copies, passes.val), partial(reconstruction_metrics, networks, passes), warnings)
        | generated
        | code_metrics(counts, networks.tokenizer.num_tokens, run.manifests["train_ar"].summary["val_loss"], warnings)
        | class_metrics(networks, sources, passes, warnings)
        | {
            "stage1_training_flops": run.manifests["train_tokenizer"].summary["training_flops"],
            "stage2_training_flops": run.manifests["train_ar"].summary["training_flops"],
        }
        | protocol(params, networks, sources, reference)
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
    sweep = _sweep(run, networks, sources, passes, reference)
    write_rows(sweep, run.staging / "guidance_sweep.csv")
    write_rows(_usage_rows(counts), run.staging / "code_usage.csv")
    _draw(run, networks, sources, counts)
    sweep = [shown(row, has_classes(metrics)) for row in sweep]
    if len(sweep) > 1:
        plot_sweep(sweep, sources.samples.guidance_scale, run.staging / "guidance_sweep.png")
    seconds = {
        m.stage: read_seconds(run.inputs[key], m.fingerprint)
        for key, m in zip(run.inputs, run.manifests.values(), strict=True)
    }
    run.timed_files.add(REPORT_FILE)
    write_report(run.staging, metrics, sweep, run.manifests, run.manifest_so_far(), seconds=seconds)
    shutil.copyfile(networks.classifier.path, run.staging / CLASSIFIER_FILE)


def _generation(
    run: StageRun, networks: Networks, samples: ChunkStore, reference: Reference, warnings: list[str]
) -> Metrics:
    """The figures of the samples of one guidance scale."""
    take = partial(
        generation_metrics, run.params.evaluate, run.params.seed, networks, samples=samples, reference=reference
    )
    return _kept(run, (samples, reference.store), take, warnings)


def _kept(
    run: StageRun, stores: tuple[ChunkStore, ChunkStore], take: Callable[..., Metrics], warnings: list[str]
) -> Metrics:
    """What `take` finds in two stores, and its warnings, kept for a restart.

    Their folders' names tell images and networks, the working folder's the params: nothing else shows in the figures.

    Raises:
        Stopped: a signal arrived.
    """
    key = hashlib.sha256(" ".join(store.folder.name for store in stores).encode()).hexdigest()
    path = run.work / f"figures-{key[:16]}.json"
    if path.exists():
        kept = json.loads(path.read_text(encoding="utf-8"))
    else:
        raise_if_stopped()
        found: list[str] = []
        kept = {"figures": take(warnings=found), "warnings": found}
        if all(isinstance(value, str) or math.isfinite(value) for value in kept["figures"].values()):
            write_json(path, kept)
    warnings += kept["warnings"]
    figures: Metrics = kept["figures"]
    return figures


def _sweep(
    run: StageRun, networks: Networks, sources: Sources, passes: Passes, reference: Reference
) -> list[dict[str, float]]:
    """The figures at each scale of guidance, ascending, one scale safe on disk before the next."""
    scales = zip((sources.samples, *sources.sweep), (passes.samples, *passes.sweep), strict=True)
    progress, rows = Progress("distances of the sweep", len(sources.sweep), "scales"), []
    for index, (source, store) in enumerate(scales):
        rows.append(sweep_row(source, store, _generation(run, networks, store, reference, [])))
        if index > 0:  # the first one's were taken before
            progress.update(index)
    return sorted(rows, key=lambda row: row["guidance_scale"])


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


def _usage_rows(counts: np.ndarray) -> list[dict[str, float]]:
    """Share of each code that occurs, most frequent first."""
    shares = np.sort(counts[counts > 0])[::-1] / counts.sum()
    return [{"rank": rank, "share": float(share)} for rank, share in enumerate(shares, 1)]


def _draw(run: StageRun, networks: Networks, sources: Sources, counts: np.ndarray) -> None:
    """The pictures."""
    params, samples = run.params.evaluate, sources.samples
    lines = lines_by_class(samples.labels, params.grid_classes, params.grid_images_per_class)
    images = [samples.read_rows(rows) for _, rows in lines]
    names = [samples.class_names[label] for label, _ in lines]
    save_png(image_grid(images, names if len(samples.class_names) > 1 else None), run.staging / "samples.png")
    originals = sources.val.read_rows(spread(len(sources.val), params.grid_reconstructions))
    save_png(reconstruction_grid(originals, networks.reconstruct(originals)), run.staging / "reconstructions.png")
    plot_code_usage(counts, run.staging / "code_usage.png")
    for title, key in (("tokenizer", "tokenizer"), ("transformer", "ar")):
        plot_losses(title, run.inputs[key], run.staging / f"curves_{title}.png")
