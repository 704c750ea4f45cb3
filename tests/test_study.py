"""Studies: what a grid unrolls to, what its runs share, and that a mistake in the file is one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from crt.__main__ import main
from crt.errors import UserError
from crt.params import load_params
from crt.study import load_study, requested_studies, study_runs, study_stamp, study_target, write_params_files
from tests.conftest import ROOT, write_params

SMALL = {
    "base": "params.yaml",
    "overrides": {},
    "metrics": ["psnr"],
    "figures": [],
    "axes": {"a": {"b": {}}},
    "seeds": [0],
}
STUDY = {
    "question": "?",
    "contrast": None,
    "scales": {
        "small": {
            "base": "params.yaml",
            "metrics": ["psnr"],
            "figures": [],
            "overrides": {"sample.num_images": 10},
            "axes": {
                "tokenizer": {"plain": {"lambda": 0.0}, "crt": {"lambda": 0.5, "train_tokenizer.steps": 95}},
                "generator": {"a": {"train_ar.steps": 10}, "b": {"train_ar.steps": 20}},
            },
            "seeds": [0, 1, 2],
        }
    },
}


@pytest.fixture
def study_file(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)

    def write(**changes):
        path = tmp_path / "trial.yaml"
        with open(path, "w") as file:
            YAML(typ="safe").dump(STUDY | changes, file)
        return path

    return write


def scale(**changes):
    """A study file's `scales`: one, s."""
    return {"scales": {"s": SMALL | changes}}


def in_a_folder_of_its_own(monkeypatch, folder):
    """Work where the pipeline's files stand and no results."""
    for name in ("dvc.yaml", "crt/stage_versions.yaml", "params.yaml"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text((ROOT / name).read_text())
    monkeypatch.chdir(folder)


def stages(runs):
    return {(name, run.fingerprints[name]) for run in runs for name in run.stages}


def test_every_combination_runs_and_shared_stages_run_once(study_file):
    runs = study_runs(study_file(), "small")
    # In the file's order, which is the alphabet's as YAML is written here.
    cells = [{"generator": size, "tokenizer": tokenizer} for size in "ab" for tokenizer in ("crt", "plain")]
    assert [(run.choices, run.seed) for run in runs] == [(cell, seed) for cell in cells for seed in range(3)]
    counts = {name: len({run.fingerprints[name] for run in runs}) for name in runs[0].stages}
    assert counts == {
        "prepare_data": 1,
        "train_tokenizer": 6,
        "tokenize": 6,
        "train_ar": 12,
        "sample": 12,
        "evaluate": 12,
    }
    run = next(run for run in runs if run.choices["tokenizer"] == "crt" and run.seed == 2)
    assert run.values["lambda"] == 0.5
    assert run.values["train_tokenizer"]["steps"] == 95
    assert f"--tokenizer {run.stages['train_tokenizer'].output} " in run.stages["sample"].command
    assert run.fingerprints["train_tokenizer"][:16] in run.stages["train_tokenizer"].output


def test_no_run_writes_the_params_or_metrics_of_another(study_file):
    runs = study_runs(study_file(), "small")
    evaluations = {run.stages["evaluate"].output: run.stages["evaluate"] for run in runs}
    assert len({stage.metrics for stage in evaluations.values()}) == len(evaluations) == 12
    for output, stage in evaluations.items():
        assert f"--params {output}.yaml " in stage.command and f"--metrics {output}.json" in stage.command


def test_a_value_of_an_axis_wins_over_the_overrides_of_the_scale(study_file):
    overrides, axes = {"train_ar.steps": 7}, {"a": {"b": {}, "c": {"train_ar.steps": 9}}}
    runs = study_runs(study_file(**scale(overrides=overrides, axes=axes)), "s")
    assert [run.values["train_ar"]["steps"] for run in runs] == [7, 9]


def test_runs_that_are_evaluated_otherwise_share_all_else(study_file):
    axes = {"a": {"b": {"evaluate.batch_size": 10}, "c": {"evaluate.batch_size": 20}}}
    one, two = study_runs(study_file(**scale(axes=axes)), "s")
    assert {name for name in one.stages if one.fingerprints[name] != two.fingerprints[name]} == {"evaluate"}


def test_a_page_is_current_for_its_study_and_its_runs_alone(study_file, monkeypatch):
    path = study_file()
    runs = study_runs(path, "small")
    stamp = study_stamp(path, "small", runs)
    assert study_stamp(path, "small", runs) == stamp
    assert study_stamp(path, "small", runs[:-1]) != stamp
    assert study_stamp(study_file(question="another?"), "small", runs) != stamp
    study_file()
    monkeypatch.setattr("crt.study.STUDY_VERSION", 0)
    assert study_stamp(path, "small", runs) != stamp


def test_a_value_added_to_an_axis_adds_one_branch(study_file):
    before = stages(study_runs(study_file(), "small"))
    axes = STUDY["scales"]["small"]["axes"]
    more = axes | {"generator": axes["generator"] | {"c": {"train_ar.steps": 30}}}
    after = stages(study_runs(study_file(scales={"small": STUDY["scales"]["small"] | {"axes": more}}), "small"))
    assert before < after
    assert {name for name, _ in after - before} == {"train_ar", "sample", "evaluate"}


def test_params_files_are_valid_and_written_once(study_file, monkeypatch, tmp_path):
    run = study_runs(study_file(), "small")[0]
    in_a_folder_of_its_own(monkeypatch, tmp_path)
    write_params_files(run)
    path = Path(run.stages["train_ar"].command.split("--params ")[1].split()[0])
    assert load_params(path).model_dump(by_alias=True) == run.values
    written = path.stat().st_mtime_ns
    write_params_files(run)
    assert path.stat().st_mtime_ns == written


def test_what_may_change_while_a_study_is_stopped_reaches_the_runs_that_read_it(study_file, monkeypatch, tmp_path):
    first = study_runs(study_file(), "small")[0]
    overrides = STUDY["scales"]["small"].get("overrides", {}) | {"train_ar.keep_checkpoints": 1}
    changed = study_file(scales={"small": STUDY["scales"]["small"] | {"overrides": overrides}})
    now = study_runs(changed, "small")[0]
    assert now.fingerprints == first.fingerprints
    in_a_folder_of_its_own(monkeypatch, tmp_path)
    files = {name: Path(f"{stage.output}.yaml") for name, stage in first.stages.items()}
    write_params_files(first)
    written = {name: path.stat().st_mtime_ns for name, path in files.items()}
    write_params_files(now)
    assert {name for name, path in files.items() if path.stat().st_mtime_ns != written[name]} == {"train_ar"}
    assert load_params(files["train_ar"]).train_ar.keep_checkpoints == 1


def test_the_page_of_made_up_results_names_figures_and_lines_for_people(study_file, monkeypatch, tmp_path, capsys):
    figure = {"x": "stage2_training_flops", "y": "stage2_val_loss", "lines": "lambda"}
    axes = {
        "lambda": {"0": {"lambda": 0.0}, "0.5": {"lambda": 0.5}},
        "budget": {f"{steps} steps": {"train_ar.steps": steps} for steps in (10, 20, 40, 80)},
    }
    # Twice the same over each other: each has its picture and its statements.
    again = figure | {"lines": ["lambda", "budget"]}
    changes = scale(axes=axes, figures=[figure, again], metrics=["stage2_val_loss"])
    path = study_file(contrast={"axis": "lambda", "baseline": "0"}, **changes)
    in_a_folder_of_its_own(monkeypatch, tmp_path)
    for number, run in enumerate(study_runs(path, "s")):
        if number == 3:
            assert main(["study", "--study", str(path), "--scale", "s"]) == 2
        compute = run.values["train_ar"]["steps"] * (1 + run.values["lambda"])
        metrics = {"stage2_training_flops": compute, "stage2_val_loss": 1 + compute**-0.5, "features": "classifier"}
        # A figure that not every run has, such as the similarity of images of another size.
        metrics |= {"ms_ssim": 0.5} if run.values["lambda"] else {}
        run.metrics_file.parent.mkdir(parents=True)
        run.metrics_file.write_text(json.dumps(metrics))
        losses = Path(run.stages["train_ar"].output) / "loss_per_position.csv"
        losses.parent.mkdir(parents=True)
        losses.write_text("position,loss\n1,2.0\n2,1.5\n")
    told = f"{path}: 5 of 8 runs have no results yet, such as {study_runs(path, 's')[3].metrics_file}: run "
    assert capsys.readouterr().err == f"error: {told}`snakemake --cores all study_trial`\n"
    assert main(["study", "--study", str(path), "--scale", "s"]) == 0
    page = Path("out/studies/trial-s/index.html").read_text()
    for text in (
        "<h2>validation loss of stage 2 (nats per code) over training FLOPs of stage 2</h2>",
        '<h2>Compute saved, by validation loss of stage 2 (nats per code)</h2>\n<p class="note">Between those points ',
        "</p>\n<ul>\n<li>lambda = 0.5: ",
        " less compute than lambda = 0, ",
        "<li>lambda = 0: alpha ",
        "<li>from 80 FLOPs on: lambda = 0, 80 steps (",
        "<dt><code>stage2_val_loss</code></dt><dd>validation loss of stage 2 (nats per code); lower is better</dd>",
    ):
        assert text in page
    assert page.count("<img ") == 3


def test_shipped_studies_unroll_at_every_scale(monkeypatch):
    monkeypatch.chdir(ROOT)
    for path in sorted(Path("studies").glob("*.yaml")):
        study = load_study(path)
        for scale in study.scales:
            runs = study_runs(path, scale)
            assert study_stamp(path, scale, runs).startswith(f"out/studies/{path.stem}-{scale}/complete-")
            target = study_target(path, scale, study)
            assert {name: asked[:2] for name, asked in requested_studies([target]).items()} == {target: (path, scale)}
    assert requested_studies(["--cores", "2", "all"]) == {}
    (runs,) = requested_studies(["study_lambda_cifar10_short"]).values()  # its first scale, by its own name
    assert runs[:2] == (Path("studies/lambda.yaml"), "cifar10_short")


def test_shipped_studies_of_the_digits_unroll_whatever_sweep_the_params_ask_for(monkeypatch, tmp_path):
    """Of guidance: one with the scale that the studies draw at would name it twice."""
    for name in ("crt", "dvc.yaml", "studies"):
        (tmp_path / name).symlink_to(ROOT / name)
    write_params(tmp_path / "params.yaml", {"sample.guidance_sweep": [1.0, 3.0]})
    monkeypatch.chdir(tmp_path)
    for path in sorted(Path("studies").glob("*.yaml")):
        for scale, values in load_study(path).scales.items():
            if str(values.base) == "params.yaml":
                assert study_runs(path, scale)


def test_a_job_that_names_the_rule_of_a_run_has_all_studies(study_file, monkeypatch):
    """As Snakemake starts it on a cluster."""
    path = study_file()
    monkeypatch.setattr("crt.study.STUDY_FOLDER", path.parent)
    for argument in ("run_sample_0123456789abcdef", "run_train_ar_0123456789abcdef:"):
        asked = requested_studies(["--allowed-rules", argument])
        assert {name: study[:2] for name, study in asked.items()} == {"study_trial": (path, "small")}
    path.write_text("")  # is not even read for a job of the main run, whatever its folder is called
    assert requested_studies(["--snakefile", "/scratch/run_1/Snakefile", "--report", "run_1.html", "train_ar:"]) == {}


@pytest.mark.parametrize(
    ("target", "hint"),
    [("study_lambdaa", "did you mean study_lambda[?]"), ("study_zzz", "there are study_crt_vs_baseline, ")],
)
def test_a_study_that_is_none_is_named_with_the_nearest(monkeypatch, target, hint):
    monkeypatch.chdir(ROOT)
    assert requested_studies(["--report", "study_of_mine.html", "all"]) == {}
    with pytest.raises(UserError, match=f"^{target}: no study of studies/, or no scale of it: {hint}"):
        requested_studies(["-n", target])


def test_the_digits_studies_share_their_runs(monkeypatch):
    """Their overrides are the same text in three files, since YAML knows no reference to another one."""
    monkeypatch.chdir(ROOT)
    main = stages(study_runs("studies/crt_vs_baseline.yaml", "digits"))
    control = stages(study_runs("studies/crt_vs_baseline.yaml", "digits_latents"))
    assert sum(made == "evaluate" for made, _fingerprint in main & control) == 20  # the VQGAN's
    for name, stage, shared in (
        ("scaling_law", "train_tokenizer", 10),  # two tokenizers of five seeds
        ("scaling_law", "evaluate", 30),  # three of the four sizes, at their longest budget
        ("regularizer", "evaluate", 9),  # of three seeds, width 32: the VQGAN, the codes' and the latents' regularizer
    ):
        common = (main | control) & stages(study_runs(f"studies/{name}.yaml", "digits"))
        assert sum(made == stage for made, _fingerprint in common) == shared, (name, stage)


def test_a_scale_that_a_study_does_not_have_is_refused_with_those_that_it_has(study_file, capsys):
    path = study_file(scales=dict.fromkeys(("small", "large"), SMALL))
    assert main(["study", "--study", str(path), "--scale", "nope"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"{path}: has no scale 'nope': it has " in error
    assert "small" in error and "large" in error


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"question": None}, "question: must be text, got null"),
        ({"contrast": {"axis": "a", "baseline": 0}}, "contrast.baseline: must be text, got 0: put it into quotes"),
        ({"metric": 1}, "metric: unknown key: known keys: question, contrast, scales"),
        ({"scales": {"s": SMALL | {"sed": 1}}}, "scales.s.sed: unknown key: did you mean 'seeds'?"),
        ({"contrast": {"axis": "a", "baseline": "b", "axes": "a"}}, "contrast.axes: unknown key: did you mean 'axis'?"),
        ({"contrast": {"axis": "tokenizr", "baseline": "plain"}}, "no axis 'tokenizr': it has generator, tokenizer"),
        ({"contrast": {"axis": "tokenizer", "baseline": "vq"}}, "axis tokenizer has no 'vq': it has crt, plain"),
        (
            {"scales": {"s": SMALL | {"overrides": {"train_ar.stepz": 1}}}},
            "train_ar.stepz",
        ),
        (
            {"scales": {"s": SMALL | {"overrides": {"sample.top_p": 9.0}}}},
            "sample.top_p",
        ),
        (
            scale(metrics=["psrn"]),
            "scales.s.metrics: 'psrn' is not a figure of an evaluation with these params: did you",
        ),
        (
            scale(metrics=["gfid"]),
            "'gfid' is not a figure of an evaluation with these params: there are fd_classifier_rec",
        ),
        (scale(figures=[{"x": "flops", "y": "psnr", "lines": "a"}]), "scales.s.figures.0.x: 'flops' is not a figure"),
        (scale(figures=[{"x": "training_flops", "y": "psrn", "lines": "a"}]), "figures.0.y: 'psrn' is not a figure"),
        (
            scale(published=[{"cell": {"a": "b"}, "metric": "gfdi", "value": 1.0, "source": "?"}]),
            "scales.s.published.0.metric: 'gfdi' is not a figure of an evaluation with these params: did you mean",
        ),
        (
            scale(figures=[{"x": "training_flops", "y": "psnr", "lines": ["a", "c"]}]),
            "scale s has no axis 'c': it has a",
        ),
        *(
            (scale(published=[{"cell": cell, "metric": "gfid", "value": 1.0, "source": "?"}]), expected)
            for cell, expected in (
                ({"c": "b"}, "scale s has no axis 'c': it has a"),
                ({"a": "x"}, "axis a has no 'x': it has b"),
            )
        ),
        (scale(overrides={"lambda.x": 1}), "lambda.x: params have no such key: correct its spelling"),
        (scale(overrides={"lambda.x.y": 1}), "lambda.x.y: params have no such key: correct its spelling"),
        (scale(axes={"lambda": 0}), "scales.s.axes: lambda: give each value a name and the params that it sets, as in"),
        (scale(axes={"lambda": [0.1, 0.1]}), "scales.s.axes: lambda: give each value a name and the params"),
        (scale(axes={"a": {0: {"lambda": 0.0}}}), 'scales.s.axes: a: the name 0 is not text: put it into quotes: "0"'),
        (scale(axes={"a": {None: {}}}), 'a: the name null is not text: put it into quotes: "null"'),
        *(
            (scale(axes={name: {"b": {}}}), f"s.axes: {name}: the results have a column of this name already: choose")
            for name in ("seed", "guidance_scale", "training_flops")
        ),
        (scale(axes={"a": {"b": {}}, "c": {}}), "scales.s.axes.c: too few entries: give at least 1, got {}"),
        (scale(axes={"a": {"b": {"seed": 3}}}), "scale s: seed: is set by seeds alone: list its values there"),
        (scale(overrides={"seed": 3}), "scale s: seed: is set by seeds alone: list its values there"),
        (
            scale(published=[{"cell": {"a": "b"}, "metric": "gfid", "value": float("nan"), "source": "?"}]),
            "scales.s.published.0.value: must be a finite number, got NaN",
        ),
        (scale(base="absent.yaml"), "scales.s.base: absent.yaml: cannot be read (No such file or directory): give"),
        (scale(axes={3: {"b": {}}}), 'scales.s.axes: the name 3 is not text: put it into quotes: "3"'),
        (
            scale(axes={"a": {"b": 0.1}}),
            "scales.s.axes: a: b: give the params that it sets, as in {lambda: 1.0}, or {}",
        ),
        (
            scale(axes={"a": {"x": {"lambda": 1}, "y": {"lambda": 1.0}}}),
            "scale s: a x, seed 0 and a y, seed 0 are one run, of equal params: change one, or take it out",
        ),
        (scale(seeds=[0, 0]), "scale s: a b, seed 0 and a b, seed 0 are one run"),
        ({"scales": {"my scale": SMALL}}, "'my scale' is to name a folder and a rule: use letters, digits, '_', '-'"),
        ({"scales": {"../s": SMALL}}, "'../s' is to name a folder and a rule"),
    ],
)
def test_mistakes_are_one_line_with_the_file_and_the_key(study_file, changes, expected):
    path = study_file(**changes)
    with pytest.raises(UserError) as caught:
        study_runs(path, "s")
    assert expected in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_study_file_whose_name_no_rule_can_have_is_refused(study_file):
    path = study_file()
    path = path.rename(path.with_name("my trial.yaml"))
    with pytest.raises(UserError, match="'my trial' is to name a folder and a rule"):
        load_study(path)


def test_figures_that_only_other_params_yield_may_be_compared_there(study_file):
    names = ["lpips", "ms_ssim", "gfid", "sfid_of_perfect_images", "kid", "training_flops", "guidance_scale"]
    overrides = {"evaluate.lpips": True, "evaluate.features": "inception"} | {
        f"{section}.image_size": 256 for section in ("prepare_data", "train_tokenizer")
    }
    study_runs(study_file(**scale(metrics=names, overrides=overrides)), "s")


def test_params_files_that_cannot_be_written_are_one_line(study_file, monkeypatch, tmp_path):
    run = study_runs(study_file(), "small")[0]
    monkeypatch.chdir(tmp_path)
    Path("out").touch()
    with pytest.raises(UserError, match=r"^out/runs/.*yaml: cannot be written [(]Not a directory[)]: check its disk"):
        write_params_files(run)
