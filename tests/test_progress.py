"""The log of a stage over restarts."""

from __future__ import annotations

import logging

import pytest

from crt.progress import Progress, logger, restore_log, start_logging


@pytest.fixture
def no_handlers():
    yield
    for handler in logger.handlers:
        handler.close()
    logger.handlers.clear()


def test_names_that_are_no_utf8_are_escaped_in_the_log(tmp_path, capfd, no_handlers, monkeypatch):
    monkeypatch.setattr(logging, "raiseExceptions", True)
    start_logging(tmp_path / "data.log")
    logger.warning("left out: %s", b"caf\xe9.png".decode("utf-8", "surrogateescape"))
    assert capfd.readouterr().err.count("\n") == 1  # no traceback of the logging module
    assert (tmp_path / "data.log").read_text(encoding="utf-8").endswith(" left out: caf\\udce9.png\n")


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
