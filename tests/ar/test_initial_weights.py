"""Oracle: weights of another model. Without a step they come out as they went in; training goes on from them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from crt.__main__ import main
from crt.ar.engine import deepspeed_engine, deepspeed_session, gather_weights
from crt.ar.generator import Generator
from crt.ar.model import save_model
from crt.distributed import join_world
from crt.history import read_history
from crt.manifest import read_manifest
from crt.params import load_params
from tests.ar.conftest import CODEBOOK, small_model
from tests.conftest import ROOT

Make = Callable[..., list[str]]


@pytest.fixture
def given(tmp_path: Path) -> Callable[..., Path]:
    """Write a model of `small_model`, which was not trained."""

    def write(name: str = "given", **changes: Any) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        model = small_model(**changes)
        save_model(model.state_dict(), model.config, folder)
        return folder

    return write


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return Generator.load(folder).model.state_dict()


def out_of(command: list[str]) -> Path:
    return Path(command[command.index("--out") + 1])


@pytest.mark.parametrize(("zero_stage", "precision"), [(1, "float32"), (2, "bf16"), (3, "bf16")])
def test_without_a_step_they_come_out_as_they_went_in(
    small_run: Make, given: Any, zero_stage: int, precision: str
) -> None:
    folder = given(scale=2.0)
    command = small_run(
        train_ar__init_from=str(folder),
        train_ar__steps=0,
        train_ar__zero_stage=zero_stage,
        train_ar__precision=precision,
    )
    assert main(command) == 0
    before, after = weights(folder), weights(out_of(command))
    assert all(torch.equal(after[name], before[name]) for name in before)
    (row,) = read_history(out_of(command) / "validation.csv")
    assert row["step"] == 0
    summary = read_manifest(out_of(command)).summary
    assert summary["val_loss"] == row["loss"] > 3.6  # more than ln 32, of random guesses: the model is confident
    assert summary["training_flops"] == 0


@pytest.mark.parametrize("micro_batch", [4, 2])
@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_training_in_bfloat16_begins_with_all_of_their_bits(zero_stage: int, micro_batch: int) -> None:
    given = small_model(dropout=0.0)
    changes = {"zero_stage": zero_stage, "precision": "bf16", "batch_size": 4, "micro_batch_size": micro_batch}
    params = load_params(ROOT / "params.yaml").train_ar.model_copy(update=changes)
    with (
        join_world() as world,
        deepspeed_session(world),
        deepspeed_engine(params, given.config, 0, world, initial=given.state_dict()) as engine,
    ):
        begun = gather_weights(engine, world)
    for name, weight in given.state_dict().items():
        assert torch.equal(begun[name], weight), name


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_training_goes_on_from_them(small_run: Make, given: Any, zero_stage: int, tmp_path: Path) -> None:
    assert main(small_run(tmp_path / "first", train_ar__steps=40)) == 0
    command = small_run(
        tmp_path / "second",
        train_ar__init_from=str(tmp_path / "first/ar"),
        train_ar__steps=1,
        train_ar__zero_stage=zero_stage,
        train_ar__optimizer__learning_rate=1e-6,
    )
    assert main(command) == 0
    first, second = (read_history(tmp_path / name / "ar/validation.csv")[-1]["loss"] for name in ("first", "second"))
    assert second == pytest.approx(first, abs=1e-3) and first < 3.4


def test_other_classes_begin_anew_and_need_steps(
    small_run: Make, given: Any, capfd: pytest.CaptureFixture, tmp_path: Path
) -> None:
    folder = given(num_classes=7, class_names=tuple("abcdefg"))
    command = small_run(tmp_path / "a", train_ar__init_from=str(folder), train_ar__steps=1)
    assert main(command) == 0
    assert "draws other classes than the images have: their embeddings begin anew" in capfd.readouterr().err
    before, after = weights(folder), weights(out_of(command))
    torch.testing.assert_close(after["code_embedding.weight"], before["code_embedding.weight"], atol=5e-3, rtol=0)
    assert after["class_embedding.weight"].shape[0] == 6 and after["class_embedding.weight"].std() < 0.03
    assert main(small_run(tmp_path / "b", train_ar__init_from=str(folder), train_ar__steps=0)) == 2
    assert "draws other classes than the images have, which steps 0 leaves untrained" in capfd.readouterr().err
    # As many, but called otherwise, are others too; those of imported models have no names.
    renamed, nameless = given("renamed", class_names=tuple("vwxyz")), given("nameless", class_names=None)
    assert main(small_run(tmp_path / "c", train_ar__init_from=str(renamed), train_ar__steps=0)) == 2
    assert main(small_run(tmp_path / "d", train_ar__init_from=str(nameless), train_ar__steps=0)) == 0


def test_another_model_is_refused(small_run: Make, given: Any, capfd: pytest.CaptureFixture, tmp_path: Path) -> None:
    def refused(**changes: Any) -> str:
        capfd.readouterr()
        assert main(small_run(**{"train_ar__init_from": str(folder)} | changes)) == 2
        told = capfd.readouterr().err
        assert "Traceback" not in told
        return told

    folder = given()
    told = refused(train_ar__model__layers=3, train_ar__model__ffn_multiple=64)
    assert (
        f"error: train_ar.init_from: {folder} has another model.layers (2, in the params 3), width of the FFN" in told
    )
    folder = given("other_codes", codebook_size=2 * CODEBOOK)
    assert f"draws codes of {2 * CODEBOOK}, the tokenizer has {CODEBOOK}: use the tokenizer that it was" in refused()
    folder = tmp_path / "nowhere"
    assert f"error: train_ar.init_from: {folder}/config.json: not found" in refused()
    folder = tmp_path / "tokens"
    assert "holds what tokenize made, no model" in refused()


def test_codes_of_another_tokenizer_are_warned_of(small_run: Make, given: Any, capfd: pytest.CaptureFixture) -> None:
    folder = given(tokenizer_content="0" * 64)
    assert main(small_run(train_ar__init_from=str(folder), train_ar__steps=1)) == 0
    assert "was trained on the codes of another tokenizer, which mean something else" in capfd.readouterr().err


def test_its_own_output_is_refused(small_run: Make, capfd: pytest.CaptureFixture, tmp_path: Path) -> None:
    assert main(small_run(train_ar__steps=1)) == 0
    assert main(small_run(tmp_path, train_ar__init_from=str(tmp_path / "ar"))) == 2
    assert "is where train_ar puts its result, which would replace it: copy it" in capfd.readouterr().err


def test_check_says_beforehand_whether_they_fit(small_run: Make, given: Any, capfd: pytest.CaptureFixture) -> None:
    def check(**changes: Any) -> tuple[int, str]:
        params = small_run(**changes)[2]
        capfd.readouterr()
        return main(["check", "--params", params]), capfd.readouterr().err

    folder = given()
    assert check(train_ar__init_from=str(folder)) == (0, "")
    status, told = check(train_ar__init_from=str(folder), train_ar__model__heads=4)
    assert status == 2 and "has another model.heads (2, in the params 4)" in told
    status, told = check(train_tokenizer__init_from=str(folder))
    assert status == 2 and f"{folder}: holds a transformer of stage 2, for crt.Generator.load" in told
