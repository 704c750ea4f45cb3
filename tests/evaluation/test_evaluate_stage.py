"""The stage itself, on real digits, with a tokenizer and a transformer as they are before training.

Oracles: the same figures computed from the images in one go, an uninterrupted run, and the text of the protocol.
"""

from __future__ import annotations

import base64
import html
import json
import re
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from cleanfid import fid as cleanfid_fid
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from crt import chunks
from crt.__main__ import main
from crt.ar.model import ARTransformer, save_model
from crt.commands.results import table
from crt.data.packed import PackedImages
from crt.data.transforms import center_crop, to_uint8, to_unit_range
from crt.distributed import World
from crt.evaluation import metrics as metrics_module
from crt.evaluation.classifier import ClassifierFeatures, ConvClassifier
from crt.evaluation.comparable import MOMENTS_OF_IMAGES, PROTOCOL_FIELDS, STORED_MOMENTS, protocol_differences
from crt.evaluation.features import INCEPTION_FILE, InceptionFeatures, interpolated
from crt.evaluation.frechet import kernel_distance
from crt.evaluation.metric_table import figure_names
from crt.evaluation.metrics import stored_moments
from crt.evaluation.passes import Networks, Sources, measure
from crt.evaluation.precision_recall import inception_score, precision_recall
from crt.evaluation.reconstruction import ms_ssim, psnr, ssim
from crt.evaluation.sources import AdmBatch, SampleSource, SplitSource
from crt.files import sha256_file
from crt.history import History, read_history
from crt.params import load_params
from crt.randomness import seed_torch
from crt.stage import open_run, publish
from crt.stages.train_ar import config_of
from crt.tokenizer.losses import PerceptualLoss
from crt.tokenizer.model import Tokenizer, TokenizerConfig
from crt.tokens.cache import TokenCache
from tests.ar.test_processes import torchrun
from tests.conftest import ROOT, TINY, run_out_of_memory, write_params
from tests.tokenizer.test_losses import vgg_file

NAMES = ("data", "tokenizer", "tokens", "ar", "samples")
# Enough real images for the 16 features of this classifier.
CHANGES = TINY | {
    "evaluate.classifier.channels": 4,
    "evaluate.classifier.steps": 30,
    "evaluate.batch_size": 10,
    "sample.num_images": 40,
}

# Images of any size, each in its own file.
FILES_AS_THEY_ARE = {
    "prepare_data.source": "imagefolder",
    "prepare_data.storage": "encoded",
    "prepare_data.image_size": None,
    "prepare_data.max_images_per_class": None,
}


class Pipeline:
    """Folders of the stages before `evaluate`, and a way to run it."""

    def __init__(self, root: Path, changes: dict, tokenizer: Tokenizer | None = None) -> None:
        self.root, self.params, self.changes = root, root / "params.yaml", changes
        write_params(self.params, changes)
        params = load_params(self.params)
        assert self.stage("prepare_data", "data") == 0

        run = open_run("train_tokenizer", self.params, self.inputs("data"), root / "tokenizer")
        run.staging.mkdir(parents=True)
        seed_torch(0, "test")
        (tokenizer or Tokenizer(TokenizerConfig.from_params(params.train_tokenizer))).save(run.staging)
        History(run.staging / "train.csv", ["loss"]).append(1, {"loss": 0.5})
        run.summary["training_flops"] = 10**10
        publish(run)
        assert self.stage("tokenize", "tokens", "data", "tokenizer") == 0

        run = open_run("train_ar", self.params, self.inputs("tokens"), root / "ar")
        run.staging.mkdir(parents=True)
        config = config_of(params.train_ar, TokenCache(root / "tokens", "train"))
        model = ARTransformer(config)
        torch.nn.init.normal_(model.head.weight)  # a new one is zero: no class would make a difference
        save_model(model.state_dict(), config, run.staging)
        run.summary |= {"val_loss": 2.5, "training_flops": 10**9, "parameters": 12_345}
        publish(run)
        assert self.stage("sample", "samples", "tokenizer", "ar") == 0

    def inputs(self, *names: str) -> dict[str, Path]:
        return {name: self.root / name for name in names}

    def stage(self, name: str, out: str, *inputs: str, shared: Path | None = None) -> int:
        options = [text for key in inputs for text in (f"--{key}", str(self.root / key))]
        options += ["--shared", str(shared)] if shared else []
        return main([name, "--params", str(self.params), *options, "--out", str(self.root / out)])

    def evaluate(self, out: str, shared: Path | None = None, **changes) -> int:
        write_params(self.params, self.changes | {f"evaluate.{name}": value for name, value in changes.items()})
        return self.stage("evaluate", out, *NAMES, shared=shared)

    def metrics(self, out: str) -> dict:
        def refuse(text: str) -> None:
            raise AssertionError(f"{text} in JSON")

        return json.loads((self.root / out / "metrics.json").read_text(), parse_constant=refuse)


def numbers(metrics: dict) -> set[str]:
    return {name for name, value in metrics.items() if not isinstance(value, str)}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> Pipeline:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        return Pipeline(tmp_path_factory.mktemp("pipeline"), CHANGES)


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def evaluated(pipeline) -> Pipeline:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr(chunks, "_CHUNK_IMAGES", 20)
        assert pipeline.evaluate("evaluation") == 0
    return pipeline


@pytest.mark.filterwarnings("ignore:Matrix is singular")  # features that no image excites
def test_figures_are_those_of_the_images_taken_in_one_go(evaluated):
    metrics, root = evaluated.metrics("evaluation"), evaluated.root
    val = PackedImages(root / "data", "val")
    originals = val.pixels(np.arange(len(val)))
    tokenizer = Tokenizer.load(root / "tokenizer")
    codes = tokenizer.encode(to_unit_range(torch.from_numpy(originals)))
    copies = to_uint8(tokenizer.decode(codes))
    with h5py.File(root / "samples/samples.h5") as file:
        samples, labels = file["images"][:], file["labels"][:]
    network = ClassifierFeatures(root / "evaluation/classifier.safetensors", "cpu")
    real, made, again = (network(images).astype(float) for images in (originals, samples, copies.numpy()))

    assert metrics["fd_classifier_rec"] == pytest.approx(cleanfid_fid.fid_from_feats(again, real), rel=1e-4)
    assert metrics["fd_classifier_gen"] == pytest.approx(cleanfid_fid.fid_from_feats(made, real), rel=1e-4)
    assert metrics["psnr"] == pytest.approx(psnr(torch.from_numpy(originals), copies).mean().item(), rel=1e-6)
    assert metrics["ssim"] == pytest.approx(ssim(torch.from_numpy(originals), copies).mean().item(), rel=1e-6)
    assert metrics["class_agreement"] == (network.probabilities(made).argmax(axis=1) == labels).mean()
    assert metrics["classifier_accuracy"] == (network.probabilities(real).argmax(axis=1) == val.labels).mean()
    shares = np.bincount(codes.flatten(), minlength=64) / codes.numel()
    entropy = -(shares[shares > 0] * np.log2(shares[shares > 0])).sum()
    assert metrics["codebook_usage"] == (shares > 0).mean()
    assert metrics["codebook_perplexity"] == pytest.approx(2**entropy)
    assert metrics["bits_per_image"] == 16 * 6
    assert metrics["bits_per_image_entropy"] == pytest.approx(16 * entropy)
    assert metrics["bits_per_image_stage2"] == pytest.approx(16 * 2.5 / np.log(2))
    assert metrics["stage2_val_loss"] == 2.5
    assert (metrics["stage1_training_flops"], metrics["stage2_training_flops"]) == (10**10, 10**9)
    settings = load_params(evaluated.params).evaluate
    expected = kernel_distance(made, real, settings.kernel_subsets, settings.kernel_subset_size, seed=0)
    assert metrics["kd_classifier_gen"] == pytest.approx(expected, rel=1e-3)


@pytest.mark.filterwarnings("ignore:Matrix is singular")
def test_precision_and_recall_are_those_of_samples_against_the_reference(evaluated):
    """Balls so wide that an untrained model's noise lies in some of them."""
    assert evaluated.evaluate("wide", neighbours=39) == 0
    network = ClassifierFeatures(evaluated.root / "wide/classifier.safetensors", "cpu")
    val = PackedImages(evaluated.root / "data", "val")
    with h5py.File(evaluated.root / "samples/samples.h5") as file:
        made, real = (network(images).astype(float) for images in (file["images"][:], val.pixels(np.arange(len(val)))))
    precision, recall = precision_recall(made, real, 39)
    assert precision != recall
    metrics = evaluated.metrics("wide")
    assert (metrics["precision"], metrics["recall"]) == (precision, recall)


def test_a_result_says_what_it_was_measured_by_and_never_calls_it_fid(evaluated, tmp_path):
    metrics = evaluated.metrics("evaluation")
    assert metrics["features"] == "classifier"
    assert metrics["generation_reference"] == metrics["reconstruction_reference"] == "val"
    assert metrics["generation_images"] == 40
    assert metrics["generation_reference_images"] == 120
    assert len(metrics["features_sha256"]) == len(metrics["generation_reference_sha256"]) == 64
    params = load_params(write_params(tmp_path / "params.yaml", evaluated.changes))
    assert numbers(metrics) == set(figure_names(params))
    assert set(PROTOCOL_FIELDS) - set(metrics) == {"lpips_sha256"}  # which was not measured
    assert not {"rfid", "gfid", "kid", "inception_score"} & set(metrics)
    assert "warnings" not in metrics
    text = "\n".join(table(metrics))
    assert f"{metrics['class_agreement']:10.4g}" in text
    assert f"real images: {metrics['classifier_accuracy']:.4g}" in text
    assert re.search(r"40 samples at guidance [\d.]+ against the 120 images of val", text)


def test_pictures_show_the_samples_of_each_class(evaluated):
    folder = evaluated.root / "evaluation"
    for name in ("samples", "reconstructions", "curves_tokenizer", "code_usage"):
        with Image.open(folder / f"{name}.png") as image:
            assert min(image.size) >= 64
    with h5py.File(evaluated.root / "samples/samples.h5") as file:
        first = file["images"][0]  # class 0: the upper left cell
    with Image.open(folder / "samples.png") as image:
        pixels = np.asarray(image)
    enlarged = first.repeat(4, axis=0).repeat(4, axis=1)
    left = pixels.shape[1] - 4 * 68  # four images of each class
    np.testing.assert_array_equal(pixels[4:68, left : left + 64], enlarged)


def test_a_stopped_run_ends_with_the_same_bytes(evaluated, monkeypatch, tmp_path):
    """Stopped by a signal after the first chunk of each pass, again and again."""
    monkeypatch.setattr(chunks, "_CHUNK_IMAGES", 20)
    expected = {path.name: path.read_bytes() for path in (evaluated.root / "evaluation").iterdir()}
    calls = []
    original = ClassifierFeatures.__call__

    def stop_now_and_then(self, images):
        calls.append(1)
        if len(calls) % 9 == 4:
            signal.raise_signal(signal.SIGTERM)
        return original(self, images)

    monkeypatch.setattr(ClassifierFeatures, "__call__", stop_now_and_then)
    statuses = []
    while not statuses or statuses[-1] == 128 + signal.SIGTERM:
        monkeypatch.setattr("crt.interrupt._received", [])
        statuses.append(evaluated.evaluate("again", shared=tmp_path / "shared"))
        assert len(statuses) < 20
    assert len(statuses) > 2
    assert statuses[-1] == 0
    assert {path.name: path.read_bytes() for path in (evaluated.root / "again").iterdir()} == expected


@pytest.mark.slow
def test_two_processes_end_with_the_same_bytes(evaluated):
    """Oracle: one process. So many samples that each process has some to measure."""
    params = write_params(evaluated.root / "many.yaml", evaluated.changes | {"sample.num_images": 2300})
    inputs = [text for key in NAMES[:-1] for text in (f"--{key}", str(evaluated.root / key))]
    samples, outs = evaluated.root / "samples_many", [evaluated.root / name for name in ("one", "two")]
    sampling = ["sample", "--params", str(params), *inputs[2:4], *inputs[6:8], "--out", str(samples)]
    assert main(sampling) == 0
    command = ["evaluate", "--params", str(params), *inputs, "--samples", str(samples)]
    for out, launch in zip(outs, ([sys.executable], torchrun(2)), strict=True):
        shared = ["--shared", str(evaluated.root / f"shared_{out.name}")]
        subprocess.run([*launch, "-m", "crt", *command, *shared, "--out", str(out)], cwd=ROOT, check=True)
    one, two = ({path.name: path.read_bytes() for path in out.iterdir()} for out in outs)
    assert "metrics.json" in one
    assert "2 processes" in (evaluated.root / "two.log").read_text()
    assert one == two


def test_another_reference_is_named_and_read_to_its_end(evaluated):
    assert evaluated.evaluate("against_train", generation_reference="train") == 0
    val, train = evaluated.metrics("evaluation"), evaluated.metrics("against_train")
    assert train["generation_reference"] == "train"
    assert train["generation_reference_images"] == 120
    assert train["fd_classifier_gen"] != val["fd_classifier_gen"]
    assert train["fd_classifier_rec"] == pytest.approx(val["fd_classifier_rec"], rel=1e-9)


def test_too_few_images_are_warned_of_with_the_bias(evaluated, capfd):
    """128 features, 40 samples, 120 real images."""
    assert evaluated.evaluate("scarce", **{"classifier.channels": 32, "classifier.steps": 1}) == 0
    metrics = evaluated.metrics("scarce")
    for name in ("fd_classifier_gen: 40 samples and 120 reference images", "fd_classifier_rec: 120 validation"):
        assert name in metrics["warnings"]
        assert f"warning: {name}" in capfd.readouterr().err or name.startswith("fd_classifier_rec")
    # Perfect reconstructions would be the originals themselves, at distance 0.
    assert "perfect" not in metrics["warnings"].split("fd_classifier_rec")[1].split(";")[0]
    assert f"about {metrics['fd_classifier_gen_of_perfect_images']:.3g} instead of 0" in metrics["warnings"]


def test_samples_of_other_classes_than_the_reference_are_warned_of(evaluated, capfd):
    """One of ten classes alone, against all of them."""
    samples = evaluated.root / "samples"
    samples.rename(evaluated.root / "of_all_classes")
    one = evaluated.changes | {"sample.labels": [3]}
    try:
        write_params(evaluated.params, one)
        assert evaluated.stage("sample", "samples", "tokenizer", "ar") == 0
        inputs = [text for key in NAMES for text in (f"--{key}", str(evaluated.root / key))]
        out = str(evaluated.root / "one_class")
        assert main(["evaluate", "--params", str(evaluated.params), *inputs, "--out", out]) == 0
    finally:
        shutil.rmtree(samples)
        (evaluated.root / "of_all_classes").rename(samples)
    metrics, usual = evaluated.metrics("one_class"), evaluated.metrics("evaluation")
    assert "other shares of the classes than val (of 3 100% instead of 10%)" in metrics["warnings"]
    assert "warning: sample.labels:" in capfd.readouterr().err
    (difference,) = [line for line in protocol_differences(usual, metrics) if line.startswith("classes of the samples")]
    assert "all classes alike, 1 of 10 classes" in difference


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"features": "inception", "inception_weights": "/nowhere"},
            "/nowhere/inception-2015-12-05.pt: not found: put",
        ),
        (
            {"features": "inception", "inception_weights": "STAND_IN"},
            "inception-2015-12-05.pt: wrong file, its SHA-256 is",
        ),
        (
            {"features": "inception", "generation_reference": "adm_train", "adm_reference": "/nowhere/adm.npz"},
            "/nowhere/adm.npz: not found: fetch",
        ),
    ],
)
def test_missing_and_wrong_files_are_named_in_one_line(evaluated, inception_folder, capfd, changes, message):
    changes = {key: str(inception_folder) if value == "STAND_IN" else value for key, value in changes.items()}
    assert evaluated.evaluate("refused", **changes) == 2
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert message in errors[0]
    assert not (evaluated.root / "refused").exists()


def test_a_reference_of_another_size_is_refused(evaluated, tmp_path, capfd):
    np.savez(tmp_path / "adm.npz", np.zeros((5, 32, 32, 3), np.uint8))
    changes = {"features": "inception", "generation_reference": "adm_train", "adm_reference": str(tmp_path / "adm.npz")}
    assert evaluated.evaluate("refused", **changes) == 2
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert "adm_train have 32 pixels a side, the samples 16: set evaluate.image_size to 32" in errors[0]


def test_a_single_sample_is_refused(evaluated, tmp_path, capfd):
    changes = evaluated.changes | {"sample.num_images": 1}
    assert evaluate_scales(evaluated, changes, "one_sample", tmp_path / "refused") == 2
    (error,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error:")]
    assert error == "error: sample.num_images: samples holds 1 image, distances need two at least: raise it"
    write_params(evaluated.params, evaluated.changes)


@pytest.mark.parametrize(
    ("where", "key"),
    [
        ("crt.stages.evaluate.train_classifier", "classifier.batch_size"),
        ("crt.evaluation.classifier.ClassifierFeatures.__call__", "batch_size"),
        ("crt.evaluation.metrics.precision_recall", "pairwise_images"),
    ],
)
def test_too_little_gpu_memory_is_said_in_one_line(evaluated, tmp_path, monkeypatch, capfd, where, key):
    monkeypatch.setattr(where, run_out_of_memory)
    assert evaluated.evaluate("refused", shared=tmp_path) == 2
    (error,) = [line for line in capfd.readouterr().err.splitlines() if "error" in line]
    assert error.startswith(f"error: evaluate: out of GPU memory: lower evaluate.{key}")
    # The next case begins anew.
    shutil.rmtree(evaluated.root / ".work", ignore_errors=True)


def test_unusable_lpips_weights_are_refused_by_this_stages_key(evaluated, tmp_path, capfd):
    (tmp_path / "vgg16.pth").write_text("no weights")
    assert evaluated.evaluate("refused", lpips=True, lpips_weights=str(tmp_path / "vgg16.pth")) == 2
    (error,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error:")]
    assert error.endswith("or set evaluate.lpips_weights to null")


def inception_run(
    evaluated: Pipeline, folder: Path, monkeypatch: pytest.MonkeyPatch, moments: dict, **changes
) -> tuple[dict, np.ndarray]:
    """Evaluate on the stand-in network against a batch of the very samples, in another order; figures and samples."""
    with h5py.File(evaluated.root / "samples/samples.h5") as file:
        samples = file["images"][:]
    np.savez_compressed(evaluated.root / "adm.npz", samples[::-1], **moments)
    checksum = sha256_file(folder / INCEPTION_FILE)
    monkeypatch.setattr("crt.stages.evaluate.InceptionFeatures", partial(InceptionFeatures, sha256=checksum))
    changes |= {
        "features": "inception",
        "inception_weights": str(folder),
        "generation_reference": "adm_train",
        "adm_reference": str(evaluated.root / "adm.npz"),
    }
    shutil.rmtree(evaluated.root / "inception", ignore_errors=True)
    assert evaluated.evaluate("inception", **changes) == 0
    return evaluated.metrics("inception"), samples


def some_moments() -> dict[str, np.ndarray]:
    """Those of no images, by their names in ADM's files."""
    rng = np.random.default_rng(0)
    moments: dict[str, np.ndarray] = {}
    for suffix, dimension in (("", 2048), ("_s", 2023)):
        factors = rng.normal(size=(50, dimension)) * 0.1
        moments |= {f"mu{suffix}": rng.normal(size=dimension), f"sigma{suffix}": factors.T @ factors}
    return moments


@pytest.mark.slow
def test_inception_figures_against_an_adm_batch(evaluated, inception_folder, monkeypatch):
    """The whole protocol of published figures, on the stand-in network: 2,048 features make the root slow."""
    metrics, samples = inception_run(evaluated, inception_folder, monkeypatch, some_moments())
    # The images of the file are the very samples; its moments belong to another resize than this one.
    assert metrics["gfid"] == pytest.approx(0, abs=1e-3)
    assert metrics["sfid"] == pytest.approx(0, abs=1e-3)
    assert (metrics["precision"], metrics["recall"]) == (1, 1)
    assert metrics["rfid"] > 0.01
    network = InceptionFeatures(inception_folder, "clean", "cpu", sha256_file(inception_folder / INCEPTION_FILE))
    settings = load_params(evaluated.params).evaluate
    probabilities = network.probabilities(network(samples))
    expected = inception_score(probabilities, settings.inception_score_splits, seed=0)
    assert (metrics["inception_score"], metrics["inception_score_std"]) == pytest.approx(expected, rel=1e-3)
    assert expected[0] > 1
    assert metrics["features_sha256"] == sha256_file(inception_folder / INCEPTION_FILE)
    assert metrics["generation_reference"] == "adm_train"
    assert metrics["generation_reference_moments"] == MOMENTS_OF_IMAGES
    assert metrics["generation_reference_sha256"] == sha256_file(evaluated.root / "adm.npz")
    for name in ("gfid", "sfid"):
        assert f"{name}: 40 samples and 40 reference images" in metrics["warnings"]
    assert {"kid", "class_agreement", "classifier_accuracy"} <= set(metrics)
    assert numbers(metrics) == set(figure_names(load_params(evaluated.params)))
    assert not {"fd_classifier_rec", "fd_classifier_gen"} & set(metrics)


@pytest.mark.slow
def test_distances_are_from_the_moments_that_the_batch_file_holds(evaluated, inception_folder, monkeypatch):
    """Oracle: clean-fid's distance of all samples' features, taken in one go, from those moments."""
    moments = some_moments()
    metrics, samples = inception_run(
        evaluated, inception_folder, monkeypatch, moments, inception_resize="legacy_tensorflow", image_size=16
    )
    checksum = sha256_file(inception_folder / INCEPTION_FILE)
    arrays = InceptionFeatures(inception_folder, "legacy_tensorflow", "cpu", checksum).arrays(samples)
    for name, column, suffix in (("gfid", "features", ""), ("sfid", "spatial", "_s")):
        values = arrays[column].astype(np.float64)
        expected = cleanfid_fid.frechet_distance(
            values.mean(axis=0), np.cov(values, rowvar=False), moments[f"mu{suffix}"], moments[f"sigma{suffix}"]
        )
        assert expected > 10
        assert metrics[name] == pytest.approx(expected, rel=1e-4)
        assert f"{name}: 40 samples are too few" in metrics["warnings"]
    assert metrics["generation_reference_moments"] == STORED_MOMENTS


def test_lpips_is_the_packages_mean_over_all_pairs(evaluated, tmp_path):
    """Oracle: the package itself, on the pairs in one go; VGG-16 with random weights."""
    weights = vgg_file(tmp_path / "vgg16.pth")
    assert evaluated.evaluate("perceptual", lpips=True, lpips_weights=str(weights)) == 0
    val = PackedImages(evaluated.root / "data", "val")
    originals = torch.from_numpy(val.pixels(np.arange(len(val))))
    tokenizer = Tokenizer.load(evaluated.root / "tokenizer")
    copies = to_uint8(tokenizer.decode(tokenizer.encode(to_unit_range(originals))))
    network = PerceptualLoss(weights).network
    expected = network(to_unit_range(originals), to_unit_range(copies)).mean().item()
    assert expected > 0
    assert evaluated.metrics("perceptual")["lpips"] == pytest.approx(expected, rel=1e-3)
    assert "<dt>LPIPS</dt>" in (evaluated.root / "perceptual/report.html").read_text()


@pytest.mark.slow
def test_large_images_are_cropped_from_their_files_and_compared_over_five_scales(imagenet_sample, tmp_path):
    """ImageNet files at 256 pixels, which the data set stores as they are."""
    changes = (
        CHANGES
        | FILES_AS_THEY_ARE
        | {
            "prepare_data.path": str(imagenet_sample),
            "train_tokenizer.image_size": 256,
            "train_tokenizer.architecture.channel_multipliers": [1, 1, 1, 1, 1],
            "train_tokenizer.architecture.decoder_blocks": 1,
            "sample.num_images": 6,
            "sample.batch_size": 6,
            "evaluate.classifier.batch_size": 8,
            "evaluate.classifier.steps": 2,
            "evaluate.batch_size": 4,
            "evaluate.grid_images_per_class": 1,
        }
    )
    made = Pipeline(tmp_path, changes)
    assert made.evaluate("evaluation") == 0
    metrics = made.metrics("evaluation")
    val = PackedImages(tmp_path / "data", "val")
    assert metrics["reconstruction_reference_images"] == len(val)
    assert "ssim" not in metrics
    assert numbers(metrics) == set(figure_names(load_params(made.params)))
    tokenizer = Tokenizer.load(tmp_path / "tokenizer")
    scores = []
    for index in range(len(val)):
        original = torch.from_numpy(center_crop(val.image(index), 256).copy())[None]
        copy = to_uint8(tokenizer.decode(tokenizer.encode(to_unit_range(original))))
        scores.append([psnr(original, copy).item(), ms_ssim(original, copy).item()])
    assert [metrics["psnr"], metrics["ms_ssim"]] == pytest.approx(np.mean(scores, axis=0), rel=1e-3)
    with Image.open(tmp_path / "evaluation/reconstructions.png") as image:
        assert image.width > 256


def test_larger_images_are_measured_at_the_side_of_published_references(imagenet_sample, inception_folder, tmp_path):
    """64 px measured at 32: real images are cropped at 32, reconstructions interpolated, as LlamaGen's scripts do."""
    changes = (
        CHANGES
        | FILES_AS_THEY_ARE
        | {
            "prepare_data.path": str(imagenet_sample),
            "train_tokenizer.image_size": 64,
            "train_tokenizer.architecture.channel_multipliers": [1, 1, 1],
            "sample.num_images": 4,
            "evaluate.classifier.steps": 2,
        }
    )
    Pipeline(tmp_path, changes)
    val = PackedImages(tmp_path / "data", "val")
    network = ConvClassifier(4, val.num_classes, 64)
    save_file(network.state_dict(), tmp_path / "c.safetensors", metadata={"sizes": json.dumps(
        {"channels": 4, "classes": val.num_classes, "image_size": 64})})  # fmt: skip
    checksum = sha256_file(inception_folder / INCEPTION_FILE)
    inception = InceptionFeatures(inception_folder, "legacy_tensorflow", "cpu", checksum, image_size=32)
    tokenizer = Tokenizer.load(tmp_path / "tokenizer")
    classifier = ClassifierFeatures(tmp_path / "c.safetensors", "cpu")
    networks = Networks(tokenizer, "content", torch.device("cpu"), classifier, inception, None)
    source = SplitSource(tmp_path / "data", "val", 64, "content")
    samples = SampleSource(tmp_path / "samples", "content")
    world = World(0, 1, torch.device("cpu"))
    passes = measure(
        tmp_path / "w", tmp_path / "s", 4, world, networks=networks, sources=Sources(source, samples, source)
    )

    plain = InceptionFeatures(inception_folder, "legacy_tensorflow", "cpu", checksum)
    small = np.stack([center_crop(val.image(row), 32) for row in range(len(val))])
    np.testing.assert_allclose(passes.val.column("features"), plain(small), rtol=1e-4, atol=1e-4)
    large = np.stack([center_crop(val.image(row), 64) for row in range(len(val))])
    assert np.abs(plain(small) - plain(interpolated(large, 32))).max() > 1e-2
    copies = networks.reconstruct(large)
    np.testing.assert_allclose(passes.copies.column("features"), plain(interpolated(copies, 32)), rtol=1e-4, atol=1e-4)
    pairs = (torch.from_numpy(interpolated(images, 32)) for images in (large, copies))
    np.testing.assert_allclose(passes.copies.column("psnr"), psnr(*pairs).numpy(), rtol=1e-4)
    predicted = classifier.probabilities(classifier(large)).argmax(axis=1)  # which learned at the images' own side
    np.testing.assert_array_equal(passes.val.column("predictions"), predicted)
    assert stored_moments(AdmBatch(adm_file(tmp_path, side=64)), inception) == {}
    assert set(stored_moments(AdmBatch(adm_file(tmp_path, side=32)), inception)) == {"features", "spatial"}


def adm_file(folder: Path, side: int) -> Path:
    np.savez(folder / "adm.npz", np.zeros((2, side, side, 3), np.uint8), **some_moments())
    return folder / "adm.npz"


def test_the_page_stands_alone_and_tells_the_run(evaluated):
    page = (evaluated.root / "evaluation/report.html").read_text()
    metrics = evaluated.metrics("evaluation")
    # Nothing is fetched: every source is inside, and there is no script.
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert len(sources) >= 4
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert "<script" not in page
    assert str(evaluated.root) not in page  # no path of this machine
    embedded = {base64.b64decode(source.partition(",")[2]) for source in sources}
    for name in ("samples", "reconstructions", "code_usage", "curves_tokenizer"):
        assert (evaluated.root / f"evaluation/{name}.png").read_bytes() in embedded
    for name in ("psnr", "fd_classifier_gen", "class_agreement", "stage2_val_loss"):
        assert f"{metrics[name]:.4g}" in page
    assert "they are for ImageNet at 256 px, this run is on digits at 16 px" in page
    assert "Guidance sweep" not in page
    assert re.search(r"A transformer of \d\d,\d{3} parameters then", page)
    assert f">{metrics['psnr']:.3g} dB<" in page
    assert "of the 64 codes are in use" in page
    # Words are explained, those of figures that are not there are not.
    for term in ("causal regularizer, lambda", "nats per code", "classifier distance", "SSIM, MS-SSIM"):
        assert f"<dt>{term}</dt>" in page
    assert "Inception score" not in page
    assert "1.00e+10" in page  # FLOPs of the tokenizer's training
    assert re.search(r"generation_reference: val\b", page)  # the params


def test_the_page_of_one_class_speaks_of_no_classes(tmp_path):
    """A folder of images without class folders: what is to be read, names of keys and params aside."""
    for row, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (50, 16, 16, 3), np.uint8)):
        (tmp_path / "photos").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / f"photos/{row}.png")
    source = {"prepare_data.source": "imagefolder", "prepare_data.path": str(tmp_path / "photos")}
    limits = {"prepare_data.max_images_per_class": None, "sample.guidance_sweep": [1.0]}
    made = Pipeline(tmp_path, CHANGES | source | limits)
    History(tmp_path / "ar/train.csv", ["loss"]).append(1, {"loss": 0.5})
    assert made.evaluate("evaluation") == 0
    page = re.sub(r"(?s)<style>.*?</style>|<pre>.*?</pre>", "", (tmp_path / "evaluation/report.html").read_text())
    assert 'alt="samples"' in page and "Guidance sweep" in page and "loss curves of the transformer" in page
    text = html.unescape(re.sub(r"<[^>]*>", " ", page))
    assert not re.findall(r".*\bclass(?:es)?\b.*|.*class_agreement.*", text)
    # Columns of images from the left edge on: no row has a label.
    with Image.open(tmp_path / "evaluation/samples.png") as image:
        assert image.width == 4 + 8 * (64 + 4)
    metrics = made.metrics("evaluation")
    assert metrics["classifier_task"] == "quarter turns" and "class_agreement" in metrics
    assert not any("class_agreement" in line for line in table(metrics))
    assert "class_agreement" in read_history(tmp_path / "evaluation/guidance_sweep.csv")[0]


@pytest.mark.parametrize("width", [1200, 500])
def test_the_page_shows_in_a_browser(evaluated, tmp_path, width):
    """Headless Chromium draws it without a network: its pictures have their sizes, and nothing overflows the page."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium here")
    page = (evaluated.root / "evaluation/report.html").read_text()
    probe = (
        "<script>onload = () => document.title = 'probe ' + JSON.stringify({"
        "sizes: [...document.images].map(image => image.naturalWidth),"
        "overflow: document.documentElement.scrollWidth - innerWidth})</script></body>"
    )
    (tmp_path / "page.html").write_text(page.replace("</body>", probe))
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile"]
    options = [f"--window-size={width},2400", f"--screenshot={tmp_path}/page.png", "--dump-dom"]
    result = subprocess.run(
        [*command, *options, f"file://{tmp_path}/page.html"], capture_output=True, text=True, timeout=120, check=True
    )
    (title,) = re.findall(r"<title>probe (.*?)</title>", result.stdout)
    found = json.loads(html.unescape(title))
    assert len(found["sizes"]) >= 4
    assert min(found["sizes"]) > 100
    assert found["overflow"] <= 0


def evaluate_scales(pipeline: Pipeline, changes: dict, samples: str, out: Path) -> int:
    """Draw samples, unless they are there, and evaluate them."""
    write_params(pipeline.params, changes)
    assert pipeline.stage("sample", samples, "tokenizer", "ar") == 0
    folders = {key: pipeline.root / (samples if key == "samples" else key) for key in NAMES}
    options = [text for key, folder in folders.items() for text in (f"--{key}", str(folder))]
    return main(["evaluate", "--params", str(pipeline.params), *options, "--out", str(out)])


def test_a_stop_among_the_figures_keeps_those_that_are_taken(evaluated, monkeypatch):
    """Oracle: an uninterrupted run. Signals within the first scale's figures, after them, and after the second's."""
    changes = evaluated.changes | {"sample.guidance_scale": 2.0, "sample.guidance_sweep": [1.5, 1.25]}
    whole, torn = (evaluated.root / f"evaluation_{name}" for name in ("whole_sweep", "torn_sweep"))
    assert evaluate_scales(evaluated, changes, "samples_sweep", whole) == 0

    calls = []
    stop_after = {1: "frechet_distance", 4: "precision_recall", 8: "precision_recall"}

    def noted(name, function):
        def call(*args, **kwargs):
            result = function(*args, **kwargs)
            calls.append(name)
            if stop_after.get(len(calls)) == name:
                signal.raise_signal(signal.SIGTERM)
            return result

        return call

    for name in ("frechet_distance", "kernel_distance", "precision_recall"):
        monkeypatch.setattr(metrics_module, name, noted(name, getattr(metrics_module, name)))
    statuses = []
    while not statuses or statuses[-1] == 128 + signal.SIGTERM:
        monkeypatch.setattr("crt.interrupt._received", [])
        statuses.append(evaluate_scales(evaluated, changes, "samples_sweep", torn))
        assert len(statuses) < 10
    assert statuses == [128 + signal.SIGTERM] * 3 + [0]
    scale = ["frechet_distance", "kernel_distance", "precision_recall"]
    # The first scale begins anew, since it was stopped within; then the reconstructions' distance, then the others.
    assert calls == ["frechet_distance", *scale, "frechet_distance", *scale, *scale]
    assert {path.name: path.read_bytes() for path in torn.iterdir()} == {
        path.name: path.read_bytes() for path in whole.iterdir()
    }
    write_params(evaluated.params, evaluated.changes)


def test_kept_figures_serve_only_what_they_were_taken_from(evaluated, tmp_path, monkeypatch):
    """Oracle: an uninterrupted run with the classifier that the stopped evaluation finds when it continues."""
    ours, others = tmp_path / "ours", tmp_path / "others"
    assert evaluated.evaluate("by_ours", shared=ours) == 0
    (path,) = ours.glob("classifier-*/classifier.safetensors")
    with safe_open(path, "pt") as file:
        weights, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    other = others / path.relative_to(ours)
    other.parent.mkdir(parents=True)
    save_file({name: (array * 1.5).to(array.dtype) for name, array in weights.items()}, other, metadata)
    assert evaluated.evaluate("by_others", shared=others) == 0

    def then_stop(*args):
        result = original(*args)
        signal.raise_signal(signal.SIGTERM)
        return result

    original = metrics_module.precision_recall
    shutil.rmtree(evaluated.root / "by_ours")
    with monkeypatch.context() as patch:
        patch.setattr("crt.interrupt._received", [])
        patch.setattr(metrics_module, "precision_recall", then_stop)
        assert evaluated.evaluate("by_ours", shared=ours) == 128 + signal.SIGTERM
    assert list((evaluated.root / ".work").glob("by_ours-*/figures-*.json"))
    assert evaluated.evaluate("by_ours", shared=others) == 0
    assert evaluated.metrics("by_ours") == evaluated.metrics("by_others")


def test_a_sweep_measures_each_scale_by_itself(evaluated):
    """Oracle: a run with that scale as its only one."""
    swept = evaluated.changes | {"sample.guidance_scale": 2.0, "sample.guidance_sweep": [1.5]}
    alone = evaluated.changes | {"sample.guidance_scale": 1.5}
    rows = {}
    for name, changes in (("swept", swept), ("alone", alone)):
        out = evaluated.root / f"evaluation_{name}"
        assert evaluate_scales(evaluated, changes, f"samples_{name}", out) == 0
        rows[name] = {row["guidance_scale"]: row for row in read_history(out / "guidance_sweep.csv")}
    assert list(rows["swept"]) == [1.5, 2.0]
    assert list(rows["alone"]) == [1.5]
    assert rows["swept"][1.5] == rows["alone"][1.5]
    assert rows["swept"][2.0] != rows["swept"][1.5] | {"guidance_scale": 2.0}
    with (
        h5py.File(evaluated.root / "samples_swept/samples_guidance_1.5.h5") as one,
        h5py.File(evaluated.root / "samples_alone/samples.h5") as other,
    ):
        assert one.attrs["guidance_scale"] == 1.5
        assert np.array_equal(one["images"], other["images"])
    assert rows["swept"][2.0]["precision"] == evaluated.metrics("evaluation_swept")["precision"]
    page = (evaluated.root / "evaluation_swept/report.html").read_text()
    assert "Guidance sweep" in page
    write_params(evaluated.params, evaluated.changes)


def test_runs_on_the_same_data_share_the_classifier(evaluated):
    """The classifier of an earlier run serves one whose other params differ, and is not touched."""
    (trained,) = [
        path
        for path in (evaluated.root / ".shared").glob("classifier-*/classifier.safetensors")
        if path.read_bytes() == (evaluated.root / "evaluation/classifier.safetensors").read_bytes()
    ]
    written = trained.stat().st_mtime_ns
    assert evaluated.evaluate("other_neighbours", neighbours=5) == 0
    assert trained.stat().st_mtime_ns == written
    copy = evaluated.root / "other_neighbours/classifier.safetensors"
    assert copy.read_bytes() == trained.read_bytes()
    before = len(list((evaluated.root / ".shared").glob("classifier-*/classifier.safetensors")))
    assert evaluated.evaluate("other_classifier", **{"classifier.steps": 3}) == 0
    assert len(list((evaluated.root / ".shared").glob("classifier-*/classifier.safetensors"))) == before + 1


def test_runs_on_the_same_tokenizer_share_its_reconstructions(evaluated, tmp_path, monkeypatch):
    """Those of another tokenizer are made, though data and classifier are the same."""

    def stores() -> dict[str, list[int]]:
        folders = (evaluated.root / ".shared").glob("reconstructions-*/")
        return {folder.name: [chunk.stat().st_mtime_ns for chunk in folder.iterdir()] for folder in folders}

    before = stores()
    assert evaluated.evaluate("more_neighbours", neighbours=7) == 0
    assert stores() == before
    assert evaluated.metrics("more_neighbours")["psnr"] == evaluated.metrics("evaluation")["psnr"]

    other = Tokenizer.load(evaluated.root / "tokenizer")
    torch.nn.init.zeros_(other.decoder.conv_out.bias)
    monkeypatch.chdir(ROOT)
    retrained = Pipeline(tmp_path, CHANGES, other)
    assert retrained.evaluate("evaluation", shared=evaluated.root / ".shared") == 0
    assert len(stores()) == len(before) + 1
    assert retrained.metrics("evaluation")["psnr"] != evaluated.metrics("evaluation")["psnr"]
