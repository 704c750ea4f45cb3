"""Oracle: clean-fid's own feature extraction and scores on the same images as PNG files.

The weights of the real Inception network cannot be had offline, so its class runs on a stand-in TorchScript file with
the same face and the same modules, narrow enough for a test; the checksum test alone tells the two apart.
"""

from __future__ import annotations

import io
import re
import urllib.error
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from cleanfid import fid as cleanfid_fid
from cleanfid.inception_torchscript import InceptionV3W
from cleanfid.resize import build_resizer
from PIL import Image

from crt.errors import UserError
from crt.evaluation.classifier import ClassifierFeatures
from crt.evaluation.features import INCEPTION_FILE, InceptionFeatures, deterministic_float32
from crt.evaluation.frechet import GaussianStatistics, frechet_distance
from crt.evaluation.spatial import split_inception
from crt.files import sha256_file
from tests.evaluation.conftest import StandIn, script_stand_in


def as_folder(images: np.ndarray, folder) -> str:
    folder.mkdir()
    for index, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{index:04d}.png")
    return str(folder)


NORMALIZED = """
def normalized(x, mean, variance):
    return torch.relu(torch.batch_norm(x, None, None, mean, variance, False, 0.0, 1e-3, False))
"""


@pytest.mark.parametrize("fixed", [True, False])
def test_torchscript_computes_the_same_in_every_call(fixed):
    """Oracle: its first call. TorchScript fuses here as it does on GPUs, where it differs without our setting."""
    images, mean, variance = torch.randn(2, 8, 12, 12), torch.randn(8), torch.rand(8) + 0.5
    network = torch.jit.CompilationUnit(NORMALIZED).normalized
    needs_llvm, fuses = torch._C._jit_get_te_must_use_llvm_cpu(), torch._C._jit_can_fuse_on_cpu()
    torch._C._jit_set_te_must_use_llvm_cpu(False)
    torch._C._jit_override_can_fuse_on_cpu(True)
    try:
        with torch.inference_mode(), deterministic_float32() if fixed else nullcontext():
            first, *others = (network(images, mean, variance) for _ in range(4))
        assert torch._C._jit_can_fuse_on_cpu()
    finally:
        torch._C._jit_override_can_fuse_on_cpu(fuses)
        torch._C._jit_set_te_must_use_llvm_cpu(needs_llvm)
    assert all(torch.equal(first, other) for other in others) is fixed


@pytest.mark.parametrize("resize", ["clean", "legacy_tensorflow"])
def test_inception_features_are_clean_fids(digits, inception_folder, tmp_path, resize):
    images = digits.val[:12]
    network = InceptionFeatures(inception_folder, resize, "cpu", sha256_file(inception_folder / INCEPTION_FILE))
    theirs = InceptionV3W(str(inception_folder), download=False, resize_inside=resize != "clean").eval()
    expected = cleanfid_fid.get_folder_features(
        as_folder(images, tmp_path / "images"), theirs, num_workers=0, mode=resize, device="cpu", verbose=False
    )
    features = network(images)
    assert features.shape == (12, network.dimension)
    np.testing.assert_allclose(features, expected, rtol=1e-4, atol=1e-5)
    assert network.resize == resize


@pytest.mark.parametrize("resize", ["clean", "legacy_tensorflow"])
def test_images_are_brought_to_a_common_size_first(digits, inception_folder, resize):
    """Oracle: the same network on images resized outside, as LlamaGen's scripts resize what they save."""
    checksum = sha256_file(inception_folder / INCEPTION_FILE)
    network = InceptionFeatures(inception_folder, resize, "cpu", checksum, image_size=12)
    plain = InceptionFeatures(inception_folder, resize, "cpu", checksum)
    images = digits.val[:5]
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    smaller = torch.nn.functional.interpolate(pixels, size=(12, 12), mode="bicubic")
    smaller = torch.clamp(127.5 * smaller + 128.0, 0, 255).byte().permute(0, 2, 3, 1).numpy()
    error = np.abs(network(images) - plain(smaller)).max()  # one pixel in thousands is rounded the other way
    assert error < 1e-3 < np.abs(plain(images) - plain(smaller)).max() / 5, error
    np.testing.assert_array_equal(network(smaller), plain(smaller))


@pytest.mark.parametrize("resize", ["clean", "legacy_tensorflow"])
def test_spatial_features_are_the_map_that_a_hook_sees(digits, inception_folder, resize):
    """Oracle: the same weights in plain modules, where hooks work, on the first 7 channels of `mixed_6.conv`."""
    network = InceptionFeatures(inception_folder, resize, "cpu", sha256_file(inception_folder / INCEPTION_FILE))
    plain = StandIn().eval()
    plain.load_state_dict(torch.jit.load(inception_folder / INCEPTION_FILE).state_dict())
    seen = []
    plain.layers.mixed_6.conv.register_forward_hook(lambda module, inputs, output: seen.append(output))
    images = digits.val[:5]
    with torch.inference_mode():
        if resize == "clean":
            resized = np.stack([build_resizer("clean")(image) for image in images])
            features = plain.layers((torch.from_numpy(resized).permute(0, 3, 1, 2) - 128) / 128).flatten(1)
        else:
            features = plain(torch.from_numpy(images).permute(0, 3, 1, 2), return_features=True)
    (maps,) = seen
    assert maps.shape == (5, 8, 17, 17)
    # In the order of ADM's statistics: rows, columns, channels.
    expected = np.stack([maps[:, channel].numpy() for channel in range(7)], axis=-1).reshape(5, -1)
    arrays = network.arrays(images)
    assert network.spatial_dimension == 2023
    assert expected.std() > 0.01
    np.testing.assert_allclose(arrays["spatial"], expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(arrays["features"], features.numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        ("del model.layers.mixed_6", "sFID is left out: .* has no attribute 'mixed_6'"),
        (
            "model.layers.mixed_6.conv, model.layers.mixed_7 = Convolution(32, 6, 1), Block(30, 32)",
            "1734 spatial features instead of 2023",
        ),
    ],
)
def test_another_network_has_no_spatial_features(digits, tmp_path, edit, reason, caplog):
    """All else goes on, and one line says why."""
    script_stand_in(tmp_path, edit)
    network = InceptionFeatures(tmp_path, "clean", "cpu", sha256_file(tmp_path / INCEPTION_FILE))
    assert network.spatial_dimension == 0
    assert network.arrays(digits.val[:2]).keys() == {"features"}
    (record,) = caplog.records
    assert re.search(reason, record.message)


def test_stages_that_are_not_the_network_are_refused(inception_folder, monkeypatch, caplog):
    """As where the network's sequence had more in it than its modules."""
    network = InceptionV3W(str(inception_folder), download=False).eval()
    assert split_inception(network, resize_inside=False, device=torch.device("cpu")) is not None
    whole = network.forward
    monkeypatch.setattr(network, "forward", lambda images: whole(images) * 1.001)
    assert split_inception(network, resize_inside=False, device=torch.device("cpu")) is None
    assert "its features differ by 0.001" in caplog.text


def test_inception_probabilities_leave_out_the_outputs_bias(digits, inception_folder):
    network = InceptionFeatures(inception_folder, "clean", "cpu", sha256_file(inception_folder / INCEPTION_FILE))
    images = np.random.default_rng(0).integers(0, 256, (3, 299, 299, 3), np.uint8)  # no resize to differ in
    model = torch.jit.load(inception_folder / INCEPTION_FILE)
    with torch.inference_mode():
        expected = model(torch.from_numpy(images).permute(0, 3, 1, 2), no_output_bias=True).numpy()
    np.testing.assert_allclose(network.probabilities(network(images)), expected, rtol=1e-4)


def test_distance_equals_clean_fids_compute_fid_on_the_same_folders(digits, classifier_path, tmp_path):
    """The whole way, from PNG folders to the score, with the same features; to 1e-6."""
    network = ClassifierFeatures(classifier_path, "cpu")

    def extract(batch: torch.Tensor) -> torch.Tensor:
        # clean-fid hands over float pixels; double keeps its own means from rounding
        pixels = batch.round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
        return torch.from_numpy(network(pixels)).double()

    sets = digits.val[:200], np.clip(digits.train[:250].astype(int) + 40, 0, 255).astype(np.uint8)
    expected = cleanfid_fid.compute_fid(
        *(as_folder(images, tmp_path / name) for name, images in zip("ab", sets, strict=True)),
        mode="legacy_tensorflow",  # images as they are
        custom_feat_extractor=extract,
        batch_size=50,
        num_workers=0,
        device="cpu",
        verbose=False,
    )
    statistics = []
    for images in sets:
        statistics.append(GaussianStatistics(network.dimension))
        for start in range(0, len(images), 50):
            statistics[-1].update(network(images[start : start + 50]))
    assert expected > 1
    assert frechet_distance(*statistics) == pytest.approx(expected, abs=1e-6)


def test_a_missing_inception_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"inception-2015-12-05\.pt: not found: put https") as error:
        InceptionFeatures(tmp_path, "clean", "cpu")
    assert "\n" not in str(error.value)


def test_a_wrong_inception_file_is_refused_by_checksum_before_it_is_loaded(inception_folder):
    with pytest.raises(UserError, match="wrong file, its SHA-256 is") as error:
        InceptionFeatures(inception_folder, "clean", "cpu")
    assert "\n" not in str(error.value)


def test_without_a_network_one_line_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def unreachable(*_, **__):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr("urllib.request.urlopen", unreachable)
    with pytest.raises(UserError, match=r"cannot be fetched .*set evaluate\.inception_weights") as error:
        InceptionFeatures(None, "clean", "cpu")
    assert "\n" not in str(error.value)
    assert not list(tmp_path.rglob("*.pt"))


def test_a_folder_for_fetched_files_that_cannot_be_made_says_the_same(tmp_path, monkeypatch):
    (tmp_path / "home").touch()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    with pytest.raises(UserError, match=r"cannot be fetched .*home.*set evaluate\.inception_weights"):
        InceptionFeatures(None, "clean", "cpu")


def test_a_fetched_file_is_kept_only_if_it_is_the_right_one(inception_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    right = inception_folder / INCEPTION_FILE
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: io.BytesIO(right.read_bytes()))
    with pytest.raises(UserError, match="what was fetched is not"):
        InceptionFeatures(None, "clean", "cpu")
    assert not list(tmp_path.rglob("*.pt"))
    network = InceptionFeatures(None, "clean", "cpu", sha256_file(right))
    assert len(list(tmp_path.rglob(INCEPTION_FILE))) == 1

    def unreachable(*_, **__):
        raise urllib.error.URLError("offline")

    monkeypatch.setattr("urllib.request.urlopen", unreachable)
    assert InceptionFeatures(None, "clean", "cpu", sha256_file(right)).checksum == network.checksum
