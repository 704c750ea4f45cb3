"""What is there to watch: curves that a continued run continues, pictures that disturb nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from crt.__main__ import main
from crt.history import read_history
from tests.ar.test_processes import fail_alone
from tests.conftest import dvclive_curve

Make = Callable[..., list[str]]


@pytest.mark.parametrize("zero_stage", [1, 3])
def test_curves_and_pictures_of_a_torn_run(
    small_run: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zero_stage: int
) -> None:
    """Oracle: train.csv and validation.csv; and a run without pictures, which must end with the same weights."""
    command = small_run(train_ar__zero_stage=zero_stage)
    fail_alone(monkeypatch, command, at=6)
    # As a kill leaves files that are being written.
    dvclive = tmp_path / "ar.live/dvclive"
    (dvclive / "metrics.json").write_text('{"loss": 3.4')
    (dvclive / "plots/metrics/mfu.tsv").write_text("")
    with open(dvclive / "plots/metrics/loss.tsv", "a", encoding="utf-8") as file:
        file.write("1")
    assert main(command) == 0
    losses = {int(row["step"]): row["loss"] for row in read_history(tmp_path / "ar" / "train.csv")}
    val = {int(row["step"]): row["loss"] for row in read_history(tmp_path / "ar" / "validation.csv")}
    assert dvclive_curve(tmp_path / "ar.live", "loss") == pytest.approx(losses)
    assert dvclive_curve(tmp_path / "ar.live", "validation/loss") == pytest.approx(val)
    assert set(dvclive_curve(tmp_path / "ar.live", "grad_norm")) == set(losses)
    assert set(dvclive_curve(tmp_path / "ar.live", "mfu")) == {step for step in losses if step > 4}
    events = EventAccumulator(str(tmp_path / "ar.live"), {"scalars": 0, "images": 0}).Reload()
    assert {point.step: point.value for point in events.Scalars("loss")} == pytest.approx(losses, rel=1e-5)
    assert [point.step for point in events.Images("samples")][-1] == 10
    assert len(events.Scalars("loss_per_position/step_00000010")) == 16
    for step in (5, 10):
        with Image.open(tmp_path / "ar.live/samples" / f"step_{step:08d}.png") as image:
            assert np.asarray(image).std() > 0
    plain = small_run(tmp_path / "plain", train_ar__zero_stage=zero_stage, train_ar__sample_images=0)
    assert main(plain) == 0
    assert not (tmp_path / "plain/ar.live/samples").exists()
    weights = "ar/model.safetensors"
    assert (tmp_path / weights).read_bytes() == (tmp_path / "plain" / weights).read_bytes()


@pytest.mark.parametrize("state", ["elsewhere", "without its stamp", "without its weights"])
def test_no_tokenizer_no_pictures(small_run: Make, tmp_path: Path, capsys: pytest.CaptureFixture, state: str) -> None:
    """A tokenizer that is being made anew, perhaps with other params, has no stamp."""
    command = small_run()
    tokenizer = tmp_path / "tokenizer"
    if state == "elsewhere":
        tokenizer.rename(tmp_path / "elsewhere")
    else:
        next(tokenizer.glob("complete-*" if "stamp" in state else "model.safetensors")).unlink()
    assert main(command) == 0
    assert "draws no samples" in capsys.readouterr().err
    assert not (tmp_path / "ar.live/samples").exists()
