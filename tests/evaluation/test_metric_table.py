"""What the table says of each figure; oracles: the params that ask for it, its definition, its own name."""

from __future__ import annotations

import pytest

from crt.evaluation.metric_table import METRICS, RESULTS, axis_title, description, figure_names, higher_is_better, title
from crt.evaluation.wording import meaning
from crt.params import MS_SSIM_MIN_SIDE, load_params
from tests.conftest import ROOT, write_params

OF_INCEPTION = {"rfid", "gfid", "gfid_of_perfect_images", "sfid", "sfid_of_perfect_images", "kid"}
OF_INCEPTION |= {"inception_score", "inception_score_std"}
OF_CLASSIFIER = {"fd_classifier_rec", "fd_classifier_gen", "fd_classifier_gen_of_perfect_images", "kd_classifier_gen"}


@pytest.mark.parametrize(
    ("features", "named", "not_named"),
    [("inception", OF_INCEPTION, OF_CLASSIFIER), ("classifier", OF_CLASSIFIER, OF_INCEPTION)],
)
def test_distances_are_those_of_the_features_that_are_asked_for(tmp_path, features, named, not_named):
    params = load_params(write_params(tmp_path / "params.yaml", {"evaluate.features": features}))
    assert set(figure_names(params)) & (OF_INCEPTION | OF_CLASSIFIER) == named
    assert not set(figure_names(params)) & not_named


def test_lpips_is_a_figure_only_where_it_is_asked_for(tmp_path):
    base = ROOT / "presets/imagenet256.yaml"
    for asked in (True, False):
        params = load_params(write_params(tmp_path / "params.yaml", {"evaluate.lpips": asked}, base=base))
        assert ("lpips" in figure_names(params)) is asked


@pytest.mark.parametrize(("side", "score"), [(MS_SSIM_MIN_SIDE, "ms_ssim"), (MS_SSIM_MIN_SIDE - 1, "ssim")])
def test_similarity_is_over_scales_from_the_side_on_that_has_room_for_them(tmp_path, side, score):
    base = ROOT / "presets/imagenet256.yaml"
    params = load_params(write_params(tmp_path / "params.yaml", {"evaluate.image_size": side}, base=base))
    assert {"ssim", "ms_ssim"} & set(figure_names(params)) == {score}


def test_distances_and_losses_are_better_low_and_scores_and_shares_high():
    lower = {"rfid", "gfid", "sfid", "kid", "fd_classifier_rec", "fd_classifier_gen", "kd_classifier_gen"}
    lower |= {"lpips", "stage2_val_loss"}
    higher = {"inception_score", "precision", "recall", "psnr", "ssim", "ms_ssim"}
    for better, names in (("lower", lower), ("higher", higher)):
        assert {name for name, text in RESULTS.items() if f", {better} is better" in text} == names


@pytest.mark.parametrize(
    ("name", "beside"),
    [
        ("gfid", "gfid_of_perfect_images"),
        ("sfid", "sfid_of_perfect_images"),
        ("fd_classifier_gen", "fd_classifier_gen_of_perfect_images"),
        ("class_agreement", "classifier_accuracy"),
        ("bits_per_image", "bits_per_image_stage2"),
    ],
)
def test_a_figure_is_told_beside_what_it_is_to_be_held_against(name, beside):
    values = {name: float(index) for index, name in enumerate(METRICS, start=100)}
    assert f" {values[beside]:g} " in f"{meaning(RESULTS[name], values)} "


def test_shares_are_better_high_without_being_told_so():
    shares = {"precision", "recall", "class_agreement", "classifier_accuracy", "codebook_usage"}
    scores = {"inception_score", "psnr", "ssim", "ms_ssim"}
    assert {name for name in (*METRICS, "training_flops") if higher_is_better(name)} == shares | scores
    for name, text in (
        ("codebook_usage", "share of codes in use; higher is better"),
        ("rfid", "rFID; lower is better"),
        ("training_flops", "training FLOPs of both stages"),
    ):
        assert description(name) == text


def test_names_for_people():
    assert (title("kd_classifier_gen"), title("codebook_usage")) == ("kernel distance of samples", "codebook usage")
    for stage in (1, 2):
        assert axis_title(f"stage{stage}_training_flops") == f"training FLOPs of stage {stage}"
    assert axis_title("training_flops") == "training FLOPs of both stages"
