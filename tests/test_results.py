"""What `python -m crt results` prints of files that it is given. Oracle: the committed metrics of the default run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from crt.__main__ import main
from tests.conftest import ROOT

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


def test_results_that_were_measured_otherwise_are_compared_with_a_warning(tmp_path, capsys):
    same, other = result(tmp_path / "a"), result(tmp_path / "b", features_sha256="0" * 64)
    assert main(["results", str(same), str(same), str(other)]) == 0
    (warning,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("warning"))
    assert str(same) in warning
    assert str(other) in warning


@pytest.mark.parametrize(
    "content",
    [None, "", "[1]", '["features"]', "{}", '{"features": "classifier"}', json.dumps(METRICS | {"psnr": "high"})],
    ids=["none", "empty", "list", "names", "nothing", "another version's", "text for a figure"],
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
