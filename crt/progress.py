"""What a person sees of a stage: a line with rate and time left in the terminal, and the same in its log file."""

from __future__ import annotations

import logging
import os
import sys
import time
from contextlib import suppress
from pathlib import Path

from crt.files import make_folder

logger = logging.getLogger("crt")

_TERMINAL_SECONDS = 0.2
_LOG_SECONDS = 10.0


def start_logging(log_file: str | Path | None, rank: int = 0) -> None:
    """Send the package's log to stderr and append it, with times, to `log_file`.

    Ranks other than 0 only report warnings, prefixed with their rank.
    """
    # A log file on a full disk, or a terminal that is gone, must not bring logging's own traceback for each line.
    logging.raiseExceptions = False
    logger.handlers.clear()
    logger.propagate = False
    logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    stream = logging.StreamHandler(sys.stderr)
    stream.setFormatter(logging.Formatter("%(message)s" if rank == 0 else f"[rank {rank}] %(message)s"))
    logger.addHandler(stream)
    if log_file is not None and rank == 0:
        make_folder(Path(log_file).parent)
        # File names may hold bytes that are no UTF-8; sys.stderr escapes them already.
        file = logging.FileHandler(log_file, encoding="utf-8", errors="backslashreplace")
        file.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
        logger.addHandler(file)


def restore_log(log_file: Path, kept: Path) -> None:
    """Bring back a log that Snakemake deleted when it started the stage again, so that it goes on over restarts.

    Args:
        log_file: the stage's log.
        kept: another name for the same file, that Snakemake does not know.
    """
    make_folder(kept.parent)
    # A file system without hard links costs the earlier lines, nothing else.
    with suppress(OSError):
        if kept.exists() and not log_file.exists():
            os.link(kept, log_file)
        log_file.touch()
        if not kept.exists() or not kept.samefile(log_file):
            kept.unlink(missing_ok=True)
            os.link(log_file, kept)


class Progress:
    """Progress of one long loop.

    In a terminal one line is redrawn; elsewhere, and in the log file, a line is written every ten seconds
    and at the end. The rate counts only the work done since this object was made, so that a continued
    stage does not promise the speed of work done yesterday.
    """

    def __init__(self, label: str, total: int, unit: str, done: int = 0) -> None:
        """`total` 0: how much there is to do shows at the end, when the caller sets it; until then no share is told."""
        self.label, self.total, self.unit = label, total, unit
        self.first = self.done = done
        self.started = self.drawn = time.monotonic()
        self.logged = self.started - _LOG_SECONDS + 2.0
        self.terminal = sys.stderr.isatty() and logger.isEnabledFor(logging.INFO)
        if 0 < total <= done:
            logger.info("%s: all %d %s were done before", label, total, unit)
        elif done:
            logger.info("%s: continues at %d of %d %s", label, done, total, unit)

    def update(self, done: int, **figures: float) -> None:
        """Show that `done` of the total is done, with named figures such as loss=0.5."""
        self.done = done
        if not logger.isEnabledFor(logging.INFO):  # ranks other than 0
            return
        now = time.monotonic()
        finished = 0 < self.total <= done
        if not finished and now - self.drawn < _TERMINAL_SECONDS:
            return
        self.drawn = now
        line = self.line(now, figures)
        if self.terminal:
            sys.stderr.write(f"\r\x1b[K{line}" if not finished else "\r\x1b[K")
            sys.stderr.flush()
        if finished or now - self.logged >= _LOG_SECONDS:
            self.logged = now
            for handler in logger.handlers:
                if isinstance(handler, logging.FileHandler) or not self.terminal or finished:
                    handler.handle(logging.LogRecord("crt", logging.INFO, "", 0, line, None, None))

    def line(self, now: float, figures: dict[str, float]) -> str:
        """The progress line: share, rate, time left (or taken), figures."""
        elapsed = max(now - self.started, 1e-9)
        rate = (self.done - self.first) / elapsed
        share = 100 * self.done / max(self.total, 1)
        if not self.total:
            return f"{self.label}: {self.done} {self.unit}, {rate:.4g} {self.unit}/s"
        if self.done >= self.total:
            clock = f"took {duration(elapsed)}"
        else:
            clock = f"{duration((self.total - self.done) / rate)} left" if rate > 0 else "time left unknown"
        parts = [
            f"{self.label}: {self.done}/{self.total} {self.unit} ({share:.0f}%)",
            f"{rate:.4g} {self.unit}/s",
            clock,
        ]
        parts += [f"{name} {value:.4g}" for name, value in figures.items()]
        return ", ".join(parts)


def duration(seconds: float) -> str:
    """Seconds as a person reads them: 45s, 3m20s, 2h05m, 4d03h."""
    total = round(seconds)
    if total < 60:
        return f"{total}s"
    if total < 3600:
        return f"{total // 60}m{total % 60:02d}s"
    if total < 86400:
        return f"{total // 3600}h{total % 3600 // 60:02d}m"
    return f"{total // 86400}d{total % 86400 // 3600:02d}h"


def human_bytes(count: float) -> str:
    """Bytes as a person reads them, three digits in decimal units: 512 B, 1.23 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:  # above, three digits make it 1e+03
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
