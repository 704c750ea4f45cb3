"""Codes that another program made, through the stages that follow."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from crt.__main__ import main
from tests.ar.conftest import CODEBOOK, draw_codes

Make = Callable[..., list[str]]


def test_a_model_trains_on_them_and_its_samples_are_decoded(
    small_run: Make, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    train = small_run()
    params = train[train.index("--params") + 1]
    codes, labels = draw_codes(60, seed=0)
    for kind, values in (("codes", codes[:, None]), ("labels", labels)):
        (tmp_path / f"peer/imagenet_{kind}").mkdir(parents=True)
        for number, value in enumerate(values):
            np.save(tmp_path / f"peer/imagenet_{kind}/{number}.npy", np.asarray(value)[None].astype(np.int64))
    tokens = str(tmp_path / "imported")
    options = ["--views", "center", "--val-fraction", "0.2", "--codebook-size", str(CODEBOOK)]
    assert main(["import_codes", str(tmp_path / "peer"), "--out", tokens, *options]) == 0
    train[train.index("--tokens") + 1] = tokens
    assert main(train) == 0
    # Which tokenizer made them is not known: no picture of it meanwhile, and the user's word is taken for it later.
    assert "draws no samples" in capsys.readouterr().err
    inputs = ["--tokenizer", str(tmp_path / "tokenizer"), "--ar", str(tmp_path / "ar")]
    assert main(["sample", "--params", params, *inputs, "--out", str(tmp_path / "samples")]) == 0
    assert (tmp_path / "samples/samples.h5").exists()
