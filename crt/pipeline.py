"""The pipeline's graph, read from dvc.yaml: the one place that states stages, edges and params keys.

The Snakefile derives its rules from it, and every stage learns here which params keys it may read.
Plain YAML reading rather than DVC's own index, since each rank of a distributed stage does it; a test
holds the two against each other.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crt.errors import UserError
from crt.yaml_files import read_yaml

PIPELINE_FILE = "dvc.yaml"
PARAMS_FILE = "params.yaml"
VERSIONS_FILE = "crt/stage_versions.yaml"
# Keys by section that change neither a result nor the state that a stopped run continues from, so that they may be
# changed meanwhile, for instance when a disk fills up.
NEUTRAL_KEYS = {
    "prepare_data": ("max_rejected_fraction",),
    "train_tokenizer": ("checkpoint_every",),
    "train_ar": ("checkpoint_every", "keep_checkpoints", "sample_images"),
}


@dataclass(frozen=True)
class StageSpec:
    """One stage as dvc.yaml states it; paths are relative to the pipeline's folder."""

    name: str
    command: str
    keys: tuple[str, ...]
    """Top-level keys of the params file that the stage reads."""
    inputs: tuple[str, ...]
    output: str
    metrics: tuple[str, ...]

    @property
    def log(self) -> str:
        """The stage's log file, beside its output."""
        return f"{self.output}.log"


def load_stages(root: str | Path = ".", paths: Mapping[str, str] | None = None) -> dict[str, StageSpec]:
    """Read dvc.yaml in `root`, in its own (topological) order.

    Args:
        root: the project's folder.
        paths: other values for some of dvc.yaml's `paths`, for a run beside the main one.

    Raises:
        UserError: there is no readable dvc.yaml in `root`.
    """
    text = _read_once(Path(root) / PIPELINE_FILE)
    variables = {f"paths.{key}": value for key, value in (path_variables(root) | dict(paths or {})).items()}

    def resolve(value: str) -> str:
        return re.sub(r"\$\{([\w.]+)\}", lambda match: variables[match.group(1)], value)

    def out_paths(entries: list[Any]) -> tuple[str, ...]:
        return tuple(resolve(next(iter(entry)) if isinstance(entry, dict) else entry) for entry in entries)

    return {
        name: StageSpec(
            name=name,
            command=resolve(stage["cmd"]),
            keys=tuple(key for key in stage["params"] if isinstance(key, str)),
            inputs=tuple(resolve(dep) for dep in stage.get("deps", [])),
            output=out_paths(stage["outs"])[0],
            metrics=out_paths(stage.get("metrics", [])),
        )
        for name, stage in text["stages"].items()
    }


def plot_files(root: str | Path = ".") -> dict[str, str]:
    """dvc.yaml's `plots`: what each file of the main run shows, by its path."""
    files: dict[str, str] = {}
    for entry in _read_once(Path(root) / PIPELINE_FILE)["plots"]:
        if isinstance(entry, str):
            files[entry] = Path(entry).stem.replace("_", " ")
            continue
        for title, plot in entry.items():
            for path in plot["y"]:
                files[path] = f"{files[path]}; {title}" if path in files else title
    return files


def path_variables(root: str | Path = ".") -> dict[str, str]:
    """dvc.yaml's `paths`: the files and folders of the main run, by name."""
    return dict(_read_once(Path(root) / PIPELINE_FILE)["vars"][0]["paths"])


def stage_version(name: str, root: str | Path = ".") -> int:
    """The version of a stage's code, part of the fingerprint of what it makes."""
    return int(_read_once(Path(root) / VERSIONS_FILE)[name])


def without_neutral(params: Mapping[str, Any]) -> dict[str, Any]:
    """Params, by section, without those of `NEUTRAL_KEYS`."""
    kept = {}
    for section, values in params.items():
        neutral = NEUTRAL_KEYS.get(section)
        kept[section] = {k: v for k, v in values.items() if k not in neutral} if neutral and values else values
    return kept


def refuse_config(config: Mapping[str, Any]) -> None:
    """Refuse values of `snakemake --config`, which would be passed over in silence.

    Raises:
        UserError: there are any.
    """
    if config:
        raise UserError(
            f"--config {', '.join(config)}: values stand in {PARAMS_FILE} alone: change them there, or run "
            "`dvc exp run -S KEY=VALUE`"
        )


def recipe_fingerprint(stage: str, version: int, params: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """Fingerprint of a stage's result by its recipe: what was run, with which params, on which inputs.

    Args:
        stage: the stage's name.
        version: the version of its code.
        params: the values of exactly the keys that the stage reads.
        inputs: the recipe fingerprint of each stage whose output it reads, by stage name.

    Returns:
        64 hexadecimal digits (SHA-256).
    """
    recipe = {"stage": stage, "version": version, "params": without_neutral(params), "inputs": dict(inputs)}
    return hashlib.sha256(canonical_json(recipe).encode()).hexdigest()


def expected_fingerprints(values: Mapping[str, Any], root: str | Path = ".") -> dict[str, str]:
    """The fingerprint that each stage's output bears if it was made with these params throughout."""
    stages = load_stages(root)
    maker = {stage.output: stage.name for stage in stages.values()}
    expected: dict[str, str] = {}
    for stage in stages.values():
        inputs = {maker[path]: expected[maker[path]] for path in stage.inputs}
        params = {key: values[key] for key in stage.keys}
        expected[stage.name] = recipe_fingerprint(stage.name, stage_version(stage.name, root), params, inputs)
    return expected


def stamp_name(fingerprint: str) -> str:
    """Name of the empty file that marks an output folder as the complete result of one recipe.

    The name bears the fingerprint, so an engine that looks for the file needs no memory of its own.
    """
    return f"complete-{fingerprint[:16]}"


def canonical_json(value: Any) -> str:
    """JSON with one spelling per value: sorted keys, no spaces, 2.0 as 2 (a params file may hold either)."""

    def normal(item: Any) -> Any:
        if isinstance(item, Mapping):
            return {str(key): normal(entry) for key, entry in item.items()}
        if isinstance(item, (list, tuple)):
            return [normal(entry) for entry in item]
        if isinstance(item, float) and item.is_integer():
            return int(item)
        return item

    return json.dumps(normal(value), sort_keys=True, separators=(",", ":"), allow_nan=False)


def _read_once(path: Path) -> dict[str, Any]:
    # A study reads the graph once per run; only a changed file is parsed again.
    if not path.is_file():
        raise UserError(f"{path}: not found: run from the project's root folder, where {PIPELINE_FILE} stands")
    return _parse(path.resolve(), path.stat().st_mtime_ns)


@functools.cache
def _parse(path: Path, mtime_ns: int) -> dict[str, Any]:
    return read_yaml(path)
