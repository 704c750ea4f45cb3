"""The training stage as its command runs it, in this process: numbers, resuming, and what it refuses."""

from __future__ import annotations

import csv
import json
import math
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from crt import interrupt
from crt.__main__ import main
from crt.ar.deepspeed_config import deepspeed_config, micro_batches
from crt.ar.engine import build_optimizer
from crt.ar.generator import Generator
from crt.errors import UserError
from crt.flops import ar_flops_per_image
from crt.history import read_history
from crt.manifest import MANIFEST, read_manifest
from crt.params import load_params
from crt.progress import Progress
from crt.stages import train_ar
from crt.tokens.cache import TokenCache
from tests.ar.conftest import SMALL, small_model
from tests.conftest import ROOT, run_out_of_memory, write_params

# Loss of each of ten steps of the small run (float32, ZeRO 1, dropout on). A refactoring must not move them.
GOLDEN = [3.46574, 3.46194, 3.45545, 3.44529, 3.42700, 3.42682, 3.42045, 3.41394, 3.40127, 3.41141]

Make = Callable[..., list[str]]


def out_of(command: list[str]) -> Path:
    return Path(command[command.index("--out") + 1])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def losses(command: list[str], name: str = "train.csv") -> list[float]:
    return [row["loss"] for row in read_history(out_of(command) / name)]


class At(Progress):
    """A progress bar that does something after a given step."""

    action: tuple[int, Callable[[], None]] | None = None

    def update(self, done: int, **figures: float) -> None:
        super().update(done, **figures)
        if At.action is not None and At.action[0] == done:
            At.action[1]()


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], None]], None]:
    """Do something in the middle of the next run, once."""
    monkeypatch.setattr(train_ar, "Progress", At)
    monkeypatch.setattr(At, "action", None)

    def schedule(step: int, action: Callable[[], None]) -> None:
        def once() -> None:
            At.action = None
            action()

        At.action = (step, once)

    return schedule


def fail() -> None:
    raise RuntimeError("as if killed")


def test_ten_steps_have_their_golden_losses(small_run: Make) -> None:
    command = small_run()
    assert main(command) == 0
    np.testing.assert_allclose(losses(command), GOLDEN, atol=2e-4)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_an_interrupted_run_ends_with_the_same_bytes(
    small_run: Make, tmp_path: Path, at: Any, zero_stage: int, precision: str
) -> None:
    """Oracle: the uninterrupted run. Two micro-batches, dropout on, activations recomputed or not."""
    changes = {
        "train_ar__zero_stage": zero_stage,
        "train_ar__precision": precision,
        "train_ar__micro_batch_size": 8,
        "train_ar__activation_checkpointing": zero_stage % 2 == 1,
    }
    whole, torn = small_run(tmp_path / "whole", **changes), small_run(tmp_path / "torn", **changes)
    assert main(whole) == 0
    at(6, fail)
    assert main(torn) == 1
    assert not out_of(torn).exists()
    assert main(torn) == 0
    assert contents(out_of(torn)) == contents(out_of(whole))
    assert not list((tmp_path / "torn" / ".work").glob("ar-*"))


def test_what_is_kept_and_shown_may_change_while_a_run_is_stopped(
    small_run: Make, tmp_path: Path, at: Any, capfd: pytest.CaptureFixture
) -> None:
    """As when a disk fills up. Oracle: the uninterrupted run."""
    whole, torn = small_run(tmp_path / "whole"), small_run(tmp_path / "torn")
    assert main(whole) == 0
    at(6, fail)
    assert main(torn) == 1
    kept = {"train_ar.keep_checkpoints": 1, "train_ar.checkpoint_every": 100, "train_ar.sample_images": 0}
    write_params(tmp_path / "torn" / "params.yaml", SMALL | kept)
    capfd.readouterr()
    assert main(torn) == 0
    assert "train_ar: continues at" in capfd.readouterr().err
    for name in ("model.safetensors", "train.csv", "validation.csv", "loss_per_position.csv"):
        assert (out_of(torn) / name).read_bytes() == (out_of(whole) / name).read_bytes()


@pytest.mark.parametrize(
    "changes",
    [
        {"train_ar__zero_stage": 0},
        {"train_ar__zero_stage": 2},
        {"train_ar__zero_stage": 3},
        {"train_ar__micro_batch_size": 4},
        {"train_ar__micro_batch_size": 4, "train_ar__zero_stage": 3, "train_ar__activation_checkpointing": True},
        {"train_ar__offload": "optimizer"},
        {"train_ar__offload": "optimizer_and_parameters", "train_ar__zero_stage": 3},
        {"train_ar__precision": "bf16", "train_ar__zero_stage": 0},
        {"train_ar__precision": "bf16", "train_ar__zero_stage": 3},
        {"train_ar__precision": "bf16", "train_ar__zero_stage": 1, "train_ar__micro_batch_size": 8},
    ],
)
def test_how_a_run_is_spread_does_not_change_its_losses(small_run: Make, tmp_path: Path, changes: dict) -> None:
    """Oracle: ZeRO 1 in one micro-batch. Dropout is off, since its draws belong to the micro-batch."""
    plain = small_run(tmp_path / "plain", train_ar__model__dropout=0.0)
    spread = small_run(tmp_path / "spread", train_ar__model__dropout=0.0, **changes)
    assert main(plain) == main(spread) == 0
    tolerance = 1e-3 if changes.get("train_ar__precision") == "bf16" else 2e-6
    np.testing.assert_allclose(losses(spread), losses(plain), atol=tolerance)
    np.testing.assert_allclose(
        [row["grad_norm"] for row in read_history(out_of(spread) / "train.csv")],
        [row["grad_norm"] for row in read_history(out_of(plain) / "train.csv")],
        rtol=2e-2 if changes.get("train_ar__precision") == "bf16" else 1e-4,
    )


def test_validation_is_the_mean_over_the_whole_split(small_run: Make, tmp_path: Path) -> None:
    """Oracle: the exported model, applied to all 27 rows at once (the run's batches of 16 do not divide them)."""
    command = small_run(train_ar__steps=40, train_ar__validate_every=15)
    assert main(command) == 0
    codes = TokenCache(tmp_path / "tokens", "val")
    model = Generator.load(out_of(command)).model
    expected = model(torch.from_numpy(codes.codes(np.arange(27), 0)), torch.from_numpy(codes.labels)).double()
    rows = read_history(out_of(command) / "validation.csv")
    assert [row["step"] for row in rows] == [15, 30, 40]
    assert rows[-1]["loss"] == pytest.approx(expected.mean().item(), abs=1e-6)
    with open(out_of(command) / "loss_per_position.csv", newline="") as file:
        positions = [float(row["loss"]) for row in csv.DictReader(file)]
    np.testing.assert_allclose(positions, expected.mean(0).numpy(), atol=1e-6)
    summary = read_manifest(out_of(command)).summary
    assert summary["val_loss"] == rows[-1]["loss"]
    assert summary["best_val_loss"] == min(row["loss"] for row in rows)
    assert summary["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert summary["tokens_seen"] == 40 * 16 * 16
    assert summary["training_flops"] == 40 * 16 * ar_flops_per_image(model.config)


def test_training_learns_what_the_codes_hold(small_run: Make) -> None:
    """Oracle: four of five codes follow from the one before: the loss must fall far below that of their frequencies."""
    command = small_run(train_ar__steps=300, train_ar__validate_every=100, train_ar__optimizer__learning_rate=5e-3)
    assert main(command) == 0
    assert losses(command, "validation.csv")[-1] < 0.8 * np.log(32)


# After steps 5 and 10 there is a validation: a stop does not wait for it, and the continued run makes up for it.
@pytest.mark.parametrize(("asked", "saved"), [(4, 5), (5, 5), (6, 7), (10, 10)])
def test_a_signal_saves_and_the_run_continues(small_run: Make, tmp_path: Path, at: Any, asked: int, saved: int) -> None:
    whole, stopped = small_run(tmp_path / "whole"), small_run(tmp_path / "stopped")
    assert main(whole) == 0
    at(asked, lambda: os.kill(os.getpid(), signal.SIGTERM))
    try:
        assert main(stopped) == 128 + signal.SIGTERM
    finally:
        interrupt._received.clear()
    (work,) = (tmp_path / "stopped" / ".work").glob("ar-*/checkpoints")
    assert (work / f"step_{saved:08}" / "complete.json").exists()
    assert main(stopped) == 0
    assert contents(out_of(stopped)) == contents(out_of(whole))


@pytest.mark.parametrize(("seconds", "steps"), [(1e-4, 20), (0.25, 20), (1.0, 5), (4.0, 1), (60.0, 1), (math.inf, 1)])
def test_a_gpu_of_long_steps_is_looked_at_more_often(seconds: float, steps: int) -> None:
    """A request to stop is heard in five seconds, or after a step."""
    assert train_ar.steps_to_look_after(seconds) == steps


def test_losses_are_looked_at_together_and_each_is_kept(small_run: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU. Oracle: the run that looks at each step."""
    looked = []

    class Seldom(train_ar._Log):
        @property
        def is_time_to_look(self) -> bool:
            self.look_steps = 3
            return super().is_time_to_look

        def flush(self) -> None:
            looked.append([step for step, *_ in self.pending])
            super().flush()

    monkeypatch.setattr(train_ar, "_Log", Seldom)
    command = small_run()
    assert main(command) == 0
    np.testing.assert_allclose(losses(command), GOLDEN, atol=2e-4)
    # Validations after steps 5 and 10, checkpoints after 4 and 8.
    assert looked == [[1, 2, 3], [4], [5], [6, 7, 8], [9, 10]]


@pytest.mark.parametrize("damage", ["unfinished", "truncated", "file_missing", "a_byte", "first_bytes"])
def test_a_torn_checkpoint_is_ignored(small_run: Make, tmp_path: Path, at: Any, damage: str) -> None:
    whole, torn = small_run(tmp_path / "whole"), small_run(tmp_path / "torn")
    assert main(whole) == 0
    at(9, fail)
    assert main(torn) == 1
    (work,) = (tmp_path / "torn" / ".work").glob("ar-*/checkpoints")
    assert sorted(path.name for path in work.iterdir()) == ["step_00000004", "step_00000008"]
    newest = work / "step_00000008"
    if damage == "unfinished":
        (newest / "complete.json").unlink()
        newest.rename(newest.with_suffix(".partial"))
    else:
        victim = max(newest.rglob("*.pt"), key=lambda path: path.stat().st_size)
        data = bytearray(victim.read_bytes())
        data[0 if damage == "first_bytes" else len(data) // 2] ^= 1
        changed = {"truncated": data[:-1], "a_byte": data, "first_bytes": data}
        victim.write_bytes(changed[damage]) if damage in changed else victim.unlink()
    seen = []
    at(5, lambda: seen.append("step 5 anew"))
    assert main(torn) == 0
    assert seen
    assert contents(out_of(torn)) == contents(out_of(whole))


def test_an_input_that_is_replaced_leaves_the_checkpoints_of_the_old_one(
    small_run: Make, tmp_path: Path, at: Any, capsys: pytest.CaptureFixture
) -> None:
    whole, stopped = small_run(tmp_path / "whole"), small_run(tmp_path / "stopped")
    assert main(whole) == 0
    manifest = tmp_path / "stopped/tokens" / MANIFEST
    old = manifest.read_text()
    at(6, lambda: manifest.write_text(json.dumps(json.loads(old) | {"content": "0" * 64})))
    assert main(stopped) == 2
    assert "tokens: was replaced while train_ar ran, in vain: run the same command again" in last_line(capsys)
    assert not out_of(stopped).exists()
    (work,) = (tmp_path / "stopped" / ".work").glob("ar-*/checkpoints")
    assert [path.name for path in work.iterdir()] == ["step_00000004"]
    manifest.write_text(old)
    assert main(stopped) == 0
    assert contents(out_of(stopped)) == contents(out_of(whole))


def test_only_the_newest_checkpoints_are_kept(small_run: Make, tmp_path: Path, at: Any) -> None:
    at(9, fail)
    assert main(small_run(train_ar__checkpoint_every=1, train_ar__keep_checkpoints=3)) == 1
    (work,) = (tmp_path / ".work").glob("ar-*/checkpoints")
    assert sorted(path.name for path in work.iterdir()) == [f"step_0000000{step}" for step in (6, 7, 8)]


@pytest.mark.parametrize("change", [('"width": 32', '"width": 64'), ('"zero_stage": 1', '"zero_stage": 2')])
def test_a_checkpoint_of_another_model_is_refused(
    small_run: Make, tmp_path: Path, at: Any, capsys: pytest.CaptureFixture, change: tuple[str, str]
) -> None:
    command = small_run()
    at(6, fail)
    assert main(command) == 1
    (work,) = (tmp_path / ".work").glob("ar-*/checkpoints")
    mark = work / "step_00000004" / "complete.json"
    assert change[0] in mark.read_text()
    mark.write_text(mark.read_text().replace(*change))
    capsys.readouterr()
    assert main(command) == 2
    assert "checkpoint of another model" in last_line(capsys)


def last_line(capsys: pytest.CaptureFixture) -> str:
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith(("error", "internal"))]
    assert len(lines) == 1, lines
    return lines[0]


def test_a_diverging_run_stops_with_one_line(small_run: Make, capsys: pytest.CaptureFixture) -> None:
    assert main(small_run(train_ar__optimizer__learning_rate=1e30, train_ar__optimizer__warmup_steps=0)) == 2
    message = last_line(capsys)
    assert "step 2" in message
    assert "learning_rate" in message


def test_too_little_gpu_memory_is_said_in_one_line(
    small_run: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(train_ar, "_update", run_out_of_memory)
    assert main(small_run()) == 2
    assert "train_ar: out of GPU memory: lower train_ar.micro_batch_size, turn on" in last_line(capsys)


def test_a_cache_without_validation_is_refused(small_run: Make, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    command = small_run()
    manifest = tmp_path / "tokens" / "manifest.json"
    text = manifest.read_text()
    (tmp_path / "tokens" / "val.h5").unlink()
    assert main(command) == 2
    assert "val.h5" in last_line(capsys)
    assert manifest.read_text() == text


def test_codes_of_another_codebook_are_refused(small_run: Make, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    command = small_run()
    other = small_run(tmp_path / "other", train_tokenizer__quantizer__codebook_size=64)
    command[command.index("--tokens") + 1] = other[other.index("--tokens") + 1]
    assert main(command) == 2
    assert "codebook_size = 64" in last_line(capsys)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_ar__model__heads": 3}, "width 32 is not divisible by heads 3"),
        ({"train_ar__model__heads": 16}, "not a multiple of 4"),
        ({"train_ar__micro_batch_size": 5}, "micro_batch_size 5 does not divide batch_size 16"),
        ({"train_ar__offload": "optimizer", "train_ar__zero_stage": 0}, "needs zero_stage"),
        ({"train_ar__compile": True, "train_ar__zero_stage": 3}, "compile needs zero_stage"),
    ],
)
def test_impossible_params_are_refused(
    small_run: Make, capsys: pytest.CaptureFixture, tmp_path: Path, changes: dict, message: str
) -> None:
    good = small_run()
    bad_file = tmp_path / "bad.yaml"
    write_params(bad_file, {k.replace("__", "."): v for k, v in changes.items()}, base=tmp_path / "params.yaml")
    good[good.index("--params") + 1] = str(bad_file)
    assert main(good) == 2
    assert message in last_line(capsys)


def test_a_batch_must_divide_among_processes() -> None:
    params = load_params(ROOT / "params.yaml").train_ar.model_copy(update={"batch_size": 12})
    assert micro_batches(params, 4) == (3, 1)
    assert micro_batches(params.model_copy(update={"micro_batch_size": 2}), 3) == (2, 2)
    for micro, world in ((None, 5), (None, 24), (4, 2)):
        with pytest.raises(UserError, match="batch_size 12 does not divide among"):
            micro_batches(params.model_copy(update={"micro_batch_size": micro}), world)


def test_buffers_fit_the_model() -> None:
    params = load_params(ROOT / "params.yaml").train_ar
    for stage in (1, 2, 3):
        zero = deepspeed_config(params.model_copy(update={"zero_stage": stage}), 1, 10_000, "cpu")["zero_optimization"]
        assert zero["reduce_bucket_size"] == zero["allgather_bucket_size"] == 10_000
    zero = deepspeed_config(params, 8, 3 * 10**9, "cuda")["zero_optimization"]
    assert zero["reduce_bucket_size"] < 10**8


def test_norms_are_not_decayed() -> None:
    params = load_params(ROOT / "params.yaml").train_ar.optimizer
    model = small_model().requires_grad_(True)
    decayed, free = build_optimizer(model, params, "none", torch.device("cpu")).param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert all("norm" in names[id(parameter)] for parameter in free["params"])
    assert not any("norm" in names[id(parameter)] for parameter in decayed["params"])
    assert len(free["params"]) + len(decayed["params"]) == len(names)
    assert (decayed["weight_decay"], free["weight_decay"]) == (params.weight_decay, 0.0)


def test_labels_are_dropped_at_their_rate_and_differently_each_step() -> None:
    drops = torch.stack([train_ar._dropped_labels(0, step, 256, 0.1) for step in range(200)])
    assert drops.float().mean().item() == pytest.approx(0.1, abs=0.005)
    assert len({tuple(row) for row in drops.tolist()}) == 200
    assert torch.equal(train_ar._dropped_labels(0, 7, 256, 0.1), drops[7])
    assert not train_ar._dropped_labels(0, 7, 256, 0.0).any()


def test_a_finished_output_is_left_alone(small_run: Make) -> None:
    command = small_run()
    assert main(command) == 0
    before = out_of(command).stat().st_mtime_ns
    assert main(command) == 0
    assert out_of(command).stat().st_mtime_ns == before
    shutil.rmtree(out_of(command))
