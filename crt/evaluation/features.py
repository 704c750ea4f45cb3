"""Feature networks: what turns images into the vectors that distances are measured between.

Every network has the same small face, so that nothing downstream knows which one it is. A figure is only as
comparable as its features: results carry the network's name and the checksum of its weights.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from cleanfid.downloads_helper import check_download_inception, inception_url
from cleanfid.inception_torchscript import InceptionV3W
from cleanfid.resize import build_resizer

from crt.data.pool import available_cpus
from crt.errors import UserError
from crt.evaluation.spatial import SPATIAL_DIMENSION, split_inception
from crt.files import flush, sha256_file
from crt.locks import fetching

TENSORFLOW_RESIZE: Literal["legacy_tensorflow"] = "legacy_tensorflow"
INCEPTION_FILE = "inception-2015-12-05.pt"
# Of the file that NVIDIA serves (95,607,719 bytes); k-diffusion and others pin the same.
INCEPTION_SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"


class FeatureNetwork(Protocol):
    """What turns images into features."""

    @property
    def name(self) -> str:
        """As recorded in results."""

    @property
    def dimension(self) -> int:
        """D, features of an image."""

    @property
    def checksum(self) -> str:
        """SHA-256 of the weights."""

    @property
    def device(self) -> torch.device:
        """Where it runs."""

    @property
    def resize(self) -> str:
        """How images are brought to the network's size, as recorded in results."""

    @property
    def image_size(self) -> int | None:
        """Side to which images are brought before that; None: each has its own."""

    @property
    def spatial_dimension(self) -> int:
        """Features of an image that keep its layout, for sFID; 0 where the network has none."""

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """uint8 (B, H, W, 3) -> float32 features (B, D)."""

    def arrays(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """All that one pass yields: `features` (B, D) and, where there are any, `spatial` (B, spatial_dimension)."""

    def probabilities(self, features: np.ndarray) -> np.ndarray:
        """Features (B, D) -> float32 class probabilities (B, classes)."""


class InceptionFeatures:
    """The Inception V3 of FID: clean-fid's, 2,048 features from its last pooling layer, and the spatial ones of sFID.

    Args:
        folder: holds `inception-2015-12-05.pt`; None fetches the file once into torch's hub folder, in one
            process while others wait.
        resize: "clean": each image to 299 pixels with an antialiased bicubic filter and without rounding (Parmar et
            al. 2022); "legacy_tensorflow": the bilinear resize inside the network that published ImageNet
            figures (ADM's evaluator) were measured with.
        device: where the network runs, in float32.
        sha256: the checksum that the file must have; TorchScript is code, so nothing else is loaded.
        image_size: side to which images are brought first, by torch's bicubic interpolation and rounded to uint8, as
            LlamaGen's scripts bring larger samples and reconstructions to 256 px; None: each has its own.

    Raises:
        UserError: the file is missing, cannot be fetched, or is another one.
    """

    def __init__(
        self,
        folder: str | Path | None,
        resize: Literal["clean", "legacy_tensorflow"],
        device: torch.device | str,
        sha256: str = INCEPTION_SHA256,
        *,
        image_size: int | None = None,
    ) -> None:
        folder = Path(folder) if folder is not None else _fetch_inception(sha256)
        path = folder / INCEPTION_FILE
        if not path.is_file():
            raise UserError(
                f"{path}: not found: put {inception_url} there, or set evaluate.inception_weights to its folder"
            )
        self.checksum = sha256_file(path)
        if self.checksum != sha256:
            raise UserError(
                f"{path}: wrong file, its SHA-256 is {self.checksum} instead of {sha256}: fetch {inception_url} again"
            )
        self.name, self.dimension, self.resize = "inception-2015-12-05", 2048, resize
        self.image_size, self.device = image_size, torch.device(device)
        self._network = InceptionV3W(str(folder), download=False, resize_inside=resize == TENSORFLOW_RESIZE)
        self._network = self._network.to(self.device).eval()
        with deterministic_float32():
            self._stages = split_inception(self._network, resize == TENSORFLOW_RESIZE, self.device)
        self.spatial_dimension = SPATIAL_DIMENSION if self._stages else 0
        self._resizer: Callable[[np.ndarray], np.ndarray] = build_resizer("clean")
        self._threads = ThreadPoolExecutor(available_cpus())  # Pillow resizes outside the interpreter's lock

    def __call__(self, images: np.ndarray) -> np.ndarray:
        return self.arrays(images)["features"]

    @torch.inference_mode()
    def arrays(self, images: np.ndarray) -> dict[str, np.ndarray]:
        if self.image_size not in (None, images.shape[1]):
            images = interpolated(images, self.image_size)
        if self.resize == "clean":
            resized = np.stack(list(self._threads.map(self._resizer, images)))
        else:
            resized = images.astype(np.float32)
        batch = torch.from_numpy(resized).permute(0, 3, 1, 2).to(self.device)
        with deterministic_float32():
            if self._stages is None:
                return {"features": self._network(batch).float().cpu().numpy()}
            features, spatial = self._stages(batch)
            return {"features": features.float().cpu().numpy(), "spatial": spatial.float().cpu().numpy()}

    @torch.inference_mode()
    def probabilities(self, features: np.ndarray) -> np.ndarray:
        """Softmax over 1,008 outputs without their bias, as the original inception score has it."""
        weight = self._network.base.output.weight.float()
        logits = torch.from_numpy(np.asarray(features, np.float32)).to(self.device) @ weight.T
        return logits.softmax(dim=1).cpu().numpy()


def interpolated(images: np.ndarray, side: int) -> np.ndarray:
    """uint8 (B, H, W, 3) to uint8 (B, side, side, 3), by torch's bicubic interpolation without antialiasing."""
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float()
    pixels = F.interpolate(pixels, size=(side, side), mode="bicubic", align_corners=False)
    return pixels.round_().clamp_(0, 255).byte().permute(0, 2, 3, 1).contiguous().numpy()


@contextmanager
def deterministic_float32() -> Iterator[None]:
    """Convolutions and products in true float32 with one fixed algorithm, on GPUs too (no TF32)."""
    matmul = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        with (
            _unfused(),
            torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False),
        ):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = matmul


@contextmanager
def _unfused() -> Iterator[None]:
    """Keep TorchScript from joining operations to kernels of its own, as it does on GPUs.

    It first watches some calls, and the kernels round differently: features would depend on where a run was stopped.
    (`torch.jit.fuser` does the same, and warns of a fuser that is gone.)
    """
    cpu, gpu = torch._C._jit_can_fuse_on_cpu(), torch._C._jit_can_fuse_on_gpu()
    torch._C._jit_override_can_fuse_on_cpu(False)
    torch._C._jit_override_can_fuse_on_gpu(False)
    try:
        yield
    finally:
        torch._C._jit_override_can_fuse_on_cpu(cpu)
        torch._C._jit_override_can_fuse_on_gpu(gpu)


def _fetch_inception(sha256: str) -> Path:
    """The folder of the file, fetched through clean-fid unless it is there, and shown only when complete and right."""
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    try:
        with fetching(folder / INCEPTION_FILE) as missing:
            if missing:
                _fetch_into(folder, sha256)
    except OSError as error:  # urllib's errors are OSErrors; or the folder may not be written
        raise UserError(
            f"{inception_url}: cannot be fetched ({error}): fetch it on a machine with a network and "
            "set evaluate.inception_weights to its folder, or evaluate.features to classifier"
        ) from None
    return folder


def _fetch_into(folder: Path, sha256: str) -> None:
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        fetched = Path(check_download_inception(fpath=temporary))
        if sha256_file(fetched) != sha256:
            raise UserError(
                f"{inception_url}: what was fetched is not {INCEPTION_FILE} (SHA-256 {sha256_file(fetched)} instead "
                f"of {sha256}): fetch it by other means and set evaluate.inception_weights to its folder"
            )
        flush(fetched)
        os.replace(fetched, folder / INCEPTION_FILE)
