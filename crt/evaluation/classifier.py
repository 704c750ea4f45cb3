"""A small classifier trained on the prepared data itself: features without a download, and a reader of samples.

Its distances are named `fd_classifier_*`, never FID, for they compare only results on the same data, params and seed.
Whatever the features, it says which share of samples shows the class that was asked for. Images of one class teach
nothing by their labels: there it learns by how many quarter turns it sees them rotated (Gidaris et al. 2018), and says
which share of samples is recognised as upright.

    B: images   S: side in pixels   C: channels   K: outputs   D: features, 4C
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from crt.data.sampler import batch_rows
from crt.errors import UserError
from crt.evaluation.comparable import CLASSES, QUARTER_TURNS
from crt.evaluation.features import deterministic_float32
from crt.files import is_undamaged_archive, replacing
from crt.interrupt import raise_if_stopped
from crt.params import Classifier as ClassifierParams
from crt.progress import Progress
from crt.randomness import numpy_generator, seed_torch

# Larger images are halved by strided convolutions until the residual blocks see at most this side.
_MAX_BLOCK_SIDE = 32
_CHECKPOINTS = 10
_WARMUP = 0.2
CLASSIFIER_FILE = "classifier.safetensors"
_NUM_TURNS = 4
# oneDNN (in torch 2.11) writes beyond its memory in 1x1 convolutions of stride 2 of fewer channels, in channels-last
# images on processors without AVX-512.
_LEAST_STRIDED = 8


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with batch normalisation and a skip; `stride` 2 halves the side."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.skip_step = stride if inputs < _LEAST_STRIDED else 1  # of the pixels that the skip sees
        stride //= self.skip_step
        self.skip = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, inputs, S, S) -> (B, outputs, S / stride, S / stride)."""
        h = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.skip(x[..., :: self.skip_step, :: self.skip_step]) + self.norm2(self.conv2(h)))


class ConvClassifier(nn.Module):
    """Residual network of three widths, pooled over all positions.

    Args:
        channels: C.
        classes: of the data; a single one becomes the first of `QUARTER_TURNS`, upright.
        image_size: S.
    """

    def __init__(self, channels: int, classes: int, image_size: int) -> None:
        super().__init__()
        self.channels, self.classes, self.image_size = channels, classes, image_size
        stem: list[nn.Module] = []
        side, inputs = image_size, 3
        while not stem or side > _MAX_BLOCK_SIDE:
            stride = 2 if side > _MAX_BLOCK_SIDE else 1
            stem += [nn.Conv2d(inputs, channels, 3, stride, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]
            side, inputs = (side + 1) // stride if stride > 1 else side, channels
        self.stem = nn.Sequential(*stem)
        self.blocks = nn.Sequential(
            ResidualBlock(channels, channels, stride=1),
            ResidualBlock(channels, 2 * channels, stride=2),
            ResidualBlock(2 * channels, 4 * channels, stride=2),
        )
        self.task = CLASSES if classes > 1 else QUARTER_TURNS
        self.head = nn.Linear(4 * channels, classes if self.task == CLASSES else _NUM_TURNS)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 (B, S, S, 3) -> float32 (B, D)."""
        x = images.permute(0, 3, 1, 2).float() / 127.5 - 1
        return self.blocks(self.stem(x)).mean(dim=(2, 3))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 (B, S, S, 3) -> logits (B, K)."""
        return self.head(self.features(images))


class ClassifierFeatures:
    """The trained classifier as a feature network.

    Args:
        path: its weights, as `train_classifier` leaves them.
        device: where it runs, in float32.
    """

    def __init__(self, path: str | Path, device: torch.device | str) -> None:
        self.path = Path(path)
        with safe_open(path, "pt") as file:
            sizes = json.loads(file.metadata()["sizes"])
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        self._network = ConvClassifier(**sizes)
        self._network.load_state_dict(weights)
        self.task = self._network.task
        self._network.to(device).eval()
        self.name, self.dimension, self.resize = "classifier", 4 * sizes["channels"], "none"
        self.image_size = None
        self.spatial_dimension = 0  # sFID is defined on Inception's map; another network's would be no sFID
        self.checksum = weights_checksum(weights)
        self.device = torch.device(device)

    @torch.inference_mode()
    def __call__(self, images: np.ndarray) -> np.ndarray:
        with deterministic_float32():
            return self._network.features(torch.from_numpy(images).to(self.device)).cpu().numpy()

    def arrays(self, images: np.ndarray) -> dict[str, np.ndarray]:
        return {"features": self(images)}

    @torch.inference_mode()
    def probabilities(self, features: np.ndarray) -> np.ndarray:
        with deterministic_float32():
            logits = self._network.head(torch.from_numpy(np.asarray(features, np.float32)).to(self.device))
            return logits.softmax(dim=1).cpu().numpy()


def train_classifier(
    read: Callable[[np.ndarray], np.ndarray],
    *,
    labels: np.ndarray,
    classes: int,
    image_size: int,
    params: ClassifierParams,
    seed: int,
    path: Path,
    device: torch.device | str,
) -> None:
    """Train the classifier and write its weights; continues where a stopped call left off.

    AdamW under a one-cycle learning rate, images shifted at random, in float32. Every draw is a function of
    (seed, step), and on a CPU one thread trains: the weights serve runs with other numbers of threads, whose figures
    must not depend on which of them came first.

    Args:
        read: rows (B,) -> uint8 images (B, S, S, 3) of the training split.
        labels: (N,) class of each row.
        classes: as in `ConvClassifier`.
        image_size: S.
        params: the section `evaluate.classifier`.
        seed: of the run.
        path: where the weights go; a checkpoint lies beside it meanwhile.
        device: where it trains.
    """
    seed_torch(seed, "classifier initialisation")
    network = ConvClassifier(params.channels, classes, image_size).to(device).train()
    optimizer = torch.optim.AdamW(network.parameters(), params.learning_rate, weight_decay=params.weight_decay)
    # A fifth of five steps ends at the first one, and torch divides by the warm-up's length, 0: end a little before.
    warmup = _WARMUP if params.steps != 5 else _WARMUP - 0.01
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, params.learning_rate, params.steps, pct_start=warmup)
    checkpoint = path.with_name("classifier-checkpoint.pt")
    parts: dict[str, Any] = {"network": network, "optimizer": optimizer, "schedule": schedule}
    step = _resume(checkpoint, parts)
    progress = Progress("classifier", params.steps, "steps", done=step)
    checkpoint_every = max(params.steps // _CHECKPOINTS, 1)

    with _one_thread(device):
        while step < params.steps:
            rows, _ = batch_rows(len(labels), min(params.batch_size, len(labels)), step, seed)
            images = random_shift(read(rows), params.max_shift, numpy_generator(seed, "classifier shift", step))
            targets = labels[rows]
            if network.task == QUARTER_TURNS:
                images, targets = random_turns(images, numpy_generator(seed, "classifier turn", step))
            with deterministic_float32():
                logits = network(torch.from_numpy(images).to(device))
                loss = F.cross_entropy(logits, torch.from_numpy(targets).to(device))
                optimizer.zero_grad()
                loss.backward()
            optimizer.step()
            schedule.step()
            step += 1
            if step % checkpoint_every == 0 and step < params.steps:
                states = {name: part.state_dict() for name, part in parts.items()}
                with replacing(checkpoint) as temporary, open(temporary, "wb") as file:
                    torch.save({"step": step, **states}, file)
                progress.update(step, loss=loss.item())
                raise_if_stopped()
    progress.update(step)
    # A value beyond float32 in any weight makes features that are no numbers.
    if not all(parameter.isfinite().all() for parameter in [loss, *network.parameters()]):
        raise UserError(
            "evaluate.classifier: its training diverged, loss or weights are no numbers: lower "
            "evaluate.classifier.learning_rate"
        )
    _save(network, path)
    checkpoint.unlink(missing_ok=True)


def random_shift(images: np.ndarray, max_shift: float, rng: np.random.Generator) -> np.ndarray:
    """Shift each image by up to `max_shift` of its side along both axes; what moves in repeats the border.

    Args:
        images: uint8 (B, S, S, 3).
        max_shift: share of the side.
        rng: source of the shifts.
    """
    side = images.shape[1]
    reach = round(max_shift * side)
    if not reach:
        return images
    offsets = rng.integers(-reach, reach + 1, size=(len(images), 2, 1))
    positions = np.clip(np.arange(side) + offsets, 0, side - 1)  # (B, 2, S)
    return images[np.arange(len(images))[:, None, None], positions[:, 0, :, None], positions[:, 1, None, :]]


def random_turns(images: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Rotate each image by none to three quarter turns.

    Args:
        images: uint8 (B, S, S, 3).
        rng: source of the turns.

    Returns:
        The rotated images, and the int64 (B,) quarter turns, counter-clockwise, of each.
    """
    turns = rng.integers(_NUM_TURNS, size=len(images))
    return np.stack([np.rot90(image, turn) for image, turn in zip(images, turns, strict=True)]), turns


def weights_checksum(weights: dict[str, torch.Tensor]) -> str:
    """SHA-256 over the tensors in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode() + weights[name].cpu().numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def _one_thread(device: torch.device | str) -> Iterator[None]:
    """On a CPU, compute with one thread of torch's: more would add the same values in another order."""
    threads = torch.get_num_threads()
    if torch.device(device).type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _resume(path: Path, parts: dict[str, Any]) -> int:
    """Load a checkpoint if one is there, undamaged; returns the step at which to go on."""
    if not path.exists() or not is_undamaged_archive(path):
        return 0
    state = torch.load(path, map_location="cpu", weights_only=True)
    for name, part in parts.items():
        part.load_state_dict(state[name])
    return int(state["step"])


def _save(network: ConvClassifier, path: Path) -> None:
    """The weights, and in their metadata what the network is built from."""
    sizes = {"channels": network.channels, "classes": network.classes, "image_size": network.image_size}
    weights = {name: tensor.cpu().contiguous() for name, tensor in network.state_dict().items()}
    with replacing(path) as temporary:
        save_file(weights, temporary, metadata={"sizes": json.dumps(sizes)})
