"""The Slurm job that a stage runs in: its size, where its tasks meet, and how it goes back into the queue.

Everything is asked of `scontrol` by the job's id: Snakemake's executor hides most of Slurm's variables from its jobs.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from crt.errors import UserError


@dataclass(frozen=True)
class Job:
    """What Slurm says of one job."""

    id: str
    nodes: int
    tasks: int
    cpus_per_task: int
    running: bool
    """False as soon as it was cancelled, pre-empted or ran out of time, while its processes may still end."""
    restarts: int
    requeueable: bool
    """Whether it is a batch job that may go back into the queue."""


def job_id() -> str | None:
    """The Slurm job that this process runs in, or None."""
    return os.environ.get("SLURM_JOB_ID")


def show_job(job: str) -> Job:
    """Ask Slurm about a job.

    Raises:
        UserError: Slurm does not answer, or has forgotten the job.
    """
    text = _scontrol("show", "job", job, "--oneliner")
    fields = dict(re.findall(r"(\S+?)=(\S*)", text))
    return Job(
        id=job,
        # Slurm writes a range where a pending job leaves the number open.
        nodes=_first_number(fields.get("NumNodes")),
        tasks=_first_number(fields.get("NumTasks")),
        cpus_per_task=_first_number(fields.get("CPUs/Task")),
        running=fields.get("JobState") == "RUNNING",
        restarts=int(fields.get("Restarts", "0")),
        requeueable=fields.get("Requeue") == "1" and fields.get("BatchFlag") == "1",
    )


def was_requeued() -> bool:
    """Whether this process runs in a Slurm job that has been in the queue before; False where Slurm does not answer."""
    own = job_id()
    try:
        return own is not None and show_job(own).restarts > 0
    except UserError:
        return False


def rendezvous(environment: Mapping[str, str]) -> tuple[str, int]:
    """Address and port at which the tasks of a Slurm step meet: its first node, and a port made from the job's id.

    Raises:
        UserError: Slurm does not answer.
    """
    first = _scontrol("show", "hostnames", environment["SLURM_STEP_NODELIST"]).split()[0]
    address = re.search(r"NodeAddr=(\S+)", _scontrol("show", "node", first, "--oneliner"))
    port = 20000 + (int(environment["SLURM_JOB_ID"]) * 16 + int(environment["SLURM_STEP_ID"]) % 16) % 20000
    return (address.group(1) if address else first), port


def continue_later(signum: int, report: Callable[[str], None]) -> None:
    """Put this process's job back into the queue after a signal that announces its end: it continues from there.

    Slurm sends such a signal ahead of the time limit (`--signal`) or of a pre-emption. A job that was cancelled, or
    that Slurm itself has requeued, is no longer running when its processes learn of it, and is left alone.

    Args:
        signum: the signal.
        report: told what is done, if anything.
    """
    own = job_id()
    if own is None or signum == signal.SIGINT:
        return
    try:
        job = show_job(own)
        if job.running and job.requeueable:
            # Said before it is done: the requeue may end this process at once.
            report(f"Slurm job {own} goes back into the queue and continues when it starts again")
            _scontrol("requeue", own)
    except UserError as error:
        report(str(error))


def requeue_behind(other: str) -> str | None:
    """Put this process's job back into the queue until another job has ended, rather than hold its nodes idle.

    It happens where Snakemake was killed and started again while its job went on: the new Snakemake submits the
    stage once more.

    Args:
        other: the id of the job that holds the stage's output; empty where it is no Slurm job.

    Returns:
        What was done, in words; None where this job cannot wait so.
    """
    own = job_id()
    if own is None or not other or own == other:
        return None
    try:
        if not (show_job(own).requeueable and show_job(other).running):
            return None
        # The requeue ends this process, after some seconds: nothing but the dependency may follow.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        _scontrol("requeue", own)
        _scontrol("update", f"JobId={own}", f"Dependency=afterany:{other}")
    except UserError as error:
        return str(error)
    return f"Slurm job {other} is writing it: job {own} goes back into the queue until that has ended"


def _first_number(text: str | None) -> int:
    number = re.match(r"\d+", text or "")
    return int(number.group()) if number else 1


def _scontrol(*arguments: str) -> str:
    try:
        result = subprocess.run(["scontrol", *arguments], capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"scontrol {' '.join(arguments)}: {error}: is Slurm's client installed on this node?") from None
    if result.returncode:
        raise UserError(f"scontrol {' '.join(arguments)}: {result.stderr.strip() or 'failed'}: run the stage again")
    return result.stdout
