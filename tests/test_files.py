"""Files that are whole or not there. Oracle: what lies in the folder afterwards."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from crt.files import replacing, write_json


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: flushed.append(os.fstat(descriptor).st_ino))
    with replacing(tmp_path / "file") as temporary:
        temporary.write_text("new")
        assert os.listdir(tmp_path) == ["file.tmp"]
    assert flushed == [(tmp_path / "file").stat().st_ino]


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    write_json(tmp_path / "file", {"old": 1})
    before = (tmp_path / "file").read_bytes()
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "file", {"begun": 1, "no JSON": float("nan")})
    with pytest.raises(KeyboardInterrupt), replacing(tmp_path / "file", tmp_path / "elsewhere") as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == ["file"]
    assert (tmp_path / "file").read_bytes() == before
