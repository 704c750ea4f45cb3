"""Words for people; oracle: what the tables of figures name."""

from __future__ import annotations

import pytest

from crt.evaluation.comparable import CLASSES, MOMENTS_OF_IMAGES, QUARTER_TURNS, STORED_MOMENTS
from crt.evaluation.metric_table import RESULTS
from crt.evaluation.wording import glossary, has_classes, protocol_text, shown

PROTOCOL = {
    "generation_images": 50_000,
    "guidance_scale": 1.75,
    "generation_reference": "adm_train",
    "generation_reference_images": 10_000,
    "reconstruction_reference": "val",
    "reconstruction_reference_images": 50_000,
    "features": "inception-2015-12-05",
    "features_sha256": "f" * 64,
    "features_resize": "legacy_tensorflow",
}


def test_a_meaning_says_what_is_better_between_what_it_is_and_the_rest() -> None:
    assert RESULTS["rfid"] == "FID of reconstructions, lower is better"
    assert RESULTS["ms_ssim"] == "reconstructions, higher is better, 1 at most"
    assert RESULTS["codebook_usage"] == "share of codes in use"


@pytest.mark.parametrize(("figure", "term"), [("sfid", "sFID"), ("lpips", "LPIPS"), ("kid", "kernel distance (KID)")])
def test_words_are_explained_where_their_figures_stand(figure: str, term: str) -> None:
    always = dict(glossary({"codebook_usage": 0.5}))
    assert "guidance" in always
    assert term not in always
    assert dict(glossary({figure: 1.0})).keys() - always.keys() >= {term}


def test_the_protocol_tells_of_moments_that_are_not_those_of_the_images() -> None:
    plain = protocol_text(PROTOCOL)
    assert protocol_text(PROTOCOL | {"generation_reference_moments": MOMENTS_OF_IMAGES}) == plain
    stored = protocol_text(PROTOCOL | {"generation_reference_moments": STORED_MOMENTS})
    assert f"10000 images of adm_train, mean and covariance {STORED_MOMENTS};" in stored


def test_the_protocol_names_each_number_and_set_where_it_belongs() -> None:
    assert protocol_text(PROTOCOL | {"reconstruction_reference_images": 49_000}) == (
        "50000 samples at guidance 1.75 against the 10000 images of adm_train; reconstructions of the 49000 images of "
        "val; features of inception-2015-12-05 (ffffffff), resize legacy_tensorflow"
    )


def test_agreement_with_the_class_is_shown_where_there_are_classes() -> None:
    """Results of earlier versions do not say what their classifier learned: it was classes."""
    figures = {"psnr": 25.0, "class_agreement": 0.9}
    assert has_classes({}) and has_classes({"classifier_task": CLASSES})
    assert not has_classes({"classifier_task": QUARTER_TURNS})
    assert shown(figures, classes=True) == figures
    assert shown(figures, classes=False) == {"psnr": 25.0}
