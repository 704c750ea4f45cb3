"""What is made or fetched once, by one of many, whoever is killed. Oracle: a count of who made it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from crt import interrupt
from crt.interrupt import Stopped
from crt.locks import exclusively, fetching
from tests.conftest import ROOT

# Makes the thing if it is not there: notes its start, works, notes its end, and shows it by a rename.
MAKER = """
import os, sys, time
from pathlib import Path
from crt.locks import exclusively
from crt.progress import start_logging
start_logging(None)
path, notes = Path(sys.argv[1]), Path(sys.argv[2])
with exclusively(path):
    if not path.exists():
        with open(notes, "a") as file: file.write(f"start {os.getpid()}\\n")
        time.sleep(float(sys.argv[3]))
        with open(notes, "a") as file: file.write(f"end {os.getpid()}\\n")
        path.with_suffix(".tmp").write_text("made")
        os.replace(path.with_suffix(".tmp"), path)
assert path.read_text() == "made"
"""


def start(path: Path, notes: Path, seconds: float) -> subprocess.Popen:
    command = [sys.executable, "-c", MAKER, str(path), str(notes), str(seconds)]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)


def test_of_many_one_makes_it(tmp_path):
    path, notes = tmp_path / "thing", tmp_path / "notes"
    makers = [start(path, notes, 1) for _ in range(3)]
    assert [maker.wait(60) for maker in makers] == [0, 0, 0]
    assert [line.split()[0] for line in notes.read_text().splitlines()] == ["start", "end"]


def test_a_killed_one_leaves_the_lock_to_the_next(tmp_path):
    path, notes = tmp_path / "thing", tmp_path / "notes"
    first = start(path, notes, 600)
    while not notes.exists():
        time.sleep(0.05)
    second = start(path, notes, 0)
    said = second.stderr.readline()
    time.sleep(1.2)
    assert second.poll() is None  # it waits
    os.kill(first.pid, signal.SIGKILL)
    first.communicate(timeout=10)
    said += second.communicate(timeout=60)[1]
    assert second.returncode == 0
    assert said == f"waits for another process that is making {path}\n"  # once
    assert [line.split()[0] for line in notes.read_text().splitlines()] == ["start", "start", "end"]


def test_a_signal_ends_the_waiting(tmp_path, monkeypatch):
    path = tmp_path / "thing"
    holder = start(path, tmp_path / "notes", 600)
    try:
        while not (tmp_path / "notes").exists():
            time.sleep(0.05)
        monkeypatch.setattr(interrupt, "_received", [signal.SIGTERM])
        for waiting in (exclusively, fetching):
            with pytest.raises(Stopped), waiting(path):
                pass
        with exclusively(path, alone=False):
            pass  # others follow: the collective check after it stops them all
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("RANK", "0")
        with fetching(path) as missing:
            assert missing
    finally:
        holder.kill()
        holder.wait()


# In place of the network: notes that it was asked, takes a while, and gives the file.
FETCHERS = '''
import io, os, sys, time, types, urllib.request
from pathlib import Path

def served(notes, data):
    with open(notes, "a") as file: file.write("asked\\n")
    time.sleep(2)
    return data

def become(processes):
    """Go on in so many new processes, all of which must succeed; the imports before are made once."""
    children = []
    for _ in range(processes):
        child = os.fork()
        if not child:
            return
        children.append(child)
    sys.exit(any([os.waitpid(child, 0)[1] for child in children]))

notes, processes = sys.argv[1], int(sys.argv[2])
'''
FETCH_INCEPTION = """
from crt.evaluation.features import _fetch_inception
import hashlib
become(processes)
urllib.request.urlopen = lambda *_, **__: io.BytesIO(served(notes, b"weights"))
folder = _fetch_inception(hashlib.sha256(b"weights").hexdigest())
assert (folder / "inception-2015-12-05.pt").read_bytes() == b"weights"
"""
# Torchvision's own loader, beneath a package of the same face as lpips.
FETCH_VGG = """
import torch
from torch import nn
from torchvision.models import VGG16_Weights
from crt.tokenizer.losses import PerceptualLoss
become(processes)

def download(url, target, *_, **__):
    served(notes, b"")
    torch.save(nn.Linear(1, 1).state_dict(), target + ".part")
    os.replace(target + ".part", target)

torch.hub.download_url_to_file = download

def network(net, pnet_rand, verbose):
    made = nn.Linear(1, 1)
    made.load_state_dict(torch.hub.load_state_dict_from_url(VGG16_Weights.IMAGENET1K_V1.url))
    return made

sys.modules["lpips"] = types.SimpleNamespace(LPIPS=network)
PerceptualLoss(None)
"""


@pytest.mark.parametrize(("fetch", "processes_of_a_run"), [(FETCH_INCEPTION, 1), (FETCH_INCEPTION, 3), (FETCH_VGG, 3)])
def test_of_many_processes_one_fetches(tmp_path, fetch, processes_of_a_run):
    """Whether they belong to one run or to several. Oracle: a count of downloads."""
    environment = os.environ | {"TORCH_HOME": str(tmp_path), "WORLD_SIZE": str(processes_of_a_run), "RANK": "0"}
    command = [sys.executable, "-c", FETCHERS + fetch, str(tmp_path / "notes")]
    subprocess.run([*command, "3"], cwd=ROOT, env=environment, check=True, timeout=120)
    assert (tmp_path / "notes").read_text() == "asked\n"
    # What is there needs no lock: its folder may be read-only.
    for lock in tmp_path.rglob("*.lock"):
        lock.unlink()
    subprocess.run([*command, "1"], cwd=ROOT, env=environment, check=True)
    assert not list(tmp_path.rglob("*.lock"))
    assert (tmp_path / "notes").read_text() == "asked\n"
