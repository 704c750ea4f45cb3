"""Studies: grids of runs declared in studies/*.yaml, unrolled into stages that are shared by what makes them.

A study names axes of named overrides, seeds and, at each of its scales, the params file that they change. Every
stage of every run lives in a folder named by its recipe's fingerprint, `out/runs/STAGE/FINGERPRINT`, so runs, studies
and restarts share each tokenizer, cache and model that has the same recipe, and a value added to an axis runs only
what is new.
"""

from __future__ import annotations

import copy
import difflib
import hashlib
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_validator
from ruamel.yaml import YAML

from crt.errors import UserError
from crt.evaluation.metric_table import METRICS, figure_names
from crt.files import make_folder, replacing
from crt.params import Params, validate_params
from crt.pipeline import (
    NEUTRAL_KEYS,
    StageSpec,
    canonical_json,
    expected_fingerprints,
    load_stages,
    path_variables,
    stamp_name,
)
from crt.yaml_files import Section, checked, in_yaml, read_yaml

STUDY_FOLDER = Path("studies")
# Raised when the page of a study changes.
STUDY_VERSION = 11
# Rules of a study's stages are named run_STAGE_FINGERPRINT.
RUN_RULE = "run"
RUN_FOLDER = Path("out/runs")
REPORT_FOLDER = Path("out/studies")
# What the results of a study have beside the figures of metrics.json: FLOPs of both trainings together.
TRAINING_FLOPS = "training_flops"
# Columns of a study's results beside its axes.
_SEED = "seed"
_RESULTS = {*METRICS, TRAINING_FLOPS}
# A file's name, as an option's value, has a dot.
_TARGET = re.compile(r"study_[\w-]+")
# Not a file or folder of a like name.
_RUN = re.compile(rf"{RUN_RULE}_\w+_[0-9a-f]{{16}}")
_NAME = re.compile(r"\w[\w.-]*")
_AXIS_FORM = "{low: {lambda: 0.1}, high: {lambda: 1.0}}"

Overrides = dict[str, Any]


class Contrast(Section):
    """The axis whose values are compared pair by pair over seeds, and the value that the others are held against."""

    axis: str
    baseline: str


class Figure(Section):
    """One picture: a metric over a metric, a line for each value of an axis, or of several axes together."""

    x: str
    y: str
    lines: str | Annotated[list[str], Field(min_length=1)]

    @property
    def axes(self) -> list[str]:
        """The axes that tell its lines apart."""
        return [self.lines] if isinstance(self.lines, str) else self.lines


class Published(Section):
    """A figure from the literature, to stand beside ours of the cell that it compares with."""

    cell: dict[str, str]
    """Name of the value by axis; axes that are left out do not matter."""
    metric: str
    value: Annotated[float, Field(allow_inf_nan=False)]
    source: str


class Scale(Section):
    """One size at which a study can be run."""

    base: str
    """Params file that the overrides change."""
    overrides: Overrides
    axes: Annotated[dict[str, Annotated[dict[str, Overrides], Field(min_length=1)]], Field(min_length=1)]
    seeds: Annotated[list[int], Field(min_length=1)]
    metrics: Annotated[list[str], Field(min_length=1)]
    """Those of metrics.json to compare: their names depend on what evaluates (fd_classifier_gen, gfid)."""
    figures: list[Figure]
    published: list[Published] = Field(default_factory=list)

    @field_validator("axes", mode="before")
    @classmethod
    def _check_form(cls, axes: Any) -> Any:
        """Say what an axis looks like to who wrote a list, a single value, or a number as a name."""
        for axis, values in axes.items() if isinstance(axes, dict) else ():
            if axis == _SEED or axis in _RESULTS:
                raise ValueError(f"{axis}: the results have a column of this name already: choose another")
            if not isinstance(axis, str):
                raise ValueError(f'the name {in_yaml(axis)} is not text: put it into quotes: "{in_yaml(axis)}"')
            if not isinstance(values, dict):
                raise ValueError(f"{axis}: give each value a name and the params that it sets, as in {_AXIS_FORM}")
            for name, overrides in values.items():
                if not isinstance(name, str):
                    raise ValueError(
                        f'{axis}: the name {in_yaml(name)} is not text: put it into quotes: "{in_yaml(name)}"'
                    )
                if not isinstance(overrides, dict):
                    raise ValueError(
                        f"{axis}: {name}: give the params that it sets, as in {{lambda: 1.0}}, or {{}} for none"
                    )
        return axes


class Study(Section):
    """A study file."""

    question: str
    contrast: Contrast | None
    scales: Annotated[dict[str, Scale], Field(min_length=1)]


@dataclass(frozen=True)
class StudyRun:
    """One cell of a study's grid with one seed."""

    choices: Mapping[str, str]
    """Name of the chosen value, by axis."""
    seed: int
    values: Mapping[str, Any]
    stages: Mapping[str, StageSpec]
    """With the paths of this run."""
    fingerprints: Mapping[str, str]

    @property
    def metrics_file(self) -> Path:
        """The run's metrics.json."""
        return Path(self.stages["evaluate"].output) / "metrics.json"

    def stamp(self, stage: str) -> str:
        """The file that shows that a stage of this run is complete."""
        return f"{self.stages[stage].output}/{stamp_name(self.fingerprints[stage])}"


def load_study(path: str | Path) -> Study:
    """Read and check a study file.

    Raises:
        UserError: unreadable, or a key is unknown, missing or of the wrong type.
    """
    study = checked(Study, read_yaml(path), path)
    for name in (Path(path).stem, *study.scales):
        if not _NAME.fullmatch(name):
            raise UserError(
                f"{path}: {name!r} is to name a folder and a rule: use letters, digits, '_', '-' and '.' alone"
            )
    for name, scale in study.scales.items():
        _check_axes(path, name, scale, study)
    return study


def study_runs(path: str | Path, scale: str) -> list[StudyRun]:
    """Unroll a study at one scale: every combination of its axes with every seed, in order.

    Raises:
        UserError: a bad study file, a scale that it does not have, an override of a key that params do not have,
            params that are refused, a figure that they do not yield, or two runs that are one.
    """
    study = load_study(path)
    if scale not in study.scales:
        raise UserError(f"{path}: has no scale {scale!r}: it has {', '.join(study.scales)}")
    size = study.scales[scale]
    try:
        base = read_yaml(size.base)
    except UserError as error:
        raise UserError(f"{path}: scales.{scale}.base: {error}") from None
    runs: list[StudyRun] = []
    made: dict[str, str] = {}
    for cell in itertools.product(*([(axis, name) for name in values] for axis, values in size.axes.items())):
        for seed in size.seeds:
            values = copy.deepcopy(base)
            for overrides in (size.overrides, *(size.axes[axis][name] for axis, name in cell), {"seed": seed}):
                for key, value in overrides.items():
                    _set(values, key, value, path)
            place = ", ".join(f"{axis} {name}" for axis, name in cell)
            params = validate_params(values, f"{path} at {place}")
            _check_figures(f"{path}: scales.{scale}", size, params)
            runs.append(_make_run(dict(cell), seed, values))
            place, fingerprint = f"{place}, seed {seed}", runs[-1].fingerprints["evaluate"]
            if fingerprint in made:
                raise UserError(
                    f"{path}: scale {scale}: {made[fingerprint]} and {place} are one run, of equal params: "
                    "change one, or take it out"
                )
            made[fingerprint] = place
    return runs


def write_params_files(run: StudyRun) -> None:
    """Write the params file of each stage of a run, once: stages are shared, so the first run's file serves all.

    Again only where the stage's own keys that change no result are others now: a stopped run is to continue with them.

    Raises:
        UserError: the disk is full, or does not take it.
    """
    for stage in run.stages.values():
        path = _params_file(stage.output)
        # In the first line, since reading all files as YAML takes seconds for a large study.
        neutral = {
            key: {name: run.values[key][name] for name in names}
            for key, names in NEUTRAL_KEYS.items()
            if key in stage.keys
        }
        mark = f"# free to change: {canonical_json(neutral)}\n"
        if not path.exists() or _first_line(path) != mark:
            try:
                make_folder(path.parent)
                with replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
                    file.write(mark)
                    YAML(typ="safe", pure=True).dump(dict(run.values), file)
            except OSError as error:
                raise UserError(f"{path}: cannot be written ({error.strerror}): check its disk or folder") from None


def _first_line(path: Path) -> str:
    with open(path, encoding="utf-8") as file:
        return file.readline()


def study_target(path: Path, scale: str, study: Study) -> str:
    """Name of the rule that runs a study: its first scale needs no suffix."""
    return f"study_{path.stem}" + ("" if scale == next(iter(study.scales)) else f"_{scale}")


def requested_studies(arguments: Sequence[str]) -> dict[str, tuple[Path, str, list[StudyRun]]]:
    """Unroll the studies that a snakemake command line asks for; each costs about a second per hundred runs.

    Args:
        arguments: of the command line. A job that Snakemake starts elsewhere names a rule `run_...` instead of a
            study; then all are unrolled.

    Returns:
        (study file, scale, runs) by target.

    Raises:
        UserError: there is no such study or scale.
    """
    inside_job = any(_RUN.match(argument) for argument in arguments)
    if not inside_job and not any(argument.startswith("study_") for argument in arguments):
        return {}
    requested, known = {}, []
    for path in sorted(STUDY_FOLDER.glob("*.yaml")):
        study = load_study(path)
        for scale in study.scales:
            # The first scale's target may name it, too.
            for target in dict.fromkeys((study_target(path, scale, study), f"study_{path.stem}_{scale}")):
                known.append(target)
                if target in arguments or (inside_job and target == study_target(path, scale, study)):
                    requested[target] = (path, scale, study_runs(path, scale))
    for argument in arguments:
        if _TARGET.fullmatch(argument) and argument not in known:
            near = difflib.get_close_matches(argument, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
            raise UserError(f"{argument}: no study of {STUDY_FOLDER}/, or no scale of it: {hint}")
    return requested


def study_stamp(path: Path, scale: str, runs: list[StudyRun]) -> str:
    """The file that shows that a study's page is complete and of these runs."""
    fingerprints = [run.fingerprints["evaluate"] for run in runs]
    recipe = canonical_json({"version": STUDY_VERSION, "study": read_yaml(path), "scale": scale, "runs": fingerprints})
    folder = REPORT_FOLDER / f"{path.stem}-{scale}"
    return f"{folder}/{stamp_name(hashlib.sha256(recipe.encode()).hexdigest())}"


def _check_axes(path: str | Path, name: str, scale: Scale, study: Study) -> None:
    """Refuse axes and values that the scale does not have, and seeds that `seeds` would replace."""
    if any(
        _SEED in overrides for overrides in (scale.overrides, *(o for v in scale.axes.values() for o in v.values()))
    ):
        raise UserError(f"{path}: scale {name}: {_SEED}: is set by seeds alone: list its values there")
    named: list[tuple[str, str | None]] = [(axis, None) for figure in scale.figures for axis in figure.axes]
    if study.contrast is not None:
        named.append((study.contrast.axis, study.contrast.baseline))
    named += [item for published in scale.published for item in published.cell.items()]
    for axis, value in named:
        if axis not in scale.axes:
            raise UserError(f"{path}: scale {name} has no axis {axis!r}: it has {', '.join(scale.axes)}")
        if value is not None and value not in scale.axes[axis]:
            raise UserError(f"{path}: scale {name}: axis {axis} has no {value!r}: it has {', '.join(scale.axes[axis])}")


def _check_figures(place: str, scale: Scale, params: Params) -> None:
    """Refuse, before anything runs, the name of a figure that an evaluation with these params does not write."""
    measured = [*figure_names(params), TRAINING_FLOPS]
    wanted: list[tuple[str, str, Sequence[str]]] = [("metrics", name, measured) for name in scale.metrics]
    for number, figure in enumerate(scale.figures):
        wanted += [(f"figures.{number}.x", figure.x, measured), (f"figures.{number}.y", figure.y, measured)]
    # Published figures may be others than ours, but must be some evaluation's.
    wanted += [(f"published.{i}.metric", entry.metric, list(METRICS)) for i, entry in enumerate(scale.published)]
    for key, name, names in wanted:
        if name not in names:
            close = difflib.get_close_matches(name, names, n=1)
            remedy = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(names)}"
            raise UserError(f"{place}.{key}: {name!r} is not a figure of an evaluation with these params: {remedy}")


def _make_run(choices: dict[str, str], seed: int, values: dict[str, Any]) -> StudyRun:
    fingerprints = expected_fingerprints(values)
    names = {stage.output: stage.name for stage in load_stages().values()}
    variables = path_variables()
    folders = {
        variable: str(RUN_FOLDER / names[path] / fingerprints[names[path]][:16])
        for variable, path in variables.items()
        if path in names
    }
    stages = {}
    for variable, output in folders.items():
        name = names[variables[variable]]
        own = {"params": str(_params_file(output)), "metrics": f"{output}.json"}
        stages[name] = load_stages(paths=folders | own)[name]
    return StudyRun(choices, seed, values, stages, fingerprints)


def _params_file(output: str) -> Path:
    return Path(f"{output}.yaml")


def _set(values: dict[str, Any], dotted: str, value: Any, path: str | Path) -> None:
    *sections, key = dotted.split(".")
    section: Any = values
    for name in sections:
        section = section.get(name) if isinstance(section, dict) else None
    if not isinstance(section, dict) or key not in section:
        raise UserError(f"{path}: {dotted}: params have no such key: correct its spelling")
    section[key] = value
