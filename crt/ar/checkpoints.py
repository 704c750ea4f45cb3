"""Resume state of a training run: written so that a kill at any moment leaves the last complete one usable.

DeepSpeed writes one file per process. They go to a folder with a temporary name; when all are there, rank 0 adds
`complete.json` (what the state belongs to, and the size of each file) and renames the folder. A folder without that
file, or with a file of another size, is not a checkpoint. Nothing here is a result: it lies in the stage's working
folder and goes when the stage is done.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from crt.ar.engine import quiet
from crt.data.pool import available_cpus
from crt.distributed import World, barrier, main_alone, raise_if_any_stopped, said_by_main
from crt.errors import UserError
from crt.files import flush, is_undamaged_archive, write_json
from crt.interrupt import stop_requested
from crt.progress import logger

SCHEMA = 1
_MARK = "complete.json"
_STATE = "state"
_UNIVERSAL = "universal"


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    folder: Path
    step: int
    world_size: int
    zero_stage: int
    owner: dict[str, Any]
    files: dict[str, int]
    """Bytes by relative path."""


class Checkpoints:
    """The checkpoints of one run, in one folder.

    Args:
        folder: theirs alone.
        world: this process among all.
        zero_stage: of the run.
        owner: what the state belongs to, as JSON values: the model. State of another owner is refused.
        keep: how many of the newest stay.
    """

    def __init__(self, folder: Path, world: World, zero_stage: int, owner: dict[str, Any], keep: int) -> None:
        self.folder, self.world, self.zero_stage, self.keep = folder, world, zero_stage, keep
        self.owner = json.loads(json.dumps(owner))

    def latest(self) -> Checkpoint | None:
        """The newest complete checkpoint, the same on all processes. A collective call.

        Raises:
            UserError: it belongs to another model; on all processes.
        """
        # Rank 0 looks and the others take its word: a shared file system may show them different things.
        step = said_by_main(self._newest_undamaged() if self.world.is_main else -1, self.world)
        if step < 0:
            return None
        checkpoint = _read(self._place(step))
        if checkpoint.owner != self.owner or checkpoint.zero_stage != self.zero_stage:
            raise UserError(
                f"{checkpoint.folder}: is a checkpoint of another model or ZeRO stage: delete {self.folder}"
            )
        return checkpoint

    def save(self, engine: Any, step: int) -> None:
        """Write the state after `step` steps. A collective call."""
        place = self._place(step)
        temporary = place.with_suffix(".partial")
        if self.world.is_main:
            # Also what kills have left of other steps: it may be as large as a checkpoint.
            for stale in (place, *self.folder.glob("step_*.*")):
                shutil.rmtree(stale, ignore_errors=True)
            temporary.mkdir(parents=True)
        barrier()
        with quiet():
            engine.save_checkpoint(str(temporary), tag=_STATE, client_state={"step": step}, save_latest=False)
        barrier()
        if self.world.is_main:
            mark = {
                "schema": SCHEMA,
                "step": step,
                "world_size": self.world.size,
                "zero_stage": self.zero_stage,
                "owner": self.owner,
                "files": _flush_files(temporary),
            }
            write_json(temporary / _MARK, mark)
            os.replace(temporary, place)
            for older in self._complete()[: -self.keep]:
                _remove(older.folder)
        barrier()

    def restore(self, engine: Any, checkpoint: Checkpoint) -> None:
        """Put the engine into a checkpoint's state. A collective call.

        Args:
            engine: freshly built, with `universal` as `needs_conversion` says.
            checkpoint: from `latest`.
        """
        universal = self.needs_conversion(checkpoint)
        groups = [dict(group) for group in engine.optimizer.param_groups]
        with quiet():
            tag = _UNIVERSAL if universal else _STATE
            path, state = engine.load_checkpoint(str(checkpoint.folder), tag=tag)
        if path is None or state["step"] != checkpoint.step:
            raise UserError(f"{checkpoint.folder}: cannot be loaded: delete it, the run continues at an earlier one")
        if universal:
            _separate_groups(engine, groups, checkpoint.step)

    def needs_conversion(self, checkpoint: Checkpoint) -> bool:
        """Whether the state is split over another number of processes than there are now."""
        return checkpoint.world_size != self.world.size and self.zero_stage > 0

    def convert(self, checkpoint: Checkpoint) -> None:
        """Regroup a checkpoint into DeepSpeed's universal format, which any number of processes loads. Collective.

        Raises:
            UserError: it failed; on all processes.
            Stopped: a signal arrived at any process meanwhile.
        """
        result = checkpoint.folder / _UNIVERSAL
        with main_alone(self.world):
            if self.world.is_main and not result.exists():
                logger.info(
                    "train_ar: regroups the state of %d processes for %d", checkpoint.world_size, self.world.size
                )
                _to_universal(checkpoint.folder)
        raise_if_any_stopped(self.world)
        if not result.exists():
            raise UserError(
                f"{checkpoint.folder}: cannot be regrouped: continue with {checkpoint.world_size} processes"
            )

    def _place(self, step: int) -> Path:
        return self.folder / f"step_{step:08d}"

    def _newest_undamaged(self) -> int:
        """The step of the newest complete checkpoint whose bytes are those that were written; -1 if there is none."""
        for found in reversed(self._complete()):
            if _is_undamaged(found):
                return found.step
            _remove(found.folder)  # or it would count among those that are kept
        return -1

    def _complete(self) -> list[Checkpoint]:
        """All complete checkpoints, oldest first."""
        folders = (f for f in sorted(self.folder.glob("step_*")) if not f.suffix and (f / _MARK).exists())
        return [checkpoint for checkpoint in map(_read, folders) if _is_whole(checkpoint)]


def _read(folder: Path) -> Checkpoint:
    mark = json.loads((folder / _MARK).read_text(encoding="utf-8"))
    if mark.pop("schema") != SCHEMA:
        raise UserError(f"{folder}: is a checkpoint of another version of this program: delete {folder.parent}")
    return Checkpoint(folder=folder, **mark)


def _is_whole(checkpoint: Checkpoint) -> bool:
    for name, size in checkpoint.files.items():
        path = checkpoint.folder / name
        if not path.exists() or path.stat().st_size != size:
            logger.warning("%s: missing or damaged: the checkpoint is ignored", path)
            return False
    return True


def _is_undamaged(checkpoint: Checkpoint) -> bool:
    """Reads all of it, many files at once: some seconds for each ten gigabytes, on a disk that is as fast."""
    paths = [checkpoint.folder / name for name in checkpoint.files if name.endswith(".pt")]
    with ThreadPoolExecutor(available_cpus()) as threads:  # checksums are taken outside the interpreter's lock
        for path, undamaged in zip(paths, threads.map(is_undamaged_archive, paths), strict=True):
            if not undamaged:
                logger.warning("%s: damaged, its checksums are wrong: the checkpoint is deleted", path)
                return False
    return True


def _separate_groups(engine: Any, groups: list[dict[str, Any]], step: int) -> None:
    """Undo what loading a universal ZeRO-3 checkpoint mixes up.

    It gives all groups of parameters the settings of the first, weight decay on the norms too, and one counter of
    steps, which Adam then advances once for each. With any ZeRO stage that counter lies on the CPU, where the fused
    AdamW of a GPU does not take it.
    """
    for group, before in zip(engine.optimizer.param_groups, groups, strict=True):
        group.update({name: value for name, value in before.items() if name != "params"})
    for parameter, state in engine.basic_optimizer.state.items():
        if isinstance(state.get("step"), torch.Tensor):
            state["step"] = torch.full_like(state["step"], step, device=parameter.device)


def _flush_files(folder: Path) -> dict[str, int]:
    """Force the files of a checkpoint onto the disk; their sizes by relative path."""
    sizes = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        flush(path)
        sizes[str(path.relative_to(folder))] = path.stat().st_size
    return sizes


def _remove(folder: Path) -> None:
    """Delete a checkpoint so that a kill halfway leaves nothing that looks like one."""
    doomed = folder.with_suffix(".old")
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(folder, doomed)
    shutil.rmtree(doomed)


def _to_universal(folder: Path) -> None:
    """Write `folder`/universal from `folder`/state, complete or not at all; DeepSpeed's tool is a program."""
    temporary = folder / f"{_UNIVERSAL}.partial"
    shutil.rmtree(temporary, ignore_errors=True)
    tool = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    folders = ["--input_folder", str(folder / _STATE), "--output_folder", str(temporary)]
    result = subprocess.run([*tool, *folders], capture_output=True, text=True, check=False)
    if result.returncode:
        if not stop_requested():  # terminals and schedulers signal the tool too
            logger.error("%s", result.stderr.strip())
    else:
        _flush_files(temporary)
        os.replace(temporary, folder / _UNIVERSAL)
