"""Which figures of a run stand beside the paper's; oracle: the paper's table 1, and one condition broken at a time."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from crt.ar.sizes import named_sizes
from crt.evaluation.comparable import MOMENTS_OF_IMAGES, STORED_MOMENTS
from crt.evaluation.paper import _TRANSFORMERS, PAPER_TABLE_COLUMNS, beside_paper

METRICS = {
    "rfid": 2.3,
    "gfid": 2.8,
    "features_resize": "legacy_tensorflow",
    "features_image_size": 256,
    "tokens_per_image": 256,
    "bits_per_image": 256 * 14,
    "reconstruction_reference_images": 50_000,
    "generation_reference": "adm_train",
    "generation_reference_moments": STORED_MOMENTS,
    "generation_images": 50_000,
}


def compare(
    changes: dict[str, Any], source: str = "imagenet", side: int = 256, *, layers: int = 24, width: int = 1024
) -> dict[str, Any]:
    manifests = {
        "prepare_data": SimpleNamespace(params={"prepare_data": {"source": source}}),
        "train_ar": SimpleNamespace(params={"train_ar": {"model": {"layers": layers, "width": width}}}),
    }
    metrics = {name: value for name, value in (METRICS | changes).items() if value is not None}
    return beside_paper(metrics, side, manifests)


def test_figures_of_the_papers_protocol_stand_beside_its_own() -> None:
    found = compare({})
    assert found["reasons"] == []
    assert found["tokenizers"] == ("baseline", "CRT")
    assert found["rows"] == [
        {"name": "rFID", "ours": "2.30", "published": ["2.21", "2.36"]},
        {"name": "gFID, 340M", "ours": "2.80", "published": ["2.89", "2.75"]},
    ]


def test_a_codebook_of_131k_stands_beside_crt_opt_whose_rfid_is_not_published() -> None:
    found = compare({"bits_per_image": 256 * 17})
    assert (found["tokenizers"], found["reasons"]) == (("CRT_opt",), [])
    assert found["rows"] == [{"name": "gFID, 340M", "ours": "2.80", "published": ["2.45"]}]


@pytest.mark.parametrize("size, name", [("B", "gFID, 111M"), ("L", "gFID, 340M"), ("XL", "gFID, 775M")])
def test_the_table_names_the_sizes_by_their_parameters(size: str, name: str) -> None:
    """Oracle: the named sizes."""
    named = named_sizes()[size]
    assert PAPER_TABLE_COLUMNS[_TRANSFORMERS[named["layers"], named["width"]]] == name


@pytest.mark.parametrize(
    ("changes", "rest", "rows", "reason"),
    [
        ({"generation_images": 10_000}, {}, ["rFID"], "gFID is for 50,000 samples against the ADM batch"),
        ({"generation_reference": "val"}, {}, ["rFID"], "against the ADM batch"),
        ({"generation_reference_moments": MOMENTS_OF_IMAGES}, {}, ["rFID"], "moments that the ADM batch file holds"),
        ({"generation_reference_moments": None}, {}, ["rFID"], "moments that the ADM batch file holds"),
        ({"generation_labels": "1 of 1000 classes, numbers of SHA-256 01234567"}, {}, ["rFID"], "all classes alike"),
        ({"features_image_size": 64}, {}, [], "measured at 256 px, this run at 64"),
        (
            {"tokens_per_image": 1024, "bits_per_image": 1024 * 14},
            {},
            [],
            "256 tokens of 16,384 or 131,072 codes, this run has 1024 of",
        ),
        ({"bits_per_image": 256 * 10}, {}, [], "this run has 256 of 1,024"),
        ({"reconstruction_reference_images": 100}, {}, ["gFID, 340M"], "rFID is for all 50,000"),
        ({}, {"layers": 6}, ["rFID"], "transformers of 111M, 340M and 775M"),
        ({}, {"width": 768}, ["rFID"], "transformers of 111M, 340M and 775M"),
        ({}, {"side": 512}, [], "this run is on imagenet at 512 px"),
        ({}, {"source": "digits", "side": 16}, [], "this run is on digits at 16 px"),
        ({"rfid": None}, {}, [], "measured with a classifier of its own"),
        ({"features_resize": "clean"}, {}, [], "under resize legacy_tensorflow, this run under clean"),
    ],
)
def test_others_do_not_and_the_page_says_why(
    changes: dict[str, Any], rest: dict[str, Any], rows: list[str], reason: str
) -> None:
    found = compare(changes, **rest)
    assert [row["name"] for row in found["rows"]] == rows
    (text,) = found["reasons"]
    assert reason in text
