"""The log of a stage over restarts."""

from __future__ import annotations

import logging
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


def test_names_that_are_no_utf8_are_escaped_in_the_log(tmp_path, capfd, no_handlers, monkeypatch):
    start_logging(tmp_path / "data.log")
    monkeypatch.setattr(logging, "raiseExceptions", True)
    logger.warning("left out: %s", b"caf\xe9.png".decode("utf-8", "surrogateescape"))
    assert capfd.readouterr().err.count("\n") == 1  # no traceback of the logging module
    assert (tmp_path / "data.log").read_text(encoding="utf-8").endswith(" left out: caf\\udce9.png\n")


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


def test_rate_and_time_left_are_of_what_is_done_since_it_began():
    """Not of what an earlier, stopped run did; oracle: 20 steps in 10 s, and 20 to go."""
    progress = Progress("train", 100, "steps", done=60)
    assert progress.line(progress.started, {}).endswith(", time left unknown")
    progress.done = 80
    line = progress.line(progress.started + 10, {"loss": 0.5})
    assert line == "train: 80/100 steps (80%), 2 steps/s, 10s left, loss 0.5"


def test_times_and_sizes_are_told_in_units_of_their_size():
    times = {0.4: "0s", 59.6: "1m00s", 200: "3m20s", 3599: "59m59s", 7500: "2h05m", 4 * 86400 + 3 * 3600: "4d03h"}
    assert {seconds: duration(seconds) for seconds in times} == times
    sizes = {512: "512 B", 1000: "1 kB", 1_230_000: "1.23 MB", 98.7e9: "98.7 GB", 2e12: "2 TB"}
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
