"""The check of the evaluator: its mechanics, on the stand-in network and made-up images; its refusals.

Oracles: clean-fid's distance of the same features, and the definitions called directly.
"""

from __future__ import annotations

import numpy as np
import pytest
from cleanfid import fid as cleanfid_fid

from crt.__main__ import main
from crt.commands import evaluator_check
from crt.commands.evaluator_check import PUBLISHED, score
from crt.evaluation.classifier import ClassifierFeatures
from crt.evaluation.features import INCEPTION_FILE
from crt.evaluation.precision_recall import precision_recall
from crt.evaluation.sources import AdmBatch
from crt.stage import open_run, publish
from tests.conftest import ROOT, TINY, write_params


@pytest.fixture(autouse=True)
def at_root(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(evaluator_check, "path_variables", lambda: {"shared": str(tmp_path / "shared")})


def batch(path, images) -> AdmBatch:
    np.savez(path, images)
    return AdmBatch(path)


def test_figures_are_those_of_the_features(digits, classifier_path, tmp_path):
    network = ClassifierFeatures(classifier_path, "cpu")
    images, reference = batch(tmp_path / "a.npz", digits.val[:200]), batch(tmp_path / "b.npz", digits.train[:300])
    settings = {"shared": tmp_path / "shared", "batch_size": 64, "neighbours": 3, "splits": 10}
    figures, warnings = score(network, images, reference, **settings)
    x, y = network(digits.val[:200]), network(digits.train[:300])
    assert figures["FID"] == pytest.approx(cleanfid_fid.fid_from_feats(x.astype(float), y.astype(float)), rel=1e-3)
    assert (figures["precision"], figures["recall"]) == precision_recall(x, y, 3)
    assert 1 < figures["inception score"] < 10
    assert figures.keys() == PUBLISHED.keys() - {"sFID"}  # this network has no spatial features
    (warning,) = warnings
    assert "holds no moments of the whole training set" in warning
    few = batch(tmp_path / "c.npz", digits.val[:20])
    warning, _ = score(network, few, reference, **settings)[1]
    assert "20 validation images are too few for a covariance of 64 features" in warning


def test_published_figures_are_from_the_moments_that_the_batch_file_holds(
    digits, classifier_path, tmp_path, monkeypatch
):
    """Oracle: clean-fid's distance from those moments, which are not those of the images in the file."""
    network = ClassifierFeatures(classifier_path, "cpu")
    monkeypatch.setattr(network, "resize", "legacy_tensorflow")
    whole = network(digits.train).astype(np.float64)
    moments = whole.mean(axis=0), np.cov(whole, rowvar=False)
    np.savez(tmp_path / "adm.npz", digits.train[:100], mu=moments[0], sigma=moments[1])
    images = batch(tmp_path / "a.npz", digits.val[:200])
    settings = {"shared": tmp_path / "shared", "batch_size": 64, "neighbours": 3, "splits": 10}
    figures, warnings = score(network, images, AdmBatch(tmp_path / "adm.npz"), **settings)
    ours = network(digits.val[:200]).astype(np.float64)
    expected = cleanfid_fid.frechet_distance(ours.mean(axis=0), np.cov(ours, rowvar=False), *moments)
    assert figures["FID"] == pytest.approx(expected, rel=1e-4)
    assert warnings == []
    monkeypatch.setattr(network, "resize", "none")
    others, _ = score(network, images, AdmBatch(tmp_path / "adm.npz"), **settings)
    assert others["FID"] > 1.2 * expected  # fewer images


def prepared(tmp_path, source: str, **changes):
    params = write_params(tmp_path / "params.yaml", TINY | changes)
    run = open_run("prepare_data", params, {}, tmp_path / "data")
    run.staging.mkdir(parents=True)
    run.values = {"prepare_data": {**run.values["prepare_data"], "source": source}}
    publish(run)
    return ["evaluator_check", "--params", str(params), "--data", str(tmp_path / "data")]


@pytest.mark.parametrize(
    ("source", "weights", "reference", "message"),
    [
        ("imagenet", "weights", None, "evaluate.adm_reference: null, but the check needs"),
        ("digits", "weights", "adm.npz", "holds digits, the published figures are for ImageNet"),
        ("imagenet", "nowhere", "adm.npz", f"{INCEPTION_FILE}: not found: put"),
        ("imagenet", "stand_in", "adm.npz", "wrong file, its SHA-256 is"),
    ],
)
def test_what_is_missing_or_wrong_is_named_in_one_line(
    tmp_path, capsys, inception_folder, source, weights, reference, message
):
    folder = inception_folder if weights == "stand_in" else tmp_path / weights
    changes = {"evaluate.inception_weights": str(folder)}
    if reference:
        changes["evaluate.adm_reference"] = str(tmp_path / reference)
    assert main(prepared(tmp_path, source, **changes)) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert message in errors[0]


def test_missing_data_are_named(tmp_path, capsys):
    params = write_params(tmp_path / "params.yaml", TINY | {"evaluate.adm_reference": "adm.npz"})
    assert main(["evaluator_check", "--params", str(params), "--data", str(tmp_path / "nowhere")]) == 2
    assert "nowhere: not found: make it first" in capsys.readouterr().err
