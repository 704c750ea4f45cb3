"""The processes of one stage: which one this is, on which device, and the few collectives that stages share."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from crt import interrupt, slurm
from crt.errors import LocalError, UserError
from crt.launch import environment_rank, keep_freed_memory

_COLLECTIVE_MINUTES = 30
_POLL_SECONDS = 0.2
# What one process may take longer than another to meet the same mistake.
_REPORT_SECONDS = 10.0
# How long rank 0 stays for the others to learn that it reports.
_LINGER_SECONDS = 2.0
_REPORTED, _SEEN = "crt mistake reported", "crt report seen"
_turns = itertools.count()


@dataclass(frozen=True)
class World:
    """Place of this process among those that run the stage together."""

    rank: int
    size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


@contextmanager
def join_world() -> Iterator[World]:
    """Join the stage's processes (gloo on CPU, NCCL on GPUs) and leave them together.

    Leaving through a barrier matters: ranks that end at different times can abort in the backend's shutdown.
    """
    rank, size, local_rank = environment_rank()
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local_rank % torch.cuda.device_count()) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    else:
        keep_freed_memory()
    started = size > 1 and not dist.is_initialized()
    if started:
        if "MASTER_ADDR" not in os.environ:  # srun, unlike `crt.processes` and torchrun, names no meeting point
            address, port = slurm.rendezvous(os.environ)
            os.environ |= {"MASTER_ADDR": address, "MASTER_PORT": str(port)}
            # DeepSpeed reads its place from torchrun's names.
            os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(local_rank)}
        timeout = timedelta(minutes=_COLLECTIVE_MINUTES)
        dist.init_process_group("nccl" if cuda else "gloo", rank=rank, world_size=size, timeout=timeout)
    try:
        yield World(rank, size, local_rank, device)
        if started:
            dist.barrier()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def stop_signal(world: World) -> int:
    """The signal that asked any of the processes to stop, or 0. A collective call: all processes must make it."""
    signum = torch.tensor(interrupt.stop_requested() or 0, device=world.device)
    if dist.is_initialized():
        dist.all_reduce(signum, dist.ReduceOp.MAX)
    return int(signum)


def said_by_main(number: int, world: World) -> int:
    """The number that rank 0 gives. A collective call; what the others give does not matter."""
    told = torch.tensor([number], device=world.device)
    if dist.is_initialized():
        dist.broadcast(told, 0)
    return int(told)


@contextmanager
def main_alone(world: World) -> Iterator[None]:
    """For what rank 0 does while the others wait, however long: in a collective they would give up after a while.

    All processes must enter; the others leave once rank 0 has, whether or not it succeeded.
    """
    if not dist.is_initialized():
        yield
        return
    store, key = dist.distributed_c10d._get_default_store(), f"crt main alone {next(_turns)}"
    if world.is_main:
        try:
            yield
        finally:
            store.set(key, "done")
        return
    yield
    while not store.check([key]):
        time.sleep(_POLL_SECONDS)


@contextmanager
def reported_once(world: World) -> Iterator[None]:
    """Let rank 0 alone report a mistake that every process meets: the others end with the same status, silently.

    A `LocalError` is reported by whoever meets it, and so is one that rank 0 does not meet soon after.
    """
    try:
        yield
    except UserError as error:
        if world.is_main:
            _tell_the_others(world)
            raise
        if isinstance(error, LocalError) or not _main_reports():
            raise
        raise SystemExit(2) from None


@contextmanager
def gpu_memory(stage: str, remedy: str) -> Iterator[None]:
    """For work whose need of GPU memory the user sets.

    Args:
        stage: its name.
        remedy: what to change in the params, as in "lower sample.batch_size".

    Raises:
        UserError: the memory did not suffice.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise UserError(f"{stage}: out of GPU memory: {remedy}") from None


def _tell_the_others(world: World) -> None:
    """Say that rank 0 reports a mistake, and stay until they know, since the store goes with this process.

    They may not have met it: after a moment it goes anyway.
    """
    if not dist.is_initialized():
        return
    store, end = dist.distributed_c10d._get_default_store(), time.monotonic() + _LINGER_SECONDS
    store.set(_REPORTED, "")
    while store.add(_SEEN, 0) < world.size - 1 and time.monotonic() < end:
        time.sleep(_POLL_SECONDS / 10)


def _main_reports() -> bool:
    """Whether rank 0 has met a mistake too: waits for it a while."""
    if not dist.is_initialized():
        return True
    store, end = dist.distributed_c10d._get_default_store(), time.monotonic() + _REPORT_SECONDS
    try:
        while not store.check([_REPORTED]):
            if time.monotonic() > end:
                return False
            time.sleep(_POLL_SECONDS)
        store.add(_SEEN, 1)
        time.sleep(_POLL_SECONDS)  # a launcher that ends all with the first to fail must not be faster than its report
    except RuntimeError:  # rank 0 is gone, and the store with it
        pass
    return True
