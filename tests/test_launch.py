"""Who starts a stage's processes, and with how many threads. The oracle is what the started processes report."""

from __future__ import annotations

import gc
import os
import platform
import subprocess
import sys

import pytest

from crt import launch, slurm
from crt.errors import UserError
from crt.launch import import_large, launch_command, limit_threads, local_command, srun_command
from tests.conftest import ROOT

SLURM_JOB = """JobId=7 JobName=x UserId=a(1) BatchFlag=1 Requeue=1 Restarts=2 JobState=RUNNING \
NumNodes=4-4 NumCPUs=32 NumTasks=32 CPUs/Task=8 ReqB:S:C:T=0:0:*:* Comment=rule_train_ar"""


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """No job, and every variable that a test changes restored."""
    for name in list(os.environ):
        if name.startswith("SLURM_") or name in ("RANK", "WORLD_SIZE"):
            monkeypatch.delenv(name)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        monkeypatch.setenv(name, "64")


def test_threads_of_a_single_task_are_its_cpus(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "1")
    assert launch_command("train_tokenizer", ["train_tokenizer"]) is None
    command = [sys.executable, "-c", "import torch; print(torch.get_num_threads())"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "1"


def test_threads_are_only_ever_lowered(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    limit_threads(5)
    assert os.environ["OMP_NUM_THREADS"] == "2"
    assert os.environ["MKL_NUM_THREADS"] == "5"


def test_garbage_is_looked_for_again_after_an_import_but_not_in_what_it_made(tmp_path, monkeypatch):
    """Oracle: Python's own count of objects that it leaves alone."""
    (tmp_path / "large.py").write_text("import gc\nasked, objects = gc.isenabled(), [[] for _ in range(1000)]\n")
    (tmp_path / "broken.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    gc.unfreeze()
    try:
        large = import_large("large")
        assert not large.asked
        assert gc.isenabled()
        assert gc.get_freeze_count() > 1000
        gc.unfreeze()
        assert import_large("large") is large
        assert gc.get_freeze_count() == 0  # what else has been made meanwhile may be garbage one day
        with pytest.raises(ZeroDivisionError):
            import_large("broken")
        assert gc.isenabled()
    finally:
        gc.unfreeze()
        del sys.modules["large"]


def test_a_user_without_a_name_gets_one():
    """Containers may run under any number; torch wants a name before it trains."""
    script = "from crt.launch import name_user; name_user(); import getpass; print(getpass.getuser())"
    command = ["unshare", "--user", "--map-user=54321", "env", "-i", sys.executable, "-c", script]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if "unshare" in result.stderr:
        pytest.skip(f"no user without a name can be made here: {result.stderr.strip()}")
    assert result.stdout.strip() == "54321"


def test_a_process_among_others_starts_none(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert launch_command("train_ar", ["train_ar"]) is None


def test_processes_of_one_machine_share_its_threads(monkeypatch):
    monkeypatch.setattr(launch, "visible_gpus", lambda: 4)
    monkeypatch.setenv("MKL_NUM_THREADS", "8")
    assert launch_command("train_ar", ["train_ar"]) == local_command(4, ["train_ar"])
    assert (os.environ["OMP_NUM_THREADS"], os.environ["MKL_NUM_THREADS"]) == ("16", "8")
    assert launch_command("prepare_data", ["prepare_data"]) is None
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    launch_command("train_ar", ["train_ar"])
    assert os.environ["OMP_NUM_THREADS"] == "1"  # fewer threads than processes


@pytest.mark.parametrize(
    ("variables", "place"),
    [
        ({}, (0, 1, 0)),
        ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, (3, 8, 1)),
        ({"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "5", "SLURM_LOCALID": "1"}, (5, 8, 1)),
        ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, (0, 1, 0)),
    ],
    ids=["alone", "torchrun", "srun", "a step of one task"],
)
def test_each_process_knows_its_place(monkeypatch, variables, place):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert launch.environment_rank() == place


def test_a_batch_script_of_several_tasks_becomes_srun(monkeypatch, tmp_path):
    (tmp_path / "scontrol").write_text(f"#!/bin/sh\necho '{SLURM_JOB}'\n")
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    job = slurm.show_job("7")
    assert job == slurm.Job("7", nodes=4, tasks=32, cpus_per_task=8, running=True, restarts=2, requeueable=True)
    command = launch_command("train_ar", ["train_ar", "--out", "x"])
    assert command == srun_command(job, ["train_ar", "--out", "x"])
    assert {"--nodes=4", "--ntasks=32", "--cpus-per-task=8"} <= set(command)
    # Else WaitTime of slurm.conf kills the first task while it publishes what the others are done with.
    assert "--wait=0" in command
    # Else the others wait for one that was killed until the job's time is up.
    assert "--kill-on-bad-exit=1" in command
    assert launch_command("prepare_data", ["prepare_data"]) is None
    assert os.environ["OMP_NUM_THREADS"] == "8"


def test_without_slurms_client_a_batch_script_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    with pytest.raises(UserError, match="is Slurm's client installed"):
        launch_command("train_ar", ["train_ar"])


def test_a_job_that_slurm_does_not_tell_of_is_not_taken_for_one_task(monkeypatch, tmp_path):
    (tmp_path / "scontrol").write_text("#!/bin/sh\necho 'Unable to contact slurm controller' >&2\nexit 1\n")
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    with pytest.raises(
        UserError, match=r"^scontrol show job 7 --oneliner: Unable to contact slurm controller: run the"
    ):
        launch_command("train_ar", ["train_ar"])


@pytest.mark.parametrize(
    "chosen, expected",
    [
        ({}, {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "1000"}),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, {"OMP_WAIT_POLICY": "ACTIVE"}),
        ({"OMP_WAIT_POLICY": "PASSIVE"}, {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}),
        ({"GOMP_SPINCOUNT": "7"}, {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "7"}),
    ],
)
def test_threads_that_wait_soon_sleep_unless_the_user_says_otherwise(chosen, expected):
    environment = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    environment |= {"OMP_DISPLAY_ENV": "verbose", **chosen}
    code = "from crt.__main__ import main; main(['check']); import torch"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    # What the OpenMP library itself reports when torch loads it.
    for name, value in expected.items():
        assert f"{name} = '{value}'" in result.stderr


@pytest.mark.parametrize("status", [0, 3])
@pytest.mark.parametrize("processes", [1, 2])
def test_a_process_ends_with_its_status_and_all_that_it_said(processes: int, status: int) -> None:
    code = (
        "import atexit; from crt.launch import leave\n"
        "class Last:\n"
        "    def __del__(self): print('destroyed')\n"
        "last = Last(); atexit.register(print, 'at exit'); print('said', end=' '); "
        f"leave({status})"
    )
    environment = {**os.environ, "RANK": "0", "WORLD_SIZE": str(processes)}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment, cwd=ROOT
    )
    assert result.returncode == status
    assert result.stdout == "said at exit\n"  # and ends before anything is destroyed


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the settings are those of glibc")
def test_freed_memory_is_used_again() -> None:
    """Oracle: the pages that the system had to hand out, of a process of its own."""
    script = (
        "import resource, sys, torch; from crt.launch import keep_freed_memory\n"
        "if sys.argv[1] == 'keep': keep_freed_memory()\n"
        "faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "for _ in range(20): torch.ones(2**24)\n"
        "before = faults()\n"
        "for _ in range(20): torch.ones(2**24)\n"
        "print(faults() - before)"
    )
    fresh, kept = (
        int(subprocess.run([sys.executable, "-c", script, how], cwd=ROOT, check=True, capture_output=True).stdout)
        for how in ("leave", "keep")
    )
    assert kept < fresh / 20
