"""The contract of a stage: what it is handed, where it works, and how its result appears.

A stage reads the params keys that dvc.yaml lists for it and the output folders of earlier stages,
works in a folder of its own that survives a kill, and publishes its output folder, with a manifest
(`crt.manifest`), in one rename.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from filelock import FileLock, Timeout

from crt import slurm
from crt.errors import UserError
from crt.files import make_folder, sha256_file, write_json
from crt.manifest import (
    MANIFEST,
    SCHEMA,
    Manifest,
    changed_key,
    check_makers,
    check_one_lineage,
    is_result,
    read_current,
    read_manifest,
    read_manifest_or_none,
    size_of,
)
from crt.params import load_params
from crt.pipeline import (
    VERSIONS_FILE,
    canonical_json,
    load_stages,
    recipe_fingerprint,
    stage_version,
    stamp_name,
)
from crt.snakemake_records import MAKE_ANEW
from crt.yaml_files import in_yaml

_SECONDS = "seconds.json"
# What may lie in a folder that is empty to a person; NFS keeps files that are still open as .nfs*.
_CLUTTER = (".gitignore", ".gitkeep", ".DS_Store")


@dataclass
class StageRun:
    """One run of one stage: its params, inputs and folders.

    `params` carries only the keys that dvc.yaml lists for the stage (`lambda` as `lambda_`); reading
    another one raises AttributeError, so the listed keys are exactly the keys read.
    """

    name: str
    params: Any
    inputs: dict[str, Path]
    manifests: dict[str, Manifest]
    out: Path
    version: int
    fingerprint: str
    values: dict[str, Any]
    """The params that the stage reads, as plain values."""
    metrics: Path | None = None
    shared_folder: Path | None = None
    summary: dict[str, Any] = field(default_factory=dict)
    timed_files: set[str] = field(default_factory=set)
    """Files of the output that tell wall times: the digest of the content leaves them out, so that it stays the same
    wherever and however often the stage runs."""
    started: float = field(default_factory=time.monotonic)

    @property
    def target(self) -> Path:
        """The folder that is replaced: `out` may be a link to it, perhaps on another disk, and stays one."""
        return Path(os.path.realpath(self.out)) if self.out.is_symlink() else self.out

    @property
    def work(self) -> Path:
        """Folder for what must survive a kill.

        Keyed by the recipe and by the bytes of its inputs (an input made again may differ), so that no run ever
        resumes from another one's state.
        """
        contents = {name: manifest.content for name, manifest in self.manifests.items()}
        key = hashlib.sha256(canonical_json([self.fingerprint, contents]).encode()).hexdigest()
        return self.target.parent / ".work" / f"{self.target.name}-{key[:16]}"

    @property
    def shared(self) -> Path:
        """Folder for what several runs of the stage have in common, by default beside the output."""
        return self.shared_folder or self.out.parent / ".shared"

    @property
    def staging(self) -> Path:
        """Folder whose content becomes the output."""
        return self.work / "staging"

    def refuse_own_output(self, key: str, folder: str | None) -> None:
        """Refuse a folder to read from that the result is about to replace.

        Args:
            key: params key that names it.
            folder: as named there; None for none.

        Raises:
            UserError: it is the stage's own output.
        """
        if folder is not None and os.path.realpath(os.path.expanduser(folder)) == os.path.realpath(self.out):
            raise UserError(
                f"{key}: {folder} is where {self.name} puts its result, which would replace it: copy it elsewhere "
                f"(cp -r {folder} FOLDER) and name the copy"
            )

    def manifest_so_far(self) -> Manifest:
        """What is known of the result's manifest before it is published: no files, no time."""
        inputs = {name: manifest.ancestry for name, manifest in self.manifests.items()}
        return Manifest(self.name, self.version, self.fingerprint, "", self.values, inputs, {}, self.summary)

    def seconds_before(self) -> float:
        """Wall time of this run's earlier attempts, as far as they could note it."""
        try:
            return float(json.loads((self.work / _SECONDS).read_text()))
        except (OSError, ValueError, TypeError):
            return 0.0

    def note_seconds(self) -> None:
        """Keep the wall time of an attempt that stops here; a full disk must not hide why it stops."""
        with suppress(OSError):
            write_json(self.work / _SECONDS, self.seconds_before() + time.monotonic() - self.started)

    def is_current(self) -> bool:
        """Whether the output folder already is the complete result of this recipe on these inputs."""
        return (self.out / stamp_name(self.fingerprint)).exists() and self._is_complete()

    def lacks_only_its_stamp(self) -> bool:
        """Whether the output folder is the complete result, from which Snakemake took the stamp.

        It deletes the stamp when it starts a stage, and when one fails. The stage may have ended before: alone, after
        Snakemake was killed, or in another job. Not so where a result is to be made anew (`MAKE_ANEW`), or where that
        was begun; in a job that was requeued even then, since it may have ended in its own last moments.
        """
        return (
            not (self.out / stamp_name(self.fingerprint)).exists()
            and not self.staging.exists()
            and self._is_complete()
            and (MAKE_ANEW not in os.environ or slurm.was_requeued())
        )

    def restore_stamp(self) -> None:
        """Mark the output folder as complete again."""
        (self.out / stamp_name(self.fingerprint)).touch()

    def _is_complete(self) -> bool:
        manifest = read_manifest_or_none(self.out)
        return (
            manifest is not None
            and manifest.fingerprint == self.fingerprint
            and all(manifest.inputs[name]["content"] == m.content for name, m in self.manifests.items())
            and all(size_of(self.out / path) == entry["bytes"] for path, entry in manifest.files.items())
        )


def open_run(
    name: str,
    params_file: str | Path,
    inputs: Mapping[str, str | Path],
    out: str | Path,
    metrics: str | Path | None = None,
    *,
    shared: str | Path | None = None,
) -> StageRun:
    """Check params and inputs and set up a run of stage `name`; writes nothing.

    Args:
        name: the stage, as in dvc.yaml.
        params_file: the whole params file; all of it is checked.
        inputs: output folders of earlier stages, by the command line's name for them (data, tokenizer...).
        out: the output folder.
        metrics: where a copy of the output's metrics.json goes, for the stage that has one.
        shared: folder for what several runs have in common; None: beside the output.

    Raises:
        UserError: bad params, an input that is missing, incomplete, or made with other params, or an output folder
            that must not be replaced.
    """
    params = load_params(params_file)
    keys = load_stages()[name].keys
    values = params.model_dump(by_alias=True)
    read = {"--params": params_file, **{f"--{key}": path for key, path in inputs.items()}}
    read |= {"--shared": shared} if shared else {}
    if name == "prepare_data" and params.prepare_data.path:
        read["prepare_data.path"] = params.prepare_data.path
    check_out(Path(out), read)
    if metrics and Path(metrics).is_dir():
        raise UserError(f"--metrics {metrics}: is a folder: name a file, such as {Path(metrics) / 'metrics.json'}")
    manifests = {key: read_current(path, values, params_file) for key, path in inputs.items()}
    check_makers(manifests, inputs)
    check_one_lineage(manifests, {key: Path(path) for key, path in inputs.items()})
    version, own_values = stage_version(name), {key: values[key] for key in keys}
    input_fingerprints = {manifest.stage: manifest.fingerprint for manifest in manifests.values()}
    attributes = {_attribute(key): getattr(params, _attribute(key)) for key in keys}
    return StageRun(
        name=name,
        params=SimpleNamespace(**attributes),
        inputs={key: Path(path) for key, path in inputs.items()},
        manifests={manifest.stage: manifest for manifest in manifests.values()},
        out=Path(out),
        version=version,
        values=own_values,
        fingerprint=recipe_fingerprint(name, version, own_values, input_fingerprints),
        metrics=Path(metrics) if metrics else None,
        shared_folder=Path(shared) if shared else None,
    )


def check_out(out: Path, read: Mapping[str, str | Path]) -> None:
    """Make sure, before any work, that an output folder can be replaced and that only a result is lost by it.

    Args:
        out: the output folder.
        read: files and folders that the stage reads, by the option or key that names each.

    Raises:
        UserError: it holds what the stage reads, or files of no stage; it is not a folder, or cannot be replaced.
    """
    if out.name in ("", ".."):
        raise UserError(f"--out {out}: is replaced as a whole: name a folder for this result alone, such as out/tokens")
    target = Path(os.path.realpath(out))
    for option, path in read.items():
        if Path(os.path.realpath(path)).is_relative_to(target):
            raise UserError(f"{out}: would be replaced, but is or holds {path} ({option}): choose another folder")
    if os.path.ismount(target):
        raise UserError(
            f"{out}: is a mount point, which cannot be replaced: name a folder in it, or make a link to one"
        )
    _check_replaceable(out)
    above = next(parent for parent in target.parents if os.path.lexists(parent))
    if not above.is_dir():
        raise UserError(f"{above}: is a file, so {out} cannot be made: choose another folder")


def _check_replaceable(out: Path) -> None:
    """Raises UserError where `out` is neither missing, nor empty, nor a stage's output."""
    if out.is_dir():
        if not is_result(out) and any(name not in _CLUTTER and not name.startswith(".nfs") for name in os.listdir(out)):
            raise UserError(f"{out}: exists and is not a stage's output: choose another folder, or empty it")
    elif out.exists():
        raise UserError(f"{out}: exists and is a file: choose another folder")


def _has_flock(path: Path) -> bool:
    """Whether the file system of a file has locks that go with their process."""
    try:
        with open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:  # held by another, mostly
        return error.errno != errno.ENOSYS
    return True


@contextmanager
def exclusive(run: StageRun) -> Iterator[None]:
    """Hold the output for this process alone, so that a job submitted twice cannot mix its writes.

    Raises:
        UserError: another process is writing the same output; where both are Slurm jobs, this one goes back into the
            queue behind the other.
    """
    path = _lock_file(run)
    holder = path.with_suffix(".holder")
    make_folder(path.parent)
    lock = FileLock(path, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        waits = slurm.requeue_behind(holder.read_text() if holder.exists() else "")
        remedy = waits or f"another process is writing it (lock {path}): wait for it, or stop it"
        if not waits and not _has_flock(path):
            # There filelock takes the file itself for the lock, which outlives a kill.
            remedy += "; if there is none, on any machine, delete that lock file"
        raise UserError(f"{run.out}: {remedy}") from None
    try:
        holder.write_text(slurm.job_id() or "")
        yield
    finally:
        lock.release()


@contextmanager
def deletion_told(run: StageRun) -> Iterator[None]:
    """For the work up to the result: whatever fails for want of the working folder, that is why.

    Raises:
        UserError: somebody deleted it meanwhile.
    """
    try:
        yield
    except Exception:
        # With the result's last rename it is gone too.
        if run.staging.exists() or run.is_current():
            raise
        raise UserError(f"{run.work}: was deleted while {run.name} ran: run the same command again") from None


def check_inputs(run: StageRun) -> None:
    """Make sure that a stage's inputs are still those that it began with, before it publishes and before a checkpoint.

    After a change of params another engine may have replaced one, or a new job beside a stage that outlived its
    Snakemake; the stage may then have read some files of each.

    Raises:
        UserError: an input has other content now.
    """
    for folder, manifest in zip(run.inputs.values(), run.manifests.values(), strict=True):
        now = read_manifest_or_none(folder)
        if now is not None and now.content != manifest.content:
            raise UserError(f"{folder}: was replaced while {run.name} ran, in vain: run the same command again")


def _lock_file(run: StageRun) -> Path:
    return run.target.parent / ".work" / f"{run.target.name}.lock"


def clear_work(run: StageRun) -> None:
    """Remove the working folder of a current result: a kill between publishing and cleaning up leaves it.

    What cannot be removed now stays for the next time; a process that is still publishing removes it itself.
    """
    if run.work.exists():
        with suppress(Timeout, OSError), FileLock(_lock_file(run), timeout=0):
            if run.is_current():
                shutil.rmtree(run.work)


def publish(run: StageRun) -> Manifest:
    """Turn the staging folder into the output: manifest and stamp are written, then one rename shows all.

    A kill at any moment leaves either the old output, none, or the new one complete; never a mixture.

    Raises:
        UserError: something else than a result appeared in the output's place meanwhile.
    """
    files = {
        str(path.relative_to(run.staging)): {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
        for path in sorted(run.staging.rglob("*"))
        if path.is_file() and path.name not in (MANIFEST, stamp_name(run.fingerprint))
    }
    repeatable = {name: entry for name, entry in files.items() if name not in run.timed_files}
    manifest = {
        "schema": SCHEMA,
        "stage": run.name,
        "version": run.version,
        "fingerprint": run.fingerprint,
        "content": hashlib.sha256(canonical_json(repeatable).encode()).hexdigest(),
        "params": run.values,
        "inputs": {name: manifest.ancestry for name, manifest in run.manifests.items()},
        "summary": run.summary,
        "files": files,
    }
    write_json(run.staging / MANIFEST, manifest)
    (run.staging / stamp_name(run.fingerprint)).touch()
    old = run.work / "replaced"
    shutil.rmtree(old, ignore_errors=True)
    _check_replaceable(run.out)
    if run.target.exists():
        os.replace(run.target, old)
    os.replace(run.staging, run.target)
    publish_metrics(run)
    # Beside the output, not in it: a result's bytes do not tell how long it took.
    seconds = run.seconds_before() + time.monotonic() - run.started
    write_json(_cost_file(run.out), {"fingerprint": run.fingerprint, "seconds": round(seconds, 1)})
    # On NFS a file that some process has open yet stays under another name, and its folder with it: `clear_work`
    # removes them at the next call.
    shutil.rmtree(run.work, ignore_errors=True)
    return read_manifest(run.out)


def check_unchanged(run: StageRun, params_file: str | Path) -> None:
    """Make sure, when a stage has ended, that its result is that of the values in force still.

    DVC reads them after the stage, and would record the result under values that it was not made with.

    Raises:
        UserError: a key that the stage reads, or its version, has another value by now, or cannot be read.
    """
    try:
        values, version = load_params(params_file).model_dump(by_alias=True), _version_now(run.name)
    except UserError as error:
        raise UserError(
            f"{str(error).splitlines()[0]}; so since {run.name} began: {run.out} holds the result of the old values: "
            "correct it and run the same command again"
        ) from None
    file, difference = Path(params_file), changed_key(run.values, values)
    if difference is None and version != run.version:
        file, difference = Path(VERSIONS_FILE), (run.name, run.version, version)
    if difference is not None:
        key, then, now = difference
        raise UserError(
            f"{file}: {key} changed from {in_yaml(then)} to {in_yaml(now)} while {run.name} ran: {run.out} holds the "
            "result of the old value: run the same command again"
        )


def _version_now(name: str) -> int | None:
    try:
        return stage_version(name)
    except (KeyError, TypeError, ValueError):
        return None


def publish_metrics(run: StageRun) -> None:
    """Copy the output's metrics.json to where DVC and people look for it."""
    if run.metrics is not None:
        source = run.out / "metrics.json"
        if not run.metrics.exists() or run.metrics.read_bytes() != source.read_bytes():
            make_folder(run.metrics.parent)
            write_json(run.metrics, json.loads(source.read_text(encoding="utf-8")))


def read_seconds(folder: Path, fingerprint: str) -> float | None:
    """Wall time that a result took on this machine, over all attempts that ended or were told to stop.

    None where the result came from elsewhere.
    """
    try:
        cost = json.loads(_cost_file(folder).read_text(encoding="utf-8"))
        return float(cost["seconds"]) if cost["fingerprint"] == fingerprint else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _cost_file(folder: Path) -> Path:
    return folder.with_name(folder.name + ".cost.json")


def _attribute(key: str) -> str:
    return "lambda_" if key == "lambda" else key
