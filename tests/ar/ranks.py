"""Runs stages in several processes, one after the other in one process group: `torchrun ... ranks.py JOBS RESULTS`.

JOBS is a JSON list of {"command": [...], "fail_at": step or null}; RESULTS gets the exit status of each on each rank.
Starting Python, torch and DeepSpeed takes most of a small run's time, so many of them share it.
"""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from pathlib import Path

import torch.distributed as dist

from crt.__main__ import main
from crt.distributed import join_world
from crt.launch import leave
from crt.progress import Progress
from crt.stages import sample, train_ar


class Failing(Progress):
    at: int | None = None

    def update(self, done: int, **figures: float) -> None:
        super().update(done, **figures)
        if done == Failing.at:
            raise RuntimeError("as if killed")


def status_of(command: list[str]) -> int:
    try:
        return main(command)
    except SystemExit as ended:
        return int(ended.code or 0)


if __name__ == "__main__":
    jobs, results = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    with join_world() as world:
        # The group stays for all jobs; everything else is as in a process of its own.
        train_ar.join_world = sample.join_world = lambda: nullcontext(world)
        train_ar.Progress = Failing
        statuses = []
        for job in jobs:
            Failing.at = job["fail_at"]
            statuses.append(status_of(job["command"]))
            dist.barrier()
        everyone = [None] * world.size
        dist.all_gather_object(everyone, statuses)
        if world.is_main:
            results.write_text(json.dumps(everyone))
    leave(0)
