"""Shared by all tests: where the real test images are, and torch kept to one thread per process."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Two test workers on two cores: more threads each would only fight.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")

ROOT = Path(__file__).resolve().parent.parent
SHARED_DATA = ROOT.parent / "shared" / "data"


@pytest.fixture
def cifar10_archive() -> Path:
    path = SHARED_DATA / "cifar10.tar.gz"
    if not path.exists():
        pytest.skip(f"{path} is absent")
    return path


@pytest.fixture
def imagenet_sample() -> Path:
    path = SHARED_DATA / "imagenet-sample"
    if not path.exists():
        pytest.skip(f"{path} is absent")
    return path
