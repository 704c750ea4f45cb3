"""The smallest real run of the whole pipeline, through both engines, and what each recognises of the other's results.

One project folder is made once, as a user would have it (a git repository with DVC), and the tests go through
its life in order: run, change, run with the other engine, copy, kill. One core for both engines: the bytes of a
network trained on a CPU depend on the number of threads, which Snakemake sets to the cores it was given.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from crt.__main__ import STAGES
from crt.pipeline import load_stages, plot_files
from tests.conftest import ROOT, TINY, write_params

NAMES = (
    "fd_classifier_rec",
    "fd_classifier_gen",
    "psnr",
    "codebook_usage",
    "bits_per_image",
    "stage2_val_loss",
    "class_agreement",
)
RESULTS = ("data/prepared", "out", "metrics.json")


class Project:
    """A clone of this repository with its own params."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.params = root / "params.yaml"
        self.environment = os.environ | {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(root),
            "GIT_AUTHOR_NAME": "t", "GIT_AUTHOR_EMAIL": "t@t", "GIT_COMMITTER_NAME": "t", "GIT_COMMITTER_EMAIL": "t@t",
        }  # fmt: skip

    def run(self, *command: str, status: int = 0) -> str:
        """Run a command in the project, check its exit status, and return all that it printed."""
        result = subprocess.run(
            command, cwd=self.root, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            check=False,
        )  # fmt: skip
        assert result.returncode == status, f"{command} ended with {result.returncode}:\n{result.stdout}"
        return result.stdout

    def planned(self) -> set[str]:
        """Stages that Snakemake would run."""
        text = self.run("snakemake", "--cores", "1", "-n", "all")
        return set(re.findall(r"^rule (\w+):", text, re.MULTILINE)) - {"all"}

    def contents(self) -> dict[str, str]:
        """Content digest of each stage's result."""
        stages = load_stages(self.root).values()
        return {s.name: json.loads((self.root / s.output / "manifest.json").read_text())["content"] for s in stages}

    def command(self, stage: str) -> list[str]:
        return load_stages(self.root)[stage].command.split()


def make_project(root: Path, changes: dict) -> Project:
    files = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\0")
    for name in filter(None, files):
        if name in ("dvc.lock", "metrics.json") or not (ROOT / name).exists():
            continue
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, root / name, follow_symlinks=False)
    project = Project(root)
    write_params(project.params, changes)
    project.run("git", "init", "-q")
    project.run("git", "add", "-A")
    project.run("git", "commit", "-qm", "start")
    return project


def wait(condition: Callable[[], bool], process: subprocess.Popen | None = None) -> None:
    """Poll; fails where it takes too long, or where the process ends first."""
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        assert process is None or process.poll() is None, "ended before it was seen"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Project:
    project = make_project(tmp_path_factory.mktemp("project"), TINY)
    project.run("snakemake", "--cores", "1", "all")
    return project


def test_both_engines_show_the_figures_of_dvc_yaml(project):
    """Oracle: the list in dvc.yaml. Snakemake's report has what evaluate draws, the page and its curves among it."""
    project.run("dvc", "plots", "show")
    page = (project.root / "dvc_plots/index.html").read_text()
    project.run("snakemake", "--report", "report.zip")
    with zipfile.ZipFile(project.root / "report.zip") as archive:
        names = [Path(name).name for name in archive.namelist()]
    assert "report.html" in names
    for path, title in plot_files(project.root).items():
        if path.startswith("out/evaluation/"):
            assert Path(path).name in names
        if path.endswith(".png"):
            assert f"workspace_{path.replace('/', '_')}" in page
        else:
            assert all(name in page for name in title.split("; "))


def test_results_and_pictures_are_there(project):
    metrics = json.loads((project.root / "metrics.json").read_text())
    for name in NAMES:
        assert isinstance(metrics[name], (int, float)), name
    assert "ssim" in metrics or "ms_ssim" in metrics
    assert not {"rfid", "gfid"} & set(metrics), "a classifier's distance must not be called FID"
    for name in ("samples.png", "reconstructions.png"):
        with Image.open(project.root / "out/evaluation" / name) as image:
            assert len(image.convert("RGB").getcolors(2**24)) > 2
    text = project.run("python", "-m", "crt", "results")
    assert "class_agreement" in text
    assert "out/evaluation/samples.png" in text
    lines = text.splitlines()
    # One column, however long a picture's name.
    assert len({line.index("out/evaluation/") for line in lines if "out/evaluation/" in line}) == 1
    assert project.run("python", "-m", "crt", "status").count(" current ") == len(STAGES)


def test_every_stage_leaves_a_log_with_rate_and_time(project):
    for stage in load_stages(project.root).values():
        log = (project.root / stage.log).read_text()
        assert re.search(r"\d+/\d+ \w+ \(100%\), [\d.e+]+ \w+/s, took ", log), log
        assert f"{stage.name}: done in" in log


def test_snakemake_tells_once_of_a_result_that_is_damaged_behind_its_stamp(project):
    kinds = (
        ("manifest.json", Path.unlink, "missing or damaged"),
        ("model.safetensors", lambda path: os.truncate(path, 5), r"has 5 bytes instead of \d+"),
    )
    try:
        # Where it has jobs to run, too.
        write_params(project.params, {"evaluate.neighbours": 4}, base=project.params)
        for name, damage, message in kinds:
            path = project.root / "out/tokenizer" / name
            content = path.read_bytes()
            damage(path)
            try:
                for options in ((), ("-n",)):
                    text = project.run("snakemake", "--cores", "1", "train_ar", *options)
                    assert "Nothing to be done" in text
                    assert re.search(
                        f"^warning: out/tokenizer/{name}: {message}: delete out/tokenizer and run `snakemake --cores "
                        "all train_tokenizer` or `dvc repro train_tokenizer`$",
                        text,
                        re.MULTILINE,
                    )
                assert project.run("snakemake", "--cores", "1", "all", status=1).count("warning: ") == 1
                assert project.run("python", "-m", "crt", "status", status=1).count(" stale ") > 0
            finally:
                path.write_bytes(content)
    finally:
        # Snakemake has deleted what evaluate had made.
        write_params(project.params, {"evaluate.neighbours": 3}, base=project.params)
        project.run("snakemake", "--cores", "1", "all")
    assert "warning" not in project.run("snakemake", "--cores", "1", "all")


def test_a_comment_reruns_nothing(project):
    project.params.write_text(project.params.read_text() + "# a remark\n")
    assert project.planned() == set()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"sample.guidance_scale": 3.0}, {"sample", "evaluate"}),
        ({"train_ar.model.layers": 2}, {"train_ar", "sample", "evaluate"}),
        ({"lambda": 0.3}, {"train_tokenizer", "tokenize", "train_ar", "sample", "evaluate"}),
    ],
)
def test_a_changed_key_reruns_what_depends_on_it(project, changes, expected):
    before = project.params.read_text()
    write_params(project.params, changes, base=project.params)
    try:
        assert project.planned() == expected
    finally:
        project.params.write_text(before)


def test_stale_inputs_are_refused_with_the_renewing_command(project):
    before = project.params.read_text()
    write_params(project.params, {"lambda": 0.3}, base=project.params)
    try:
        text = project.run(*project.command("sample"), status=2)
        assert "Traceback" not in text
        assert "train_tokenizer was run with lambda = 0.5, params.yaml now says 0.3" in text
        assert "`dvc repro train_tokenizer`" in text
        lines = project.run("python", "-m", "crt", "status", status=1).splitlines()
        assert [line.count("stale") for line in lines] == [0, 1, 1, 1, 1, 1]  # all but prepare_data
        project.run("python", "-m", "crt", "results", status=2)
    finally:
        project.params.write_text(before)


def test_dvc_recognises_what_snakemake_made(project):
    before = project.contents()
    text = project.run("dvc", "repro")
    assert text.count("is current") == len(STAGES)
    assert project.contents() == before
    assert "up to date" in project.run("dvc", "status")
    assert "class_agreement" in project.run("dvc", "metrics", "show")


def test_dvc_does_not_record_a_damaged_result_and_brings_back_the_sound_one(project):
    path, lock = project.root / "out/tokenizer/model.safetensors", (project.root / "dvc.lock").read_text()
    sound = path.read_bytes()
    path.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
    assert "out/tokenizer/model.safetensors: damaged: " in (text := project.run("dvc", "repro", status=255))
    assert "restore it (move it away, then `dvc checkout out/tokenizer`), or delete out/tokenizer" in text
    assert (project.root / "dvc.lock").read_text() == lock
    path.unlink()
    project.run("dvc", "checkout", "out/tokenizer")
    assert path.read_bytes() == sound
    assert "Running stage" not in project.run("dvc", "repro")


def test_snakemake_recognises_what_dvc_made(project):
    write_params(project.params, {"sample.temperature": 0.7}, base=project.params)
    text = project.run("dvc", "repro")
    assert set(re.findall(r"Running stage '(\w+)'", text)) == {"sample", "evaluate"}
    assert "is current" not in text
    assert project.planned() == set()
    project.run("git", "add", "-A")
    project.run("git", "commit", "-qm", "temperature")


def test_a_fresh_clone_with_copied_results_is_current_in_both_engines(project, tmp_path):
    project.run("git", "clone", "-q", str(project.root), str(tmp_path / "clone"))
    clone = Project(tmp_path / "clone")
    (clone.root / "dvc.lock").unlink()
    for name in RESULTS:
        source = project.root / name
        # copytree without times: files appear in any order, as a download would leave them
        (shutil.copytree if source.is_dir() else shutil.copyfile)(
            source,
            clone.root / name,
            **({"copy_function": shutil.copyfile, "dirs_exist_ok": True} if source.is_dir() else {}),
        )
    assert clone.planned() == set()
    assert clone.run("dvc", "repro").count("is current") == len(STAGES)
    assert "up to date" in clone.run("dvc", "status")
    assert clone.planned() == set()


def test_results_pushed_to_a_remote_are_current_where_they_are_pulled(project, tmp_path):
    project.run("dvc", "remote", "add", "--default", "storage", str(tmp_path / "remote"))
    project.run("git", "commit", "-qam", "remote")
    project.run("dvc", "push")
    project.run("git", "clone", "-q", str(project.root), str(tmp_path / "clone"))
    clone = Project(tmp_path / "clone")
    assert clone.planned() == set(load_stages(project.root))
    clone.run("dvc", "pull")
    assert clone.contents() == project.contents()
    assert clone.planned() == set()
    assert clone.run("python", "-m", "crt", "status").count(" current ") == len(STAGES)
    assert "up to date" in clone.run("dvc", "status")
    assert "Running stage" not in clone.run("dvc", "repro")


def test_an_experiment_shows_the_effect_of_lambda(project):
    project.run("dvc", "exp", "run", "-S", "lambda=0.0", "-S", "train_ar.steps=10")
    row = json.loads(project.run("dvc", "metrics", "diff", "--json"))["metrics.json"]
    assert row["psnr"]["old"] != row["psnr"]["new"]
    assert row["stage2_val_loss"]["old"] != row["stage2_val_loss"]["new"]
    shown = project.run("dvc", "exp", "show", "--csv")
    assert "lambda" in shown
    assert "stage2_val_loss" in shown
    assert project.planned() == set()
    project.run("git", "checkout", "-q", "params.yaml", "dvc.lock", "metrics.json")


def test_going_back_to_older_params_never_passes_the_newer_results_off(project):
    assert project.planned() == {"train_tokenizer", "tokenize", "train_ar", "sample", "evaluate"}
    assert "stale" in project.run("python", "-m", "crt", "status", status=1)
    # DVC has the older results in its cache: no stage computes anything.
    project.run("dvc", "checkout")
    assert project.planned() == set()


def test_a_killed_stage_leaves_no_result_and_ends_with_the_same_bytes(project):
    before = project.contents()
    shutil.rmtree(project.root / "out/ar")
    process = subprocess.Popen(project.command("train_ar"), cwd=project.root, env=project.environment)
    wait(lambda: any((project.root / "out/.work").glob("ar-*/checkpoints/*/complete.json")), process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (project.root / "out/ar").exists()
    assert project.planned() == {"train_ar", "sample", "evaluate"}
    assert "out/ar: not found" in project.run(*project.command("sample"), status=2)
    project.run("snakemake", "--cores", "1", "all")
    assert "continues at" in (project.root / "out/ar.log").read_text()
    assert project.contents() == before


@pytest.mark.parametrize("options", [(), ("--rerun-incomplete",)], ids=["plain", "rerun-incomplete"])
def test_a_stage_that_ends_after_snakemake_was_killed_is_not_run_again(project, options):
    shutil.rmtree(project.root / "out/ar")
    command = ["snakemake", "--cores", "1", "train_ar", *options]
    process = subprocess.Popen(command, cwd=project.root, env=project.environment, stderr=subprocess.DEVNULL)
    wait(lambda: any((project.root / "out/.work").glob("ar-*/checkpoints/*/complete.json")), process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    wait((project.root / "out/ar").exists)
    wait(lambda: not any((project.root / "out/.work").glob("ar-*")))
    made = (project.root / "out/ar/manifest.json").stat().st_mtime_ns
    project.run("snakemake", "--unlock")
    assert "Nothing to be done" in project.run(*command)
    # A job that was in a queue meanwhile: Snakemake deletes the stamp when it starts.
    next((project.root / "out/ar").glob("complete-*")).unlink()
    assert "train_ar: out/ar is current" in project.run(*command)
    assert (project.root / "out/ar/manifest.json").stat().st_mtime_ns == made
    if not options:
        assert "train_ar: done in" in project.run(*command, "--force")
        assert (project.root / "out/ar/manifest.json").stat().st_mtime_ns != made


def change_while_training(project, command: list[str], value: float) -> str:
    """Run an engine, and write another value of label_dropout once it trains; returns what it printed."""
    process = subprocess.Popen(
        command, cwd=project.root, env=project.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    wait(lambda: any((project.root / "out/.work").glob("ar-*/checkpoints/*/complete.json")), process)
    write_params(project.params, {"train_ar.model.label_dropout": value}, base=project.params)
    text, _ = process.communicate()
    assert process.returncode
    return text


def test_a_value_changed_while_a_stage_runs_is_not_recorded_as_its_own(project):
    message = (
        "params.yaml: train_ar.model.label_dropout changed from {} to {} while train_ar ran: out/ar holds the result "
        "of the old value: run the same command again"
    )
    write_params(project.params, {"train_ar.model.label_dropout": 0.2}, base=project.params)
    lock = (project.root / "dvc.lock").read_text()
    text = change_while_training(project, ["dvc", "repro", "train_ar"], 0.3)
    assert message.format(0.2, 0.3) in text
    assert (project.root / "dvc.lock").read_text() == lock
    assert "train_ar: done in" in project.run("dvc", "repro", "train_ar")
    manifest = json.loads((project.root / "out/ar/manifest.json").read_text())
    assert manifest["params"]["train_ar"]["model"]["label_dropout"] == 0.3
    # Snakemake deletes the stamp of a job that failed.
    write_params(project.params, {"train_ar.model.label_dropout": 0.4}, base=project.params)
    text = change_while_training(project, ["snakemake", "--cores", "1", "train_ar"], 0.5)
    assert message.format(0.4, 0.5) in text
    write_params(project.params, {"train_ar.model.label_dropout": 0.4}, base=project.params)
    assert "train_ar: out/ar is current" in project.run("snakemake", "--cores", "1", "train_ar")


def test_the_remedy_for_a_stale_result_works_where_dvc_has_recorded_it_as_current(project):
    write_params(project.params, {"train_ar.model.label_dropout": 0.6}, base=project.params)
    project.run("dvc", "commit", "-f", "train_ar")
    assert "Stage 'train_ar' didn't change, skipping" in project.run("dvc", "repro", "train_ar")
    text = project.run(*project.command("sample"), status=2)
    (remedy,) = re.findall(r"\(`(.*)` where DVC skips it\)", text)
    assert "train_ar: done in" in project.run(*remedy.split())
    assert "out/ar: stale" not in project.run("python", "-m", "crt", "status", status=1)
    assert "didn't change, skipping" in project.run("dvc", "repro", "train_ar")


def test_make_clean_leaves_nothing_of_a_stage(tmp_path):
    """What stages put beside their folders goes too, and nothing else."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    for stage in load_stages().values():
        (tmp_path / stage.output).mkdir(parents=True)
        for ending in (".log", ".cost.json"):
            (tmp_path / f"{stage.output}{ending}").touch()
    (tmp_path / "data" / "prepared.tar").touch()
    subprocess.run(["make", "clean"], cwd=tmp_path, check=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["Makefile", "data"]
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["prepared.tar"]
