"""Oracles: the arrays that were written."""

from __future__ import annotations

import io
import json
import os
import tracemalloc
import zipfile

import h5py
import numpy as np
import pytest

from crt.errors import UserError
from crt.evaluation.sources import AdmBatch, SampleSource

IMAGES = np.random.default_rng(0).integers(0, 256, (40, 12, 12, 3), np.uint8)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_adm_batch_reads_any_stretch(tmp_path, save):
    save(tmp_path / "batch.npz", IMAGES, mu=np.zeros(3))
    source = AdmBatch(tmp_path / "batch.npz")
    assert (len(source), source.image_size) == (40, 12)
    stream = source._stream
    for start, stop in ((0, 7), (7, 9), (33, 40), (5, 6)):
        images = source.read(start, stop)
        np.testing.assert_array_equal(images, IMAGES[start:stop])
        assert images.flags.writeable  # torch warns of others
        assert (source._stream is stream) == (start != 5)  # only the way back starts anew


def test_adm_batch_never_holds_the_whole_array(tmp_path):
    large = np.zeros((400, 256, 256, 3), np.uint8)  # 79 MB
    np.savez_compressed(tmp_path / "batch.npz", large)
    source = AdmBatch(tmp_path / "batch.npz")
    tracemalloc.start()
    source.read(300, 310)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < large.nbytes / 4


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def test_adm_batch_says_what_is_wrong_in_one_line(tmp_path):
    (tmp_path / "text.npz").write_text("not an archive")
    np.savez(tmp_path / "unnamed.npz", images=IMAGES)
    np.savez(tmp_path / "floats.npz", IMAGES.astype(np.float32))
    np.savez(tmp_path / "wide.npz", IMAGES[:, 1:])
    np.savez(tmp_path / "grey.npz", IMAGES[..., :1])
    np.savez(tmp_path / "columns.npz", np.asfortranarray(IMAGES))
    np.savez(tmp_path / "objects.npz", np.array([{}], dtype=object))
    # A header that does not end.
    with zipfile.ZipFile(tmp_path / "open.npz", "w") as file:
        file.writestr("arr_0.npy", npy(IMAGES).replace(b"}", b" ", 1))
    for name, text in {
        "absent.npz": "not found",
        "text.npz": "no ADM batch file",
        "unnamed.npz": "no ADM batch file",
        "open.npz": "no ADM batch file",
        "floats.npz": "expected uint8",
        "wide.npz": "expected uint8",
        "grey.npz": "expected uint8",
        "columns.npz": "no ADM batch file",
        "objects.npz": "expected uint8",
    }.items():
        with pytest.raises(UserError, match=text) as error:
            AdmBatch(tmp_path / name)
        assert str(tmp_path / name) in str(error.value)
        assert "\n" not in str(error.value)


def test_stored_moments_are_read_for_the_features_that_they_fit(tmp_path):
    rng = np.random.default_rng(0)
    moments = {"mu": rng.normal(size=4), "sigma": np.eye(4), "mu_s": rng.normal(size=6), "sigma_s": 2 * np.eye(6)}
    np.savez(tmp_path / "batch.npz", IMAGES, **moments)
    source = AdmBatch(tmp_path / "batch.npz")
    for column, (mean, covariance) in {"features": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}.items():
        given = source.moments(column, len(moments[mean]))
        np.testing.assert_array_equal(given.mean, moments[mean])
        np.testing.assert_array_equal(given.covariance, moments[covariance])
    with pytest.raises(UserError, match=r"mu and sigma have the shapes \(4,\) and \(4, 4\).*has 2048") as error:
        source.moments("features", 2048)
    assert "\n" not in str(error.value)
    for mean, covariance in ((4, 3), (3, 4)):
        np.savez(tmp_path / "mixed.npz", IMAGES, mu=np.zeros(mean), sigma=np.eye(covariance))
        with pytest.raises(UserError, match="fetch the file again"):
            AdmBatch(tmp_path / "mixed.npz").moments("features", 4)
    np.savez(tmp_path / "without.npz", IMAGES, mu=moments["mu"])
    assert AdmBatch(tmp_path / "without.npz").moments("features", 4) is None


def test_damaged_moments_are_named(tmp_path):
    np.savez(tmp_path / "batch.npz", IMAGES, mu=np.zeros(4), sigma=np.array([{}], dtype=object))
    with pytest.raises(UserError, match=r"batch\.npz: mu or sigma is damaged") as error:
        AdmBatch(tmp_path / "batch.npz").moments("features", 4)
    assert "\n" not in str(error.value)


def test_a_damaged_adm_batch_is_named(tmp_path):
    np.savez(tmp_path / "batch.npz", IMAGES)
    data = bytearray((tmp_path / "batch.npz").read_bytes())
    data[2000:2100] = bytes(100)
    (tmp_path / "batch.npz").write_bytes(data)
    with zipfile.ZipFile(tmp_path / "short.npz", "w") as file:
        file.writestr("arr_0.npy", npy(IMAGES)[:-1])
    for name in ("batch", "short"):
        with pytest.raises(UserError, match=rf"{name}\.npz: arr_0 is damaged"):
            AdmBatch(tmp_path / f"{name}.npz").read(0, 40)


def test_samples_read_any_stretch_and_any_rows(tmp_path):
    with h5py.File(tmp_path / "samples.h5", "w") as file:
        file["images"], file["labels"] = IMAGES, np.arange(40) % 4
        file.attrs["class_names"], file.attrs["guidance_scale"] = json.dumps(list("abcd")), 1.5
    source = SampleSource(tmp_path, "content")
    assert (len(source), source.image_size, source.guidance_scale) == (40, 12, 1.5)
    assert source.class_names == list("abcd")
    np.testing.assert_array_equal(source.labels, np.arange(40) % 4)
    np.testing.assert_array_equal(source.read(10, 20), IMAGES[10:20])
    np.testing.assert_array_equal(source.read_rows(np.array([39, 2])), IMAGES[[39, 2]])


@pytest.mark.parametrize(
    "damage", [lambda path: path.write_bytes(bytes(path.stat().st_size)), lambda path: os.truncate(path, 2000)]
)
def test_damaged_samples_are_told_in_one_line(tmp_path, damage):
    """Of the same size, as a disk that lost blocks leaves a file."""
    path = tmp_path / "samples.h5"
    with h5py.File(path, "w") as file:
        file["images"] = IMAGES
    damage(path)
    with pytest.raises(UserError) as caught:
        SampleSource(tmp_path, "0" * 64)
    assert str(caught.value) == f"{path}: damaged: delete {tmp_path} and make it again with the sample stage"
