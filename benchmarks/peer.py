"""A peer's code in a process of its own: each side runs as its own programs do.

In one process the settings of our stages would serve the peer as well: memory that is kept once it is freed, threads
that sleep while they wait for each other. Both sides still take turns.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Any, Self

import torch

from crt.launch import keep_freed_memory, wait_briefly
from crt.processor import multiplies_bfloat16

_WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


def run_as_our_stages() -> None:
    """Begin this program anew if its threads do not wait as those of our stages; torch reads that when imported."""
    if _WAITING[0] not in os.environ:
        wait_briefly()
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def usual_precisions() -> list[str]:
    """What is measured unless told otherwise.

    On a processor that multiplies no bfloat16 float32 alone: a peer's step of stage 2 takes minutes in bf16 there.
    """
    slow = not torch.cuda.is_available() and not multiplies_bfloat16()
    return ["float32"] if slow else ["bf16", "float32"]


class Peer:
    """The peer's process, while the context lasts.

    Args:
        prepare: makes the calls that are timed, by name; a function of a module.
        arguments: of `prepare`, pickled.
        keep_memory: let that process keep freed memory as our stages do.

    Attributes:
        peak_memory_bytes: most that its calls so far took of a GPU.
    """

    peak_memory_bytes = 0

    def __init__(self, prepare: Callable[..., dict[str, Callable[[], object]]], *arguments: Any, keep_memory: bool):
        context = multiprocessing.get_context("spawn")
        self._pipe, self._theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(self._theirs, prepare, arguments, keep_memory))

    def __enter__(self) -> Self:
        ours = {name: os.environ.pop(name) for name in _WAITING if name in os.environ}
        self._process.start()
        os.environ |= ours
        self._theirs.close()
        self._answer()
        return self

    def seconds(self, name: str) -> float:
        """How long the call took.

        Raises:
            SystemExit: it failed.
        """
        with suppress(BrokenPipeError):  # its end is told below
            self._pipe.send(name)
        return self._answer()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pipe.close()
        self._process.join()

    def _answer(self) -> float:
        try:
            seconds, self.peak_memory_bytes = self._pipe.recv()
        except EOFError:
            self._process.join()
            raise SystemExit(f"error: the peer's process ended with status {self._process.exitcode}") from None
        return float(seconds)


def timed(work: Callable[[], object]) -> float:
    """Seconds of a call, until the GPU is done with it."""
    await_gpu()
    started = time.perf_counter()
    work()
    await_gpu()
    return time.perf_counter() - started


def await_gpu() -> None:
    """Until what was asked of it is done, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _serve(pipe: Any, prepare: Callable[..., Any], arguments: tuple[Any, ...], keep_memory: bool) -> None:
    if keep_memory:
        keep_freed_memory()
    calls, seconds = prepare(*arguments), 0.0
    while True:
        pipe.send((seconds, torch.cuda.max_memory_allocated()))
        try:
            seconds = timed(calls[pipe.recv()])
        except EOFError:  # the other side is done
            return
