"""What made a result, and whether it still is one: the `manifest.json` of a stage's output folder.

A folder holds its stage's files, the manifest (what made them, from what, with a checksum per file) and an empty stamp
whose name bears the recipe's fingerprint. A folder without its stamp is not a result.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crt.errors import UserError
from crt.files import refuse_unreadable, sha256_file
from crt.pipeline import canonical_json, load_stages, path_variables, stage_version, stamp_name, without_neutral
from crt.progress import Progress
from crt.yaml_files import in_yaml

MANIFEST = "manifest.json"
SCHEMA = 1
_STAMP = re.compile(r"complete-[0-9a-f]{16}")
# How every manifest begins, also one that was cut short.
_MANIFEST_START = '{\n  "schema"'
# Bytes from which reading a result takes so long that a person wants to see it go on.
_LARGE = 2**30
# In every folder that the library loads a model from: a stage's output, or what import_llamagen made.
_MODEL_CONFIG = "config.json"


@dataclass(frozen=True)
class Manifest:
    """What a stage says of its own output, read from `manifest.json`."""

    stage: str
    version: int
    fingerprint: str
    """Of the recipe: stage, version, params and the fingerprints of its inputs."""
    content: str
    """Of the files themselves, without those that tell wall times."""
    params: Mapping[str, Any]
    inputs: Mapping[str, Any]
    """By stage name: fingerprint, content, params and inputs of each folder that was read."""
    files: Mapping[str, Any]
    """By relative path: bytes and sha256."""
    summary: Mapping[str, Any]
    """Figures of the result that other stages and tools may show."""

    @property
    def ancestry(self) -> dict[str, Any]:
        """What a later stage's manifest records of this one."""
        return {
            "version": self.version,
            "fingerprint": self.fingerprint,
            "content": self.content,
            "params": self.params,
            "inputs": self.inputs,
        }


def read_manifest(folder: str | Path) -> Manifest:
    """Read and check a stage's output folder: the manifest, its stamp, and every file's size.

    Raises:
        UserError: the folder is missing, holds an imported model, is no stage's output, or is incomplete.
    """
    folder = Path(folder)
    manifest = _read_unstamped(folder)
    if not (folder / stamp_name(manifest.fingerprint)).exists():
        raise UserError(f"{folder}: incomplete, no stamp: run {_renew_command(folder, manifest.stage)}")
    return manifest


def _read_unstamped(folder: Path) -> Manifest:
    """`read_manifest` without a look at the stamp, which Snakemake takes away while a stage runs."""
    if not folder.is_dir():
        if folder.exists():
            raise UserError(f"{folder}: is not a folder: move it away, and make it with {_renew_command(folder)}")
        raise UserError(f"{folder}: not found: make it first with {_renew_command(folder)}")
    path = folder / MANIFEST
    if not path.exists() and (folder / _MODEL_CONFIG).exists() and not any(folder.glob(stamp_name("*"))):
        # Advice to delete it would cost a model that may exist nowhere else.
        raise UserError(
            f"{folder}: an imported model, for the library (`Tokenizer.load` or `Generator.load`), not a stage's "
            "result: give the output folder of a stage"
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        schema = values.pop("schema")
        manifest = Manifest(**values)
        if schema == SCHEMA:
            _check_types(values)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        refuse_unreadable(path, error)
        raise UserError(f"{path}: missing or damaged: delete {folder} and run {_renew_command(folder)}") from None
    if schema != SCHEMA:
        raise UserError(f"{path}: has schema {schema}, this version reads {SCHEMA}: delete {folder} and make it again")
    for name, entry in manifest.files.items():
        size = size_of(folder / name)
        if size != entry["bytes"]:
            state = "is missing" if size is None else f"has {size} bytes instead of {entry['bytes']}"
            raise UserError(
                f"{folder / name}: {state}: delete {folder} and run {_renew_command(folder, manifest.stage)}"
            )
    return manifest


def _check_types(record: Mapping[str, Any]) -> None:
    """Raises TypeError or KeyError where a manifest, or what one records of an ancestor, is none that a stage wrote."""
    kinds = {"version": int, "fingerprint": str, "content": str, "params": dict, "inputs": dict}
    if "files" in record:
        kinds |= {"stage": str, "files": dict, "summary": dict}
    for name, kind in kinds.items():
        if not isinstance(record[name], kind):
            raise TypeError(name)
    for ancestor in record["inputs"].values():
        _check_types(ancestor)
    for entry in record.get("files", {}).values():
        if not isinstance(entry["bytes"], int) or not isinstance(entry["sha256"], str):
            raise TypeError("files")


def read_current(
    folder: str | Path, values: Mapping[str, Any], params_file: str | Path, stage: str | None = None
) -> Manifest:
    """`read_manifest`, and check that the folder and all that it was made from agree with the params in force.

    Args:
        folder: a stage's output.
        values: the params in force, as a plain mapping.
        params_file: their file, for messages.
        stage: that must have made the folder; None: any.

    Raises:
        UserError: as `read_manifest`; or some key has another value now, which the message names; or another stage
            made it.
    """
    manifest = read_manifest(folder)
    if stage not in (None, manifest.stage):
        raise UserError(
            f"{folder}: made by {manifest.stage}: move it away, and run {_renew_command(Path(folder), stage)}"
        )
    stale = _first_difference({manifest.stage: manifest.ancestry}, values)
    if stale:
        changed, key, then, now = stale
        raise UserError(
            f"{folder}: stale: {changed} was run with {key} = {in_yaml(then)}, {params_file} now says {in_yaml(now)}: "
            + _renewal(Path(folder), manifest.stage)
        )
    outdated = _first_old_version({manifest.stage: manifest.ancestry})
    if outdated:
        raise UserError(
            f"{folder}: stale: made by an earlier version of stage {outdated}: "
            + _renewal(Path(folder), manifest.stage)
        )
    return manifest


def check_content(folder: Path) -> None:
    """Compare the bytes of every file with the manifest's checksums; all else looks at sizes, which costs nothing.

    Raises:
        UserError: a file is damaged.
    """
    manifest = _read_unstamped(folder)
    total = sum(entry["bytes"] for entry in manifest.files.values())
    progress, done = Progress(f"{folder}: checksums", total, "bytes") if total >= _LARGE else None, 0

    def read(count: int) -> None:
        nonlocal done
        done += count
        if progress:
            progress.update(done)

    for name, entry in manifest.files.items():
        found = sha256_file(folder / name, read)
        if found != entry["sha256"]:
            tracked = any(Path(spec.output) == folder for spec in load_stages().values())
            # Where other files are not DVC's either, it refuses then; with --force it would replace those too.
            restore = f" (move it away, then `dvc checkout {folder}`)" if tracked else ""
            raise UserError(
                f"{folder / name}: damaged: its content is not what {manifest.stage} wrote (SHA-256 {found[:16]}, not "
                f"{entry['sha256'][:16]}): restore it{restore}, or delete {folder} to make it again"
            )


def is_result(folder: Path) -> bool:
    """Whether some version of a stage made a folder, complete or damaged: its stamp or its manifest tells."""
    if any(_STAMP.fullmatch(name) for name in os.listdir(folder)):
        return True
    path = folder / MANIFEST
    if not path.is_file():
        return False
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        return text.startswith(_MANIFEST_START)
    # Other programs have files of this name too.
    return isinstance(values, dict) and {"schema", "stage", "fingerprint"} <= values.keys()


def read_manifest_or_none(folder: Path) -> Manifest | None:
    """`read_manifest` without a look at the stamp; None for whatever that refuses."""
    try:
        return _read_unstamped(folder)
    except UserError:
        return None


def damaged_results(stamps: Iterable[str | Path]) -> list[str]:
    """What is wrong with results whose stamps are there, with the remedy: a line for each.

    Args:
        stamps: of the stages, in their order.
    """
    lines, present = [], {}
    for stamp in map(Path, stamps):
        if stamp.exists():
            try:
                manifest = read_manifest(stamp.parent)
                present[manifest.stage] = stamp.parent, manifest.content
                check_ancestors(stamp.parent, manifest, present)
            except UserError as error:
                lines.append(str(error))
    return lines


def check_makers(manifests: Mapping[str, Manifest], inputs: Mapping[str, str | Path]) -> None:
    """Raises UserError where an option names the output of another stage than dvc.yaml gives it."""
    places, maker = path_variables(), {spec.output: spec.name for spec in load_stages().values()}
    for option, manifest in manifests.items():
        if manifest.stage != (wanted := maker[places[option]]):
            raise UserError(
                f"{inputs[option]}: made by {manifest.stage}: give --{option} the output folder of {wanted}"
            )


def check_one_lineage(manifests: Mapping[str, Manifest], folders: Mapping[str, Path]) -> None:
    """Refuse inputs that disagree about a common ancestor, such as codes made by another tokenizer."""
    present = {manifest.stage: (folders[key], manifest.content) for key, manifest in manifests.items()}
    for key, manifest in manifests.items():
        check_ancestors(folders[key], manifest, present)


def check_ancestors(folder: Path, manifest: Manifest, present: Mapping[str, tuple[Path, str]]) -> None:
    """Make sure that a result was made from others as they lie now: another run of their recipe may differ in bytes.

    Args:
        folder: of the result.
        manifest: its manifest.
        present: folder and content of the others, by stage; some may be absent.

    Raises:
        UserError: one is another than the result was made from.
    """

    def walk(inputs: Mapping[str, Any]) -> None:
        for name, ancestor in inputs.items():
            if name in present and present[name][1] != ancestor["content"]:
                # Where the params are the same both engines may take it for current.
                raise UserError(
                    f"{folder}: was made from another {name} result than the one in {present[name][0]}: "
                    f"delete {folder} and run {_renew_command(folder, manifest.stage)}"
                )
            walk(ancestor["inputs"])

    walk(manifest.inputs)


def _first_difference(stages: Mapping[str, Any], values: Mapping[str, Any]) -> tuple[str, str, Any, Any] | None:
    """The first (stage, key, then, now) in which a result's ancestry differs from the params in force."""
    for stage, record in stages.items():
        earlier = _first_difference(record["inputs"], values)
        if earlier:
            return earlier
        difference = changed_key(record["params"], values)
        if difference:
            return stage, *difference
    return None


def changed_key(params: Mapping[str, Any], values: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """The first (key, then, now) in which the params of a result differ from those in force; neutral ones may.

    Args:
        params: what the result was made with.
        values: the params in force; sections that the result does not depend on do not matter.
    """
    now = without_neutral({key: values.get(key) for key in params})
    for key, then in without_neutral(params).items():
        difference = _differing_key(key, then, now[key])
        if difference:
            return difference
    return None


def _differing_key(key: str, then: Any, now: Any) -> tuple[str, Any, Any] | None:
    if isinstance(then, Mapping) and isinstance(now, Mapping):
        for name in {**then, **now}:
            difference = _differing_key(f"{key}.{name}", then.get(name), now.get(name))
            if difference:
                return difference
        return None
    return None if canonical_json(then) == canonical_json(now) else (key, then, now)


def _first_old_version(stages: Mapping[str, Any]) -> str | None:
    for stage, record in stages.items():
        older = _first_old_version(record["inputs"])
        if older or record["version"] != stage_version(stage):
            return older or stage
    return None


def _renew_command(folder: Path, stage: str | None = None) -> str:
    """The command that makes `folder` again: its stage's name where known, else the whole pipeline."""
    if stage is None:
        stage = next((spec.name for spec in load_stages().values() if Path(spec.output) == folder), None)
    return f"`snakemake --cores all {stage or 'all'}` or `dvc repro{' ' + stage if stage else ''}`"


def _renewal(folder: Path, stage: str) -> str:
    """The remedy for a result that is stale; DVC does not run it where dvc.lock or its run cache are wrong about it."""
    return f"renew it with {_renew_command(folder, stage)} (`dvc repro -f -s {stage}` where DVC skips it)"


def size_of(path: Path) -> int | None:
    """Bytes of a file; None if there is none."""
    try:
        return path.stat().st_size
    except OSError:
        return None
