"""Each key of params.yaml, changed alone: which stages its new value makes stale, in the terms of both engines.

Oracle: dvc.yaml as it stands, whose params name the sections that a stage reads and whose deps name its inputs. No
stage is run, and DVC's records are made up.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import pytest
from dvc.repo import Repo
from ruamel.yaml import YAML

from crt.params import Params, validate_params
from crt.pipeline import expected_fingerprints
from crt.yaml_files import read_yaml
from tests.conftest import ROOT, override

VALUES = read_yaml(ROOT / "params.yaml")
STAGES = YAML(typ="safe").load(ROOT / "dvc.yaml")["stages"]
# What no result shows: these may be changed at any time, and the run continues.
NEUTRAL = {
    "prepare_data.max_rejected_fraction",
    "train_tokenizer.checkpoint_every",
    "train_ar.checkpoint_every",
    "train_ar.keep_checkpoints",
    "train_ar.sample_images",
}
# Where half of a number or another name is no valid value, or not without other keys: that value, and those keys.
OTHERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "prepare_data.source": ("cifar10", {}),
    "prepare_data.path": ("a", {"prepare_data.source": "cifar10"}),
    "prepare_data.image_size": (32, {"train_tokenizer.image_size": 32}),
    "prepare_data.max_images_per_class": (9, {}),
    "train_tokenizer.image_size": (8, {"prepare_data.storage": "encoded"}),
    "train_tokenizer.quantizer.revive_after_steps": (None, {}),
    "train_tokenizer.regularizer.betas": ([0.5, 0.6], {}),
    "train_tokenizer.discriminator.kind": ("stylegan", {"train_tokenizer.discriminator.start_step": 9}),
    "train_tokenizer.architecture.channel_multipliers": ([1, 2, 2], {}),
    "tokenize.views": (["flip"], {}),
    "train_ar.micro_batch_size": (8, {}),
    "train_ar.zero_stage": (2, {}),
    "train_ar.offload": ("optimizer", {}),
    "sample.labels": ([3], {}),
    "sample.guidance_scale": (3.0, {}),
    "sample.guidance_interval": ([0.0, 0.5], {}),
    "sample.guidance_sweep": ([1.0], {}),
    "sample.top_k": (9, {}),
    "sample.export": (["npz"], {}),
    "evaluate.image_size": (32, {"evaluate.features": "inception"}),
    "evaluate.generation_reference": ("train", {}),
}


def leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every key that has a value of its own, dotted; a list is one value."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def another(key: str, value: Any) -> tuple[Any, dict[str, Any]]:
    """Another valid value of a key, and what other keys must be for it."""
    if key in OTHERS:
        return OTHERS[key]
    if isinstance(value, bool):
        return not value, {}
    if isinstance(value, int):
        return max(value // 2, 1) if value != 1 else 2, {}
    if isinstance(value, float):
        return value / 2 or 0.5, {}
    if isinstance(value, list):
        return [entry / 2 for entry in value], {}
    if value is None:
        return "a", {}
    kind: Any = Params
    for part in key.split("."):
        kind = next(field.annotation for name, field in kind.model_fields.items() if (field.alias or name) == part)
    return next(name for name in get_args(kind) if name not in (value, "none")), {}


def readers(*keys: str) -> set[str]:
    """The stages whose params in dvc.yaml name the section of one of the keys."""
    sections = {key.partition(".")[0] for key in keys}
    return {name for name, stage in STAGES.items() if sections & set(stage["params"][:-1])}


def with_all_after(names: set[str]) -> set[str]:
    """Stages, and those that read their outputs or those of such, in the order of dvc.yaml."""
    made: set[str] = set()
    for name, stage in STAGES.items():
        if name in names or made & set(stage.get("deps", [])):
            made |= {next(iter(out)) for out in stage["outs"]}
            names = names | {name}
    return names


@pytest.fixture(scope="module")
def before() -> dict[str, str]:
    return expected_fingerprints(VALUES, ROOT)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Repo:
    """A project whose dvc.lock records params.yaml's values for each stage."""
    root: Path = tmp_path_factory.mktemp("recorded")
    (root / "crt").mkdir()
    for name in ("dvc.yaml", "params.yaml", "crt/stage_versions.yaml"):
        (root / name).write_bytes((ROOT / name).read_bytes())
    repo = Repo.init(str(root), no_scm=True)
    for stage in repo.index.stages:
        stage.save_deps(allow_missing=True)
        stage.dump(update_pipeline=False)
    return Repo(str(root))


@pytest.mark.parametrize(("key", "value"), leaves(VALUES), ids=[key for key, _ in leaves(VALUES)])
def test_a_changed_key_makes_stale_what_dvc_yaml_says(
    before: dict[str, str], recorded: Repo, key: str, value: Any
) -> None:
    new, others = another(key, value)
    assert new != value
    changed = override(copy.deepcopy(VALUES), {**others, key: new})
    values = validate_params(changed, "params.yaml").model_dump(by_alias=True)
    direct = readers(key, *others)
    # Snakemake asks for stamps that bear the fingerprints.
    after = expected_fingerprints(values, ROOT)
    stale = {stage for stage in before if before[stage] != after[stage]}
    assert stale == (set() if key in NEUTRAL else with_all_after(direct))
    # DVC looks at the params of each stage, and at what lies there.
    with open(Path(recorded.root_dir) / "params.yaml", "w", encoding="utf-8") as file:
        YAML().dump(values, file)
    told = {stage.name for stage in recorded.index.stages if any(dep.workspace_status() for dep in stage.params)}
    assert told == direct
