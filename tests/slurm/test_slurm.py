"""The Slurm profile on a real Slurm of two nodes: every stage as a job, and what happens when jobs and nodes die.

`make slurm-test` installs Slurm from Debian's packages where it can and runs this; without root it skips.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import threading
import time
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from crt.__main__ import STAGES
from tests.conftest import TINY, write_params
from tests.slurm.cluster import Cluster, why_not
from tests.test_end_to_end import Project, make_project

pytestmark = [pytest.mark.slurm, pytest.mark.skipif(why_not() is not None, reason=str(why_not()))]

# Long enough to be interrupted in the middle: a minute or so of training.
LONG = TINY | {
    "train_tokenizer.steps": 600,
    "train_tokenizer.checkpoint_every": 50,
    "train_tokenizer.validate_every": 600,
}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with Cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> Project:
    """The same params, run on this machine without Slurm."""
    project = make_project(tmp_path_factory.mktemp("local"), LONG)
    project.run("snakemake", "--cores", "1", "all")
    return project


def slurm_project(root: Path, **resources) -> Project:
    """A clone whose owner has edited the profile for the cluster at hand: no GPUs, little memory, one core a task."""
    project = make_project(root, LONG)
    path = root / "workflow/profiles/slurm/config.yaml"
    yaml = YAML()
    profile = yaml.load(path.read_text())
    profile["default-resources"] |= {"mem_mb": 3000, "cpus_per_task": 1, "runtime": 15}
    profile["set-resources"] = {"tokenize": {"mpi": "srun", "nodes": 2, "tasks": 2}, **resources}
    profile |= {"slurm-init-seconds-before-status-checks": 3, "seconds-between-status-checks": 3, "latency-wait": 10}
    with open(path, "w") as file:
        yaml.dump(profile, file)
    return project


def jobs(state: str = "RUNNING") -> dict[str, str]:
    """Rule of each Slurm job in a state, by job id; the executor puts the rule's name into the job's comment."""
    command = ["squeue", "-h", "-t", state, "-o", "%A %k"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {line.split()[0]: line for line in text.splitlines()}


def wait_for_checkpoint(project: Project) -> str:
    """Wait until train_tokenizer has saved something, and return the id of its job."""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        log = project.root / "out/tokenizer.log"
        if list((project.root / "out/.work").glob("tokenizer-*/checkpoint*")) and log.exists():
            running = [job for job, line in jobs().items() if "train_tokenizer" in line]
            if running:
                return running[0]
        time.sleep(0.2)
    raise AssertionError("train_tokenizer saved no checkpoint")


def run_and_disturb(project: Project, disturb) -> str:
    """Run everything through the profile, call `disturb(job id)` in the middle of stage 1; returns all output."""
    output: list[str] = []
    thread = threading.Thread(target=lambda: output.append(project.run("snakemake", "--profile", "slurm", "all")))
    thread.start()
    disturb(wait_for_checkpoint(project))
    thread.join(600)
    assert output, "the workflow did not end well"
    return output[0]


def test_all_stages_are_jobs_and_two_tasks_on_two_nodes_give_the_local_result(cluster, reference, tmp_path):
    project = slurm_project(tmp_path)
    text = project.run("snakemake", "--profile", "slurm", "all")
    assert len(re.findall(r"has been submitted with SLURM jobid \d+", text)) == len(STAGES)
    assert project.contents() == reference.contents()
    assert "2 processes" in (project.root / "out/tokens.log").read_text()


def test_a_cancelled_job_is_submitted_again_and_continues(cluster, reference, tmp_path):
    project = slurm_project(tmp_path)
    run_and_disturb(project, lambda job: subprocess.run(["scancel", job], check=True))
    assert "continues at" in (project.root / "out/tokenizer.log").read_text()
    assert project.contents() == reference.contents()


def test_a_preempted_job_is_requeued_and_continues(cluster, reference, tmp_path):
    project = slurm_project(tmp_path)
    run_and_disturb(project, lambda job: subprocess.run(["scontrol", "requeue", job], check=True))
    assert "continues at" in (project.root / "out/tokenizer.log").read_text()
    assert project.contents() == reference.contents()


def test_a_job_at_its_time_limit_saves_and_continues(cluster, reference, tmp_path):
    project = slurm_project(tmp_path)
    # Slurm ends a job whose limit has passed at its next check: the real signal, without waiting for a full minute.
    run_and_disturb(
        project, lambda job: subprocess.run(["scontrol", "update", f"JobId={job}", "TimeLimit=0:10"], check=True)
    )
    assert "continues at" in (project.root / "out/tokenizer.log").read_text()
    assert project.contents() == reference.contents()


def test_a_node_that_dies_costs_the_job_but_not_its_work(cluster, reference, tmp_path):
    project = slurm_project(tmp_path)

    def crash(job: str) -> None:
        text = subprocess.run(["squeue", "-h", "-j", job, "-o", "%N"], capture_output=True, text=True, check=True)
        node = text.stdout.strip()
        cluster.kill_node(node)
        time.sleep(2)
        cluster.start_node(node)

    run_and_disturb(project, crash)
    assert "continues at" in (project.root / "out/tokenizer.log").read_text()
    assert project.contents() == reference.contents()


def test_the_controller_may_be_killed_and_started_again(cluster, reference, tmp_path):
    project = slurm_project(tmp_path)
    process = subprocess.Popen(["snakemake", "--profile", "slurm", "all"], cwd=project.root, env=project.environment)
    wait_for_checkpoint(project)
    process.kill()
    process.wait()
    project.run("snakemake", "--profile", "slurm", "--unlock")
    project.run("snakemake", "--profile", "slurm", "all")
    assert project.contents() == reference.contents()


def test_a_failing_stage_is_explained(cluster, tmp_path):
    project = slurm_project(tmp_path)
    write_params(
        project.params, {"prepare_data.source": "imagefolder", "prepare_data.path": "/nowhere"}, base=project.params
    )
    output = project.run("snakemake", "--profile", "slurm", "--retries", "0", "all", status=1)
    assert "rule prepare_data" in output
    assert re.search(r"external_jobid: \d+|SLURM jobid \d+", output)
    assert "data/prepared.log" in output
    assert "error: /nowhere" in output
    shutil.rmtree(project.root)
