"""Small tokenizers, and runs of stage train_tokenizer on a packed data set made here."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from crt import interrupt
from crt.__main__ import main
from crt.tokenizer.model import Tokenizer, TokenizerConfig
from tests.conftest import ROOT, TINY, write_params

# Seconds of training on one core; further keys are set by each test.
TINY_TOKENIZER = TINY | {
    "lambda": 1.0,
    "train_tokenizer.architecture.encoder_channels": 8,
    "train_tokenizer.architecture.decoder_channels": 8,
    "train_tokenizer.architecture.channel_multipliers": [1, 1, 2],
    "train_tokenizer.architecture.decoder_blocks": 1,
    "train_tokenizer.architecture.norm_groups": 4,
    "train_tokenizer.architecture.z_channels": 8,
    "train_tokenizer.quantizer.codebook_size": 32,
    "train_tokenizer.quantizer.codebook_dim": 4,
    "train_tokenizer.regularizer.width": 16,
    "train_tokenizer.regularizer.heads": 2,
    "train_tokenizer.regularizer.layers": 1,
    "train_tokenizer.regularizer.anneal_steps": 4,
    "train_tokenizer.optimizer.warmup_steps": 2,
    "train_tokenizer.steps": 8,
    "train_tokenizer.batch_size": 8,
    "train_tokenizer.validate_every": 4,
    "train_tokenizer.checkpoint_every": 3,
}


def tiny_config(**changes) -> TokenizerConfig:
    values = {
        "image_size": 16, "encoder_channels": 8, "decoder_channels": 16, "channel_multipliers": (1, 2, 2),
        "encoder_blocks": 1, "decoder_blocks": 2, "attention": True, "norm_groups": 4, "z_channels": 12, "dropout": 0.0,
        "codebook_size": 64, "codebook_dim": 4, "l2_normalize": True,
    }  # fmt: skip
    return TokenizerConfig(**{**values, **changes})


@pytest.fixture
def tokenizer() -> Tokenizer:
    torch.manual_seed(0)
    return Tokenizer(tiny_config()).eval()


@pytest.fixture(scope="session")
def digits(tmp_path_factory) -> Path:
    """The digits, packed; 12 of each class and split."""
    folder = tmp_path_factory.mktemp("digits")
    params = write_params(folder / "params.yaml", TINY_TOKENIZER)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        assert main(["prepare_data", "--params", str(params), "--out", str(folder / "data")]) == 0
    return folder / "data"


class Runs:
    """Trainings in one temporary folder, each with its own params and output."""

    def __init__(self, folder: Path, data: Path) -> None:
        self.folder, self.data = folder, data

    def arguments(self, name: str, **changes) -> list[str]:
        """Command line of a training; two underscores in a key stand for a dot, below train_tokenizer."""
        dotted = {
            k if k in ("lambda", "seed") else f"train_tokenizer.{k.replace('__', '.')}": changes[k] for k in changes
        }
        (self.folder / name).mkdir(exist_ok=True)
        params = write_params(self.folder / name / "params.yaml", TINY_TOKENIZER | dotted)
        return ["train_tokenizer", "--params", str(params), "--data", str(self.data), "--out", str(self.out(name))]

    def train(self, name: str, status: int = 0, **changes) -> Path:
        """Train in this process and check the exit status."""
        assert main(self.arguments(name, **changes)) == status
        return self.out(name)

    def out(self, name: str) -> Path:
        return self.folder / name / "tokenizer"

    def content(self, name: str) -> str:
        return json.loads((self.out(name) / "manifest.json").read_text())["content"]

    def forget(self, name: str) -> None:
        shutil.rmtree(self.folder / name)


@pytest.fixture
def runs(tmp_path, digits, monkeypatch) -> Iterator[Runs]:
    """Trainings in this process, which afterwards handles signals as before."""
    before = {signum: signal.getsignal(signum) for signum in interrupt.SIGNALS}
    monkeypatch.setattr(interrupt, "_received", [])
    monkeypatch.chdir(ROOT)
    yield Runs(tmp_path, digits)
    for signum, handler in before.items():
        signal.signal(signum, handler)
