"""What `python -m crt results` prints of files that it is given. Oracle: the committed metrics of the default run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from crt.__main__ import main
from tests.conftest import ROOT, in_ascii_locale

METRICS = json.loads((ROOT / "metrics.json").read_text(encoding="utf-8"))


def result(folder: Path, **changes: Any) -> Path:
    """An evaluation's folder; a change to None takes a figure away."""
    folder.mkdir()
    metrics = {name: value for name, value in (METRICS | changes).items() if value is not None}
    (folder / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")
    return folder


def test_one_result_is_told_in_words(tmp_path, capsys):
    assert main(["results", str(result(tmp_path / "a", warnings="few images; small classifier"))]) == 0
    lines = capsys.readouterr().out.splitlines()
    (psnr,) = (line.split(maxsplit=2) for line in lines if line.split()[:1] == ["psnr"])
    assert psnr == ["psnr", f"{METRICS['psnr']:.4g}", "dB, reconstructions, higher is better"]
    assert [line.split(maxsplit=1)[1] for line in lines if "warning" in line] == ["few images", "small classifier"]
    assert any(line.split()[:2] == ["measured", "by"] for line in lines)


def test_signs_that_the_locale_lacks_are_printed_as_escapes(tmp_path):
    printed = in_ascii_locale("-m", "crt", "results", str(result(tmp_path / "a", warnings="class ä is rare")))
    assert "class \\xe4 is rare" in printed


def test_notes_are_wrapped_beside_their_names(tmp_path, capsys):
    """And without a warning there is no note of one."""
    assert main(["results", str(result(tmp_path / "a"))]) == 0
    lines = capsys.readouterr().out.splitlines()
    (first,) = (index for index, line in enumerate(lines) if line.startswith("  measured by "))
    column = lines[first].index(str(METRICS["generation_images"]))
    assert lines[first + 1] == " " * column + lines[first + 1].lstrip() and lines[first + 1].strip()
    assert not any("warning" in line for line in lines)


def test_several_results_stand_side_by_side(tmp_path, capsys):
    first, second = result(tmp_path / "a"), result(tmp_path / "another", psnr=31.25, recall=None)
    assert main(["results", str(first), str(second / "metrics.json")]) == 0
    captured = capsys.readouterr().out
    lines = {line.split()[0]: line for line in captured.splitlines() if line}
    assert lines["psnr"].split() == ["psnr", f"{METRICS['psnr']:.4g}", "31.25"]
    assert lines["recall"].split() == ["recall", f"{METRICS['recall']:.4g}", "-"]
    # Each value ends where the name of its file does.
    heading = lines[str(first)]
    assert len(lines["psnr"]) == len(heading)
    assert lines["psnr"].index(f"{METRICS['psnr']:.4g}") + 5 == heading.index(str(first)) + len(str(first))
    assert "warning" not in captured


def test_columns_of_short_names_are_as_wide_as_figures(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result(tmp_path / "a", lpips=None)
    result(tmp_path / "b", lpips=0.25, psnr=-1.234e-05)
    assert main(["results", "a", "b"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line}
    assert len({len(lines[name]) for name in ("a", "psnr", "recall")}) == 1
    # What only one of them has is told, wherever it stands.
    assert lines["lpips"].split() == ["lpips", "-", "0.25"]


def test_agreement_with_the_only_class_is_not_told(tmp_path, capsys):
    one = result(tmp_path / "one", classifier_task="quarter turns")
    several = result(tmp_path / "several", classifier_task="classes")
    assert main(["results", str(one)]) == main(["results", str(one), str(one)]) == 0
    assert "class_agreement" not in capsys.readouterr().out
    assert main(["results", str(one), str(several)]) == 0
    (line,) = (line.split() for line in capsys.readouterr().out.splitlines() if "class_agreement" in line)
    assert line == ["class_agreement", "-", f"{METRICS['class_agreement']:.4g}"]


def test_results_that_were_measured_otherwise_are_compared_with_a_warning(tmp_path, capsys):
    same, other = result(tmp_path / "a"), result(tmp_path / "b", generation_images=50)
    assert main(["results", str(same), str(same), str(other)]) == 0
    (warning,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("warning"))
    # Names and values in the same order.
    assert warning == (
        f"warning: {same} and {other} were measured differently (number of samples: {METRICS['generation_images']}, "
        "50): their figures do not compare"
    )


@pytest.mark.parametrize(
    "content",
    [
        None,
        "",
        "[1]",
        '["features"]',
        "{}",
        '{"features": "classifier"}',
        json.dumps(METRICS | {"psnr": "high"}),
        "[" * 100_000,
    ],
    ids=["none", "empty", "list", "names", "nothing", "another version's", "text for a figure", "deep"],
)
@pytest.mark.parametrize("alone", [True, False])
def test_what_is_no_result_is_one_line(tmp_path, capsys, content, alone):
    file = tmp_path / "metrics.json"
    if content is not None:
        file.write_text(content, encoding="utf-8")
    others = [] if alone else [str(result(tmp_path / "a"))]
    assert main(["results", *others, str(file)]) == 2
    assert capsys.readouterr().err == (
        f"error: {file}: missing, or no metrics of an evaluation by this version: give its output folder or "
        "metrics.json\n"
    )


def test_a_folder_without_metrics_is_told_with_the_file_that_lacks(tmp_path, capsys):
    assert main(["results", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}/metrics.json: missing, or no metrics")
