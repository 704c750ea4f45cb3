"""The real digits as arrays, and one classifier trained on them with the default params, shared by all tests here."""

from __future__ import annotations

import subprocess
import sys
from collections import OrderedDict
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
            classes=int(self.train_labels.max()) + 1,
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


class Convolution(torch.nn.Module):
    """Convolution, normalisation by stored statistics, ReLU."""

    def __init__(self, inputs: int, outputs: int, size: int, stride: int = 1, padding: int = 0) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(inputs, outputs, size, stride, padding, bias=False)
        self.bn = torch.nn.BatchNorm2d(outputs, eps=0.001, affine=False)
        torch.nn.init.kaiming_normal_(self.conv.weight, nonlinearity="relu")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.relu(self.bn(self.conv(x)))


class Block(torch.nn.Module):
    """Branches side by side: 1x1, 3x3 and pooling; `stride` 2 halves the side."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        padding = 1 if stride == 1 else 0
        self.conv = Convolution(inputs, outputs // 4, 1 if stride == 1 else 3, stride)
        self.tower = Convolution(inputs, outputs // 4, 3, stride, padding)
        self.pool = torch.nn.MaxPool2d(3, stride, padding)
        self.tower_2 = Convolution(inputs, outputs // 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.conv(x), self.tower(x), self.tower_2(self.pool(x))], 1)


class StandIn(torch.nn.Module):
    """inception-2015-12-05.pt, narrower: its modules by name, its sides at each of them, its resize, 2,048 features."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        layers: OrderedDict[str, torch.nn.Module] = OrderedDict()
        layers["conv"] = Convolution(3, 8, 3, stride=2)
        layers["conv_1"] = Convolution(8, 8, 3)
        layers["conv_2"] = Convolution(8, 8, 3, padding=1)
        layers["pool0"] = torch.nn.MaxPool2d(3, 2)
        layers["conv_3"] = Convolution(8, 8, 1)
        layers["conv_4"] = Convolution(8, 16, 3)
        layers["pool1"] = torch.nn.MaxPool2d(3, 2)
        layers["mixed"] = Block(16, width)
        for index in range(1, 11):
            layers[f"mixed_{index}"] = Block(width, 2048 if index == 10 else width, stride=2 if index in (3, 8) else 1)
        layers["pool2"] = torch.nn.AvgPool2d(8, 8)
        self.layers = torch.nn.Sequential(layers)
        self.output = torch.nn.Linear(2048, 1008)

    def forward(
        self, img: torch.Tensor, return_features: bool = False, use_fp16: bool = False, no_output_bias: bool = False
    ) -> torch.Tensor:
        x = img.float()
        height, width = x.shape[2], x.shape[3]
        # TensorFlow 1 puts the first pixel's corner, not its centre, on the first pixel.
        theta = torch.eye(2, 3, device=x.device)
        theta[0, 2] += theta[0, 0] / width - theta[0, 0] / 299
        theta[1, 2] += theta[1, 1] / height - theta[1, 1] / 299
        grid = torch.nn.functional.affine_grid(
            theta.unsqueeze(0).repeat([x.shape[0], 1, 1]), [x.shape[0], x.shape[1], 299, 299], align_corners=False
        )
        x = torch.nn.functional.grid_sample(x, grid, "bilinear", "border", align_corners=False)
        features = self.layers((x - 128) / 128).reshape(-1, 2048)
        if return_features:
            return features
        logits = torch.nn.functional.linear(features, self.output.weight)
        if not no_output_bias:
            logits = logits + self.output.bias
        return torch.softmax(logits, dim=1)


def script_stand_in(folder: Path, edit: str = "") -> Path:
    """Write the stand-in as TorchScript; `edit` changes `model` first. Returns the folder."""
    # In a process of its own: TorchScript fails to compile where other libraries have patched torch before.
    script = (
        "import sys, torch\nfrom tests.evaluation.conftest import Block, Convolution, StandIn\ntorch.manual_seed(0)\n"
        f"model = StandIn().eval()\n{edit}\ntorch.jit.script(model).save(sys.argv[1])"
    )
    subprocess.run([sys.executable, "-c", script, str(folder / INCEPTION_FILE)], cwd=ROOT, check=True)
    return folder


@pytest.fixture(scope="session")
def inception_folder(tmp_path_factory) -> Path:
    return script_stand_in(tmp_path_factory.mktemp("inception"))
