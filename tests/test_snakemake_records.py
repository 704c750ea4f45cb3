"""crt/snakemake_records.py against the marks that Snakemake itself writes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from snakemake.io import IOFile
from snakemake.persistence.file import FilePersistence

from crt.snakemake_records import forget_incomplete


@pytest.mark.parametrize(
    "folder", ["out/ar", "out/~~~~", "out/" + "/".join(["a" * 100] * 3)], ids=["short", "signs", "long"]
)
def test_marks_of_outputs_that_exist_are_removed_and_no_others(tmp_path, monkeypatch, folder):
    """Oracle: Snakemake's own reading of its records."""
    monkeypatch.chdir(tmp_path)
    made, running, foreign = names = [f"{folder}/{name}" for name in ("made", "running", "foreign")]
    Path(folder).mkdir(parents=True)
    Path(made).touch()
    Path(foreign).touch()
    records = FilePersistence(nolock=True)
    records.started(SimpleNamespace(output=[IOFile(name) for name in names]))
    for stray in ("no base64!", "cut"):
        (tmp_path / ".snakemake/incomplete" / stray).touch()
    forget_incomplete([made, running])
    records = FilePersistence(nolock=True)
    assert records._filter_incomplete_keys(names) == {running, foreign}


def test_a_project_without_marks_is_fine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    forget_incomplete(["out/ar"])
