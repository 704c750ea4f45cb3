"""Stopping on request: SIGTERM, SIGINT and Slurm's warning signal end a stage at its next safe point."""

from __future__ import annotations

import signal
import time
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_received: list[int] = []
_received_at: list[float] = []
_ONE_REQUEST_SECONDS = 1.0


class Stopped(Exception):
    """The stage was asked to stop, has saved what it had, and continues there when run again."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}: run the same command to continue")
        self.signum = signum
        self.exit_status = 128 + signum


def listen() -> None:
    """Record the signals instead of dying; a second SIGINT ends the process at once.

    It must come a moment later: a terminal and a scheduler reach every process, and a parent passes its own on, so one
    request arrives twice. Other signals are never sent again to hurry.
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
    if signum == signal.SIGINT and signum in _received and time.monotonic() - _received_at[0] > _ONE_REQUEST_SECONDS:
        signal.signal(signum, signal.SIG_DFL)
        signal.raise_signal(signum)
    if not _received:
        _received_at[:] = [time.monotonic()]
    _received.append(signum)
