"""crt/pipeline.py against DVC's own reading of dvc.yaml, and the two engines' graphs against each other."""

from __future__ import annotations

import copy
import os
import re
import shutil
import subprocess
import sys

import pytest
from dvc.repo import Repo

from crt.__main__ import STAGES
from crt.params import load_params
from crt.pipeline import PARAMS_FILE, canonical_json, expected_fingerprints, load_stages, plot_files
from crt.yaml_files import read_yaml
from tests.conftest import ROOT, override, raise_version


def test_stages_are_read_as_dvc_reads_them():
    ours = load_stages(ROOT)
    index = {stage.name: stage for stage in Repo(str(ROOT)).index.stages if stage.name}
    assert list(ours) == list(STAGES)
    assert set(ours) == set(index)
    for name, stage in ours.items():
        theirs = index[name]
        assert stage.command == theirs.cmd
        assert {str(dep) for dep in theirs.deps} - {PARAMS_FILE, "crt/stage_versions.yaml"} == set(stage.inputs)
        assert [str(out) for out in theirs.outs] == [stage.output, *stage.metrics]
        keys = {str(params): tuple(params.params) for params in theirs.params}
        assert keys == {PARAMS_FILE: stage.keys, "crt/stage_versions.yaml": (name,)}


def test_both_engines_show_the_same_stages_and_edges():
    run = {"cwd": ROOT, "capture_output": True, "text": True}
    dvc_text = subprocess.run([sys.executable, "-m", "dvc", "dag", "--mermaid"], check=True, **run).stdout
    smk_text = subprocess.run(
        [sys.executable, "-m", "snakemake", "--cores", "1", "--rulegraph", "mermaid-js"], check=True, **run
    ).stdout

    def edges(text: str, label: str, arrow: str) -> tuple[set[str], set[tuple[str, str]]]:
        names = dict(re.findall(label, text))
        return set(names.values()), {(names[a], names[b]) for a, b in re.findall(arrow, text)}

    dvc_names, dvc_edges = edges(dvc_text, r'(node\d+)\["(\w+)"\]', r"(node\d+)-->(node\d+)")
    smk_names, smk_edges = edges(smk_text, r"(id\d+)\[(\w+)\]", r"(id\d+) --> (id\d+)")
    assert dvc_names == smk_names - {"all"} == set(load_stages(ROOT))
    assert dvc_edges == {(a, b) for a, b in smk_edges if b != "all"}
    assert len(dvc_edges) == 11


@pytest.mark.parametrize(
    ("change", "changed"),
    [
        ({"sample.guidance_scale": 3.0}, {"sample", "evaluate"}),
        ({"lambda": 0.25}, {"train_tokenizer", "tokenize", "train_ar", "sample", "evaluate"}),
        ({"train_ar.model.layers": 2}, {"train_ar", "sample", "evaluate"}),
        ({"evaluate.batch_size": 10}, {"evaluate"}),
        ({"prepare_data.val_fraction": 0.3}, set(STAGES)),
        ({"prepare_data.images_per_shard": 7}, set(STAGES)),
        ({"train_tokenizer.validate_every": 7}, set(STAGES) - {"prepare_data"}),
        ({"train_ar.validate_every": 7}, {"train_ar", "sample", "evaluate"}),
        # What no result shows, and what is another spelling of the same value.
        ({"prepare_data.max_rejected_fraction": 0.9, "train_tokenizer.checkpoint_every": 7}, set()),
        ({"train_ar.checkpoint_every": 7, "train_ar.keep_checkpoints": 7, "train_ar.sample_images": 7}, set()),
        ({"train_tokenizer.loss.pixel_weight": 1}, set()),
    ],
)
def test_a_changed_key_changes_exactly_the_fingerprints_downstream(change, changed):
    values = read_yaml(ROOT / PARAMS_FILE)
    before = expected_fingerprints(values, ROOT)
    after = expected_fingerprints(override(copy.deepcopy(values), change), ROOT)
    assert {name for name in before if before[name] != after[name]} == changed


def test_a_raised_version_changes_exactly_the_fingerprints_downstream(tmp_path):
    (tmp_path / "crt").mkdir()
    shutil.copy(ROOT / "dvc.yaml", tmp_path)
    raise_version("train_ar", tmp_path)
    values = read_yaml(ROOT / PARAMS_FILE)
    before, after = expected_fingerprints(values, ROOT), expected_fingerprints(values, tmp_path)
    assert {name for name in before if before[name] != after[name]} == {"train_ar", "sample", "evaluate"}


def test_fingerprints_do_not_depend_on_how_the_params_were_read():
    assert expected_fingerprints(read_yaml(ROOT / PARAMS_FILE), ROOT) == expected_fingerprints(
        load_params(ROOT / PARAMS_FILE).model_dump(by_alias=True), ROOT
    )


def test_canonical_json_has_one_spelling_per_value():
    assert (
        canonical_json({"b": 1.0, "a": [True, None, 2.0]})
        == canonical_json({"a": (True, None, 2), "b": 1})
        == '{"a":[true,null,2],"b":1}'
    )
    with pytest.raises(ValueError, match="JSON"):
        canonical_json(float("inf"))


def test_a_file_of_plots_bears_what_each_of_them_shows(tmp_path):
    plots = "[out/code_usage.png, {loss: {x: step, y: {a.csv: loss, b.csv: loss}}}, {usage: {y: {a.csv: usage}}}]"
    (tmp_path / "dvc.yaml").write_text(f"plots: {plots}\n")
    titles = {"out/code_usage.png": "code usage", "a.csv": "loss; usage", "b.csv": "loss"}
    assert plot_files(tmp_path) == titles


def test_values_of_snakemakes_config_are_refused_not_passed_over():
    command = [sys.executable, "-m", "snakemake", "--cores", "1", "-n", "--config", "lambda=0.3"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "error: --config lambda: values stand in params.yaml alone" in done.stderr


def test_a_dry_run_of_a_study_writes_nothing_and_a_file_in_the_place_of_results_is_one_line(tmp_path):
    for name in ("Snakefile", "crt", "dvc.yaml", "params.yaml", "studies"):
        (tmp_path / name).symlink_to(ROOT / name)
    command = [sys.executable, "-m", "snakemake", "--cores", "1", "-n", "study_crt_vs_baseline"]
    run = {"cwd": tmp_path, "env": os.environ | {"PYTHONPATH": str(ROOT)}, "capture_output": True, "text": True}
    assert "This was a dry-run" in subprocess.run(command, check=True, **run).stdout
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "runs").touch()
    done = subprocess.run(command, check=False, **run)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == ("error: out/runs: is not a folder: move it away, or choose another place")
    assert "Traceback" not in done.stderr
