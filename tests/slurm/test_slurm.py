"""The Slurm profile on a real Slurm of two nodes: every stage as a job, and what happens when jobs and nodes die.

`make slurm-test` installs Slurm from Debian's packages where it can and runs this; without root it skips. One
project is made, and the tests go through its life in order: training is disturbed in every way while it runs, then
the rest of the pipeline follows. The oracle is the same pipeline run once without Slurm and without disturbance.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from tests.conftest import TINY, write_params
from tests.slurm.cluster import Cluster, why_not
from tests.test_end_to_end import Project, make_project

pytestmark = [pytest.mark.slurm, pytest.mark.skipif(why_not() is not None, reason=str(why_not()))]

# Of stage 1's training without a disturbance: enough for five of them, also after a slow measurement.
TRAINING_SECONDS, LEAST_STEPS = 75, 500
TWO_NODES = {"mpi": "srun", "nodes": 2, "tasks": 2}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with Cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def changes(tmp_path_factory) -> dict[str, Any]:
    """Params of a run whose stage 1 lasts long enough on a machine of any speed."""
    some = {"train_tokenizer.steps": 100, "train_tokenizer.validate_every": 100}
    project = make_project(tmp_path_factory.mktemp("rate"), TINY | some)
    project.run("snakemake", "--cores", "1", "train_tokenizer")
    rate = float(re.findall(r"([\d.e+]+) steps/s, took", (project.root / "out/tokenizer.log").read_text())[-1])
    steps = max(round(rate * TRAINING_SECONDS), LEAST_STEPS)
    return TINY | {
        "train_tokenizer.steps": steps,
        "train_tokenizer.checkpoint_every": 10,
        "train_tokenizer.validate_every": steps,
    }


@pytest.fixture(scope="module")
def undisturbed(changes, tmp_path_factory) -> Iterator[tuple[Project, subprocess.Popen[bytes]]]:
    """The same params on this machine without Slurm, beside the other run: on a core that one leaves free."""
    project = make_project(tmp_path_factory.mktemp("local"), changes)
    process = subprocess.Popen(["snakemake", "--cores", "1", "all"], cwd=project.root, env=project.environment)
    yield project, process
    process.terminate()  # Snakemake ends its stage with itself


@pytest.fixture(scope="module")
def reference(undisturbed) -> Project:
    """The result of the undisturbed run."""
    project, process = undisturbed
    assert process.wait(900) == 0
    return project


class SlurmProject(Project):
    """A clone whose owner has edited the profile for the cluster at hand: no GPUs, little memory, one core a task."""

    def __init__(self, root: Path, changes: dict[str, Any]) -> None:
        super().__init__(make_project(root, changes).root)
        path = root / "workflow/profiles/slurm/config.yaml"
        yaml = YAML()
        profile = yaml.load(path.read_text())
        profile["default-resources"] |= {"mem_mb": 3000, "cpus_per_task": 1, "runtime": 15}
        profile["set-resources"] = {"tokenize": TWO_NODES, "sample": TWO_NODES, "evaluate": TWO_NODES}
        profile |= {"slurm-init-seconds-before-status-checks": 3, "seconds-between-status-checks": 3}
        with open(path, "w") as file:
            yaml.dump(profile, file)
        self.output = root.parent / "snakemake.out"
        self.controller: subprocess.Popen[bytes] | None = None

    def start(self, target: str) -> None:
        """Start Snakemake in the background; what it prints is appended to `output`."""
        with open(self.output, "ab") as file:
            self.controller = subprocess.Popen(
                ["snakemake", "--profile", "slurm", target],
                cwd=self.root, env=self.environment, stdout=file, stderr=file,
            )  # fmt: skip

    def finish(self) -> None:
        """Wait for Snakemake's good end."""
        assert self.controller is not None
        assert self.controller.wait(900) == 0, self.output.read_text()[-5000:]

    def log(self, output: str) -> str:
        path = self.root / f"{output}.log"
        return path.read_text() if path.exists() else ""

    def wait(self, condition: Callable[[], object], what: str) -> None:
        """Poll; fails with Snakemake's output."""
        deadline = time.monotonic() + 600
        while not condition():
            assert time.monotonic() < deadline, f"{what}: waited in vain:\n{self.output.read_text()[-3000:]}"
            assert self.controller is None or not self.controller.poll(), self.output.read_text()[-5000:]
            time.sleep(0.2)

    def training_job(self) -> str:
        """Wait until stage 1 has saved a checkpoint since its last start; returns the id of its job."""
        starts = len(re.findall(r"starts, recipe", self.log("out/tokenizer")))
        checkpoints = list((self.root / "out/.work").glob("tokenizer-*/checkpoint.pt"))
        before = checkpoints[0].stat().st_mtime_ns if checkpoints else 0

        def saved() -> bool:
            found = list((self.root / "out/.work").glob("tokenizer-*/checkpoint.pt"))
            return bool(found) and found[0].stat().st_mtime_ns != before

        self.wait(
            lambda: saved() and len(re.findall("starts, recipe", self.log("out/tokenizer"))) >= starts, "training"
        )
        return re.findall(r"Slurm job (\d+)\n", self.log("out/tokenizer"))[-1]

    def wait_for_restart(self, disturb: Callable[[], object]) -> None:
        """Disturb stage 1, and wait until it has continued from a later step than ever before."""
        before = self.continued()
        disturb()
        self.wait(lambda: len(self.continued()) > len(before), "stage 1 to continue")
        steps = self.continued()
        assert steps == sorted(set(steps)), f"a restart lost work: {steps}"

    def continued(self) -> list[int]:
        """The steps from which stage 1 has continued."""
        return [int(step) for step in re.findall(r"continues at (\d+) of", self.log("out/tokenizer"))]


def slurm(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def project(cluster, changes, undisturbed, tmp_path_factory) -> SlurmProject:
    project = SlurmProject(tmp_path_factory.mktemp("project") / "clone", changes)
    project.start("train_tokenizer")
    yield project
    if project.controller is not None and project.controller.poll() is None:
        project.controller.kill()


def test_a_job_at_its_time_limit_saves_is_requeued_and_continues(project):
    job = project.training_job()

    def expire() -> None:
        # Slurm counts limits in minutes; --signal lies further ahead than that, so the warning comes at once.
        slurm("scontrol", "update", f"JobId={job}", "TimeLimit=1")
        project.wait(lambda: "goes back into the queue" in project.log("out/tokenizer"), "the warning")
        project.wait(lambda: "Restarts=1" in slurm("scontrol", "show", "job", job), "the requeue")
        slurm("scontrol", "update", f"JobId={job}", "TimeLimit=15")

    project.wait_for_restart(expire)
    assert "stopped by SIGTERM" in project.log("out/tokenizer")
    assert project.training_job() == job


def test_a_preempted_job_is_requeued_and_continues(project, cluster):
    """A job of a higher partition takes both nodes."""
    job = project.training_job()

    def preempt() -> None:
        command = ["sbatch", "--parsable", "-p", "urgent", "-N2", "--exclusive", "--wrap", "sleep 1", "-o", "/dev/null"]
        urgent = slurm(*command).strip()
        project.wait(lambda: "COMPLETED" in slurm("scontrol", "show", "job", urgent), "the urgent job")

    project.wait_for_restart(preempt)
    assert project.training_job() == job
    assert "Restarts=2" in slurm("scontrol", "show", "job", job)


def test_a_node_that_dies_costs_the_job_but_not_its_work(project, cluster):
    job = project.training_job()

    def crash() -> None:
        node = slurm("squeue", "-h", "-j", job, "-o", "%N").strip()
        cluster.kill_node(node)
        project.wait(lambda: "JobState=RUNNING" not in slurm("scontrol", "show", "job", job), "Slurm to notice")
        cluster.start_node(node)

    project.wait_for_restart(crash)


def test_a_cancelled_job_is_submitted_again_and_continues(project):
    job = project.training_job()
    project.wait_for_restart(lambda: slurm("scancel", job))
    assert project.training_job() != job


def test_the_controller_may_be_killed_and_started_again_while_its_job_goes_on(project):
    job = project.training_job()
    project.controller.send_signal(signal.SIGKILL)
    project.controller.wait()
    project.run("snakemake", "--profile", "slurm", "--unlock")
    project.start("train_tokenizer")
    project.wait(lambda: f"Slurm job {job} is writing it" in project.log("out/tokenizer"), "the second job")
    slurm("scontrol", "show", "job", job)
    assert project.continued() == sorted(set(project.continued()))


def test_the_disturbed_training_ends_with_the_undisturbed_result(project, reference):
    project.finish()
    log = project.log("out/tokenizer")
    assert len(project.continued()) >= 4
    assert len(re.findall(r"train_tokenizer: done in", log)) == 1, "made twice"
    manifest = "out/tokenizer/manifest.json"
    ours, theirs = (json.loads((p.root / manifest).read_text()) for p in (project, reference))
    assert ours["files"] == theirs["files"]


def test_all_stages_are_jobs_and_two_tasks_on_two_nodes_give_the_local_result(project, reference):
    project.start("all")
    project.finish()
    assert project.contents() == reference.contents()
    for output in ("data/prepared", "out/tokenizer", "out/ar"):
        assert re.search(r"1 process, Slurm job \d+", project.log(output)), output
    for output in ("out/tokens", "out/samples", "out/evaluation"):
        assert re.search(r"2 processes, Slurm job \d+", project.log(output)), output
    submitted = re.findall(r"has been submitted with SLURM jobid (\d+)", project.output.read_text())
    assert len(set(submitted)) >= 6


def test_a_current_result_is_made_anew_where_snakemake_is_told_so(project, reference):
    """The job must learn of it from Snakemake on another machine: told nothing, a stage leaves its result as it is."""
    before = len(re.findall("sample: starts, recipe", project.log("out/samples")))
    project.run("snakemake", "--profile", "slurm", "-R", "sample", "--", "sample")
    assert len(re.findall("sample: starts, recipe", project.log("out/samples"))) == before + 1
    assert project.contents() == reference.contents()


def test_deepspeed_trains_across_nodes(project, reference):
    """Two processes on two nodes agree to rounding with one process."""
    assert (project.root / "out/ar").exists()
    subprocess.run(["rm", "-r", "out/ar"], cwd=project.root, check=True)
    resources = [f"train_ar:{key}={value}" for key, value in TWO_NODES.items()]
    project.run("snakemake", "--profile", "slurm", "train_ar", "--set-resources", *resources)
    assert re.search(r"2 processes, Slurm job \d+", project.log("out/ar"))
    ours, theirs = (json.loads((p.root / "out/ar/manifest.json").read_text())["summary"] for p in (project, reference))
    assert ours["val_loss"] == pytest.approx(theirs["val_loss"], abs=1e-2)


def test_a_failing_stage_is_explained(project):
    write_params(
        project.params, {"prepare_data.source": "imagefolder", "prepare_data.path": "/nowhere"}, base=project.params
    )
    output = project.run("snakemake", "--profile", "slurm", "--retries", "0", "prepare_data", status=1)
    assert re.search(r"Error in rule prepare_data", output)
    assert re.search(r"external_jobid: \d+", output)
    assert "data/prepared.log" in output
    assert "error: /nowhere" in output
