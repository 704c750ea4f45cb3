"""The curves of a run that stops and goes on; oracle: the file of a run that never stopped."""

from __future__ import annotations

import pytest

from crt import history
from crt.history import History, read_history, write_rows


def append(curve: History, first: int, last: int) -> None:
    for step in range(first, last + 1):
        curve.append(step, {"loss": 1 / step, "rate": 1e-5 * step})


@pytest.fixture
def whole(tmp_path):
    """The bytes of six steps in one go."""
    append(History(tmp_path / "whole.csv", ["loss", "rate"]), 1, 6)
    return (tmp_path / "whole.csv").read_bytes()


@pytest.mark.parametrize(
    ("torn", "saved"),
    [("", 4), ("6,0.1", 4), ("6,0.1", 5), ("6,0.1", 0), ("6", 5)],
    ids=["whole lines", "half a line", "half a line after the checkpoint", "from the beginning", "a step alone"],
)
def test_a_continued_curve_has_the_bytes_of_one_that_was_never_torn(tmp_path, whole, torn, saved):
    path = tmp_path / "train.csv"
    append(History(path, ["loss", "rate"]), 1, 5)
    with open(path, "a") as file:
        file.write(torn)
    append(History(path, ["loss", "rate"], resume_step=saved), saved + 1, 6)
    assert path.read_bytes() == whole
    assert [row["step"] for row in read_history(path)] == [1, 2, 3, 4, 5, 6]


def test_a_kill_while_kept_rows_are_written_loses_none(tmp_path, monkeypatch):
    path = tmp_path / "train.csv"
    append(History(path, ["loss", "rate"]), 1, 5)
    before = path.read_bytes()

    class Killed(history.csv.DictWriter):
        def writerows(self, rows):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(history.csv, "DictWriter", Killed)
        with pytest.raises(KeyboardInterrupt):
            History(path, ["loss", "rate"], resume_step=4)
    assert path.read_bytes() == before


def test_it_knows_which_steps_it_has(tmp_path):
    curve = History(tmp_path / "validation.csv", ["loss"])
    for step in (5, 10):
        curve.append(step, {"loss": 1.0})
    assert [step for step in range(12) if curve.has(step)] == [5, 10]


def test_rows_are_written_with_their_columns_in_order(tmp_path):
    rows = [{"scale": 1.5, "psnr": 25.0, "fid": 3.25}, {"fid": 3.5, "scale": 2.0, "psnr": 24.0}]
    write_rows(rows, tmp_path / "sweep.csv")
    assert (tmp_path / "sweep.csv").read_text() == "scale,psnr,fid\n1.5,25.0,3.25\n2.0,24.0,3.5\n"
    assert read_history(tmp_path / "sweep.csv") == rows


def test_a_column_that_not_all_rows_have_is_empty_in_the_others(tmp_path):
    write_rows([{"psnr": 25.0}, {"psnr": 24.0, "ssim": 0.5}, {"lpips": 0.25, "psnr": 1.0}], tmp_path / "results.csv")
    assert (tmp_path / "results.csv").read_text() == "psnr,ssim,lpips\n25.0,,\n24.0,0.5,\n1.0,,0.25\n"
