"""Several processes for one stage: who starts them, how many threads each gets, and how they end.

Engines run `python -m crt STAGE ...` once. Where that process finds itself in a Slurm job of several tasks it
becomes `srun` over them; where it sees several GPUs it becomes `crt.processes` over those. So dvc.yaml and the
Snakefile state one command for a laptop, a workstation and a cluster.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import getpass
import importlib
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NoReturn

from crt import slurm

# Stages that can share their work between processes.
DISTRIBUTED_STAGES = ("train_tokenizer", "tokenize", "train_ar", "sample", "evaluate")
# Snakemake sets these to the threads of the rule, which knows nothing of several processes.
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")

# Times that a waiting thread looks before it sleeps: most of the gain of more, hardly any of the harm (dev/LOG.md).
_SPINS = "1000"
# Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
# On Linux, and under Windows' subsystem for it.
_NVIDIA_DRIVER = ("/dev/nvidiactl", "/usr/lib/wsl/lib/libcuda.so.1")


def launch_command(stage: str, arguments: Sequence[str]) -> list[str] | None:
    """The command that should replace this process, or None if it is to do the work itself.

    Args:
        stage: the stage's name.
        arguments: the command line after `python -m crt`.

    Raises:
        UserError: Slurm does not answer about the job that this process runs in.
    """
    if _is_launched():
        return None
    own = slurm.job_id()
    if own is not None and "SLURM_STEP_NUM_TASKS" not in os.environ:  # a batch script, which may span nodes
        job = slurm.show_job(own)
        limit_threads(job.cpus_per_task)
        if stage in DISTRIBUTED_STAGES and job.tasks > 1:
            return srun_command(job, arguments)
    elif os.environ.get("SLURM_CPUS_PER_TASK", "").isdecimal():
        limit_threads(int(os.environ["SLURM_CPUS_PER_TASK"]))
    gpus = visible_gpus() if stage in DISTRIBUTED_STAGES else 0
    if gpus > 1:
        limit_threads(max(1, _threads() // gpus))
        return local_command(gpus, arguments)
    return None


def environment_rank() -> tuple[int, int, int]:
    """(rank, world size, local rank) as `crt.processes`, torchrun or srun state them; (0, 1, 0) for a process alone."""
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), int(os.environ.get("LOCAL_RANK", "0"))
    if int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        return (
            int(os.environ["SLURM_PROCID"]),
            int(os.environ["SLURM_STEP_NUM_TASKS"]),
            int(os.environ["SLURM_LOCALID"]),
        )
    return 0, 1, 0


def srun_command(job: slurm.Job, arguments: Sequence[str]) -> list[str]:
    """`python -m crt` over all tasks of a Slurm job, ended together if one fails.

    A task that is done ends none: the first one may go on for long to write and publish the result, while some sites
    (WaitTime in slurm.conf) give it seconds.
    """
    size = [f"--nodes={job.nodes}", f"--ntasks={job.tasks}", f"--cpus-per-task={job.cpus_per_task}"]
    return ["srun", *size, "--kill-on-bad-exit=1", "--wait=0", "--export=ALL", sys.executable, "-m", "crt", *arguments]


def local_command(processes: int, arguments: Sequence[str]) -> list[str]:
    """`python -m crt` in several processes on this machine, ended together if one fails."""
    return [sys.executable, "-m", "crt.processes", str(processes), *arguments]


def limit_threads(threads: int) -> None:
    """Let this process, and those that it becomes, use at most so many threads; torch reads this when imported.

    More threads than CPUs spin while they wait for each other.
    """
    for name in _THREAD_VARIABLES:
        os.environ[name] = str(min(threads, _threads(name)))


def wait_briefly() -> None:
    """Let threads that wait for each other sleep after some microseconds; torch's OpenMP reads this when imported.

    By default they spin for milliseconds, which is slower several times where another program takes a share of a CPU:
    all wait for the thread that was interrupted. To sleep at once costs a third of the speed of small networks.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", _SPINS)  # GNU's, which torch's wheels bring: counts for more there
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"


def name_user() -> None:
    """Give a user whom the system does not know, as in a container that runs under any number, that number as a name.

    torch asks for a name, for a folder of its compiler, even where nothing is compiled.
    """
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["USER"] = str(os.getuid())


def keep_freed_memory() -> None:
    """Let this process reuse the memory that it frees, instead of giving it back to the system each time.

    glibc maps each large tensor anew, and the system clears every page of it at first touch. A training step on a
    CPU allocates the same tensors again and again: a tenth to a quarter of its time went there
    (`benchmarks/stage2.md`). Elsewhere than on glibc this does nothing.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, -1)


def import_large(name: str) -> Any:
    """Import a module and its large libraries; what they hold stays, so Python is to look for no garbage in it."""
    if name not in sys.modules:
        gc.disable()
        try:
            importlib.import_module(name)
        finally:
            gc.freeze()
            gc.enable()
    return sys.modules[name]


def leave(status: int) -> NoReturn:
    """End this process before Python, C and C++ destroy what is left of it.

    That takes up to two seconds where large libraries were imported, and is not safe. DeepSpeed keeps references to
    process groups that were destroyed, and gloo's threads live as long: under load a process whose work was complete
    then aborted now and then ("terminate called without an active exception"). And HDF5 crashes where a file that it
    could not write, on a full disk, is closed once more.
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # which has been told, or cannot be
            stream.flush()
    os._exit(status)


def has_gpu() -> bool:
    """Whether the machine has an NVIDIA GPU, without importing torch."""
    return any(map(os.path.exists, _NVIDIA_DRIVER))


def visible_gpus() -> int:
    """Number of GPUs that this process may use."""
    # Asking torch costs seconds of import.
    if not has_gpu():
        return 0
    import torch

    return torch.cuda.device_count()


def _is_launched() -> bool:
    """Whether this process was started among others."""
    return "RANK" in os.environ or int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1


def _threads(variable: str = "OMP_NUM_THREADS") -> int:
    text = os.environ.get(variable, "")
    return int(text) if text.isdecimal() and int(text) > 0 else len(os.sched_getaffinity(0))
