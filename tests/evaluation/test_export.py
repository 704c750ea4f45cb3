"""Oracles: numpy's and Pillow's own readers, and the arrays that were written."""

from __future__ import annotations

import json
import zipfile

import h5py
import numpy as np
import pytest
from PIL import Image

from crt.evaluation import export
from crt.evaluation.export import export_samples
from crt.evaluation.sources import AdmBatch
from crt.interrupt import Stopped
from tests.conftest import in_ascii_locale

IMAGES = np.random.default_rng(0).integers(0, 256, (23, 8, 8, 3), np.uint8)
LABELS = np.arange(23) % 4


@pytest.fixture
def samples(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "_IMAGES_AT_ONCE", 10)
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 1000)  # as if the images had more than 2 GiB
    path = tmp_path / "samples.h5"
    with h5py.File(path, "w") as file:
        file["images"], file["labels"] = IMAGES, LABELS
        file.attrs["class_names"] = json.dumps(["ä", "b", "c", "d"])
    return path


def test_the_batch_file_is_what_adms_evaluator_reads(samples):
    export_samples(samples, ["npz"])
    target = samples.with_suffix(".npz")
    with np.load(target) as batch:
        assert list(batch) == ["arr_0", "arr_1"]
        np.testing.assert_array_equal(batch["arr_0"], IMAGES)
        np.testing.assert_array_equal(batch["arr_1"], LABELS)
        assert batch["arr_0"].dtype == np.uint8
    np.testing.assert_array_equal(AdmBatch(target).read(5, 20), IMAGES[5:20])
    with zipfile.ZipFile(target) as archive:  # whose bytes depend on no clock
        assert {info.date_time for info in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
    first = target.read_bytes()
    target.unlink()
    export_samples(samples, ["npz"])
    assert target.read_bytes() == first
    assert not samples.with_name("samples_png").exists()


def test_png_folders_hold_each_image_under_its_class(samples):
    export_samples(samples, ["png"])
    folder = samples.with_name("samples_png")
    assert len(list(folder.glob("*/*.png"))) == 23
    for row in range(23):
        with Image.open(folder / f"{LABELS[row]:05d}" / f"{row:08d}.png") as image:
            np.testing.assert_array_equal(np.asarray(image), IMAGES[row])
    assert json.loads((folder / "class_names.json").read_text()) == ["ä", "b", "c", "d"]
    assert not samples.with_suffix(".npz").exists()


def test_names_of_classes_are_utf8_in_every_locale(samples):
    in_ascii_locale(
        "-c",
        f"from pathlib import Path; from crt.evaluation.export import export_samples\n"
        f"export_samples(Path({str(samples)!r}), ['png'])",
    )
    names = (samples.with_name("samples_png") / "class_names.json").read_bytes()
    assert json.loads(names.decode("utf-8")) == ["ä", "b", "c", "d"]


@pytest.fixture
def told(monkeypatch) -> list[int]:
    """Images done, as the line of progress has them."""
    numbers = []

    class Told(export.Progress):
        def update(self, done: int) -> None:
            numbers.append(done)
            super().update(done)

    monkeypatch.setattr(export, "Progress", Told)
    return numbers


def test_a_signal_leaves_whole_files_and_no_others(samples, told, monkeypatch):
    for formats in (["npz"], ["png"]):
        told.clear()
        monkeypatch.setattr("crt.interrupt._received", told)  # a signal arrives with the first images
        with pytest.raises(Stopped):
            export_samples(samples, formats)
        assert told == [10]
    rows = sorted(int(path.stem) for path in samples.with_name("samples_png").glob("*/*"))
    assert rows == list(range(10))
    assert {path.name for path in samples.parent.iterdir()} == {"samples.h5", "samples_png"}


def test_files_that_are_there_stay_and_others_are_made(samples, told):
    export_samples(samples, ["npz", "png"])
    assert told == 2 * [10, 20, 23]
    images = [samples.with_name("samples_png") / f"{LABELS[row]:05d}" / f"{row:08d}.png" for row in range(23)]
    missing = images[12].read_bytes()
    images[12].unlink()
    kept = [samples.with_suffix(".npz"), *images[:12], *images[13:]]
    for path in kept:
        path.write_bytes(b"kept")
    told.clear()
    export_samples(samples, ["npz", "png"])
    assert told == [23]
    assert {path.read_bytes() for path in kept} == {b"kept"}
    assert images[12].read_bytes() == missing
