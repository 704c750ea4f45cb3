"""Which figures an evaluation takes of what, and what it warns of. Oracle: the functions that take one figure each."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from crt.chunks import ChunkStore
from crt.distributed import World
from crt.evaluation.comparable import ALL_CLASSES_ALIKE
from crt.evaluation.frechet import GaussianStatistics, expected_distance, kernel_distance
from crt.evaluation.metric_table import figure_names
from crt.evaluation.metrics import (
    code_metrics,
    drawn_labels,
    generation_metrics,
    open_reference,
    other_shares_warning,
    rows_of_pairs,
)
from crt.evaluation.precision_recall import inception_score, precision_recall
from crt.evaluation.sources import SplitSource
from crt.params import load_params
from crt.pictures import spread
from crt.stages.evaluate import _code_counts
from tests.conftest import ROOT, write_params
from tests.tokens.caches import make_header, random_codes, write_cache

SETTINGS = {"neighbours": 3, "pairwise_images": 1000, "kernel_subsets": 4, "kernel_subset_size": 10}


def features(count: int, dimension: int = 4, scale: float = 1.0) -> np.ndarray:
    return np.random.default_rng(count).normal(size=(count, dimension)) * scale


def store_of(folder: Path, values: np.ndarray) -> ChunkStore:
    store = ChunkStore(folder, len(values), 16)
    store.fill("test", lambda start, stop: {"features": values[start:stop]}, World(0, 1, torch.device("cpu")))
    return store


def probabilities(values: np.ndarray) -> np.ndarray:
    return np.exp(values) / np.exp(values).sum(axis=1, keepdims=True)


def figures(
    folder: Path, made: np.ndarray, real: np.ndarray, seed: int = 0, inception: bool = False, **changes: int
) -> tuple[dict, list[str]]:
    """The figures of these features, and the warnings; `inception`: of a network that is not the classifier."""
    samples, reference = store_of(folder / "made", made), store_of(folder / "real", real)
    network = SimpleNamespace(dimension=made.shape[1], spatial_dimension=0, probabilities=probabilities)
    networks = SimpleNamespace(features=network, classifier=None if inception else network, device="cpu")
    params = load_params(ROOT / "params.yaml").evaluate.model_copy(update=SETTINGS | changes)
    warnings: list[str] = []
    whole = open_reference(reference, network, {})
    found = generation_metrics(params, seed, networks, samples=samples, reference=whole, warnings=warnings)
    return found, warnings


def test_what_perfect_images_score_depends_on_the_reference_and_on_both_numbers_of_images(tmp_path):
    made, real = features(40, scale=3.0), features(200)
    found, warnings = figures(tmp_path, made, real)
    statistics = GaussianStatistics(4)
    statistics.update(real)
    assert found["fd_classifier_gen_of_perfect_images"] == pytest.approx(expected_distance(statistics, (40, 200)))
    assert not warnings


@pytest.mark.parametrize(
    ("made", "real", "named"),
    [(200, 50, "50 reference images are"), (50, 200, "50 samples are"), (50, 40, "50 samples and 40 reference")],
)
def test_too_few_of_either_are_warned_of(tmp_path, made, real, named):
    """50 images have a covariance of rank 49."""
    _, (warning,) = figures(tmp_path, features(made, 50), features(real, 50))
    assert warning.startswith(f"fd_classifier_gen: {named}")


def test_pairs_are_taken_of_so_many_images_from_all_over_the_sets(tmp_path):
    made, real = features(70), features(90) + 0.5
    found, _ = figures(tmp_path, made, real, seed=5, pairwise_images=30)
    rows = [rows_of_pairs(count, 30, seed=5) for count in (70, 90)]
    for chosen, count in zip(rows, (70, 90), strict=True):
        assert len(np.unique(chosen)) == 30 and (np.diff(chosen) > 0).all()
        assert chosen.min() < count / 4 and chosen.max() >= 3 * count / 4
    x, y = made[rows[0]], real[rows[1]]
    assert found["kd_classifier_gen"] == pytest.approx(kernel_distance(x, y, subsets=4, subset_size=10, seed=5))
    assert (found["precision"], found["recall"]) == precision_recall(x, y, 3)


@pytest.mark.parametrize(("count", "wanted", "classes"), [(15_000, 5_000, 3), (50_000, 5_000, 10)])
def test_a_part_of_the_samples_is_of_all_classes_alike(count, wanted, classes):
    """Samples are of all classes in turn; rows at equal distances are of the first one for half of its share."""
    chosen = rows_of_pairs(count, wanted, seed=0)
    expected, deviation = wanted / classes, np.sqrt(wanted / classes * (1 - 1 / classes) * (1 - wanted / count))
    assert np.bincount(chosen % classes) == pytest.approx(np.full(classes, expected), abs=4 * deviation)
    assert np.bincount(spread(count, wanted) % classes)[0] < expected - 10 * deviation


@pytest.mark.parametrize(("made", "real"), [(3, 40), (40, 3)])
def test_fewer_images_than_neighbours_cost_the_figures_of_pairs_alone(tmp_path, made, real):
    found, warnings = figures(tmp_path, features(made), features(real))
    assert set(found) == {"fd_classifier_gen", "fd_classifier_gen_of_perfect_images"}
    assert "kd_classifier_gen, precision and recall: left out, they need over 3 images" in warnings


def test_the_inception_score_is_of_all_samples_in_its_splits(tmp_path):
    made = features(50)
    found, _ = figures(tmp_path, made, features(40), seed=5, inception=True, inception_score_splits=5)
    expected = inception_score(probabilities(made), 5, seed=5)
    assert (found["inception_score"], found["inception_score_std"]) == pytest.approx(expected)
    assert {"gfid", "kid"} <= set(found)


@pytest.mark.parametrize(("side", "measured_at", "score"), [(256, 128, "ssim"), (128, 256, "ms_ssim")])
def test_similarity_is_named_by_the_side_at_which_images_are_measured(tmp_path, side, measured_at, score):
    changes = {"train_tokenizer.image_size": side, "evaluate.image_size": measured_at}
    params = load_params(write_params(tmp_path / "params.yaml", changes, base=ROOT / "presets/imagenet256.yaml"))
    assert {"ssim", "ms_ssim"} & set(figure_names(params)) == {score}


class Labelled(SplitSource):
    """A split of which only the labels are known."""

    def __init__(self, labels: np.ndarray) -> None:
        self.name, self._labels = "val", labels

    def __len__(self) -> int:
        return len(self._labels)

    @property
    def labels(self) -> np.ndarray:
        return self._labels


@pytest.mark.parametrize(
    ("real", "warned"),
    [
        (np.repeat([0, 1], [300, 700]), True),
        (np.repeat([0, 1], [450, 550]), False),  # more than chance, but little
        (np.repeat([0, 1], [3, 7]), False),  # no more than chance
    ],
)
def test_other_shares_of_the_classes_are_warned_of_beyond_chance(real, warned):
    """Beside 1,000 samples of two classes in turn."""
    samples = SimpleNamespace(labels=np.arange(1000) % 2, class_names=["cat", "dog"])
    warning = other_shares_warning(samples, Labelled(real))
    assert bool(warning) == warned
    assert not warned or "of cat 50% instead of 30%" in warning


def test_classes_in_turn_are_all_classes_alike_whatever_the_number_of_images():
    names = ["a", "b", "c"]
    assert drawn_labels(SimpleNamespace(labels=np.arange(10) % 3, class_names=names)) == ALL_CLASSES_ALIKE
    uneven = drawn_labels(SimpleNamespace(labels=np.array([0, 0, 0, 1]), class_names=names))
    assert uneven.startswith("2 of 3 classes, numbers of SHA-256 ")


def test_a_collapsed_codebook_is_warned_of():
    for counts, told in (([10] * 64, False), ([320, 320] + [0] * 62, True)):
        warnings: list[str] = []
        code_metrics(np.array(counts), 16, 2.0, warnings)
        assert ["the codebook has collapsed" in warning for warning in warnings] == [True] * told


def test_code_use_is_of_all_images_of_a_large_split(tmp_path):
    """Oracle: the codes that were written."""
    header = make_header(rows=5000, grid=(2, 2), split="val")
    codes, labels = random_codes(header)
    write_cache(tmp_path / "tokens", header, codes, labels)
    counts = _code_counts(SimpleNamespace(inputs={"tokens": tmp_path / "tokens"}))
    np.testing.assert_array_equal(counts, np.bincount(codes.ravel(), minlength=64))
