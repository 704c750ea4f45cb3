"""What the page of a run says. Oracle: figures and params of the committed run, one thing changed at a time."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from ruamel.yaml import YAML

from crt.evaluation.metric_table import RESULTS, title
from crt.evaluation.report import write_report
from crt.manifest import Manifest
from crt.params import load_params
from crt.pictures import image_grid
from crt.pipeline import load_stages
from tests.conftest import ROOT, write_params

METRICS = json.loads((ROOT / "metrics.json").read_text(encoding="utf-8"))
SUMMARIES: dict[str, dict[str, Any]] = {
    "train_tokenizer": {"training_flops": 1.25e16},
    "train_ar": {"training_flops": 3.5e21, "parameters": 775_320_000},
}
FILES: dict[str, dict[str, Any]] = {"tokenize": {"train.h5": {"bytes": 1_500_000}, "val.h5": {"bytes": 730_000}}}


def write(
    folder: Path,
    changes: Mapping[str, Any] | None = None,
    *,
    params: Mapping[str, Any] | None = None,
    sweep: Sequence[Mapping[str, float]] = (),
    seconds: Mapping[str, float | None] | None = None,
    summaries: Mapping[str, Mapping[str, Any]] = SUMMARIES,
) -> str:
    """The page of a run with other figures or params."""
    values = load_params(write_params(folder / "params.yaml", dict(params or {}))).model_dump(by_alias=True)
    manifests = {
        name: Manifest(
            stage=name,
            version=1,
            fingerprint=f"{index}recipe".ljust(64, "0"),
            content=f"{index}content".ljust(64, "0"),
            params={key: values[key] for key in stage.keys},
            inputs={},
            files=FILES.get(name, {}),
            summary=summaries.get(name, {}),
        )
        for index, (name, stage) in enumerate(load_stages(ROOT).items())
    }
    for name in ("samples", "reconstructions", "code_usage"):
        Image.new("RGB", (1, 1)).save(folder / f"{name}.png")
    own = manifests.pop("evaluate")
    write_report(folder, METRICS | dict(changes or {}), sweep, manifests, own, seconds=seconds or {})
    return (folder / "report.html").read_text(encoding="utf-8")


def texts(page: str, start: str, tag: str = "") -> list[str]:
    """What a person reads in each element that begins so."""
    found = re.findall(rf"(?s)<(?:{start})[^>]*>(.*?)</(?:{tag or start})>", page)
    return [" ".join(html.unescape(re.sub("<[^>]*>", " ", inner)).split()) for inner in found]


def lines_of(page: str, heading: str) -> list[list[str]]:
    """Cells of the table below a heading, line by line."""
    (table,) = re.findall(rf"(?s)<h2>{re.escape(heading)}</h2>.*?<table>(.*?)</table>", page)
    return [texts(line, "td|th") for line in re.findall("(?s)<tr.*?</tr>", table)]


@pytest.mark.parametrize(
    ("weight", "said"),
    [
        (0.25, "It was trained with the causal regularizer at weight 0.25, which"),
        (0.0, "It was trained without the causal regularizer (lambda 0): the plain VQGAN"),
    ],
)
def test_the_first_lines_say_what_was_made(tmp_path, weight, said):
    page = write(tmp_path, params={"lambda": weight, "seed": 7})
    assert texts(page, "h1") == [f"Run report: digits at 16 px, lambda {weight:g}, seed 7"]
    (lead,) = texts(page, 'p class="lead"', "p")
    assert lead.startswith(
        "A tokenizer turns an image of 16x16 pixels into 16 codes, each one of 64 (96 bits an image). "
    )
    assert said in lead
    assert lead.endswith("codes, and drew 1,000 new images with them.")
    assert "the transformer wrote 16 codes for it" in page


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        (775_320_000, "A transformer of 775.3 million parameters then"),
        (100_000, "A transformer of 0.1 million parameters then"),
        (99_999, "A transformer of 99,999 parameters then"),
        (None, "A transformer then"),  # imported, by an earlier version
    ],
)
def test_sizes_are_told_in_numbers_that_can_be_read(tmp_path, parameters, said):
    summary = {} if parameters is None else {"parameters": parameters}
    assert said in write(tmp_path, summaries={"train_ar": summary})


def test_tiles_tell_the_main_figures_with_units_and_what_to_hold_them_against(tmp_path):
    page = write(tmp_path, {"bits_per_image": 160.0})
    tiles = re.findall('<div class="tile"><b>(.*?)</b><span>(.*?)</span>', page)
    assert tiles == [
        (
            f"{METRICS['fd_classifier_gen']:.3g}",
            "distance of the samples from real images: lower is better, perfect images would score "
            f"{METRICS['fd_classifier_gen_of_perfect_images']:.2f}",
        ),
        (
            f"{METRICS['class_agreement']:.1%}",
            "of the samples are recognised as the class asked for "
            f"(of real images {METRICS['classifier_accuracy']:.1%})",
        ),
        (f"{METRICS['psnr']:.3g} dB", "PSNR of the reconstructions: higher is better"),
        (f"{METRICS['stage2_val_loss']:.3g}", "nats per code, how hard the codes are to predict: lower is better"),
        (f"{METRICS['codebook_usage']:.1%}", "of the 1,024 codes are in use"),
    ]
    fid = write(tmp_path, {"gfid": 3.456, "gfid_of_perfect_images": 0.5678})
    assert "<b>3.46</b><span>FID of the samples: lower is better, perfect images would score 0.57</span>" in fid


def test_every_figure_of_the_results_has_a_line_with_its_key(tmp_path):
    header, *lines = lines_of(write(tmp_path), "Results")
    assert header == ["figure", "value", "meaning", "key in metrics.json"]
    names = [name for name in RESULTS if name in METRICS]
    assert [(line[0], line[1], line[3]) for line in lines] == [(title(n), f"{METRICS[n]:.4g}", n) for n in names]


def test_each_warning_is_shown_and_none_where_there_is_none(tmp_path):
    assert not texts(write(tmp_path), 'p class="warning"', "p")
    page = write(tmp_path, {"warnings": "few images; <small> classifier"})
    assert texts(page, 'p class="warning"', "p") == ["Warning: few images", "Warning: <small> classifier"]


@pytest.mark.parametrize(("side", "said"), [(32, True), (64, False)])
def test_images_that_are_shown_enlarged_are_said_to_be(tmp_path, side, said):
    """Oracle: the pictures themselves."""
    page = write(tmp_path, params={"prepare_data.image_size": side, "train_tokenizer.image_size": side})
    assert ("Small images are enlarged without smoothing." in page) is said
    assert (image_grid([np.zeros((1, side, side, 3), np.uint8)]).width > 2 * side) is said


def test_a_sweep_has_a_line_for_each_scale_and_marks_the_chosen_one(tmp_path):
    rows = [
        {"guidance_scale": scale, "fd_classifier_gen": 10 * scale, "precision": 0.5, "neighbours": 3.0}
        for scale in (1.0, 1.75, 3.0)
    ]
    Image.new("RGB", (1, 1)).save(tmp_path / "guidance_sweep.png")
    page = write(tmp_path, sweep=rows)
    header, *lines = lines_of(page, "Guidance sweep")
    assert header == ["guidance scale", "classifier distance of samples", "precision"]
    assert lines == [["1", "10", "0.5"], ["1.75", "17.5", "0.5"], ["3", "30", "0.5"]]
    assert texts(page, 'tr class="chosen"', "tr") == ["1.75 17.5 0.5"]
    assert "Each scale has its own\n1,000 samples; all figures above are at scale 1.75." in page
    assert "Guidance sweep" not in write(tmp_path, sweep=rows[:1])


def test_costs_stand_beside_the_stages_that_had_them(tmp_path):
    page = write(tmp_path, seconds={"prepare_data": 0.4, "train_ar": 7500.0, "sample": None})
    _header, *lines = lines_of(page, "What was run, and what it cost")
    told = {line[0]: line[2:] for line in lines}
    assert list(told) == list(load_stages(ROOT))
    assert told["prepare_data"] == ["0s", "", "", "0recipe000000000"]
    assert told["train_tokenizer"] == ["", "1.25e+16", "", "1recipe000000000"]
    assert told["tokenize"] == ["", "", "2.23 MB", "2recipe000000000"]
    assert told["train_ar"] == ["2h05m", "3.50e+21", "", "3recipe000000000"]
    assert told["sample"] == ["", "", "", "4recipe000000000"]


def test_all_params_are_there_to_be_read_as_they_were(tmp_path):
    page = write(tmp_path, params={"prepare_data.path": "<photos> & 'größer'", "prepare_data.source": "imagefolder"})
    (text,) = re.findall("(?s)<pre>(.*?)</pre>", page)
    values = load_params(tmp_path / "params.yaml").model_dump(by_alias=True)
    assert YAML(typ="safe").load(html.unescape(text)) == json.loads(json.dumps(values))
