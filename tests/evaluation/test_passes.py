"""What is kept of images that were looked at, and whom it serves. Oracle: networks whose features are known."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from crt.distributed import World
from crt.evaluation.passes import Networks, Passes, Sources, measure

PIXELS = np.random.default_rng(0).integers(0, 256, (10, 8, 8, 3), np.uint8)


@dataclass(frozen=True)
class Images:
    """Some images in memory."""

    name: str
    checksum: str = "i"
    image_size: int = 8

    @property
    def pixels(self) -> np.ndarray:
        return PIXELS[::-1] if self.name == "train" else PIXELS

    def __len__(self) -> int:
        return len(PIXELS)

    def read(self, start: int, stop: int) -> np.ndarray:
        return self.pixels[start:stop].copy()


@dataclass(frozen=True)
class MeanColour:
    """Features are the mean colour times a factor; the class is the strongest feature, or the weakest."""

    factor: float = 1.0
    checksum: str = "w"
    resize: str = "none"
    image_size: int | None = None
    spatial_dimension: int = 0

    def __call__(self, images: np.ndarray) -> np.ndarray:
        return self.factor * images.mean(axis=(1, 2))

    def arrays(self, images: np.ndarray) -> dict[str, np.ndarray]:
        return {"features": self(images)}

    def probabilities(self, features: np.ndarray) -> np.ndarray:
        return features


class Distance(torch.nn.Module):
    """In place of LPIPS: the same for all pairs."""

    def __init__(self, distance: float) -> None:
        super().__init__()
        self.distance = torch.nn.Parameter(torch.tensor([distance]))

    def network(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.distance.expand(len(x))


NETWORKS = Networks(
    SimpleNamespace(image_size=8, encode=lambda images: images, decode=lambda codes: -codes),
    "t",
    torch.device("cpu"),
    MeanColour(checksum="c"),
    MeanColour(),
    Distance(0.5),
)


def look(folder: Path, networks: Networks, **samples: str) -> Passes:
    sources = Sources(Images("val"), Images("samples", **samples), Images("train"))
    world = World(0, 1, torch.device("cpu"))
    return measure(folder / "work", folder / "shared", 4, world, networks=networks, sources=sources)


@pytest.mark.parametrize(("key", "value"), [("checksum", "other"), ("resize", "clean")])
def test_features_of_another_network_or_resize_are_taken_anew(tmp_path, key, value):
    before = look(tmp_path, NETWORKS)
    np.testing.assert_allclose(before.val.column("features"), MeanColour()(PIXELS))
    after = look(tmp_path, replace(NETWORKS, features=MeanColour(factor=2.0, **{key: value})))
    for store in (after.val, after.reference, after.copies):
        seen = {after.val: PIXELS, after.reference: PIXELS[::-1], after.copies: 255 - PIXELS}[store]
        np.testing.assert_allclose(store.column("features"), 2 * MeanColour()(seen), rtol=1e-5)
    if key == "checksum":  # the resize is a param, whose change has another working folder
        np.testing.assert_allclose(after.samples.column("features"), 2 * MeanColour()(PIXELS))


def test_classes_that_another_classifier_sees_are_taken_anew(tmp_path):
    before = look(tmp_path, NETWORKS)
    after = look(tmp_path, replace(NETWORKS, classifier=MeanColour(factor=-1.0, checksum="another")))
    colours = MeanColour()(PIXELS)
    for store in ("val", "samples"):
        np.testing.assert_array_equal(getattr(before, store).column("predictions"), colours.argmax(axis=1))
        np.testing.assert_array_equal(getattr(after, store).column("predictions"), colours.argmin(axis=1))


def test_distances_by_other_weights_are_taken_anew_and_missing_ones_added(tmp_path):
    assert "lpips" not in replace(NETWORKS, lpips=None).similarities()
    look(tmp_path, replace(NETWORKS, lpips=None))
    for distance in (0.5, 0.25):
        copies = look(tmp_path, replace(NETWORKS, lpips=Distance(distance))).copies
        assert copies.column("lpips").tolist() == [distance] * len(PIXELS)


def test_distances_are_computed_in_true_float32(tmp_path):
    """Oracle: the protocol's word in metrics.json. On a GPU convolutions take TF32 unless told otherwise."""
    precisions = []

    class Watched(Distance):
        def network(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            precisions.append((torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32))
            return super().network(x, y)

    look(tmp_path, replace(NETWORKS, lpips=Watched(0.5)))
    assert set(precisions) == {(False, False)}
    assert torch.backends.cudnn.allow_tf32


def test_what_nothing_has_changed_of_is_looked_at_once(tmp_path):
    before = look(tmp_path, NETWORKS)
    after = look(tmp_path, replace(NETWORKS, features=MeanColour(factor=2.0)))  # unnoticed: it says that it is the same
    for store in ("val", "reference", "samples", "copies"):
        old, new = (getattr(passes, store).column("features") for passes in (before, after))
        np.testing.assert_array_equal(old, new)


def test_other_samples_are_looked_at_anew(tmp_path):
    look(tmp_path, NETWORKS)
    after = look(tmp_path, replace(NETWORKS, features=MeanColour(factor=2.0)), checksum="others")
    np.testing.assert_allclose(after.samples.column("features"), 2 * MeanColour()(PIXELS))
