"""Inputs of the tokenize stage: packed images, made by the real stage, and an untrained tokenizer."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from crt.__main__ import main
from crt.params import load_params
from crt.stage import open_run, publish
from crt.tokenizer.model import Tokenizer, TokenizerConfig
from tests.conftest import ROOT, write_params

SIZE = 16
MODEL = {
    "train_tokenizer.image_size": SIZE,
    "train_tokenizer.architecture.encoder_channels": 8,
    "train_tokenizer.architecture.decoder_channels": 8,
    "train_tokenizer.architecture.norm_groups": 4,
    "train_tokenizer.architecture.z_channels": 8,
    "train_tokenizer.quantizer.codebook_size": 300,
    "train_tokenizer.quantizer.codebook_dim": 4,
}


class Project:
    """Params, data set and tokenizer in one folder, and the command line that tokenizes them."""

    def __init__(self, folder: Path, images: Path, changes: dict) -> None:
        self.folder, self.data, self.tokenizer = folder, folder / "data", folder / "tokenizer"
        source = {"prepare_data.source": "imagefolder", "prepare_data.path": str(images)}
        self.params = write_params(folder / "params.yaml", MODEL | source | changes)
        command = ["prepare_data", "--params", str(self.params), "--out", str(self.data)]
        assert main(command) == 0
        self.publish_tokenizer(seed=0)

    def publish_tokenizer(self, seed: int, out: Path | None = None) -> Tokenizer:
        """An untrained tokenizer with the manifest of a real run; codes differ between seeds."""
        run = open_run("train_tokenizer", self.params, {"data": self.data}, out or self.tokenizer)
        torch.manual_seed(seed)
        model = Tokenizer(TokenizerConfig.from_params(load_params(self.params).train_tokenizer))
        # Spread codes over the sphere, so that many of them are used.
        torch.nn.init.normal_(model.quantizer.codebook)
        run.staging.mkdir(parents=True, exist_ok=True)
        model.save(run.staging)
        publish(run)
        return model

    def command(self, out: Path) -> list[str]:
        paths = ["--params", self.params, "--data", self.data, "--tokenizer", self.tokenizer, "--out", out]
        return ["tokenize", *map(str, paths)]

    def processes(self, out: Path, world_size: int, port: int) -> list[subprocess.Popen]:
        """Start the ranks of one run, as srun would."""
        environment = os.environ | {
            "WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
        }
        return [
            subprocess.Popen(
                [sys.executable, "-m", "crt", *self.command(out)],
                cwd=ROOT,
                env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(world_size)
        ]


def save_images(folder: Path, count: int, sizes=((SIZE, SIZE),), kind: str = "png") -> Path:
    """Smooth noise in two class folders."""
    for number in range(count):
        rng = np.random.default_rng(number)
        height, width = sizes[number % len(sizes)]
        coarse = Image.fromarray(rng.integers(0, 256, (5, 5, 3), np.uint8))
        path = folder / f"class_{number % 2}" / f"{number:05d}.{kind}"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse.resize((width, height), Image.Resampling.BICUBIC).save(path)
    return folder


@pytest.fixture(scope="session")
def small_project(tmp_path_factory):
    """200 images of 16 px: centre and mirror image, in batches that leave a rest everywhere."""
    folder = tmp_path_factory.mktemp("small")
    return make(
        folder, save_images(folder / "images", 200), {"tokenize.views": ["center", "flip"], "tokenize.batch_size": 48}
    )


@pytest.fixture(scope="session")
def large_project(tmp_path_factory):
    """4,700 images of 16 px: two training shards and one for validation."""
    folder = tmp_path_factory.mktemp("large")
    changes = {
        "tokenize.batch_size": 100,
        "prepare_data.val_fraction": 0.08,
        # A token per pixel: rows of so many bytes that two shards are needed.
        "train_tokenizer.architecture.channel_multipliers": [1],
        "train_tokenizer.architecture.encoder_channels": 4,
    }
    return make(folder, save_images(folder / "images", 4700), changes)


@pytest.fixture(scope="session")
def encoded_project(tmp_path_factory):
    """Image files of several sizes, to be decoded and cropped ten-fold at each use."""
    folder = tmp_path_factory.mktemp("encoded")
    images = save_images(folder / "images", 40, sizes=((20, 30), (33, 21), (64, 70)))
    changes = {
        "prepare_data.storage": "encoded",
        "prepare_data.image_size": None,
        "tokenize.views": ["ten_crop@1.1", "flip", "ten_crop@1.25"],
        "tokenize.batch_size": 64,
    }
    return make(folder, images, changes)


def make(folder: Path, images: Path, changes: dict) -> Project:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        # In this process: starting workers would take longer than the work.
        patch.setattr("crt.data.packing.available_cpus", lambda: 1)
        return Project(folder, images, changes)
