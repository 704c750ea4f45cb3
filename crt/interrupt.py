"""Stopping on request: SIGTERM, SIGINT and Slurm's warning signal end a stage at its next safe point."""

from __future__ import annotations

import signal
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_received: list[int] = []


class Stopped(Exception):
    """The stage was asked to stop, has saved what it had, and continues there when run again."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}: run the same command to continue")
        self.signum = signum
        self.exit_status = 128 + signum


def listen() -> None:
    """Record the signals instead of dying; a second SIGINT ends the process at once.

    Other signals come twice without being meant so: from a scheduler that reaches every process of a job, and from the
    parent that passes on its own.
    """
    for signum in SIGNALS:
        signal.signal(signum, _receive)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # `crt.processes` blocks them until here


def stop_requested() -> int | None:
    """The signal that asked this process to stop, or None."""
    return _received[0] if _received else None


def raise_if_stopped() -> None:
    """Call between two units of work that are safe on disk.

    Raises:
        Stopped: a signal arrived.
    """
    if _received:
        raise Stopped(_received[0])


def _receive(signum: int, frame: FrameType | None) -> None:
    if signum == signal.SIGINT and signum in _received:
        signal.signal(signum, signal.SIG_DFL)
        signal.raise_signal(signum)
    _received.append(signum)
