"""The log of a stage over restarts."""

from __future__ import annotations

from crt.progress import restore_log


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
