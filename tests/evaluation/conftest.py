"""The real digits as arrays, and one classifier trained on them with the default params, shared by all tests here."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from crt.evaluation.classifier import train_classifier
from crt.evaluation.features import INCEPTION_FILE
from crt.params import load_params
from tests.conftest import ROOT


@dataclass(frozen=True)
class Digits:
    """uint8 (N, 16, 16, 3) and int64 (N,)."""

    train: np.ndarray
    train_labels: np.ndarray
    val: np.ndarray
    val_labels: np.ndarray

    def train_classifier(self, path: Path, seed: int = 0, **changes) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        train_classifier(
            lambda rows: self.train[rows],
            labels=self.train_labels,
            classes=10,
            image_size=16,
            params=load_params(ROOT / "params.yaml").evaluate.classifier.model_copy(update=changes),
            seed=seed,
            path=path,
            device="cpu",
        )
        return path


@pytest.fixture(scope="session")
def digits() -> Digits:
    data = load_digits()
    small = np.round(data.images * 255 / 16).astype(np.uint8)
    gray = np.stack([np.asarray(Image.fromarray(image).resize((16, 16), Image.Resampling.BICUBIC)) for image in small])
    images, labels = gray[..., None].repeat(3, axis=-1), data.target.astype(np.int64)
    order = np.random.default_rng(0).permutation(len(images))
    val, train = order[:360], order[360:]
    return Digits(images[train], labels[train], images[val], labels[val])


@pytest.fixture(scope="session")
def classifier_path(digits, tmp_path_factory) -> Path:
    return digits.train_classifier(tmp_path_factory.mktemp("classifier") / "classifier.safetensors")


class StandIn(torch.nn.Module):
    """The face of inception-2015-12-05.pt: 2,048 pooled features, 1,008 outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Conv2d(3, 8, 13, stride=13), torch.nn.Tanh(), torch.nn.AvgPool2d(23), torch.nn.Conv2d(8, 2048, 1)
        )
        self.output = torch.nn.Linear(2048, 1008)

    def forward(
        self, img: torch.Tensor, return_features: bool = False, use_fp16: bool = False, no_output_bias: bool = False
    ) -> torch.Tensor:
        x = torch.nn.functional.interpolate(img.float(), size=[299, 299], mode="bilinear", align_corners=False)
        features = self.layers((x - 128) / 128).reshape(-1, 2048)
        if return_features:
            return features
        logits = torch.nn.functional.linear(features, self.output.weight)
        if not no_output_bias:
            logits = logits + self.output.bias
        return torch.softmax(logits, dim=1)


@pytest.fixture(scope="session")
def inception_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("inception")
    # In a process of its own: TorchScript fails to compile where other libraries have patched torch before.
    script = (
        "import sys, torch; from tests.evaluation.conftest import StandIn; torch.manual_seed(0); "
        "torch.jit.script(StandIn()).save(sys.argv[1])"
    )
    subprocess.run([sys.executable, "-c", script, str(folder / INCEPTION_FILE)], cwd=ROOT, check=True)
    return folder
