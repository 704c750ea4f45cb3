"""One look at every image: what is measured by which networks, kept on disk so that a stopped evaluation continues."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from crt.chunks import ChunkStore
from crt.data.transforms import to_uint8, to_unit_range
from crt.distributed import World, main_alone
from crt.evaluation import reconstruction
from crt.evaluation.classifier import ClassifierFeatures, weights_checksum
from crt.evaluation.features import FeatureNetwork, deterministic_float32, interpolated
from crt.evaluation.shared import shared_path
from crt.evaluation.sources import ImageSource, SampleSource, SplitSource
from crt.locks import exclusively
from crt.params import MS_SSIM_MIN_SIDE
from crt.tokenizer.losses import PerceptualLoss
from crt.tokenizer.model import Tokenizer

# Pixels that tokenizer and SSIM work on at once, 16 images of 256 px: each takes some thousand bytes on the way.
_PIECE_PIXELS = 16 * 256 * 256
_Look = Callable[[ImageSource, int, int], dict[str, np.ndarray]]


@dataclass(frozen=True)
class Sources:
    """The images that are measured."""

    val: SplitSource
    samples: SampleSource
    reference: ImageSource
    """What the samples are compared with; may be `val` itself."""
    sweep: tuple[SampleSource, ...] = ()
    """Samples at other scales of guidance."""


@dataclass(frozen=True)
class Networks:
    """What measures them."""

    tokenizer: Tokenizer
    tokenizer_content: str
    """Checksum of the files that it was loaded from, as their manifest has it."""
    device: torch.device
    classifier: ClassifierFeatures
    features: FeatureNetwork
    """What distances are taken between; may be `classifier` itself."""
    lpips: PerceptualLoss | None

    @property
    def side(self) -> int:
        """Side at which images are measured, in pixels."""
        return self.features.image_size or self.tokenizer.image_size

    @property
    def lpips_checksum(self) -> str | None:
        return weights_checksum(self.lpips.state_dict()) if self.lpips else None

    @torch.inference_mode()
    def reconstruct(self, images: np.ndarray) -> np.ndarray:
        """uint8 (B, S, S, 3) -> the same through encoder, codes and decoder, in float32."""
        pieces = []
        with deterministic_float32():
            for piece in _pieces(torch.from_numpy(images)):
                codes = self.tokenizer.encode(to_unit_range(piece.to(self.device)))
                pieces.append(to_uint8(self.tokenizer.decode(codes)).cpu().numpy())
        return np.concatenate(pieces)

    def similarities(self) -> dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]]:
        """What compares uint8 images (B, S, S, 3) with others, by the score's name; each returns float64 (B,)."""
        structural = reconstruction.ms_ssim if self.side >= MS_SSIM_MIN_SIDE else reconstruction.ssim
        scores = {"psnr": reconstruction.psnr, structural.__name__: structural}
        return scores | ({"lpips": self._lpips} if self.lpips else {})

    def look(self, source: ImageSource, start: int, stop: int) -> dict[str, np.ndarray]:
        """Features of the images of some rows, and the classes (B,) that the classifier sees in them."""
        images = seen = source.read(start, stop)
        if isinstance(source, SplitSource) and images.shape[1] != self.side:
            # Real images are cropped at that side at once, as those of published references are.
            seen = source.read_rows(np.arange(start, stop), self.side)
        arrays = self.features.arrays(seen)
        own = arrays["features"] if self.features is self.classifier else self.classifier(images)
        return {**arrays, "predictions": self.classifier.probabilities(own).argmax(axis=1)}

    def look_at_copies(self, source: ImageSource, start: int, stop: int) -> dict[str, np.ndarray]:
        """Features of the reconstructions of some rows, and their scores beside the originals, float64 (B,) each."""
        originals = source.read(start, stop)
        copies = self.reconstruct(originals)
        return {"features": self.features(copies), **self._compare(originals, copies)}

    def _compare(self, originals: np.ndarray, copies: np.ndarray) -> dict[str, np.ndarray]:
        """Scores of each pair, float64 (B,), at the features' side, as LlamaGen's script compares larger images."""
        both = (
            images if images.shape[1] == self.side else interpolated(images, self.side)
            for images in (originals, copies)
        )
        pairs = zip(*(_pieces(torch.from_numpy(images)) for images in both), strict=True)
        measures = self.similarities()
        scores = [
            {name: score(x.to(self.device), y.to(self.device)).cpu().numpy() for name, score in measures.items()}
            for x, y in pairs
        ]
        return {name: np.concatenate([piece[name] for piece in scores]) for name in measures}

    @torch.inference_mode()
    def _lpips(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        assert self.lpips is not None
        with deterministic_float32():
            distances = self.lpips.network(to_unit_range(x), to_unit_range(y))
        return distances.flatten().double()  # (B, 1, 1, 1) -> (B,)


@dataclass(frozen=True)
class Passes:
    """What one look at each image left on disk."""

    val: ChunkStore
    copies: ChunkStore
    """Reconstructions of `val`."""
    samples: ChunkStore
    reference: ChunkStore
    sweep: tuple[ChunkStore, ...]


def measure(work: Path, shared: Path, batch_size: int, world: World, *, networks: Networks, sources: Sources) -> Passes:
    """Look at every image once; all processes must call.

    Args:
        work: folder that keeps what was measured, by what was measured and with which weights.
        shared: folder for what other evaluations of the same data can use: features of real images and, for each
            tokenizer, of its reconstructions.
        batch_size: images worked on at once.
        world: the processes that share the work.
        networks: what measures.
        sources: what is measured.

    Raises:
        Stopped: a signal arrived; what was measured stays.
    """
    features, classifier = networks.features, networks.classifier.checksum

    def own(source: ImageSource) -> ChunkStore:
        # The weights are files of the user's, which may be others today.
        made_of = hashlib.sha256(f"{source.checksum} {features.checksum} {classifier}".encode()).hexdigest()
        store = ChunkStore(work / f"{source.name}-{made_of[:16]}", len(source), batch_size)
        store.fill(source.name.replace("_", " "), partial(networks.look, source), world)
        return store

    def common(label: str, kind: str, source: ImageSource, look: _Look, **depends_on: Any) -> ChunkStore:
        recipe = {
            "images": [source.checksum, source.name, source.image_size, len(source)],
            "features": [features.checksum, features.resize, features.image_size, features.spatial_dimension],
            "batch_size": batch_size,
            "cropped_at": networks.side,
        }
        path = shared_path(shared, kind, recipe | depends_on)
        store = ChunkStore(path, len(source), batch_size)
        with ExitStack() as lock:
            # The main process holds the lock for all, and may wait for another run that is at the same work.
            with main_alone(world):
                if world.is_main:
                    lock.enter_context(exclusively(path, alone=world.size == 1))
            store.fill(label, partial(look, source), world)
        return store

    def real(source: ImageSource) -> ChunkStore:
        return common(f"reference {source.name}", "features", source, networks.look, classifier=classifier)

    val = real(sources.val)
    reference = val if sources.reference is sources.val else real(sources.reference)
    scores, lpips = sorted(networks.similarities()), networks.lpips_checksum
    made_of = {"tokenizer": networks.tokenizer_content, "scores": scores, "lpips": lpips}
    copies = common("reconstructions", "reconstructions", sources.val, networks.look_at_copies, **made_of)
    samples, *sweep = (own(source) for source in (sources.samples, *sources.sweep))
    return Passes(val, copies, samples, reference, tuple(sweep))


def _pieces(images: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return images.split(max(_PIECE_PIXELS // math.prod(images.shape[1:3]), 1))
