"""Words for people; oracle: what the tables of figures name."""

from __future__ import annotations

import pytest

from crt.evaluation.comparable import MOMENTS_OF_IMAGES, STORED_MOMENTS
from crt.evaluation.wording import LOWER_IS_BETTER, RESULTS, TITLES, glossary, protocol_text

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


def test_every_figure_has_a_title_and_its_meaning_agrees_on_what_is_better() -> None:
    meanings = dict(RESULTS)
    assert meanings.keys() == TITLES.keys()
    for name in LOWER_IS_BETTER:
        assert "lower is better" in meanings[name]
    for name in ("inception_score", "precision", "recall"):
        assert "higher is better" in meanings[name]


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
