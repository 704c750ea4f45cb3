"""Files that are whole or not there. Oracle: what lies in the folder afterwards."""

from __future__ import annotations

import os
import resource
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from crt.__main__ import main
from crt.commands import results
from crt.data.packed import PackedImages, read_index
from crt.errors import UserError
from crt.evaluation.sources import AdmBatch
from crt.files import replacing, write_json
from crt.manifest import read_manifest
from crt.model_files import CONFIG_FILE, TOKENIZER, WEIGHTS_FILE, read_config, read_weights, write_model
from crt.tokens.cache import TokenCache
from tests.conftest import ROOT
from tests.tokens.caches import make_header, random_codes, write_cache


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


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_weights_can_be_read_by_those_whom_the_mask_of_the_user_lets(tmp_path: Path, mask: int, mode: int) -> None:
    """Oracle: a file that Python makes."""
    before = os.umask(mask)
    try:
        write_model(tmp_path, {}, {"weight": torch.zeros(1)})
    finally:
        os.umask(before)
    assert [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in (WEIGHTS_FILE, CONFIG_FILE)] == [mode, mode]


READS = {
    "manifest.json": read_manifest,
    CONFIG_FILE: lambda folder: read_config(folder, TOKENIZER, object),
    WEIGHTS_FILE: lambda folder: read_weights(folder, TOKENIZER, {}, torch.Tensor.float),
    "val.h5": lambda folder: TokenCache(folder, "val"),
    "index.json": read_index,
    "train-00000.h5": lambda folder: PackedImages(folder, "train"),
    "metrics.json": lambda folder: results.run(SimpleNamespace(results=[folder])),
    "adm.npz": lambda folder: AdmBatch(folder / "adm.npz"),
}


def test_a_file_that_may_not_be_read_is_not_called_damaged_nor_missing(params_file, tmp_path: Path) -> None:
    """Its remedy must not be to delete it. Root may read all, so a process without its powers reads."""
    powerless = ["setpriv", "--inh-caps=-all", "--bounding-set=-all"] if os.geteuid() == 0 else []
    if powerless and not shutil.which("setpriv"):
        pytest.skip("root without setpriv")
    reason = "cannot be read (Permission denied): change its permissions, or choose another folder"
    assert read_all(params_file, tmp_path, *powerless) == [f"{tmp_path / 'data' / name}: {reason}" for name in READS]


def test_a_file_for_which_there_is_no_descriptor_is_not_called_damaged_nor_missing(params_file, tmp_path: Path) -> None:
    reason = "cannot be read (Too many open files): raise the limit (`ulimit -n`)"
    lines = read_all(params_file, tmp_path, "env", "NO_DESCRIPTORS=1")
    assert [line.partition(": ")[2] for line in lines] == [reason] * len(READS)


def read_all(params_file, tmp_path: Path, *prefix: str) -> list[str]:
    """What each of READS says in a process that may not read, started with a prefix to the command."""
    assert main(["prepare_data", "--params", str(params_file()), "--out", str(tmp_path / "data")]) == 0
    write_model(tmp_path / "data", {}, {})
    (tmp_path / "data" / "metrics.json").write_text("{}")
    np.savez(tmp_path / "data" / "adm.npz", np.zeros((2, 8, 8, 3), np.uint8))
    header = make_header(split="val")
    write_cache(tmp_path / "data", header, *random_codes(header))
    command = [*prefix, sys.executable, "-m", "tests.test_files", str(tmp_path / "data")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert not done.stderr
    return done.stdout.splitlines()


if __name__ == "__main__":
    for name, read in READS.items():
        path = Path(sys.argv[1]) / name
        path.chmod(0)
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        if "NO_DESCRIPTORS" in os.environ:
            path.chmod(0o644)
            resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
        try:
            read(path.parent)
        except UserError as error:
            print(error)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        path.chmod(0o644)
