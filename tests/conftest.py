"""Shared by all tests: where the real test images are, params files with overrides, one thread per process."""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ruamel.yaml import YAML

# Two test workers on two cores: more threads each would only fight.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))  # torch has looked already
os.environ.setdefault("DS_ACCELERATOR", "cpu")

ROOT = Path(__file__).resolve().parent.parent
SHARED_DATA = ROOT.parent / "shared" / "data"

# The smallest run of the whole pipeline on the real digits: some seconds of work per stage.
TINY = {
    "lambda": 0.5,
    "prepare_data.max_images_per_class": 12,
    "train_tokenizer.architecture.encoder_channels": 16,
    "train_tokenizer.architecture.decoder_channels": 16,
    "train_tokenizer.quantizer.codebook_size": 64,
    "train_tokenizer.regularizer.anneal_steps": 5,
    "train_tokenizer.steps": 20,
    "train_tokenizer.batch_size": 16,
    "train_tokenizer.validate_every": 10,
    "train_tokenizer.checkpoint_every": 5,
    "train_ar.model.layers": 1,
    "train_ar.model.width": 32,
    "train_ar.steps": 20,
    "train_ar.batch_size": 16,
    "train_ar.validate_every": 10,
    "train_ar.checkpoint_every": 5,
    "sample.num_images": 20,
    "sample.batch_size": 10,
    "evaluate.classifier.steps": 10,
    "evaluate.batch_size": 20,
}


def override(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Set dotted keys, which must exist, and return `values`."""
    for dotted, value in changes.items():
        *sections, key = dotted.split(".")
        section = values
        for name in sections:
            section = section[name]
        assert key in section, f"{dotted} is no key of params.yaml"
        section[key] = value
    return values


def write_params(path: Path, changes: dict[str, Any], base: Path = ROOT / "params.yaml") -> Path:
    """Copy a params file with dotted keys changed; comments survive."""
    yaml = YAML()
    yaml.width = 4096
    values = override(yaml.load(base.read_text(encoding="utf-8")), changes)
    with open(path, "w", encoding="utf-8") as file:
        yaml.dump(values, file)
    return path


def raise_version(stage: str, root: Path) -> None:
    """Write a project's stage versions as after a change of one stage's code."""
    text = (ROOT / "crt/stage_versions.yaml").read_text(encoding="utf-8")
    raised = re.sub(rf"(?m)^{stage}: (\d+)$", lambda found: f"{stage}: {int(found[1]) + 1}", text)
    assert raised != text
    (root / "crt/stage_versions.yaml").write_text(raised, encoding="utf-8")


def dvclive_curve(folder: Path, name: str) -> dict[int, float]:
    """A curve that DVCLive keeps in a folder of `crt.live`, by step."""
    with open(folder / "dvclive/plots/metrics" / f"{name}.tsv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    curve = {int(row["step"]): float(row[name.rpartition("/")[2]]) for row in rows}
    assert len(curve) == len(rows)  # no step twice
    return curve


def in_ascii_locale(*arguments: str) -> str:
    """What `python ARGUMENTS` prints where text is ASCII unless told otherwise, as it is Latin-1 or GBK in others."""
    locale = {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=os.environ | locale, check=True, stdout=subprocess.PIPE, text=True
    ).stdout


def run_out_of_memory(*_: Any, **__: Any) -> None:
    """In place of what needs a GPU's memory: fails as torch does."""
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.fixture
def params_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Make a params file of the tiny run with further changes; stages are run from the project's root."""
    monkeypatch.chdir(ROOT)
    return lambda **changes: write_params(
        tmp_path / "params.yaml", TINY | {k.replace("__", "."): v for k, v in changes.items()}
    )


@pytest.fixture
def cifar10_archive() -> Path:
    """60,000 real JPEG files in class folders; skips where absent."""
    return _shared("cifar10.tar.gz")


@pytest.fixture
def imagenet_sample() -> Path:
    """103 real ImageNet JPEG files by synset, some of them grayscale; skips where absent."""
    return _shared("imagenet-sample")


def _shared(name: str) -> Path:
    path = SHARED_DATA / name
    if not path.exists():
        pytest.skip(f"{path} is absent")
    return path


def output_and_gradients(function: Callable[..., torch.Tensor], values: list[torch.Tensor]) -> list[torch.Tensor]:
    """What a function makes of copies of `values`, and their gradients from one that differs from place to place."""
    inputs = [value.clone().requires_grad_() for value in values]
    output = function(*inputs)
    output.backward(torch.linspace(-1, 1, output.numel()).view(output.shape).to(output.dtype))
    return [output, *(value.grad for value in inputs)]
