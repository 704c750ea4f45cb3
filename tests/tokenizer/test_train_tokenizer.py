"""Oracles: an uninterrupted run, a run in one process, figures computed here from published weights, definitions."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from crt import Tokenizer, interrupt
from crt.data.packed import PackedImages
from crt.data.transforms import to_uint8, to_unit_range
from crt.distributed import World
from crt.errors import LocalError
from crt.flops import tokenizer_training_flops
from crt.history import read_history
from crt.manifest import MANIFEST, read_manifest
from crt.params import load_params
from crt.pictures import reconstruction_grid
from crt.progress import Progress
from crt.schedules import learning_rate_factor
from crt.stages import train_tokenizer
from crt.tokenizer import validation
from crt.tokenizer.state import TrainingState
from crt.tokenizer.validation import collapse_warning
from crt.tokens.statistics import CodebookUse
from tests.conftest import ROOT, dvclive_curve, run_out_of_memory

FILES = ("config.json", "model.safetensors", "train.csv", "validation.csv", "reconstructions.png")
# Every part that carries state or draws random numbers.
EVERYTHING = {
    "quantizer__update": "ema",
    "quantizer__revive_after_steps": 2,
    "discriminator__kind": "patchgan",
    "discriminator__channels": 4,
    "discriminator__layers": 2,
    "discriminator__start_step": 3,
    "discriminator__adaptive_weight": True,
    "regularizer__kind": "larp",
    "loss__entropy_weight": 0.1,
    "loss__entropy_temperature": 0.1,
    "horizontal_flip": True,
    "min_crop": 0.8,
}


def curve(out, name="train") -> dict[str, np.ndarray]:
    rows = read_history(out / f"{name}.csv")
    return {key: np.array([row[key] for row in rows]) for key in rows[0]}


def same_files(a, b) -> bool:
    return all((a / name).read_bytes() == (b / name).read_bytes() for name in FILES)


def test_a_process_that_finds_another_state_than_the_first_one_does_not_train_on(monkeypatch, tmp_path):
    """As on NFS, where a node may not see for a while what another one wrote."""
    second = World(1, 2, torch.device("cpu"))
    monkeypatch.setattr(train_tokenizer, "said_by_main", lambda step, world: 1000)
    train_tokenizer.check_same_step(1000, tmp_path, second)
    with pytest.raises(LocalError, match=r"process 1 .* 0 steps there, the first one that after 1000"):
        train_tokenizer.check_same_step(0, tmp_path, second)


class Died(BaseException):
    """What no one catches."""


def end_in_the_middle(monkeypatch, runs, name, at, **changes):
    """A run that dies without any clearing up after some step."""

    class Dying(Progress):
        def update(self, done, **figures):
            if done == at:
                raise Died

    with monkeypatch.context() as patch:
        patch.setattr(train_tokenizer, "Progress", Dying)
        with pytest.raises(Died):
            runs.train(name, **changes)
    assert not runs.out(name).exists()


def test_result_describes_itself_and_its_figures_are_those_of_the_published_weights(runs):
    out = runs.train("run")
    tokenizer = Tokenizer.load(out)
    images = PackedImages(runs.data, "val")
    pixels = torch.from_numpy(images.pixels(range(len(images))))
    codes = tokenizer.encode(to_unit_range(pixels))
    decoded = tokenizer.decode(codes)
    last = read_history(out / "validation.csv")[-1]
    assert last["step"] == 8
    assert last["mse"] == pytest.approx((decoded - to_unit_range(pixels)).square().mean().item(), rel=1e-5)
    errors = (to_uint8(decoded).double() - pixels.double()).square().mean((1, 2, 3))
    assert last["psnr"] == pytest.approx((10 * torch.log10(255**2 / errors)).mean().item(), rel=1e-5)
    assert last["codebook_usage"] == len(codes.unique()) / 32
    shares = codes.flatten().bincount() / codes.numel()
    entropy = -sum(float(p) * math.log2(p) for p in shares if p)
    assert last["code_entropy"] == pytest.approx(entropy, rel=1e-5)
    assert last["perplexity"] == pytest.approx(2**entropy, rel=1e-5)

    summary = read_manifest(out).summary
    assert summary["parameters"] == sum(parameter.numel() for parameter in tokenizer.parameters())
    assert (summary["val_psnr"], summary["regularizer"]) == (last["psnr"], last["regularizer"])
    assert (summary["grid"], summary["codebook_size"]) == ([4, 4], 32)
    params = load_params(out.with_name("params.yaml")).train_tokenizer
    assert summary["training_flops"] == tokenizer_training_flops(params, with_regularizer=True)
    with Image.open(out / "reconstructions.png") as picture:
        assert picture.size[0] > picture.size[1] > 64
    steps = curve(out)
    assert steps["step"].tolist() == list(range(1, 9))
    assert steps["lambda"].tolist() == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0]
    o = params.optimizer
    factors = [learning_rate_factor(step, 8, o.schedule, o.warmup_steps, o.final_fraction) for step in range(8)]
    np.testing.assert_allclose(steps["learning_rate"], o.learning_rate * np.array(factors), rtol=1e-6)
    expected = steps["pixel"] + steps["codebook"] + 0.25 * steps["commitment"] + steps["lambda"] * steps["regularizer"]
    np.testing.assert_allclose(steps["loss"], expected, rtol=1e-5)
    assert sorted(path.name for path in out.iterdir() if not path.name.startswith("complete-")) == sorted(
        [*FILES, "manifest.json"]
    )


def test_without_lambda_there_is_no_regularizer(runs, params_file):
    out = runs.train("plain", **{"lambda": 0.0})
    columns = set(curve(out)) | set(curve(out, "validation"))
    assert not columns & {"regularizer", "lambda", "regularizer_grad_norm"}
    summary, params = read_manifest(out).summary, load_params(out.with_name("params.yaml")).train_tokenizer
    assert "regularizer" not in summary
    assert summary["training_flops"] == tokenizer_training_flops(params, with_regularizer=False)
    params = load_params(params_file())
    state = TrainingState(params.train_tokenizer, 0.0, 0, torch.device("cpu"))
    assert state.regularizer is None
    assert set(state.optimizers) == {"tokenizer"}
    # Whether there is a regularizer does not change what the tokenizer starts from.
    other = TrainingState(params.train_tokenizer, 1.0, 0, torch.device("cpu"))
    for ours, theirs in zip(state.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_crops_and_mirrors_are_those_of_the_params(runs):
    changes = ({}, {"horizontal_flip": True}, {"min_crop": 0.5})
    losses = [tuple(curve(runs.train(f"run{n}", steps=1, **changed))["pixel"]) for n, changed in enumerate(changes)]
    assert len(set(losses)) == 3


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(runs):
    first = runs.train("a")
    assert same_files(first, runs.train("b"))
    assert not same_files(first, runs.train("c", seed=1))


@pytest.mark.parametrize(
    ("moments", "changes"),
    [
        ((2, 8), {}),  # before the first checkpoint, and after the last
        ((5,), EVERYTHING),
        ((5,), {"architecture__dropout": 0.3, "channels_last": True}),
    ],
    ids=["plain", "everything", "dropout"],
)
def test_a_run_that_died_ends_with_the_same_bytes(runs, monkeypatch, moments, changes):
    whole = runs.train("whole", **changes)
    for at in moments:
        end_in_the_middle(monkeypatch, runs, f"died{at}", at, **changes)
        assert same_files(whole, runs.train(f"died{at}", **changes))


def test_curves_of_a_run_that_died_have_every_step_once(runs, monkeypatch):
    """Oracle: train.csv and validation.csv."""
    end_in_the_middle(monkeypatch, runs, "died", 5, **EVERYTHING)
    out = runs.train("died", **EVERYTHING)
    live = out.with_name(out.name + ".live")
    events = EventAccumulator(str(live), {"scalars": 0, "images": 0}).Reload()
    for name, prefix in (("train", ""), ("validation", "validation/")):
        figures = curve(out, name)
        steps = figures.pop("step").astype(int).tolist()
        for key, values in figures.items():
            expected = dict(zip(steps, values, strict=True))
            assert dvclive_curve(live, prefix + key) == pytest.approx(expected)
            points = events.Scalars(prefix + key)
            assert {point.step: point.value for point in points} == pytest.approx(expected, rel=1e-5)
            assert len(points) == len(steps)
    assert all(speed > 0 for speed in dvclive_curve(live, "images_per_second").values())
    assert [point.step for point in events.Images("reconstructions")][-1] == 8
    last = (live / "reconstructions" / "step_00000008.png").read_bytes()
    assert last == (out / "reconstructions.png").read_bytes()
    assert last != (live / "reconstructions" / "step_00000004.png").read_bytes()


def test_the_picture_shows_images_of_all_classes(runs):
    """Oracle: the same grid of rows chosen here; images lie in the order of their classes."""
    out = runs.train("run")
    images = PackedImages(runs.data, "val")
    rows = np.linspace(0, len(images) - 1, 16).round().astype(int)
    assert len(set(images.labels[rows])) == 10
    originals = images.pixels(rows)
    with torch.no_grad():
        decoded = Tokenizer.load(out)(to_unit_range(torch.from_numpy(originals)))[0]
    expected = np.asarray(reconstruction_grid(originals, to_uint8(decoded).numpy()), np.int16)
    with Image.open(out / "reconstructions.png") as picture:
        assert np.abs(np.asarray(picture, np.int16) - expected).max() <= 1  # one image at a time rounds otherwise


def test_how_often_it_is_saved_may_change_while_a_run_is_stopped(runs, monkeypatch, capfd):
    whole = runs.train("whole")
    end_in_the_middle(monkeypatch, runs, "died", 5)
    capfd.readouterr()
    out = runs.train("died", checkpoint_every=100)
    assert "train_tokenizer: continues at 3 of 8" in capfd.readouterr().err
    assert same_files(whole, out)
    runs.train("died", checkpoint_every=7)
    assert "is current" in capfd.readouterr().err


def test_a_run_that_died_between_its_last_checkpoint_and_its_result(runs, monkeypatch):
    whole = runs.train("whole")
    with monkeypatch.context() as patch:
        patch.setattr(train_tokenizer, "tokenizer_training_flops", lambda *_: 1 / 0)
        runs.train("died", status=1)
    assert same_files(whole, runs.train("died"))


# After steps 4 and 8 there is a validation: a stop does not wait for it, and the continued run makes up for it.
@pytest.mark.parametrize(("asked", "saved"), [(2, 3), (3, 4), (4, 4), (8, 8)])
def test_a_signal_saves_the_step_and_the_run_continues_there(runs, monkeypatch, asked, saved):
    class Signalled(Progress):
        def update(self, done, **figures):
            super().update(done, **figures)
            if done == asked:
                signal.raise_signal(signal.SIGTERM)

    whole = runs.train("whole", checkpoint_every=100)
    with monkeypatch.context() as patch:
        patch.setattr(train_tokenizer, "Progress", Signalled)
        runs.train("stopped", status=128 + signal.SIGTERM, checkpoint_every=100)
    (checkpoint,) = runs.out("stopped").parent.glob(".work/*/checkpoint.pt")
    assert torch.load(checkpoint, weights_only=True)["step"] == saved
    interrupt._received.clear()
    assert same_files(whole, runs.train("stopped", checkpoint_every=100))


def test_an_input_that_is_replaced_leaves_the_checkpoint_of_the_old_one(runs, monkeypatch, capsys):
    manifest = runs.data / MANIFEST
    old = manifest.read_text()

    class Replacing(Progress):
        def update(self, done, **figures):
            super().update(done, **figures)
            if done == 5:
                manifest.write_text(json.dumps(json.loads(old) | {"content": "0" * 64}))

    whole = runs.train("whole", checkpoint_every=2)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(train_tokenizer, "Progress", Replacing)
            runs.train("stopped", status=2, checkpoint_every=2)
    finally:
        manifest.write_text(old)
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"error: {runs.data}: was replaced while train_tokenizer ran, in vain: run the same command again"
    )
    (checkpoint,) = runs.out("stopped").parent.glob(".work/*/checkpoint.pt")
    assert torch.load(checkpoint, weights_only=True)["step"] == 4
    assert same_files(whole, runs.train("stopped", checkpoint_every=2))


def kill_and_continue(runs, name, wait, **changes):
    """Start a training in a process of its own and kill it when `wait` returns; True if it was still running."""
    command = [sys.executable, "-m", "crt", *runs.arguments(name, **changes)]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL) as process:
        wait(process)
        alive = process.poll() is None
        process.send_signal(signal.SIGKILL)
    return alive


def test_kill_nine_between_checkpoints(runs):
    changes = EVERYTHING | {"steps": 400, "checkpoint_every": 2, "validate_every": 4}

    def for_a_checkpoint(process):
        deadline = time.monotonic() + 120
        while not list(runs.folder.glob("killed/.work/*/checkpoint.pt")) and time.monotonic() < deadline:
            time.sleep(0.01)

    assert kill_and_continue(runs, "killed", for_a_checkpoint, **changes)
    (checkpoint,) = runs.folder.glob("killed/.work/*/checkpoint.pt")
    done = torch.load(checkpoint, weights_only=True)["step"]
    # The same training, ended early by both: what a checkpoint holds is what an uninterrupted run reaches.
    whole = reached_after(runs, done, changes)
    killed = torch.load(checkpoint, weights_only=True)
    for part in ("networks", "averaged", "upkeep", "optimizers"):
        assert_same(whole[part], killed[part])


def reached_after(runs, steps, changes):
    """State of an uninterrupted run of the same params after so many steps, without a checkpoint before."""

    class Ending(Progress):
        def update(self, done, **figures):
            if done == steps + 1:
                raise Died

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Died):
        patch.setattr(train_tokenizer, "Progress", Ending)
        runs.train("whole", **changes | {"checkpoint_every": steps})
    (checkpoint,) = runs.folder.glob("whole/.work/*/checkpoint.pt")
    return torch.load(checkpoint, weights_only=True)


def assert_same(ours, theirs):
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert_same(ours[key], theirs[key])
    elif isinstance(ours, (list, tuple)):
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            assert_same(one, other)
    elif isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs)
    else:
        assert ours == theirs


@pytest.mark.slow
def test_twenty_kills_at_random_moments(runs):
    rng = random.Random(0)
    changes = EVERYTHING | {"steps": 60, "checkpoint_every": 3, "validate_every": 7}
    started = time.monotonic()
    command = [sys.executable, "-m", "crt", *runs.arguments("whole", **changes)]
    subprocess.run(command, cwd=ROOT, check=True, stderr=subprocess.DEVNULL)
    duration = time.monotonic() - started
    for trial in range(20):
        killed = kill_and_continue(runs, "killed", lambda _: time.sleep(rng.uniform(0, duration)), **changes)
        command = [sys.executable, "-m", "crt", *runs.arguments("killed", **changes)]
        subprocess.run(command, cwd=ROOT, check=True, stderr=subprocess.DEVNULL)
        assert same_files(runs.out("whole"), runs.out("killed")), (trial, killed)
        runs.forget("killed")


def test_two_processes_train_as_one(runs, tmp_path):
    cases = {
        "l2": {"optimizer__clip_norm": 0.05},
        "everything": EVERYTHING,
        "stylegan": {
            "discriminator__kind": "stylegan", "discriminator__channels": 4, "discriminator__layers": 2,
            "discriminator__start_step": 0, "quantizer__revive_after_steps": 2,
            "regularizer__kind": "cross_entropy", "regularizer__context": "codes",
        },
    }  # fmt: skip
    jobs = [runs.arguments(f"{name}-two", **changes) for name, changes in cases.items()]
    jobs.append(runs.arguments("indivisible", batch_size=9))
    jobs.append(runs.arguments("diverging", optimizer__learning_rate=1e30, optimizer__warmup_steps=0))
    (tmp_path / "jobs").write_text(json.dumps(jobs))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, "-m", "tests.tokenizer.ranks", str(tmp_path / "jobs")],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [json.loads((tmp_path / f"jobs.{rank}").read_text()) for rank in range(2)] == [[0, 0, 0, 2, 2]] * 2
    for message in ("batch_size 9 does not divide among 2 processes", "the run diverged"):
        assert done.stderr.count(message) == 1
    for name, changes in cases.items():
        one, two = runs.train(f"{name}-one", **changes), runs.out(f"{name}-two")
        for file in ("train", "validation"):
            ours, theirs = curve(one, file), curve(two, file)
            assert ours.keys() == theirs.keys()
            for key in ours:
                np.testing.assert_allclose(theirs[key], ours[key], rtol=2e-3, atol=2e-5, err_msg=f"{name} {file} {key}")


def test_a_diverging_run_stops_with_one_line(runs, capsys):
    runs.train("diverging", status=2, optimizer__learning_rate=1e30, optimizer__warmup_steps=0)
    message = capsys.readouterr().err
    assert "the run diverged: lower train_tokenizer.optimizer.learning_rate" in message
    assert "step 2" in message or "step 3" in message
    assert not runs.out("diverging").exists()


def test_too_little_gpu_memory_is_said_in_one_line(runs, monkeypatch, capsys):
    monkeypatch.setattr(train_tokenizer, "_update", run_out_of_memory)
    runs.train("run", status=2)
    errors = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(errors) == 1
    assert "train_tokenizer: out of GPU memory: lower train_tokenizer.batch_size" in errors[0]


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(runs, monkeypatch, capfd):
    end_in_the_middle(monkeypatch, runs, "run", 5, checkpoint_every=2)
    (checkpoint,) = runs.folder.glob("run/.work/*/checkpoint.pt")
    clean, previous = checkpoint.read_bytes(), checkpoint.with_name("checkpoint.previous.pt")
    place = len(clean) // 2
    for damaged in (clean[:1000], clean[:place] + bytes([clean[place] ^ 1]) + clean[place + 1 :]):
        checkpoint.write_bytes(damaged)
        kept = previous.read_bytes()
        previous.write_bytes(damaged)
        capfd.readouterr()
        runs.train("run", status=2, checkpoint_every=2)
        assert f"error: {checkpoint}: damaged, and none before it is whole: delete it" in capfd.readouterr().err
        previous.write_bytes(kept)
    assert torch.load(previous, weights_only=True)["step"] == 2
    continued = runs.train("run", checkpoint_every=2)
    assert "continues at 2 of 8 steps" in capfd.readouterr().err
    assert same_files(runs.train("whole"), continued)


def test_unusable_lpips_weights_stop_before_training(runs, tmp_path, capsys):
    runs.train("run", status=2, loss__lpips_weight=1.0, loss__lpips_weights=str(tmp_path / "absent.pth"))
    error = capsys.readouterr().err
    assert "absent.pth: no weights of LPIPS" in error and "steps/s" not in error
    assert "or set train_tokenizer.loss.lpips_weights to null" in error


@pytest.mark.parametrize(("kind", "context"), [("l2", "latents"), ("l2", "codes"), ("larp", "codes")])
def test_more_lambda_makes_codes_more_predictable(runs, kind, context):
    """Where the targets have a gradient, their error falls when it counts; a few dozen steps suffice to see it."""
    common = {
        "regularizer__kind": kind, "regularizer__context": context, "regularizer__layers": 1,
        "steps": 40, "validate_every": 60, "batch_size": 16,
        "regularizer__anneal_steps": 5, "weight_ema_decay": 0.0, "checkpoint_every": 100,
        "optimizer__learning_rate": 5e-3, "regularizer__learning_rate": 5e-3,
    }  # fmt: skip
    low, high = (curve(runs.train(f"{kind}{value}", **common, **{"lambda": value})) for value in (1e-6, 3.0))
    assert high["regularizer"][-10:].mean() < 0.9 * low["regularizer"][-10:].mean()
    assert high["pixel"][-10:].mean() > low["pixel"][-10:].mean()


def test_bf16_and_channels_last_train_like_float32(runs):
    """Another precision and memory layout change roundings, not the training."""
    plain = curve(runs.train("plain", steps=6))
    for name, changes in (
        ("bf16", {"precision": "bf16", "channels_last": True}),
        ("adversarial", {"precision": "bf16", **{k: v for k, v in EVERYTHING.items() if "discr" in k}}),
    ):
        other = curve(runs.train(name, steps=6, **changes))
        np.testing.assert_allclose(other["pixel"], plain["pixel"], rtol=0.1)


def test_average_weights_follow_their_recurrence(params_file):
    params = load_params(params_file(train_tokenizer__weight_ema_decay=0.5)).train_tokenizer
    state = TrainingState(params, 0.0, 0, torch.device("cpu"))
    codebook, bias = state.model.quantizer.codebook, state.model.encoder.conv_in.bias
    expected = bias.detach().clone()
    for step in range(12):
        with torch.no_grad():
            bias.add_(1.0)
            codebook.add_(1.0)
        state.average_weights(step, torch.tensor([3]))
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * bias.detach()
        torch.testing.assert_close(state.averaged.encoder.conv_in.bias.detach(), expected)
        assert torch.equal(state.averaged.quantizer.codebook[3], codebook[3])
        assert not torch.equal(state.averaged.quantizer.codebook[4], codebook[4])


def test_a_collapsed_codebook_is_told(runs, monkeypatch, capfd):
    def told(used, size, tokens):
        counts = np.zeros(size, np.int64)
        counts[:used] = 1
        counts[0] += tokens - used
        return collapse_warning(CodebookUse(counts))

    # Of a large codebook as many codes can be in use as there are tokens.
    assert not any(told(*facts) for facts in ((52, 1024, 10**6), (820, 16_384, 10**6), (300, 131_072, 5_744)))
    assert "50 of 1024 codes are in use" in told(50, 1024, 10**6)
    assert told(200, 131_072, 5_744)
    monkeypatch.setattr(validation, "_COLLAPSED_SHARE", 2.0)
    runs.train("run")
    lines = [line for line in capfd.readouterr().err.splitlines() if "codebook has collapsed" in line]
    assert len(lines) == 2 and all("of 32 codes" in line and "revive_after_steps" in line for line in lines)
