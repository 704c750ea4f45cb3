"""A real Slurm on this machine: munge, slurmctld and two slurmd that play two nodes, from Debian's packages.

Needs root. Slurm's jobs do not inherit SLURM_CONF through Snakemake's executor, so the configuration is put at
Slurm's own place, /etc/slurm/slurm.conf, and taken away again; a machine that already has one is left alone.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

CONFIG = Path("/etc/slurm/slurm.conf")
MARK = "# written by tests/slurm/cluster.py\n"
PROGRAMS = ("slurmctld", "slurmd", "munged", "srun", "sbatch", "scontrol", "squeue")
NODES = ("n1", "n2")


def why_not() -> str | None:
    """Why no test cluster can be started here; None if it can."""
    if os.geteuid() != 0:
        return "a test cluster needs root (slurmd starts jobs for others)"
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        return f"{', '.join(missing)} not installed: apt-get install slurm-wlm munge"
    if CONFIG.exists() and not CONFIG.read_text().startswith(MARK):
        return f"{CONFIG} exists: this machine belongs to a cluster"
    return None


class Cluster:
    """Start and stop the daemons; each node can be killed and started again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Cluster:
        CONFIG.parent.mkdir(parents=True, exist_ok=True)
        CONFIG.write_text(self._config())
        for name in ("state", *(f"spool/{node}" for node in NODES), "log"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        try:
            self._start_munge()
            self._start("slurmctld", "slurmctld", "-D", "-c")
            for node in NODES:
                self.start_node(node)
            self._wait_until_idle()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Cancel all jobs, end the daemons and take the configuration away."""
        subprocess.run(["scancel", "--user=root"], check=False, capture_output=True)
        time.sleep(1)
        for daemon in reversed(list(self.daemons.values())):
            daemon.terminate()
        for daemon in self.daemons.values():
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
        CONFIG.unlink(missing_ok=True)

    def start_node(self, node: str) -> None:
        """Start a node's slurmd; its jobs go to it when it has registered."""
        self._start(node, "slurmd", "-D", "-N", node)

    def kill_node(self, node: str) -> None:
        """Kill a node as a crash would: its slurmd and every process of its jobs, at once."""
        self.daemons[node].send_signal(signal.SIGKILL)
        self.daemons[node].wait()
        for job in subprocess.run(
            ["squeue", "-h", "-w", node, "-o", "%A"], capture_output=True, text=True, check=True
        ).stdout.split():
            for process in Path("/proc").glob("[0-9]*"):
                try:
                    step = (process / "cmdline").read_bytes().startswith(f"slurmstepd: [{job}.".encode())
                    if step or f"SLURM_JOB_ID={job}\0".encode() in (process / "environ").read_bytes():
                        os.kill(int(process.name), signal.SIGKILL)
                except OSError:
                    continue

    def _start(self, name: str, *command: str) -> None:
        with open(self.folder / "log" / f"{name}.out", "ab") as log:
            self.daemons[name] = subprocess.Popen(command, stdout=log, stderr=log)

    def _start_munge(self) -> None:
        if subprocess.run(["munge", "-n"], capture_output=True, check=False).returncode == 0:
            return
        for path in ("/run/munge", "/var/lib/munge", "/var/log/munge"):
            Path(path).mkdir(parents=True, exist_ok=True)
            shutil.chown(path, "munge", "munge")
        if not Path("/etc/munge/munge.key").exists():
            subprocess.run(["mungekey", "--create"], check=True)
            shutil.chown("/etc/munge/munge.key", "munge", "munge")
        subprocess.run(["runuser", "-u", "munge", "--", shutil.which("munged") or "munged", "--force"], check=True)

    def _wait_until_idle(self) -> None:
        for _ in range(60):
            states = subprocess.run(
                ["sinfo", "-h", "-N", "-p", "gpu", "-o", "%T"], capture_output=True, text=True, check=False
            ).stdout.split()
            if states == ["idle"] * len(NODES) and all(d.poll() is None for d in self.daemons.values()):
                return
            time.sleep(0.5)
        logs = "\n".join(path.read_text()[-2000:] for path in (self.folder / "log").iterdir())
        raise RuntimeError(f"the test cluster did not come up:\n{logs}")

    def _config(self) -> str:
        host, cores = socket.gethostname(), os.cpu_count() or 1
        nodes = "\n".join(
            f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={17001 + i} CPUs={cores} RealMemory=8000"
            for i, node in enumerate(NODES)
        )
        return f"""{MARK}
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort=16817
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A requeued job starts again after so many seconds (two minutes by default).
AuthInfo=cred_expire=5
SchedulerParameters=sched_interval=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
ReturnToService=2
SlurmdTimeout=10
KillWait=10
OverTimeLimit=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
StateSaveLocation={self.folder}/state
SlurmdSpoolDir={self.folder}/spool/%n
SlurmctldPidFile={self.folder}/slurmctld.pid
SlurmdPidFile={self.folder}/slurmd-%n.pid
SlurmctldLogFile={self.folder}/log/slurmctld.log
SlurmdLogFile={self.folder}/log/slurmd-%n.log
{nodes}
PartitionName=gpu Nodes={",".join(NODES)} Default=YES MaxTime=INFINITE State=UP PriorityTier=1
PartitionName=urgent Nodes={",".join(NODES)} MaxTime=INFINITE State=UP PriorityTier=2
"""
