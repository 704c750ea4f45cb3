"""Several processes for one stage: who starts them, and where they meet.

Engines run `python -m crt STAGE ...` once. Where that process finds itself in a Slurm job of several tasks it
becomes `srun` over them; where it sees several GPUs it becomes `torchrun` over those. So dvc.yaml and the
Snakefile state one command for a laptop, a workstation and a cluster.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence

from crt.errors import UserError

# Stages that can share their work between processes.
DISTRIBUTED_STAGES = ("train_tokenizer", "tokenize", "train_ar", "sample")


def launch_command(stage: str, arguments: Sequence[str]) -> list[str] | None:
    """The command that should replace this process, or None if it is to do the work itself.

    Args:
        stage: the stage's name.
        arguments: the command line after `python -m crt`.

    Raises:
        UserError: Slurm does not answer about the job that this process runs in.
    """
    environment = os.environ
    if (
        stage not in DISTRIBUTED_STAGES
        or "RANK" in environment
        or int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1
    ):
        return None
    if "SLURM_JOB_ID" in environment:
        nodes, tasks = _job_size(environment)
        if tasks > 1:
            srun = ["srun", f"--nodes={nodes}", f"--ntasks={tasks}", "--kill-on-bad-exit=1", "--export=ALL"]
            return [*srun, sys.executable, "-m", "crt", *arguments]
    gpus = _visible_gpus()
    if gpus > 1:
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={gpus}"]
        return [sys.executable, *torchrun, "-m", "crt", *arguments]
    return None


def slurm_rendezvous(environment: Mapping[str, str]) -> tuple[str, int]:
    """Address and port at which the tasks of a Slurm step meet: its first node, and a port made from the job's id.

    Raises:
        UserError: Slurm does not answer.
    """
    first = _scontrol("show", "hostnames", environment["SLURM_STEP_NODELIST"]).split()[0]
    address = re.search(r"NodeAddr=(\S+)", _scontrol("show", "node", first, "--oneliner"))
    port = 20000 + (int(environment["SLURM_JOB_ID"]) * 16 + int(environment["SLURM_STEP_ID"]) % 16) % 20000
    return (address.group(1) if address else first), port


def _job_size(environment: Mapping[str, str]) -> tuple[int, int]:
    """(nodes, tasks) of this Slurm job; Snakemake hides them from the environment of jobs that span nodes."""
    text = _scontrol("show", "job", environment["SLURM_JOB_ID"], "--oneliner")
    numbers = [re.search(rf"\b{name}=(\d+)", text) for name in ("NumNodes", "NumTasks")]
    nodes, tasks = (int(number.group(1)) if number else 1 for number in numbers)
    return nodes, tasks


def _scontrol(*arguments: str) -> str:
    try:
        result = subprocess.run(["scontrol", *arguments], capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"scontrol {' '.join(arguments)}: {error}: is Slurm's client installed on this node?") from None
    if result.returncode:
        raise UserError(f"scontrol {' '.join(arguments)}: {result.stderr.strip() or 'failed'}: run the stage again")
    return result.stdout


def _visible_gpus() -> int:
    # Asking torch costs seconds of import; a process that sees no NVIDIA device need not.
    if not os.path.exists("/dev/nvidiactl"):
        return 0
    import torch

    return torch.cuda.device_count()
