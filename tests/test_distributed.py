"""Processes that wait for one of them. The oracle is a collective, which gives up after its timeout."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from crt import distributed
from crt.distributed import World, reported_once
from crt.errors import LocalError, UserError
from crt.processes import free_port
from tests.conftest import ROOT


@pytest.mark.parametrize("rank", [0, 1])
def test_what_one_process_alone_meets_it_reports_itself(rank):
    world = World(rank, 2, torch.device("cpu"))
    with pytest.raises(LocalError), reported_once(world):
        raise LocalError("a damaged image")
    with pytest.raises(SystemExit if rank else UserError), reported_once(world):
        raise UserError("a wrong value")


ALONE = """
import sys
import crt.distributed as d
from crt.errors import UserError
d._REPORT_SECONDS = 2
with d.join_world() as world, d.reported_once(world):
    if str(world.rank) in sys.argv[1]:
        raise UserError("a damaged reference")
    d.stop_signal(world)
"""


@pytest.mark.parametrize("ranks, reports", [("01", [True, False]), ("1", [False, True]), ("0", [True, False])])
def test_a_mistake_of_all_processes_is_reported_once_and_that_of_a_single_one_too(ranks, reports):
    said = [err for _, err in _run_two(ALONE, ranks)]
    assert ["UserError: a damaged reference" in err for err in said] == reports, said


OUT_OF_MEMORY = """
import sys, torch
import crt.distributed as d
with d.join_world() as world, d.reported_once(world), d.gpu_memory("sample", "lower sample.batch_size"):
    raise torch.OutOfMemoryError("CUDA out of memory")
"""


def test_gpu_memory_that_suffices_on_no_process_is_told_once():
    said = [err for _, err in _run_two(OUT_OF_MEMORY, "")]
    assert ["UserError: sample: out of GPU memory: lower sample.batch_size" in err for err in said] == [True, False]


SCRIPT = """
import sys, time
import crt.distributed as d
d._COLLECTIVE_MINUTES = 2 / 60
with d.join_world() as world:
    for turn in range(2):
        if sys.argv[1] == "alone":
            with d.main_alone(world):
                if world.is_main:
                    time.sleep(4)
        elif world.is_main:
            time.sleep(4)
        assert d.stop_signal(world) == 0
    print("together")
"""


@pytest.mark.parametrize("how, together", [("alone", True), ("in a collective", False)])
def test_the_others_wait_for_the_first_one_longer_than_in_a_collective(how, together):
    said = _run_two(SCRIPT, how)
    assert [("together" in out) for out, _ in said] == [together] * 2, said


COLLECTIVES = """
import torch
import crt.distributed as d
from crt import interrupt
d._BUCKET_BYTES = 20  # two numbers fill no bucket, four do
with d.join_world() as world:
    mine = torch.tensor([1.0, 10.0]) * (1 + 2 * world.rank)  # 1 and 3
    assert d.sum_over_ranks(mine).tolist() == [4, 40]
    assert mine.tolist() == [1 + 2 * world.rank, 10 + 20 * world.rank]

    for mean_over_ranks in d.mean_over_ranks, torch.compile(d.mean_over_ranks, backend="aot_eager", fullgraph=True):
        variable = mine.clone().requires_grad_()
        mean = mean_over_ranks(variable)
        assert mean.tolist() == [2, 20]
        # The loss of rank r is (1 + r) times the mean's sum: their mean is 1.5 times it, half of it for each number.
        ((1 + world.rank) * mean.sum()).backward()
        assert (variable.grad / 2).tolist() == [0.75, 0.75]

    parameters = [torch.nn.Parameter(torch.zeros(size)) for size in (2, 4, 1, 3, 5, 2)]
    for number, parameter in enumerate(parameters):
        parameter.grad = None if number == 2 else torch.full_like(parameter, number + 2.0 * world.rank)
    d.average_gradients(parameters)
    averages = [p.grad if p.grad is None else p.grad.unique().tolist() for p in parameters]
    assert averages == [[1], [2], None, [4], [5], [6]]

    assert d.all_reduce(5 + world.rank, world) == 11
    assert d.said_by_main(7 + world.rank, world) == 7
    if world.rank == 1:
        interrupt._received.append(15)
    assert d.stop_signal(world) == 15
print("agreed")
"""


def test_collectives_give_all_processes_the_same():
    said = _run_two(COLLECTIVES, "")
    assert ["agreed" in out for out, _ in said] == [True] * 2, said


def test_nccl_is_told_which_gpu_waits(monkeypatch):
    """Else its first collective takes GPU rank % count: where Slurm deals ranks out in turn that is another task's."""
    told = []

    def wait(device_ids: list[int]) -> None:
        told.extend(device_ids)

    monkeypatch.setattr(distributed, "world_size", lambda: 4)
    monkeypatch.setattr(distributed.dist, "get_backend", lambda: "nccl")
    monkeypatch.setattr(distributed.dist, "barrier", wait)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    distributed.barrier()
    assert told == [1]


NCCL = """
import sys, torch
import torch.distributed as dist
torch.cuda.is_available, torch.cuda.device_count, torch.cuda.set_device = lambda: True, lambda: 2, lambda device: None
join, leave = dist.init_process_group, dist.destroy_process_group
dist.init_process_group = lambda backend, **place: join({"nccl": "gloo"}[backend], **place)
def leave_together():
    print("leaves with the others")
    leave()
dist.destroy_process_group = leave_together
import crt.distributed as d
from crt.errors import LocalError
with d.join_world() as world:
    if sys.argv[1] == str(world.rank):
        raise LocalError("a damaged image")
    if sys.argv[1] == "stopped":
        raise d.interrupt.Stopped(15)
    d.barrier()
"""


@pytest.mark.parametrize("how", ["done", "stopped", "1"])
def test_a_process_that_fails_does_not_wait_in_nccls_shutdown(how):
    """Gloo in its place, whose shutdown waits for nobody. Oracle: NCCL's documentation, all processes must make it."""
    said = _run_two(NCCL, how)
    assert ["leaves with the others" in out for out, _ in said] == [how != "1"] * 2, said
    assert ("LocalError: a damaged image" in said[1][1]) == (how == "1"), said


def _run_two(script: str, argument: str) -> list[tuple[str, str]]:
    """What two processes of a script write to stdout and stderr."""
    environment = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", script, argument],
            cwd=ROOT,
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    return [rank.communicate(timeout=120) for rank in ranks]
