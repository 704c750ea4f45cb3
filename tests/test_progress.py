"""What a stage says of itself, in a terminal and in its log, and the log over restarts."""

from __future__ import annotations

import io
import logging
import os
import re
import sys
from contextlib import suppress

import pytest

from crt.progress import Progress, duration, human_bytes, logger, restore_log, start_logging


@pytest.fixture
def no_handlers():
    yield
    for handler in logger.handlers:
        with suppress(OSError):
            handler.close()
    logger.handlers.clear()


class Terminal(io.StringIO):
    """What is written shows when it is flushed."""

    shown = ""

    def isatty(self):
        return True

    def flush(self):
        self.shown = self.getvalue()


def test_names_that_are_no_utf8_are_escaped_in_the_log(tmp_path, capfd, no_handlers, monkeypatch):
    start_logging(tmp_path / "data.log")
    monkeypatch.setattr(logging, "raiseExceptions", True)
    logger.warning("left out: %s", b"caf\xe9.png".decode("utf-8", "surrogateescape"))
    assert capfd.readouterr().err.count("\n") == 1  # no traceback of the logging module
    assert (tmp_path / "data.log").read_text(encoding="utf-8").endswith(" left out: caf\\udce9.png\n")


def test_starting_again_doubles_no_line_and_makes_the_logs_folder(tmp_path, capfd, no_handlers):
    for _ in range(2):
        start_logging(tmp_path / "out/data.log")
    logger.info("reads the labels")
    assert capfd.readouterr().err == "reads the labels\n"
    assert re.fullmatch(r"[\d-]+ [\d:]+ reads the labels\n", (tmp_path / "out/data.log").read_text())


def test_other_processes_only_warn_and_say_who_they_are(tmp_path, no_handlers, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    start_logging(tmp_path / "data.log", rank=1)
    Progress("train", 10, "steps").update(10)
    logger.info("reads the labels")
    logger.warning("left out: a.png")
    assert terminal.shown == "[rank 1] left out: a.png\n"
    assert not (tmp_path / "data.log").exists()


def test_a_log_on_a_full_disk_costs_its_lines_and_no_traceback(capfd, no_handlers, monkeypatch):
    monkeypatch.setattr(logging, "raiseExceptions", True)
    start_logging("/dev/full")
    logger.warning("left out: a.png")
    assert capfd.readouterr().err == "left out: a.png\n"


def test_what_is_not_known_beforehand_is_counted(tmp_path, no_handlers, monkeypatch):
    now = iter(range(0, 1000, 5))
    monkeypatch.setattr("crt.progress.time.monotonic", lambda: float(next(now)))
    start_logging(tmp_path / "data.log")
    progress = Progress("listing photos", 0, "files")
    for done in (100, 200, 300):
        progress.update(done)
    progress.total = 300
    progress.update(300)
    lines = [line.split(" ", 2)[2] for line in (tmp_path / "data.log").read_text().splitlines()]
    assert lines == [
        "listing photos: 100 files, 20 files/s",
        "listing photos: 300 files, 20 files/s",
        "listing photos: 300/300 files (100%), 15 files/s, took 20s",
    ]


def test_a_terminal_shows_one_line_that_is_redrawn_and_in_the_end_a_lasting_one(tmp_path, no_handlers, monkeypatch):
    """The log has a line after two seconds, then one every ten, and the last."""
    terminal, now = Terminal(), 0.0
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr("crt.progress.time.monotonic", lambda: now)
    start_logging(tmp_path / "ar.log")
    progress = Progress("train", 200, "steps")
    for step in range(1, 201):  # eight a second: every other one is drawn
        now = step / 8
        progress.update(step)
        assert terminal.shown == terminal.getvalue()
    *drawn, last = terminal.shown.split("\r\x1b[K")
    assert not any("\n" in line for line in drawn)
    assert [line.split()[1] for line in drawn if line] == [f"{step}/200" for step in range(2, 200, 2)]
    assert last == "train: 200/200 steps (100%), 8 steps/s, took 25s\n"
    logged = re.findall(r"train: (\d+)/200", (tmp_path / "ar.log").read_text())
    assert logged == ["16", "96", "176", "200"]


def test_a_loop_that_ends_at_once_has_its_last_line(capfd, no_handlers):
    start_logging(None)
    Progress("train", 3, "steps").update(3)
    assert re.fullmatch(r"train: 3/3 steps \(100%\), .* took 0s\n", capfd.readouterr().err)


@pytest.mark.parametrize(
    ("done", "said"),
    [(0, ""), (7, "train: continues at 7 of 10 steps\n"), (10, "train: all 10 steps were done before\n")],
)
def test_what_was_done_before_is_said(capfd, no_handlers, done, said):
    start_logging(None)
    Progress("train", 10, "steps", done)
    assert capfd.readouterr().err == said


def test_rate_and_time_left_are_of_what_is_done_since_it_began():
    """Not of what an earlier, stopped run did; oracle: 20 steps in 10 s, and 20 to go."""
    progress = Progress("train", 100, "steps", done=60)
    assert progress.line(progress.started, {}).endswith(", time left unknown")
    progress.done = 80
    line = progress.line(progress.started + 10, {"loss": 0.5})
    assert line == "train: 80/100 steps (80%), 2 steps/s, 10s left, loss 0.5"


def test_times_and_sizes_are_told_in_units_of_their_size():
    times = {0.4: "0s", 59.6: "1m00s", 200: "3m20s", 3599: "59m59s", 3600: "1h00m", 7500: "2h05m"}
    times |= {86399: "23h59m", 86400: "1d00h", 4 * 86400 + 3 * 3600: "4d03h"}
    assert {seconds: duration(seconds) for seconds in times} == times
    sizes = {
        512: "512 B",
        1000: "1 kB",
        999_499: "999 kB",
        999_600: "1 MB",
        1_230_000: "1.23 MB",
        98.7e9: "98.7 GB",
        2e12: "2 TB",
    }
    assert {count: human_bytes(count) for count in sizes} == sizes


def test_a_deleted_log_comes_back_with_its_lines(tmp_path):
    log, kept = tmp_path / "ar.log", tmp_path / ".work/ar.log"
    for run in range(3):
        restore_log(log, kept)
        with open(log, "a") as file:
            file.write(f"run {run}\n")
        if run == 0:
            log.unlink()  # as Snakemake does
    assert log.read_text() == "run 0\nrun 1\nrun 2\n"


def test_a_log_from_elsewhere_is_kept(tmp_path):
    log, kept = tmp_path / "ar.log", tmp_path / ".work/ar.log"
    restore_log(log, kept)
    log.unlink()
    log.write_text("copied\n")
    restore_log(log, kept)
    assert log.read_text() == kept.read_text() == "copied\n"


def test_without_hard_links_a_log_begins_anew(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    log, kept = tmp_path / "ar.log", tmp_path / ".work/ar.log"
    restore_log(log, kept)
    log.write_text("run 0\n")
    restore_log(log, kept)
    assert log.read_text() == "run 0\n"
