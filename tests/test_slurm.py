"""What is asked of Slurm, and when, without one: a script answers for `scontrol`. See tests/slurm for a real one."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from crt.slurm import continue_later, rendezvous, requeue_behind, show_job, was_requeued
from crt.yaml_files import read_yaml
from tests.conftest import ROOT

SCONTROL = """#!/bin/sh
case "$1 $2" in
    "show job") cat {folder}/job-$3 ;;
    "show hostnames") printf 'n1\\nn2\\n' ;;
    "show node") echo "NodeName=$3 NodeAddr=$3.example NodeHostName=$3" ;;
    *) echo "$*" >> {folder}/calls ;;
esac
"""


class Jobs:
    """The jobs that Slurm knows, and what was asked to be done with them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def add(self, job: str, state: str = "RUNNING", requeue: int = 1, batch: int = 1, restarts: int = 0) -> None:
        text = f"JobId={job} BatchFlag={batch} Requeue={requeue} Restarts={restarts} JobState={state} NumNodes=1\n"
        (self.folder / f"job-{job}").write_text(text)

    def calls(self) -> list[str]:
        path = self.folder / "calls"
        return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Jobs]:
    """This process is in job 7."""
    (tmp_path / "scontrol").write_text(SCONTROL.format(folder=tmp_path))
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    handler = signal.getsignal(signal.SIGTERM)
    yield Jobs(tmp_path)
    signal.signal(signal.SIGTERM, handler)


def test_a_job_that_is_told_of_its_end_goes_back_into_the_queue(jobs: Jobs) -> None:
    jobs.add("7")
    said: list[str] = []
    continue_later(signal.SIGTERM, said.append)
    assert jobs.calls() == ["requeue 7"]
    assert said == ["Slurm job 7 goes back into the queue and continues when it starts again"]


def test_that_it_goes_back_is_said_before_since_slurm_may_end_the_process_at_once(jobs: Jobs) -> None:
    jobs.add("7")
    done_before: list[list[str]] = []
    continue_later(signal.SIGTERM, lambda _: done_before.append(jobs.calls()))
    assert done_before == [[]]


def test_a_process_in_no_job_asks_slurm_nothing(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID")
    jobs.add("9")
    said: list[str] = []
    continue_later(signal.SIGTERM, said.append)
    assert requeue_behind("9") is None
    assert jobs.calls() == said == []


def test_of_a_range_of_nodes_a_job_has_the_least(jobs: Jobs) -> None:
    """As Slurm writes it of a pending job that leaves the number open."""
    (jobs.folder / "job-9").write_text("JobId=9 JobState=PENDING NumNodes=2-4 NumCPUs=24 NumTasks=6 CPUs/Task=4\n")
    job = show_job("9")
    assert (job.nodes, job.tasks, job.cpus_per_task) == (2, 6, 4)


@pytest.mark.parametrize(
    ("signum", "job"),
    [
        (signal.SIGINT, {}),
        (signal.SIGTERM, {"state": "CANCELLED"}),
        (signal.SIGTERM, {"state": "COMPLETING"}),
        (signal.SIGTERM, {"requeue": 0}),
        (signal.SIGTERM, {"batch": 0}),
    ],
    ids=["ctrl-c", "cancelled", "ending", "not to be requeued", "no batch job"],
)
def test_a_job_that_is_to_end_is_left_alone(jobs: Jobs, signum: int, job: dict) -> None:
    jobs.add("7", **job)
    said: list[str] = []
    continue_later(signum, said.append)
    assert jobs.calls() == said == []


def test_a_job_waits_in_the_queue_for_the_one_that_holds_its_output(jobs: Jobs) -> None:
    jobs.add("7")
    jobs.add("9")
    assert requeue_behind("9") == "Slurm job 9 is writing it: job 7 goes back into the queue until that has ended"
    assert jobs.calls() == ["requeue 7", "update JobId=7 Dependency=afterany:9"]
    # The signal that follows a requeue must not end the process before the dependency is there.
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN


def test_that_slurm_refuses_is_said_with_its_reason(jobs: Jobs) -> None:
    said: list[str] = []
    continue_later(signal.SIGTERM, said.append)
    assert requeue_behind("9") == said[0]
    assert said[0].startswith("scontrol show job 7 --oneliner: cat: ") and said[0].endswith(": run the stage again")
    assert jobs.calls() == []


@pytest.mark.parametrize(
    ("other", "own", "its"),
    [("", {}, {}), ("7", {}, {}), ("9", {"requeue": 0}, {}), ("9", {}, {"state": "COMPLETED"})],
    ids=["no job", "itself", "not to be requeued", "ended"],
)
def test_a_job_does_not_wait_for_what_does_not_end_or_has_ended(jobs: Jobs, other: str, own: dict, its: dict) -> None:
    jobs.add("7", **own)
    jobs.add("9", **its)
    assert requeue_behind(other) is None
    assert jobs.calls() == []


def test_a_job_knows_whether_it_was_in_the_queue_before(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not was_requeued()  # Slurm has forgotten it
    jobs.add("7")
    assert not was_requeued()
    jobs.add("7", restarts=1)
    assert was_requeued()
    monkeypatch.delenv("SLURM_JOB_ID")
    assert not was_requeued()


def test_tasks_meet_at_the_first_node_and_steps_of_a_job_at_ports_of_their_own(jobs: Jobs) -> None:
    def meet(job: int, step: int) -> tuple[str, int]:
        return rendezvous({"SLURM_STEP_NODELIST": "n[1-2]", "SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)})

    assert meet(7, 0) == meet(7, 0)
    places = [meet(job, step) for job in (7, 1_236_000) for step in range(16)]
    assert {address for address, _ in places} == {"n1.example"}
    ports = {port for _, port in places}
    assert len(ports) == 32 and min(ports) >= 20_000 and max(ports) < 40_000


def test_a_stage_gets_its_gpus_on_one_node_unless_it_asks_for_several() -> None:
    """Of GPUs alone Slurm may give some of each of several nodes; the executor's srun then asks one for all."""
    profile = read_yaml(ROOT / "workflow/profiles/slurm/config.yaml")
    assert profile["default-resources"]["nodes"] == 1
