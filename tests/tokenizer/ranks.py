"""Trains several tokenizers in one group of processes: `torchrun ... -m tests.tokenizer.ranks JOBS`.

JOBS is a JSON list of command lines; each rank writes the exit status of all to JOBS.RANK. Starting Python and torch
takes most of a tiny training's time, so many of them share it.
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
from crt.stages import train_tokenizer


def status_of(command: list[str]) -> int:
    try:
        return main(command)
    except SystemExit as ended:
        return int(ended.code or 0)


if __name__ == "__main__":
    jobs = Path(sys.argv[1])
    with join_world() as world:
        train_tokenizer.join_world = lambda: nullcontext(world)
        statuses = []
        for command in json.loads(jobs.read_text()):
            statuses.append(status_of(command))
            dist.barrier()
        Path(f"{jobs}.{world.rank}").write_text(json.dumps(statuses))
    leave(0)
