"""Several processes of one stage on this machine, started and ended together: `python -m crt.processes N STAGE ...`.

They find each other as under torchrun, by its variables. torchrun itself would end its workers 30 seconds after a
signal, whatever they have to save, and answer each mistake and each stop with a traceback of its own.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from types import FrameType

from crt import interrupt
from crt.system_errors import REMEDIES, RUN_AGAIN

# How long the others may take to end by themselves once one has failed: most meet the same mistake, but one may wait
# for the one that is gone.
_GRACE_SECONDS = 15.0
_POLL_SECONDS = 0.1
# Of Linux's sys/prctl.h.
_PR_SET_PDEATHSIG = 1
_prctl = getattr(ctypes.CDLL(None), "prctl", None)


def run_together(processes: int, arguments: Sequence[str]) -> int:
    """Run `python -m crt` in several processes and wait for all of them.

    A signal that asks to stop is passed on once, and waited for as long as it takes. If a process fails, the others
    have some seconds to end too, and are killed then.

    Args:
        processes: how many.
        arguments: the command line after `python -m crt`.

    Returns:
        The exit status of the first process that ended with another one than 0; of one that was killed, 128 + signal;
        2 where one could not be started.
    """
    asked: list[int] = []
    children: list[subprocess.Popen[bytes]] = []

    def pass_on(signum: int, frame: FrameType | None) -> None:
        if not asked:
            asked.append(signum)
            for child in children:
                child.send_signal(signum)

    for signum in interrupt.SIGNALS:
        signal.signal(signum, pass_on)
    environment = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    environment |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    for rank in range(processes):
        own = environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        command = [sys.executable, "-m", "crt", *arguments]
        try:
            # This process has one thread, so the child may do it before it becomes Python.
            children.append(subprocess.Popen(command, env=own, preexec_fn=_first))  # noqa: PLW1509
        except OSError as error:
            for child in children:
                child.kill()
                child.wait()
            remedy = REMEDIES.get(error.errno or 0, "see to that")
            print(
                f"error: process {rank} of {processes} cannot be started: {error.strerror}: {remedy}{RUN_AGAIN}",
                file=sys.stderr,
            )
            return 2
        if asked:
            children[-1].send_signal(asked[0])
    return _wait(children)


def _wait(children: Sequence[subprocess.Popen[bytes]]) -> int:
    """The status of `run_together`."""
    stops = {128 + signum for signum in interrupt.SIGNALS}
    status, deadline = 0, float("inf")
    running = dict(enumerate(children))
    while running:
        ended = {rank: code for rank, child in running.items() if (code := child.poll()) is not None}
        # A killed one comes first: it is why others, seen to end at the same time, failed.
        for rank, code in sorted(ended.items(), key=lambda entry: entry[1]):
            del running[rank]
            if code and not status:
                status = code if code > 0 else 128 - code
                if code < 0:
                    _say(rank, len(children), signal.Signals(-code), time.monotonic() > deadline)
            # Those that stop on request wait for the first one, which saves; nobody has to wait once that is gone.
            if rank == 0 or (code and code not in stops):
                deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
        if running and time.monotonic() > deadline:
            for child in running.values():
                child.kill()
        time.sleep(_POLL_SECONDS if running else 0)
    return status


def _say(rank: int, processes: int, signum: signal.Signals, is_late: bool) -> None:
    reason = ", most likely out of memory" if signum == signal.SIGKILL else ""
    ended = "did not end when the first one was done" if is_late else f"was ended by {signum.name}{reason}"
    print(
        f"error: process {rank} of {processes} {ended}: run the same command again; finished work is kept",
        file=sys.stderr,
    )


def _first() -> None:
    """What a child does before all else.

    It puts off signals until it listens: died of one before, the others would wait for it to join them. And it asks to
    be stopped when its parent is gone.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, interrupt.SIGNALS)
    if _prctl is not None:
        _prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM))


def free_port() -> int:
    """A port of this machine that nothing uses at the moment."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


if __name__ == "__main__":
    sys.exit(run_together(int(sys.argv[1]), sys.argv[2:]))
