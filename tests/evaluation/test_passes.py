"""What is kept of images that were looked at, and whom it serves. Oracle: networks whose features are known."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from crt.data.transforms import center_crop
from crt.distributed import World
from crt.evaluation.features import interpolated
from crt.evaluation.passes import Networks, Passes, Sources, measure
from crt.evaluation.reconstruction import psnr
from crt.evaluation.sources import SplitSource

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


def look(folder: Path, networks: Networks, data: str = "i", **samples: str) -> Passes:
    sources = Sources(Images("val", data), Images("samples", **samples), Images("train", data))
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
    for side, score in ((175, "ssim"), (176, "ms_ssim")):  # a window of 11 pixels at a sixteenth of the size
        assert score in replace(NETWORKS, features=MeanColour(image_size=side)).similarities()
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


def test_other_data_and_reconstructions_of_another_tokenizer_are_looked_at_anew(tmp_path):
    look(tmp_path, NETWORKS)
    after = look(tmp_path, replace(NETWORKS, features=MeanColour(factor=2.0)), data="others")
    for store, images in ((after.val, PIXELS), (after.reference, PIXELS[::-1]), (after.copies, 255 - PIXELS)):
        np.testing.assert_allclose(store.column("features"), 2 * MeanColour()(images), rtol=1e-5)
    exact = SimpleNamespace(image_size=8, encode=lambda images: images, decode=lambda codes: codes)
    copies = look(tmp_path, replace(NETWORKS, tokenizer=exact, tokenizer_content="other")).copies
    np.testing.assert_allclose(copies.column("features"), MeanColour()(PIXELS))


def test_other_samples_are_looked_at_anew(tmp_path):
    look(tmp_path, NETWORKS)
    after = look(tmp_path, replace(NETWORKS, features=MeanColour(factor=2.0)), checksum="others")
    np.testing.assert_allclose(after.samples.column("features"), 2 * MeanColour()(PIXELS))


class Corner(MeanColour):
    """Features are the colour of one pixel."""

    def __call__(self, images: np.ndarray) -> np.ndarray:
        return images[:, 0, 0]


@pytest.mark.parametrize("side", [4, 8, 16])
def test_images_are_measured_at_the_side_of_the_features_and_classified_at_that_of_the_tokenizer(side, monkeypatch):
    """Oracle: the crops and the interpolation that they are defined by."""
    data = SimpleNamespace(storage="pixels", image_size=8, image=PIXELS.__getitem__, pixels=PIXELS.__getitem__)
    monkeypatch.setattr("crt.evaluation.sources.PackedImages", lambda folder, split: data)
    networks = replace(NETWORKS, features=MeanColour(image_size=side), classifier=Corner())
    images, source = PIXELS[2:7], SplitSource("", "val", 8, "i")
    arrays = networks.look(source, 2, 7)
    crops = np.stack([center_crop(image, side) for image in images])
    np.testing.assert_allclose(arrays["features"], crops.mean(axis=(1, 2)))
    np.testing.assert_array_equal(arrays["predictions"], images[:, 0, 0].argmax(axis=1))
    if side > 4:  # the windows of SSIM have more
        originals, copies = (torch.from_numpy(interpolated(some, side)) for some in (images, 255 - images))
        np.testing.assert_allclose(networks.look_at_copies(source, 2, 7)["psnr"], psnr(originals, copies), rtol=0.01)
