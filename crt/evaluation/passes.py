"""One look at every image: what is measured by which networks, kept on disk so that a stopped evaluation continues."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from crt.data.transforms import to_uint8, to_unit_range
from crt.distributed import World
from crt.evaluation import reconstruction
from crt.evaluation.chunks import ChunkStore
from crt.evaluation.classifier import ClassifierFeatures
from crt.evaluation.features import FeatureNetwork
from crt.evaluation.sources import ImageSource, SampleSource, SplitSource
from crt.tokenizer.losses import PerceptualLoss
from crt.tokenizer.model import Tokenizer

# Pixels that tokenizer and SSIM work on at once, 16 images of 256 px: each takes some thousand bytes on the way.
_PIECE_PIXELS = 16 * 256 * 256


@dataclass(frozen=True)
class Sources:
    """The images that are measured."""

    val: SplitSource
    samples: SampleSource
    reference: ImageSource
    """What the samples are compared with; may be `val` itself."""


@dataclass(frozen=True)
class Networks:
    """What measures them."""

    tokenizer: Tokenizer
    device: torch.device
    classifier: ClassifierFeatures
    features: FeatureNetwork
    """What distances are taken between; may be `classifier` itself."""
    lpips: PerceptualLoss | None

    @torch.inference_mode()
    def reconstruct(self, images: np.ndarray) -> np.ndarray:
        """uint8 (B, S, S, 3) -> the same through encoder, codes and decoder, in float32."""
        pieces = []
        for piece in _pieces(torch.from_numpy(images)):
            codes = self.tokenizer.encode(to_unit_range(piece.to(self.device)))
            pieces.append(to_uint8(self.tokenizer.decode(codes)).cpu().numpy())
        return np.concatenate(pieces)

    def similarities(self) -> dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]]:
        """What compares uint8 images (B, S, S, 3) with others, by the score's name; each returns float64 (B,)."""
        large = self.tokenizer.image_size >= reconstruction.MS_SSIM_MIN_SIDE
        structural = reconstruction.ms_ssim if large else reconstruction.ssim
        scores = {"psnr": reconstruction.psnr, structural.__name__: structural}
        return scores | ({"lpips": self._lpips} if self.lpips else {})

    @torch.inference_mode()
    def _lpips(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        assert self.lpips is not None
        return self.lpips.network(to_unit_range(x), to_unit_range(y)).flatten().double()  # (B, 1, 1, 1) -> (B,)


@dataclass(frozen=True)
class Passes:
    """What one look at each image left on disk."""

    val: ChunkStore
    samples: ChunkStore
    reference: ChunkStore


def measure(work: Path, batch_size: int, world: World, networks: Networks, sources: Sources) -> Passes:
    """Look at every image once; all processes must call.

    Args:
        work: folder that keeps what was measured, by what was measured and with which weights.
        batch_size: images worked on at once.
        world: the processes that share the work.
        networks: what measures.
        sources: what is measured.

    Raises:
        Stopped: a signal arrived; what was measured stays.
    """
    classifier, features_of = networks.classifier, networks.features
    measures = networks.similarities()

    def predictions(images: np.ndarray, features: np.ndarray) -> np.ndarray:
        own = features if features_of is classifier else classifier(images)
        return classifier.probabilities(own).argmax(axis=1)

    def compare(originals: np.ndarray, copies: np.ndarray) -> dict[str, np.ndarray]:
        """Scores of each pair, float64 (B,)."""
        pairs = zip(*(_pieces(torch.from_numpy(images)) for images in (originals, copies)), strict=True)
        scores = [
            {name: score(x.to(world.device), y.to(world.device)).cpu().numpy() for name, score in measures.items()}
            for x, y in pairs
        ]
        return {name: np.concatenate([piece[name] for piece in scores]) for name in measures}

    def measure_original(start: int, stop: int) -> dict[str, np.ndarray]:
        originals = sources.val.read(start, stop)
        copies = networks.reconstruct(originals)
        features = features_of(originals)
        return {
            "features": features,
            "copy_features": features_of(copies),
            "predictions": predictions(originals, features),
            **compare(originals, copies),
        }

    def measure_sample(start: int, stop: int) -> dict[str, np.ndarray]:
        images = sources.samples.read(start, stop)
        features = features_of(images)
        return {"features": features, "predictions": predictions(images, features)}

    def measure_reference(start: int, stop: int) -> dict[str, np.ndarray]:
        return {"features": features_of(sources.reference.read(start, stop))}

    def store(source: ImageSource) -> ChunkStore:
        # The weights and the ADM batch are files of the user's, which may be others today.
        made_of = hashlib.sha256(f"{source.checksum} {features_of.checksum}".encode()).hexdigest()
        return ChunkStore(work / f"{source.name}-{made_of[:16]}", len(source), batch_size)

    val = store(sources.val)
    val.fill("reconstructions", measure_original, world)
    samples = store(sources.samples)
    samples.fill("samples", measure_sample, world)
    if sources.reference is sources.val:
        return Passes(val, samples, val)
    reference = store(sources.reference)
    reference.fill(f"reference {sources.reference.name}", measure_reference, world)
    return Passes(val, samples, reference)


def _pieces(images: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return images.split(max(_PIECE_PIXELS // math.prod(images.shape[1:3]), 1))
