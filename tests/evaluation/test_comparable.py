"""Results of different protocols are told apart; oracle: which field was changed."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from crt.__main__ import main
from crt.analysis.study_page import protocol_warnings
from crt.evaluation.comparable import (
    ALL_CLASSES_ALIKE,
    MOMENTS_OF_IMAGES,
    PROTOCOL_FIELDS,
    STORED_MOMENTS,
    protocol_differences,
    protocol_warning,
)

METRICS = {
    "features": "classifier",
    "features_sha256": "a" * 64,
    "features_resize": "none",
    "features_precision": "float32, statistics float64",
    "reconstruction_reference": "val",
    "reconstruction_reference_sha256": "b" * 64,
    "reconstruction_reference_images": 360,
    "generation_reference": "val",
    "generation_reference_sha256": "b" * 64,
    "generation_reference_images": 360,
    "generation_images": 1000,
    "guidance_scale": 2.0,
    "psnr": 25.0,
}


@pytest.mark.parametrize("field", PROTOCOL_FIELDS)
def test_every_field_of_the_protocol_counts(field):
    differences = protocol_differences(METRICS, METRICS | {field: "another"})
    assert [line.startswith(f"{PROTOCOL_FIELDS[field]}: ") for line in differences] == [True]


def test_what_is_measured_is_no_difference():
    assert protocol_differences(METRICS, METRICS | {"psnr": 3.0, "guidance_scale": 1.0}) == []


def test_another_reference_is_told_with_its_numbers_but_not_its_digest():
    other = {"generation_reference": "adm_train", "generation_reference_sha256": "c" * 64}
    differences = protocol_differences(METRICS, METRICS | other | {"generation_reference_images": 10_000})
    assert differences == ["reference of samples: val, adm_train", "number of reference images: 360, 10000"]


def test_an_older_result_without_a_field_differs():
    older = {name: value for name, value in METRICS.items() if name != "features_resize"}
    assert protocol_differences(METRICS, older) == ["resize before the feature network: none, not recorded"]


def test_results_from_before_moments_could_be_stored_took_them_from_images():
    now = METRICS | {"generation_reference_moments": MOMENTS_OF_IMAGES}
    assert protocol_differences(METRICS, now) == []
    (line,) = protocol_differences(METRICS, METRICS | {"generation_reference_moments": STORED_MOMENTS})
    assert line == f"mean and covariance of the reference of samples: {MOMENTS_OF_IMAGES}, {STORED_MOMENTS}"


def test_results_from_before_labels_could_be_chosen_are_of_all_classes_alike():
    assert protocol_differences(METRICS, METRICS | {"generation_labels": ALL_CLASSES_ALIKE}) == []
    (line,) = protocol_differences(METRICS | {"generation_labels": "1 of 10 classes"}, METRICS)
    assert line == f"classes of the samples: 1 of 10 classes, {ALL_CLASSES_ALIKE}"


def test_digests_are_cut_and_other_values_are_not():
    (weights,) = protocol_differences(METRICS, METRICS | {"features_sha256": "0123456789abcdef" * 4})
    assert weights == "weights of the feature network: aaaaaaaa, 01234567"
    name = "a reference whose name has as many letters as a digest has digits"[:64]
    (reference,) = protocol_differences(METRICS, METRICS | {"reconstruction_reference": name})
    assert reference == f"reference of reconstructions: val, {name}"


def test_the_warning_tells_all_differences():
    differences = protocol_differences(METRICS, METRICS | {"generation_images": 50, "features_resize": "clean"})
    assert protocol_warning(("a", "b"), differences) == (
        "a and b were measured differently (resize before the feature network: none, clean; number of samples: 1000, "
        "50): their figures do not compare"
    )


def test_results_of_two_runs_stand_side_by_side_and_warn(tmp_path, capsys):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "metrics.json").write_text(json.dumps(METRICS))
    (tmp_path / "b.json").write_text(json.dumps(METRICS | {"psnr": 26.5, "generation_images": 50}))
    assert main(["results", str(tmp_path / "a"), str(tmp_path / "b.json")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines if "psnr" in line] == [["psnr", "25", "26.5"]]
    (warning,) = [line for line in lines if line.startswith("warning: ")]
    assert "measured differently (number of samples: 1000, 50): their figures do not compare" in warning
    assert main(["results", str(tmp_path / "a"), str(tmp_path / "a")]) == 0
    assert "warning" not in capsys.readouterr().out


def test_what_is_no_result_is_named(tmp_path, capsys):
    (tmp_path / "list.json").write_text("[]")
    for path in (tmp_path / "absent", tmp_path / "list.json"):
        assert main(["results", str(path), str(path)]) == 2
        assert f"error: {path}: missing, or no metrics" in capsys.readouterr().err


def test_a_study_warns_within_a_seed_only(tmp_path: Path):
    runs = []
    for seed in (0, 1):
        for choice, images in (("a", 1000), ("b", 1000 if seed == 0 else 999)):
            file = tmp_path / f"{seed}{choice}.json"
            metrics = METRICS | {"features_sha256": str(seed) * 64, "generation_images": images}
            file.write_text(json.dumps(metrics))
            runs.append(SimpleNamespace(choices={"axis": choice}, seed=seed, metrics_file=file))
    (warning,) = protocol_warnings(runs)
    assert warning.startswith("axis a, seed 1 and axis b, seed 1 were measured differently (number of samples")
