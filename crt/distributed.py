"""The processes of one stage: which one this is, on which device, and the collectives by which they work together.

In one process all collectives do nothing. When a model is trained, each process holds an equal share of the global
batch, and its loss is the mean over that share; a term that is not itself a mean over images (batch statistics,
entropies, norms) goes through the differentiable `mean_over_ranks`.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from crt import interrupt, slurm
from crt.errors import LocalError, UserError
from crt.launch import environment_rank, keep_freed_memory

_COLLECTIVE_MINUTES = 30
_BUCKET_BYTES = 64 * 2**20
_as_one_process = False
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
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


@contextmanager
def join_world() -> Iterator[World]:
    """Join the stage's processes (gloo on CPU, NCCL on GPUs) and leave them together.

    Leaving through a barrier matters: ranks that end at different times can abort in the backend's shutdown.
    NCCL's shutdown waits for all processes: one that fails leaves without, as the others may wait for it in a
    collective, and its mistake would not be heard before that gives up.
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
    together = False
    try:
        yield World(rank, size, device)
        if started:
            barrier()
        together = True
    except interrupt.Stopped:  # at all of them
        together = True
        raise
    finally:
        if dist.is_initialized() and (together or size == 1 or not cuda):
            dist.destroy_process_group()


def world_size() -> int:
    """Number of processes that work together."""
    return dist.get_world_size() if dist.is_initialized() and not _as_one_process else 1


@contextmanager
def as_one_process() -> Iterator[None]:
    """Whatever runs inside sends nothing and waits for nobody, as if there were no other process."""
    global _as_one_process  # noqa: PLW0603
    before, _as_one_process = _as_one_process, True
    try:
        yield
    finally:
        _as_one_process = before


def barrier() -> None:
    """Wait until all processes are here. A collective call: all processes must make it."""
    if world_size() > 1:
        # Of itself NCCL takes the GPU that the rank suggests where nothing was sent before, which may be another's.
        nccl = dist.get_backend() == "nccl"
        dist.barrier(device_ids=[torch.cuda.current_device()] if nccl else None)


def all_reduce(number: int, world: World, operation: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> int:
    """The sum, or another combination, of the processes' numbers. A collective call."""
    total = torch.tensor(number, device=world.device)
    if world_size() > 1:
        dist.all_reduce(total, operation)
    return int(total)


def stop_signal(world: World) -> int:
    """The signal that asked any of the processes to stop, or 0. A collective call."""
    return all_reduce(interrupt.stop_requested() or 0, world, dist.ReduceOp.MAX)


def raise_if_any_stopped(world: World) -> None:
    """Stop if any process was asked to, so that none waits for one that has left. A collective call.

    Raises:
        Stopped: a signal arrived at some process.
    """
    signum = stop_signal(world)
    if signum:
        raise interrupt.Stopped(signum)


def said_by_main(number: int, world: World) -> int:
    """The number that rank 0 gives. A collective call; what the others give does not matter."""
    told = torch.tensor([number], device=world.device)
    if dist.is_initialized():
        dist.broadcast(told, 0)
    return int(told)


def sum_over_ranks(value: Tensor) -> Tensor:
    """Sum of equally shaped tensors, one per process; carries no gradient, and leaves `value` as it is."""
    total = value.detach().clone()
    if world_size() > 1:
        dist.all_reduce(total)
    return total


def mean_over_ranks(value: Tensor) -> Tensor:
    """Mean of equally shaped tensors, one per process; gradients flow back to all of them.

    Its gradient is that of the mean loss over the processes once `average_gradients` has run.
    """
    return _differentiable_sum(value) / world_size() if world_size() > 1 else value


def average_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Replace each parameter's gradient by its mean over the processes.

    A parameter without a gradient is left alone, so it must lack one in every process.
    """
    if world_size() == 1:
        return
    bucket: list[Tensor] = []
    size = 0
    for parameter in parameters:
        if parameter.grad is not None:
            bucket.append(parameter.grad)
            size += parameter.grad.nbytes
        if size >= _BUCKET_BYTES:
            _average(bucket)
            bucket, size = [], 0
    _average(bucket)


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
def failing_together(world: World) -> Iterator[None]:
    """For what one process alone may fail at, such as a full disk, while the others would wait for it.

    All processes must enter. Whoever fails raises what it met; where only others fail, this process ends with the
    status of theirs, which they report.
    """
    failure: Exception | None = None
    try:
        yield
    except (OSError, UserError, torch.OutOfMemoryError) as error:
        failure = error
    failures = all_reduce(int(failure is not None), world)
    if failure is not None:
        raise failure
    if failures:
        raise SystemExit(2)


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


def _average(tensors: list[Tensor]) -> None:
    """Average tensors of one type over the processes in place, in a single message."""
    if not tensors:
        return
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    dist.all_reduce(flat)
    flat /= world_size()
    parts = flat.split([tensor.numel() for tensor in tensors])
    torch._foreach_copy_(tensors, [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)])


# An operator of torch, which its compiler takes as it is: of an autograd function with a collective in it, torch 2.11
# makes a graph that passes no gradient, without a word.
_differentiable_sum = torch.library.custom_op("crt::sum_over_ranks", sum_over_ranks, mutates_args=())
_differentiable_sum.register_fake(torch.empty_like)


def _differentiate_sum(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> Tensor:
    """Its gradient is the sum of the processes' gradients."""
    return _differentiable_sum(gradient)


_differentiable_sum.register_autograd(_differentiate_sum)


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
