"""Which checkpoints there are after a kill at any moment. Oracles: the steps that were saved, the engine that saved."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from crt import interrupt
from crt.ar.checkpoints import SCHEMA, Checkpoints, _separate_groups
from crt.ar.engine import deepspeed_engine, deepspeed_session, gather_weights, set_learning_rate
from crt.distributed import World, join_world
from crt.errors import UserError
from crt.params import load_params
from crt.progress import start_logging
from tests.ar.conftest import small_config
from tests.conftest import ROOT

OWNER = {"width": 32, "grid": (4, 4)}


@pytest.fixture(scope="module")
def running() -> Iterator[tuple[Any, World]]:
    """A real engine, alone."""
    changes = {"zero_stage": 1, "precision": "float32", "batch_size": 4, "micro_batch_size": None}
    params = load_params(ROOT / "params.yaml").train_ar.model_copy(update=changes)
    config = small_config(dropout=0.0)
    with join_world() as world, deepspeed_session(world), deepspeed_engine(params, config, 0, world) as engine:
        yield engine, world


def of(folder: Path, world: World, keep: int = 2, **changes: Any) -> Checkpoints:
    return Checkpoints(**{"folder": folder, "world": world, "zero_stage": 1, "owner": OWNER, "keep": keep} | changes)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def train(engine: Any) -> None:
    codes = torch.arange(4 * 16).view(4, 16) % 32
    set_learning_rate(engine, 1e-2)
    engine.backward(engine(codes, torch.arange(4)).mean())
    engine.step()


@pytest.mark.parametrize(("keep", "left"), [(1, [12]), (2, [10, 12]), (3, [9, 10, 12]), (9, [4, 9, 10, 12])])
def test_the_newest_is_found_and_so_many_are_kept(running: Any, tmp_path: Path, keep: int, left: list[int]) -> None:
    engine, world = running
    checkpoints = of(tmp_path, world, keep)
    assert checkpoints.latest() is None
    for step in (4, 9, 10, 12):
        checkpoints.save(engine, step)
        latest = checkpoints.latest()
        assert latest is not None and (latest.step, latest.world_size, latest.zero_stage) == (step, 1, 1)
    assert names(tmp_path) == [f"step_{step:08}" for step in left]


def test_what_was_saved_is_restored(running: Any, tmp_path: Path) -> None:
    """Weights and Adam's moments: the next step ends with the same bits."""
    engine, world = running
    checkpoints = of(tmp_path, world)
    train(engine)
    checkpoints.save(engine, 1)
    train(engine)
    expected = gather_weights(engine, world)
    train(engine)
    checkpoint = checkpoints.latest()
    assert checkpoint is not None
    checkpoints.restore(engine, checkpoint)
    train(engine)
    again = gather_weights(engine, world)
    assert all(torch.equal(again[name], weight) for name, weight in expected.items())


@pytest.mark.parametrize("damage", ["shorter", "longer", "missing", "without its mark", "zeros", "a byte"])
def test_a_damaged_one_is_passed_over_and_saved_anew(running: Any, tmp_path: Path, damage: str) -> None:
    engine, world = running
    checkpoints = of(tmp_path, world, keep=3)
    for step in (4, 8):
        checkpoints.save(engine, step)
    newest = tmp_path / "step_00000008"
    victim = max(newest.rglob("*.pt"), key=lambda path: path.stat().st_size)
    match damage:
        case "shorter":
            os.truncate(victim, victim.stat().st_size - 1)
        case "longer":
            os.truncate(victim, victim.stat().st_size + 1)
        case "missing":
            victim.unlink()
        case "without its mark":
            (newest / "complete.json").unlink()
        case "zeros":
            victim.write_bytes(bytes(victim.stat().st_size))
        case "a byte":
            content = bytearray(victim.read_bytes())
            content[len(content) // 2] ^= 1
            victim.write_bytes(content)
    (newest / "of the damaged one").touch()
    found = checkpoints.latest()
    assert found is not None and found.step == 4
    of(tmp_path, world, keep=1).save(engine, 6)  # what is damaged is not the one that is kept
    found = checkpoints.latest()
    assert found is not None and found.step == 6
    checkpoints.save(engine, 8)
    found = checkpoints.latest()
    assert found is not None and found.step == 8
    assert "of the damaged one" not in names(newest)


def test_what_kills_leave_is_no_checkpoint_and_in_nobodys_way(running: Any, tmp_path: Path) -> None:
    """Killed before the rename of a finished one, and while an older one was deleted: the next one frees its space."""
    engine, world = running
    checkpoints = of(tmp_path, world, keep=1)
    checkpoints.save(engine, 4)
    for name in ("step_00000004.old", "step_00000002.old", "step_00000008.partial", "step_00000007.partial"):
        shutil.copytree(tmp_path / "step_00000004", tmp_path / name)
    (tmp_path / "step_00000008.partial" / "of the killed run").touch()
    found = checkpoints.latest()
    assert found is not None and (found.step, found.folder.name) == (4, "step_00000004")
    checkpoints.save(engine, 8)
    assert names(tmp_path) == ["step_00000008"]
    assert "of the killed run" not in names(tmp_path / "step_00000008")


def test_every_file_is_on_the_disk_before_the_checkpoint_has_its_name(
    running: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or a node that goes down leaves a complete checkpoint of empty files. Oracle: what the system was asked."""
    engine, world = running
    flushed: set[str] = set()
    fsync, rename = os.fsync, os.replace

    def note(descriptor: int) -> None:
        flushed.add(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def look(source: Path, target: Path) -> None:
        if Path(source).is_dir():
            files = {str(path) for path in Path(source).rglob("*") if path.is_file()}
            assert files <= {path.removesuffix(".tmp") for path in flushed} and len(files) > 2
        rename(source, target)

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(os, "replace", look)
    train(engine)
    of(tmp_path, world).save(engine, 4)
    assert names(tmp_path) == ["step_00000004"]
    # Nor is what a regrouping makes of it.
    checkpoints = of(tmp_path, World(0, 1, world.device))
    checkpoint = checkpoints.latest()
    assert checkpoint is not None
    checkpoints.convert(checkpoint)
    assert len(list((checkpoint.folder / "universal").rglob("*.pt"))) > 2


@pytest.mark.parametrize("schema", [SCHEMA - 1, SCHEMA + 1])
def test_that_of_another_version_is_refused(running: Any, tmp_path: Path, schema: int) -> None:
    engine, world = running
    checkpoints = of(tmp_path, world)
    checkpoints.save(engine, 4)
    mark = tmp_path / "step_00000004/complete.json"
    mark.write_text(json.dumps(json.loads(mark.read_text()) | {"schema": schema}))
    with pytest.raises(UserError, match=f"another version of this program: delete {tmp_path}$"):
        checkpoints.latest()


@pytest.mark.parametrize("changes", [{"owner": OWNER | {"width": 64}}, {"zero_stage": 2}])
def test_that_of_another_model_is_refused(running: Any, tmp_path: Path, changes: dict[str, Any]) -> None:
    engine, world = running
    of(tmp_path, world).save(engine, 4)
    with pytest.raises(UserError, match=f"another model or ZeRO stage: delete {tmp_path}$"):
        of(tmp_path, world, **changes).latest()


def test_one_that_is_not_what_its_mark_says_is_named(running: Any, tmp_path: Path) -> None:
    engine, world = running
    checkpoints = of(tmp_path, world)
    checkpoints.save(engine, 4)
    checkpoint = checkpoints.latest()
    assert checkpoint is not None
    with pytest.raises(UserError, match=f"^{checkpoint.folder}: cannot be loaded: delete it, the run continues at an"):
        checkpoints.restore(engine, replace(checkpoint, step=3))


@pytest.mark.parametrize(
    ("then", "now", "zero_stage", "needed"),
    [(1, 1, 1, False), (2, 2, 3, False), (2, 1, 1, True), (1, 2, 2, True), (4, 2, 3, True), (2, 1, 0, False)],
)
def test_state_is_regrouped_where_it_was_split_otherwise(
    running: Any, tmp_path: Path, then: int, now: int, zero_stage: int, needed: bool
) -> None:
    """ZeRO 0 splits nothing. Oracle: the processes that the run had and has."""
    engine, world = running
    of(tmp_path, World(0, then, world.device), zero_stage=zero_stage).save(engine, 4)
    checkpoints = of(tmp_path, World(0, now, world.device), zero_stage=zero_stage)
    checkpoint = checkpoints.latest()
    assert checkpoint is not None and checkpoint.world_size == then
    assert checkpoints.needs_conversion(checkpoint) is needed


def test_regrouped_groups_get_back_their_settings_and_their_count_of_steps() -> None:
    """Oracle: the optimizer as it was before it was mixed up as DeepSpeed does."""
    decayed, free = torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(2))
    groups = [{"params": [decayed], "weight_decay": 0.05}, {"params": [free], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95))
    for parameter in (decayed, free):
        parameter.grad = torch.ones_like(parameter)
    for _ in range(3):
        optimizer.step()
    before = [dict(group) for group in optimizer.param_groups]
    optimizer.param_groups[1].update({k: v for k, v in optimizer.param_groups[0].items() if k != "params"})
    for state in optimizer.state.values():
        state["step"] += 3
    _separate_groups(SimpleNamespace(optimizer=optimizer, basic_optimizer=optimizer), before, 3)
    assert optimizer.param_groups == before
    assert [state["step"].item() for state in optimizer.state.values()] == [3, 3]


def test_a_regrouped_count_of_steps_lies_where_its_weights_do() -> None:
    """DeepSpeed's tool leaves it on the CPU, from where the fused AdamW of a GPU does not read it."""
    master = torch.nn.Parameter(torch.ones(2, device="meta"))  # stands for a GPU
    state = {master: {"step": torch.tensor(3.0), "exp_avg": torch.zeros(2, device="meta")}}
    engine = SimpleNamespace(optimizer=SimpleNamespace(param_groups=[]), basic_optimizer=SimpleNamespace(state=state))
    _separate_groups(engine, [], 3)
    assert state[master]["step"].device == master.device


def test_one_that_cannot_be_regrouped_is_told_with_the_number_of_processes_that_can_go_on(
    running: Any, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    engine, world = running
    of(tmp_path, World(0, 3, world.device)).save(engine, 4)
    checkpoints = of(tmp_path, world)
    checkpoint = checkpoints.latest()
    assert checkpoint is not None
    for path in (checkpoint.folder / "state").iterdir():
        path.write_bytes(bytes(path.stat().st_size))
    start_logging(None)
    with pytest.raises(UserError, match=f"^{checkpoint.folder}: cannot be regrouped: continue with 3 processes$"):
        checkpoints.convert(checkpoint)
    told = capfd.readouterr().err
    assert told.startswith("train_ar: regroups the state of 3 processes for 1\n") and "Error" in told
    # The state stays, for those to which it belongs.
    assert {"state", "complete.json"} <= set(names(checkpoint.folder))
    assert "universal" not in names(checkpoint.folder)


def test_a_stop_while_it_is_regrouped_is_no_failure(running: Any, tmp_path: Path, monkeypatch: Any, capfd: Any) -> None:
    """A terminal's Ctrl-C reaches the tool too, which ends of it."""
    engine, world = running
    of(tmp_path, World(0, 3, world.device)).save(engine, 4)
    checkpoints = of(tmp_path, world)
    checkpoint = checkpoints.latest()
    assert checkpoint is not None

    def interrupted(*_: Any, **__: Any) -> SimpleNamespace:
        monkeypatch.setattr(interrupt, "_received", [signal.SIGINT])
        return SimpleNamespace(returncode=-signal.SIGINT, stderr="Traceback: KeyboardInterrupt")

    monkeypatch.setattr(subprocess, "run", interrupted)
    start_logging(None)
    with pytest.raises(interrupt.Stopped):
        checkpoints.convert(checkpoint)
    assert "KeyboardInterrupt" not in capfd.readouterr().err
