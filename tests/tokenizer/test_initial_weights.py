"""Oracle: weights of another run. Without a step they come out as they went in; training goes on from them."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from crt.history import read_history
from crt.params import load_params
from crt.tokenizer.model import Tokenizer, TokenizerConfig
from tests.conftest import ROOT
from tests.tokenizer.conftest import tiny_config
from tests.tokenizer.test_train_tokenizer import end_in_the_middle, same_files


def test_without_a_step_they_come_out_as_they_went_in(runs):
    first = runs.train("first")
    runs.train("second", seed=1, init_from=str(first), steps=0)
    given, taken = Tokenizer.load(first).state_dict(), Tokenizer.load(runs.out("second")).state_dict()
    assert all(torch.equal(taken[name], given[name]) for name in given)
    # Figures of the validation are those of the run that it comes from.
    before, after = (read_history(runs.out(name) / "validation.csv")[-1] for name in ("first", "second"))
    assert after["step"] == 0 and after["mse"] == before["mse"]
    assert "regularizer" in before and "regularizer" not in after  # it would be one that was never trained
    summary = json.loads((runs.out("second") / "manifest.json").read_text())["summary"]
    assert summary["training_flops"] == 0 and summary["val_psnr"] == before["psnr"]


def test_training_goes_on_from_them(runs):
    first = runs.train("first", steps=20)
    runs.train("second", init_from=str(first), steps=3, optimizer__learning_rate=1e-5, weight_ema_decay=0.0)
    fresh, going_on = (read_history(runs.out(name) / "train.csv")[0]["pixel"] for name in ("first", "second"))
    assert going_on < 0.8 * fresh
    assert runs.content("second") != runs.content("first")


def test_images_may_have_another_size_and_dropout_another_value(runs):
    first = runs.train("first", steps=1)
    runs.train("second", init_from=str(first), steps=0, architecture__dropout=0.5)
    assert Tokenizer.load(runs.out("second")).config.dropout == 0.5


@pytest.mark.parametrize("kind", ["gradient", "ema"])
def test_a_run_that_died_ends_with_the_same_bytes(runs, monkeypatch, kind):
    first = runs.train("first", steps=2)
    changes = {"init_from": str(first), "quantizer__update": kind}
    whole = runs.train("whole", **changes)
    end_in_the_middle(monkeypatch, runs, "died", 5, **changes)
    assert same_files(whole, runs.train("died", **changes))


def test_the_imagenet_preset_describes_llamagens_tokenizer():
    params = load_params(ROOT / "presets/imagenet256.yaml").train_tokenizer
    wanted = TokenizerConfig.from_params(params)
    assert wanted == dataclasses.replace(
        tiny_config(), image_size=256, encoder_channels=128, decoder_channels=128, channel_multipliers=(1, 1, 2, 2, 4),
        encoder_blocks=2, decoder_blocks=3, attention=True, norm_groups=32, z_channels=256, codebook_size=16384,
        codebook_dim=8,
    )  # fmt: skip


def test_another_tokenizer_is_refused(runs, capfd):
    first = runs.train("first", steps=1)
    capfd.readouterr()
    other = {"quantizer__codebook_size": 16, "architecture__channel_multipliers": [1, 2, 2]}
    runs.train("second", status=2, init_from=str(first), **other)
    told = capfd.readouterr().err
    assert (
        f"error: train_tokenizer.init_from: {first} has another architecture.channel_multipliers ([1, 1, 2], in the "
        "params [1, 2, 2]), quantizer.codebook_size (32, in the params 16): set it in the params to what the folder has"
    ) in told
    assert "Traceback" not in told and not runs.out("second").exists()


def test_folders_without_a_tokenizer_are_refused(runs, digits, capfd):
    runs.train("second", status=2, init_from=str(runs.folder / "nowhere"))
    expected = f"error: train_tokenizer.init_from: {runs.folder / 'nowhere'}/config.json: not found"
    assert expected in capfd.readouterr().err
    runs.train("third", status=2, init_from=str(digits))
    assert "holds what prepare_data made, no model" in capfd.readouterr().err


def test_its_own_output_is_refused(runs, capfd):
    first = runs.train("first", steps=1)
    runs.train("first", status=2, steps=2, init_from=str(first))
    assert "is where train_tokenizer puts its result, which would replace it: copy it" in capfd.readouterr().err
    assert Tokenizer.load(first)


def test_no_steps_need_weights(runs, capfd):
    runs.train("first", status=2, steps=0)
    assert "steps is 0, which takes the weights of init_from as they are, and it is null" in capfd.readouterr().err
