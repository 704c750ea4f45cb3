"""The stage as the command line runs it. Oracles: the files that went in, and an undisturbed run in one process."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import crt.stages.prepare_data as stage
from crt import interrupt
from crt.__main__ import main
from crt.data import listing, packing
from crt.data.decode import Undecodable, decode
from crt.data.packed import PackedImages, pixel_digest, read_index
from crt.data.store import Form, stored_form
from crt.manifest import read_manifest

ROOT = Path(__file__).resolve().parent.parent.parent


def fingerprint(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def both(out: Path) -> tuple[PackedImages, PackedImages]:
    return PackedImages(out, "train"), PackedImages(out, "val")


# --- what is stored ---------------------------------------------------------------------------------------------


def test_digits_are_scikit_learns(prepare):
    from sklearn.datasets import load_digits

    status, out = prepare(source="digits", image_size=8, val_fraction=0.2)
    assert status == 0
    digits = load_digits()
    seen = []
    for packed in both(out):
        for row in range(len(packed)):
            label, _, number = packed.source_id(row).partition("/")
            assert packed.labels[row] == int(label) == digits.target[int(number)]
            expected = np.rint(digits.images[int(number)] / 16 * 255)
            assert np.array_equal(packed.image(row), np.repeat(expected[..., None], 3, axis=-1))
            seen.append(int(number))
    assert sorted(seen) == list(range(1797))
    assert packed.class_names == list("0123456789")


@pytest.mark.parametrize("name", ["bilinear", "bicubic", "lanczos", "box"])
def test_stored_pixels_are_pillows_resize_of_the_central_square(prepare, make, tmp_path, name):
    sizes = [(40, 64), (64, 40), (16, 16), (7, 9), (16, 30)]
    for number, size in enumerate(sizes):
        make.write(tmp_path / "images" / "train" / "a" / f"{number}.png", make.encode(make.noise(number, *size)))
    make.class_folders(tmp_path / "images" / "val", {"a": 2}, first_seed=50)
    status, out = prepare(path=tmp_path / "images", resize_filter=name)
    assert status == 0
    packed = PackedImages(out, "train")
    for row, (height, width) in enumerate(sizes):
        scale = 16 / min(height, width)
        size = round(width * scale), round(height * scale)
        picture = Image.fromarray(make.noise(row, height, width))
        if (width, height) != size:
            picture = picture.resize(size, Image.Resampling[name.upper()])
        left, top = (size[0] - 16) // 2, (size[1] - 16) // 2
        assert np.array_equal(packed.image(row), np.asarray(picture)[top : top + 16, left : left + 16])


def test_encoded_files_are_kept_unless_they_are_too_large(prepare, make, tmp_path):
    files = {
        "0.jpg": make.encode(make.noise(0, 16, 40), "JPEG", quality=60),
        "1.jpg": make.encode(make.noise(1, 10, 12), "JPEG"),
        "2.jpg": make.encode(make.noise(2, 32, 64), "JPEG", quality=60),
        "3.png": make.encode(make.noise(3, 32, 64)),
        "4.webp": make.encode(make.noise(4, 32, 64), "WEBP", lossless=True),
        "5.webp": make.encode(make.noise(5, 32, 64), "WEBP", quality=80),
        "6.bmp": make.encode(make.noise(6, 64, 32), "BMP"),
    }
    for name, data in files.items():
        make.write(tmp_path / "images" / "train" / "a" / name, data)
    make.class_folders(tmp_path / "images" / "val", {"a": 2}, first_seed=50)
    status, out = prepare(path=tmp_path / "images", storage="encoded", image_size=16)
    assert status == 0
    packed = PackedImages(out, "train")
    stored = {packed.source_id(row).removeprefix("train/a/"): packed.encoded(row) for row in range(len(packed))}
    assert stored["0.jpg"] == files["0.jpg"] and stored["1.jpg"] == files["1.jpg"]
    for name in ("3.png", "4.webp", "6.bmp"):
        assert stored[name].startswith(b"\x89PNG")
        original = Image.fromarray(decode(files[name]))
        size = (32, 16) if original.width > original.height else (16, 32)
        assert np.array_equal(decode(stored[name]), np.asarray(original.resize(size, Image.Resampling.BICUBIC)))
    for name in ("2.jpg", "5.webp"):
        small = Image.fromarray(decode(files[name])).resize((32, 16), Image.Resampling.BICUBIC)
        assert stored[name] == make.encode(np.asarray(small), "JPEG", quality=95, subsampling="4:4:4")
    status, out = prepare(path=tmp_path / "images", storage="encoded", image_size=None)
    packed = PackedImages(out, "train")
    assert [packed.encoded(row) for row in range(len(packed))] == list(files.values())


@pytest.mark.parametrize("storage, size", [("pixels", 16), ("encoded", 16), ("encoded", None)])
def test_digests_are_those_of_the_pixels_that_a_reader_gets(prepare, make, tmp_path, storage, size):
    make.class_folders(tmp_path / "images", {"a": 4, "b": 4})
    make.write(tmp_path / "images" / "a" / "x.jpg", make.encode(make.noise(77, 50, 60), "JPEG"))
    status, out = prepare(path=tmp_path / "images", storage=storage, image_size=size)
    assert status == 0
    for packed in both(out):
        for row, digest in enumerate(packed.digests()):
            assert pixel_digest(packed.image(row)) == digest.tobytes()


def test_shards_hold_so_many_images_each(prepare, make, tmp_path):
    make.class_folders(tmp_path / "images", {"a": 9, "b": 8})
    status, out = prepare(path=tmp_path / "images", images_per_shard=4, val_fraction=0.2)
    assert status == 0
    index = read_index(out)["splits"]
    assert [shard["images"] for shard in index["train"]["shards"]] == [4, 4, 4, 1]
    assert [shard["file"] for shard in index["val"]["shards"]] == ["val-00000.h5"]
    assert index["train"]["images_per_class"] == [7, 6]
    train, val = both(out)
    ids = [packed.source_id(row) for packed in (train, val) for row in range(len(packed))]
    assert len(set(ids)) == 17
    assert read_manifest(out).summary == {
        "classes": 2, "train_images": 13, "val_images": 4, "rejected_files": 0, "duplicates_dropped": 0
    }  # fmt: skip


# --- splits -----------------------------------------------------------------------------------------------------


def test_copies_of_an_image_never_lie_on_both_sides(prepare, make, tmp_path):
    root = make.class_folders(tmp_path / "images", {"a": 12, "b": 12})
    for number in range(12):  # the same pixels in another format
        make.write(root / "a" / f"copy{number}.bmp", make.encode(make.noise(number), "BMP"))
    status, out = prepare(path=root, val_fraction=0.3)
    assert status == 0
    train, val = both(out)
    assert not {d.tobytes() for d in train.digests()} & {d.tobytes() for d in val.digests()}
    assert len(train) + len(val) == 36 and make.lines(out / "duplicates.jsonl") == []


def test_training_images_that_validation_has_too_are_dropped_and_listed(prepare, make, tmp_path):
    root = tmp_path / "images"
    make.class_folders(root / "train", {"a": 4, "b": 4})
    make.class_folders(root / "val", {"a": 2, "b": 2}, first_seed=50)
    shutil.copy(root / "val" / "b" / "001.png", root / "train" / "a" / "leak.png")
    make.write(root / "train" / "b" / "leak.bmp", make.encode(make.noise(50), "BMP"))
    status, out = prepare(path=root)
    assert status == 0
    assert make.lines(out / "duplicates.jsonl") == [
        {"source_id": "train/a/leak.png", "same_as": "val/b/001.png"},
        {"source_id": "train/b/leak.bmp", "same_as": "val/a/000.png"},
    ]
    train, val = both(out)
    assert len(train) == 8 and len(val) == 4
    assert not {d.tobytes() for d in train.digests()} & {d.tobytes() for d in val.digests()}
    assert read_manifest(out).summary["duplicates_dropped"] == 2


@pytest.mark.parametrize("official", [True, False])
def test_a_limit_keeps_the_first_of_each_class_and_split(prepare, make, tmp_path, official):
    root = tmp_path / "images"
    make.class_folders(root / "train" if official else root, {"a": 10, "b": 2})
    if official:
        make.class_folders(root / "val", {"a": 4, "b": 1}, first_seed=50)
    _, whole = prepare(path=root, out=tmp_path / "whole", val_fraction=0.5)
    status, out = prepare(path=root, out=tmp_path / "limited", max_images_per_class=3, val_fraction=0.5)
    assert status == 0
    for full, limited in zip(both(whole), both(out), strict=True):
        for label in range(2):
            first = [full.source_id(row) for row in np.flatnonzero(full.labels == label)][:3]
            assert [limited.source_id(row) for row in np.flatnonzero(limited.labels == label)] == first


def test_one_class_is_fine(prepare, make, tmp_path):
    status, out = prepare(path=make.class_folders(tmp_path / "images", {"only": 10}))
    assert status == 0
    assert PackedImages(out, "train").num_classes == 1 and len(PackedImages(out, "val")) == 2


def test_no_share_for_validation_needs_a_validation_split(prepare, refused, make, tmp_path):
    root = make.class_folders(tmp_path / "images" / "train", {"a": 3}).parent
    message = refused(path=root, val_fraction=0)
    assert "prepare_data.val_fraction: 0 leaves no validation image" in message and "set it to a share" in message
    make.class_folders(root / "val", {"a": 2}, first_seed=50)
    status, out = prepare(path=root, val_fraction=0)
    assert status == 0 and list(map(len, both(out))) == [3, 2]


# --- files that cannot be used ----------------------------------------------------------------------------------


def damaged(make, root: Path) -> Path:
    """Twenty good images and four that are not."""
    make.class_folders(root, {"a": 10, "b": 10})
    jpeg = make.encode(make.noise(70), "JPEG")
    make.write(root / "a" / "cut.jpg", jpeg[: len(jpeg) // 2])
    make.write(root / "a" / "empty.jpg", b"")
    make.write(root / "b" / "text.png", b"no image")
    make.write(root / "b" / "thin.png", make.encode(make.noise(71, 1, 30)))
    return root


def test_what_cannot_be_decoded_is_set_aside_and_listed(prepare, make, tmp_path, capfd):
    root = damaged(make, tmp_path / "images")
    make.write(root / "b" / "png inside.JPEG", make.encode(make.noise(72)))
    status, out = prepare(path=root, max_rejected_fraction=0.2)
    assert status == 0
    rejected = {record["source_id"]: record["reason"] for record in make.lines(out / "rejected.jsonl")}
    assert rejected["a/empty.jpg"] == "empty file" and rejected["b/thin.png"] == "30x1 pixels: too small"
    assert rejected["a/cut.jpg"].startswith("corrupt: ") and rejected["b/text.png"].startswith("not a JPEG")
    assert len(rejected) == 4 and sum(map(len, both(out))) == 21
    assert read_manifest(out).summary["rejected_files"] == 4
    assert "4 of 25 files (16%) cannot be decoded and are left out: a/cut.jpg" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("storage", "size", "limit"),
    [("pixels", 256, 1365), ("pixels", 512, 341), ("encoded", 256, 341), ("encoded", None, 341), ("encoded", 1024, 85)],
)
def test_images_too_elongated_to_be_resized_are_set_aside(storage, size, limit):
    """The limit is where the resized image would have more pixels than Pillow takes a file for a bomb at."""
    assert (side := size if storage == "pixels" else max(size or 0, 512)) ** 2 * limit <= Image.MAX_IMAGE_PIXELS
    assert side**2 * (limit + 1) > Image.MAX_IMAGE_PIXELS
    form = Form(storage, size, "box")
    for shape in ((2, 2 * limit + 2, 3), (2 * limit + 2, 2, 3), (2, 60_000, 3)):
        name = f"{shape[1]}x{shape[0]} pixels: too elongated"
        with pytest.raises(Undecodable, match=name):
            stored_form(np.zeros(shape, np.uint8), form)
    kept, _ = stored_form(np.zeros((20, 1000, 3), np.uint8), form)
    assert kept.shape == ((size, size, 3) if storage == "pixels" else (20, 1000, 3))


def test_a_thin_image_is_rejected_with_the_reason(prepare, make, tmp_path):
    root = make.class_folders(tmp_path / "images", {"a": 3})
    make.write(root / "a" / "thin.png", make.encode(np.zeros((2, 60_000, 3), np.uint8)))
    status, out = prepare(path=root, storage="encoded", image_size=None, val_fraction=0.5, max_rejected_fraction=0.5)
    assert status == 0 and sum(map(len, both(out))) == 3
    assert "60000x2 pixels: too elongated" in make.lines(out / "rejected.jsonl")[0]["reason"]


@pytest.mark.parametrize("official", [True, False])
def test_classes_without_a_training_image_left_are_noted(prepare, make, tmp_path, capfd, official):
    root = tmp_path / "images" / "train" if official else tmp_path / "images"
    make.class_folders(root, {"a": 3})
    make.write(root / "b" / "0.png", b"no image")
    if official:
        make.class_folders(root.parent / "val", {"a": 1, "b": 1}, first_seed=50)
        shutil.copytree(root.parent / "val" / "b", root / "c\nd")
    status, out = prepare(path=tmp_path / "images", val_fraction=0.5, max_rejected_fraction=0.5)
    assert status == 0
    assert np.bincount(PackedImages(out, "train").labels).tolist()[:1] == [3 if official else 1]
    told = capfd.readouterr().err
    reason = "no training image left, since all were rejected or are validation images too"
    assert (f"2 classes have {reason}: b, c\\nd" if official else f"1 class has {reason}: b") in told


def test_too_many_of_them_stop_the_stage(refused, make, tmp_path):
    message = refused(path=damaged(make, tmp_path / "images"), max_rejected_fraction=0.1)
    assert "4 of 24 files (16.7%) cannot be decoded, more than prepare_data.max_rejected_fraction 0.1" in message
    assert "a/cut.jpg" in message and "a/empty.jpg (empty file)" in message and "..." in message
    found = re.search(r"fix or delete them \((.*) lists all\), or raise the limit$", message)
    names = ["a/cut.jpg", "a/empty.jpg", "b/text.png", "b/thin.png"]
    assert [record["source_id"] for record in make.lines(Path(found[1]))] == names


def test_a_file_that_was_mended_is_looked_at_again(prepare, make, tmp_path):
    root = damaged(make, tmp_path / "images")
    assert prepare(path=root)[0] == 2
    for number, name in enumerate(("a/cut.jpg", "a/empty.jpg", "b/text.png", "b/thin.png")):
        make.write(root / name, make.encode(make.noise(80 + number)))
    status, out = prepare(path=root)
    assert status == 0 and sum(map(len, both(out))) == 24 and make.lines(out / "rejected.jsonl") == []


def test_a_limit_that_is_raised_makes_use_of_what_was_unpacked(prepare, make, tmp_path, capfd):
    root = damaged(make, tmp_path / "images")
    with tarfile.open(tmp_path / "images.tar.gz", "w:gz") as archive:
        archive.add(root, "images")
    assert prepare(path=tmp_path / "images.tar.gz", max_rejected_fraction=0.1)[0] == 2
    assert "unpacking images.tar.gz: " in capfd.readouterr().err
    status, out = prepare(path=tmp_path / "images.tar.gz", max_rejected_fraction=0.5)
    assert status == 0 and sum(map(len, both(out))) == 20
    told = capfd.readouterr().err
    assert "unpacking" not in told
    assert not list((out.parent / ".work").glob("*/unpacked.tar"))


def test_hidden_and_foreign_files_are_ignored(prepare, make, tmp_path, capfd):
    root = make.class_folders(tmp_path / "images", {"a": 3, "b": 3})
    for name in (".DS_Store", "a/.DS_Store", "a/._000.png", "__MACOSX/a/000.png", ".hidden/x.png", "Thumbs.db"):
        make.write(root / name, b"clutter")
    for name in ("a/@eaDir/000.png/SYNOPHOTO_THUMB_M.jpg", "$RECYCLE.BIN/x.png", "lost+found/x.png"):
        make.write(root / name, b"clutter")
    make.write(root / "LICENSE", b"text")
    make.write(root / "a" / "labels.csv", b"text")
    status, out = prepare(path=root)
    assert status == 0 and sum(map(len, both(out))) == 6
    assert "ignored: 1 .csv, 1 no extension" in capfd.readouterr().err


def test_links_that_lead_nowhere_are_set_aside_if_they_are_named_like_images(prepare, make, tmp_path):
    root = make.class_folders(tmp_path / "images", {"a": 3, "b": 3})
    (root / "a" / "self").symlink_to("self")
    (root / "a" / "up").symlink_to(root)
    (root / "a" / "loop.png").symlink_to("loop.png")
    (root / "b" / "gone.png").symlink_to("nothing.png")
    (root / "b" / "under a file.png").symlink_to("000.png/1.png")
    status, out = prepare(path=root, max_rejected_fraction=0.5)
    assert status == 0 and sum(map(len, both(out))) == 6
    assert {record["source_id"]: record["reason"] for record in make.lines(out / "rejected.jsonl")} == {
        "a/loop.png": "a loop of links",
        "b/gone.png": "file not found (a broken link?)",
        "b/under a file.png": "file not found (a broken link?)",
    }


def test_names_that_are_no_utf8_are_escaped(prepare, make, tmp_path):
    root = make.class_folders(tmp_path / "images", {"a": 3})
    data = make.encode(make.noise(9))
    with open(os.fsencode(root / "a") + b"/caf\xe9.png", "wb") as file:
        file.write(data)
    make.write(root / "a" / "empty.png", b"")
    os.rename(root / "a" / "empty.png", os.fsencode(root / "a") + b"/\xff.png")
    status, out = prepare(path=root, val_fraction=0.5, max_rejected_fraction=0.5)
    assert status == 0
    assert "a/caf\\udce9.png" in [packed.source_id(row) for packed in both(out) for row in range(len(packed))]
    assert make.lines(out / "rejected.jsonl")[0]["source_id"] == "a/\\udcff.png"


def test_names_of_rejected_files_take_one_line(prepare, refused, make, tmp_path, capfd):
    root = make.class_folders(tmp_path / "images", {"a": 3})
    make.write(root / "a" / "line\nbreak.png", b"no image")
    with open(os.fsencode(root / "a") + b"/\xff.png", "wb"):
        pass
    message = refused(path=root, max_rejected_fraction=0.1)
    assert "a/line\\nbreak.png (not a" in message and "a/\\udcff.png (empty file)" in message
    assert prepare(path=root, out=tmp_path / "kept", max_rejected_fraction=0.5, val_fraction=0.5)[0] == 0
    assert "Logging error" not in capfd.readouterr().err
    make.write(root / "b" / "x.png", make.encode(make.noise(9)))
    make.write(root / "line\nbreak.png", make.encode(make.noise(10)))
    assert "image line\\nbreak.png lies outside" in refused(path=root)


# --- sources that cannot be used --------------------------------------------------------------------------------


def test_sources_laid_out_otherwise_are_refused(refused, make, tmp_path):
    assert "gone: not found: set prepare_data.path" in refused(path=tmp_path / "gone")
    (tmp_path / "empty").mkdir()
    assert "empty: put images there, or set prepare_data.path" in refused(path=tmp_path / "empty")
    make.write(tmp_path / "text.tar", b"no archive" * 200)
    assert "text.tar: no archive" in refused(path=tmp_path / "text.tar")

    root = make.class_folders(tmp_path / "images", {"a": 2, "b": 2})
    (root / "c").mkdir()
    assert "class folder c holds no images" in refused(path=root)
    make.write(root / "c" / "notes.txt", b"text")
    assert "class folder c holds no images" in refused(path=root)
    shutil.rmtree(root / "c")
    make.write(root / "stray.png", make.encode(make.noise(50)))
    assert "image stray.png lies outside the class folders" in refused(path=root)

    cifar = tmp_path / "flat"
    make.write(cifar / "1.png", make.encode(make.noise(50)))
    assert "1.png lies outside the class folders" in refused(path=cifar, source="cifar10")
    make.write(tmp_path / "text" / "notes.txt", b"text")
    make.write(tmp_path / "text" / "photo.JXL", b"jxl")
    assert "text: holds no images (.jpg, " in (message := refused(path=tmp_path / "text"))
    assert ".pnm), but 1 .jxl, 1 .txt: add some, or set prepare_data.path" in message
    make.write(tmp_path / "bare" / "photo", make.encode(make.noise(50)))
    told = "but 1 no extension: add some, or set prepare_data.path to the folder that holds them, or if those without"
    assert told in refused(path=tmp_path / "bare")
    make.write(tmp_path / "text" / "0.tar", b"shard")
    assert "set prepare_data.source to webdataset" in refused(path=tmp_path / "text")
    make.write(tmp_path / "hub" / "data" / "train-00000-of-00001.parquet", b"table")
    assert "hub: holds no images" in (message := refused(path=tmp_path / "hub"))
    assert message.endswith("or set prepare_data.source to parquet to read images inside these files")


@pytest.mark.parametrize("inner", [("seg_train", "seg_test"), ("train", "test"), ("images", "images"), ("a/b", "a")])
def test_class_folders_may_lie_deeper_in_splits(prepare, make, tmp_path, capfd, inner):
    """Kaggle's archives have them so: train/train/CLASS."""
    for seed, (split, folder) in enumerate(zip(("train", "test"), inner, strict=True)):
        make.class_folders(tmp_path / "images" / split / folder, {"cat": 3, "dog": 3}, first_seed=10 * seed)
    status, out = prepare(path=tmp_path / "images")
    assert status == 0
    for split in ("train", "val"):
        assert PackedImages(out, split).class_names == ["cat", "dog"] and len(PackedImages(out, split)) == 6
    assert f"class folders are those in train/{inner[0]}/" in capfd.readouterr().err


def test_split_folders_laid_out_otherwise_are_refused(refused, make, tmp_path):
    root = make.class_folders(tmp_path / "images" / "train", {"a": 2, "b": 2}).parent
    make.class_folders(root / "val", {"a": 1, "c": 1}, first_seed=50)
    assert "class c has validation images, but no training images" in refused(path=root)
    shutil.rmtree(root / "val" / "c")
    shutil.rmtree(root / "val" / "a")
    told = "val/ holds no images: add some, or remove it: validation images are then set aside from train/"
    assert told in refused(path=root)
    make.class_folders(root / "val", {"patient1": 1, "patient2": 1}, first_seed=50)
    assert refused(path=root).endswith("if they are no classes, put all images of each split into one folder")
    shutil.rmtree(root / "val")
    make.class_folders(root / "val", {"a": 1}, first_seed=50)
    make.class_folders(root / "extra", {"a": 1}, first_seed=60)
    assert "folder extra beside train/ and val/" in refused(path=root)
    shutil.rmtree(root / "extra")
    make.write(root / "stray.png", make.encode(make.noise(70)))
    assert "image stray.png lies outside the class folders" in refused(path=root)
    (root / "stray.png").unlink()
    make.write(root / "train" / "stray.png", make.encode(make.noise(70)))
    assert "image train/stray.png lies outside the class folders" in refused(path=root)
    shutil.rmtree(root / "train")
    assert "holds val/ but no train/" in refused(path=root)
    make.class_folders(root / "test", {"a": 1}, first_seed=80)
    assert "holds val/ but no train/" in refused(path=root)


def test_no_training_image_left_is_refused(refused, make, tmp_path):
    root = make.class_folders(tmp_path / "images" / "train", {"a": 2}).parent
    make.class_folders(root / "val", {"a": 2})
    assert "no training image is left" in refused(path=root)
    make.write(tmp_path / "bad" / "a" / "1.png", b"no image")
    assert "no training image is left" in refused(path=tmp_path / "bad", max_rejected_fraction=1.0)


def test_no_validation_image_left_is_refused(refused, make, tmp_path):
    """Oracle: each split needs an image of its own, and equal images stay together."""
    root = tmp_path / "photos"
    for name, seed in (("1.png", 1), ("copy.png", 1)):
        make.write(root / name, make.encode(make.noise(seed)))
        message = refused(path=root)
        assert "photos: no image is left for validation, evaluate needs 2: add images, until a class has 3" in message

    official = make.class_folders(tmp_path / "official" / "train", {"a": 2}).parent
    make.write(official / "val" / "a" / "1.png", b"no image")
    message = refused(path=official, max_rejected_fraction=1.0)
    assert "no image is left for validation" in message and message.endswith("add images to the validation split")


@pytest.mark.parametrize(
    ("classes", "values", "remedy"),
    [
        ({"train/a": 4, "val/a": 1}, {}, "add images to the validation split"),
        ({"train/a": 4, "val/a": 3}, {"max_images_per_class": 1}, "raise prepare_data.max_images_per_class, or add"),
        ({"a": 2}, {"val_fraction": 0.5}, "add images, until a class has 3 that differ"),
        ({"a": 2, "b": 1, "c": 1}, {"val_fraction": 0.5}, "add images, until a class has 3 that differ"),
        ({"a": 30}, {"val_fraction": 0.01}, "raise prepare_data.val_fraction, to 0.05 at least, or add images"),
        ({"a": 30}, {"max_images_per_class": 1}, "raise prepare_data.max_images_per_class, or add images"),
    ],
)
def test_one_validation_image_is_refused_with_a_remedy_that_helps(
    refused, prepare, make, tmp_path, classes, values, remedy
):
    root = make.class_folders(tmp_path / "images", classes)
    message = refused(path=root, **values)
    assert f"images: 1 image is left for validation, evaluate needs 2: {remedy}" in message
    if "val_fraction, to" in remedy:
        assert prepare(path=root, val_fraction=0.05)[0] == 0
    elif "max_images_per_class" in remedy:
        assert prepare(path=root, max_images_per_class=2)[0] == 0
    else:
        make.class_folders(root, {"val/a" if "val/a" in classes else "a": 3}, first_seed=100)
        assert prepare(path=root, val_fraction=0.6)[0] == 0


def test_classes_of_one_image_that_serve_validation_are_noted(prepare, make, tmp_path, capfd):
    root = make.class_folders(tmp_path / "images", dict.fromkeys("abcdefghij", 1))
    make.write(root / "bad" / "0.png", b"no image")
    status, out = prepare(path=root, max_rejected_fraction=0.5)
    assert status == 0
    train, val = (set(packed.labels.tolist()) for packed in both(out))
    assert len(train) == 8 and len(val) == 2 and not train & val
    told = capfd.readouterr().err
    served = ", ".join("abcdefghij"[label - (label > 1)] for label in sorted(val))  # "bad" sorts behind "b"
    remedy = f"merge classes, or give a flat folder, and delete {out}: {served}"
    assert (
        f"each class has one image, so 2 of them serve validation, and their classes are never trained: {remedy}"
        in told
    )
    assert "1 class has no training image left, since all were rejected or are validation images too: bad" in told


def test_an_archive_that_leads_outside_is_refused(refused, make, tmp_path):
    import zipfile

    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("a/1.png", make.encode(make.noise(0)))
        archive.writestr("../evil.png", b"evil")
    assert "member '../evil.png' may lead outside the archive" in refused(path=tmp_path / "x.zip")
    assert not (tmp_path.parent / "evil.png").exists()


@pytest.mark.parametrize("what", ["file", "folder", "archive"])
def test_what_may_not_be_read_is_refused(params_of, make, capfd, what):
    # Root may read everything, so the stage runs as nobody, in a folder that nobody may write.
    base = Path(tempfile.mkdtemp())
    try:
        root = make.class_folders(base / "images", {"a": 2, "b": 2})
        archive = make.write(base / "x.tar", b"x")
        target = {"file": root / "a" / "000.png", "folder": root / "a", "archive": archive}[what]
        params = base / "params.json"
        shutil.copy(params_of(path=archive if what == "archive" else root), params)
        for path in [base, *base.rglob("*")]:
            path.chmod(0o777)
        target.chmod(0)
        os.seteuid(65534 if os.geteuid() == 0 else os.geteuid())
        try:
            status = main(["prepare_data", "--params", str(params), "--out", str(base / "out")])
        finally:
            os.seteuid(os.getuid())
        errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
        assert status == 2 and len(errors) == 1
        assert f"{target}: cannot be read (Permission denied)" in errors[0]
    finally:
        shutil.rmtree(base)


# --- the same bytes, whatever happens ---------------------------------------------------------------------------

MANY = {"source": "digits", "image_size": 16, "images_per_shard": 300, "val_fraction": 0.2}


_UNDISTURBED: dict[str, str] = {}


@pytest.fixture
def undisturbed(prepare, tmp_path) -> dict[str, str]:
    """Checksums of the files that one process makes without a break."""
    if not _UNDISTURBED:
        status, out = prepare(out=tmp_path / "undisturbed", **MANY)
        assert status == 0
        _UNDISTURBED.update(fingerprint(out))
    return _UNDISTURBED


@pytest.mark.parametrize("cpus", [2, 3])
def test_any_number_of_workers_makes_the_same_bytes(prepare, tmp_path, monkeypatch, undisturbed, cpus):
    monkeypatch.setattr(packing, "available_cpus", lambda: cpus)
    status, out = prepare(out=tmp_path / "other", **MANY)
    assert status == 0 and fingerprint(out) == undisturbed


def test_a_kill_in_the_middle_leaves_no_trace(params_of, tmp_path, undisturbed):
    out = tmp_path / "killed" / "prepared"
    command = [sys.executable, "-m", "crt", "prepare_data", "--params", str(params_of(**MANY)), "--out", str(out)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    records = "killed/.work/*/finished/train-00000.h5.json"
    while not list(tmp_path.glob(records)):
        assert process.poll() is None, "it ended before its first shard"
        time.sleep(0.001)
    process.kill()
    process.wait()
    assert not out.exists()
    (work,) = tmp_path.glob("killed/.work/prepared-*")
    kept = work / "staging" / "train-00000.h5"
    before = kept.stat()
    finished = subprocess.run(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, check=True)
    assert "checking images: all 1797 images were done before" in finished.stderr
    assert "packing: continues at " in finished.stderr
    assert fingerprint(out) == undisturbed
    after = (out / "train-00000.h5").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)  # not written again


def stopped_after(prepare, monkeypatch, out: Path, calls: int, **changes) -> Path:
    """Run the stage until its `calls`th safe point, as if a signal had arrived there; returns its work folder."""
    left = [calls]

    def stop() -> None:
        left[0] -= 1
        if left[0] == 0:
            raise interrupt.Stopped(signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(interrupt, "raise_if_stopped", stop)
        assert prepare(out=out, **(changes or MANY))[0] == 128 + signal.SIGTERM
    (work,) = (out.parent / ".work").glob(f"{out.name}-*")
    return work


@pytest.mark.parametrize("calls", [1, 8, 9, 13])
def test_a_stop_at_any_safe_point_leaves_no_trace(prepare, tmp_path, monkeypatch, undisturbed, calls):
    out = tmp_path / "stopped" / "prepared"
    stopped_after(prepare, monkeypatch, out, calls)
    status, out = prepare(out=out, **MANY)
    assert status == 0 and fingerprint(out) == undisturbed


@pytest.mark.parametrize("damage", ["cut", "flipped", "foreign", "checked"])
def test_torn_state_is_found_and_made_again(prepare, tmp_path, monkeypatch, undisturbed, damage):
    out = tmp_path / "stopped" / "prepared"
    work = stopped_after(prepare, monkeypatch, out, 13)
    shard = work / "staging" / "train-00000.h5"
    if damage == "cut":
        os.truncate(shard, shard.stat().st_size // 2)
    elif damage == "flipped":
        data = bytearray(shard.read_bytes())
        data[-100] ^= 1
        shard.write_bytes(data)
    elif damage == "foreign":
        (work / "staging" / "train-00077.h5").write_bytes(b"left by another version")
    else:
        for path in sorted((work / "checked").iterdir())[:2]:
            os.truncate(path, 50)
    status, out = prepare(out=out, **MANY)
    assert status == 0 and fingerprint(out) == undisturbed


def test_a_source_that_changes_meanwhile_is_noticed_and_checked_anew(prepare, make, tmp_path, monkeypatch, capfd):
    root = make.class_folders(tmp_path / "images", {"a": 300})
    left = [2]  # chunks of the first pass

    def change() -> None:
        left[0] -= 1
        if left[0] == 0:
            make.write(root / "a" / "007.png", make.encode(make.noise(999)))

    monkeypatch.setattr(interrupt, "raise_if_stopped", change)
    assert prepare(path=root)[0] == 2
    assert "a/007.png: changed while the data set was packed" in capfd.readouterr().err
    status, out = prepare(path=root)
    assert status == 0
    rows = {packed.source_id(row): packed.image(row) for packed in both(out) for row in range(len(packed))}
    expected = Image.fromarray(make.noise(999)).resize((19, 16), Image.Resampling.BICUBIC)
    assert np.array_equal(rows["a/007.png"], np.asarray(expected)[:, 1:17])


@pytest.mark.parametrize("calls", [4, 5])  # all is checked; the first shard, with the file in it, is finished
def test_a_file_that_changes_between_a_stop_and_the_rerun_is_taken_anew(
    prepare, make, tmp_path, monkeypatch, capfd, calls
):
    monkeypatch.setattr(packing, "CHUNK_IMAGES", 4)
    root = tmp_path / "images"
    for number in range(12):
        make.write(root / "train" / "a" / f"{number:03d}.bmp", make.encode(make.noise(number), "BMP"))
    make.class_folders(root / "val", {"a": 2}, first_seed=50)
    source = {"path": root, "images_per_shard": 4}
    stopped_after(prepare, monkeypatch, tmp_path / "stopped", calls, **source)
    changed = root / "train" / "a" / "001.bmp"
    size = changed.stat().st_size
    assert make.write(changed, make.encode(make.noise(99), "BMP")).stat().st_size == size
    capfd.readouterr()
    status, out = prepare(out=tmp_path / "stopped", **source)
    assert status == 0 and "checking train images: continues at 8 of 12" in capfd.readouterr().err
    status, expected = prepare(out=tmp_path / "expected", **source)
    assert status == 0
    assert [(out / f"train-0000{n}.h5").read_bytes() for n in range(3)] == [
        (expected / f"train-0000{n}.h5").read_bytes() for n in range(3)
    ]
    expected_pixels = Image.fromarray(make.noise(99)).resize((19, 16), Image.Resampling.BICUBIC)
    assert np.array_equal(PackedImages(out, "train").image(1), np.asarray(expected_pixels)[:, 1:17])


def test_labels_that_change_between_a_stop_and_the_rerun_are_taken_anew(prepare, make, tmp_path, monkeypatch):
    """Tiny ImageNet has them in a file: the images and their order stay, and their shard was finished."""
    root = make.class_folders(tmp_path / "images" / "train", {"a": 2, "b": 2}).parent
    make.class_folders(root / "val", {"images": 4}, first_seed=50)
    labels = root / "val" / "val_annotations.txt"
    make.write(labels, b"000.png\ta\n001.png\ta\n002.png\ta\n003.png\tb\n")
    stopped_after(prepare, monkeypatch, tmp_path / "stopped", 4, path=root)
    make.write(labels, b"000.png\ta\n001.png\ta\n002.png\tb\n003.png\tb\n")
    status, out = prepare(out=tmp_path / "stopped", path=root)
    assert status == 0
    assert PackedImages(out, "val").labels.tolist() == [0, 0, 1, 1]


def test_shards_are_on_the_disk_before_they_have_their_names(prepare, make, tmp_path, monkeypatch):
    flushed = set()
    monkeypatch.setattr(os, "fsync", lambda descriptor: flushed.add(os.fstat(descriptor).st_ino))
    status, out = prepare(path=make.class_folders(tmp_path / "images", {"a": 6}), val_fraction=0.4)
    assert status == 0
    assert {path.stat().st_ino for path in out.glob("*.h5")} <= flushed


@pytest.mark.parametrize("kind", ["tar", "zip", "webdataset", "imagenet"])
def test_an_archive_replaced_by_one_of_the_same_layout_is_taken_anew(prepare, make, tmp_path, monkeypatch, kind):
    source = {"path": tmp_path / "data", "images_per_shard": 4, "val_fraction": 0.25, "max_rejected_fraction": 0.0}

    def pack(first: int) -> None:
        shutil.rmtree(tmp_path / "data", ignore_errors=True)
        files = tmp_path / "files" / ("n01440764" if kind == "imagenet" else "a")
        for number in range(8):
            make.write(files / f"{number:03d}.png", make.encode(make.noise(first + number), "BMP"))
        source["source"] = "imagefolder" if kind in ("tar", "zip") else kind
        if kind == "imagenet":
            nested = tmp_path / "nested"
            shutil.make_archive(str(nested / "n01440764"), "tar", files)
            (tmp_path / "data").mkdir()
            (tmp_path / "data" / "ILSVRC2012_img_train.tar").write_bytes(tar_of(nested))
            val = make.class_folders(tmp_path / "data" / "val", {"n01440764": 2}, first_seed=500)
            assert val.is_dir()
        else:
            made = shutil.make_archive(str(tmp_path / "data" / "all"), "zip" if kind == "zip" else "tar", files.parent)
            source["path"] = tmp_path / "data" if kind == "webdataset" else Path(made)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    pack(first=0)
    with monkeypatch.context() as patched:
        patched.setattr(stage, "_index", interrupted)  # all shards are finished
        assert prepare(**source)[0] != 0
    pack(first=100)
    listing._opened.cache_clear()  # a run of its own opens what lies there
    status, out = prepare(**source)
    assert status == 0
    splits = both(out)[:1] if kind == "imagenet" else both(out)
    found = {packed.image(row).tobytes() for packed in splits for row in range(len(packed))}
    new = [Image.fromarray(make.noise(100 + n)).resize((19, 16), Image.Resampling.BICUBIC) for n in range(8)]
    assert found == {np.asarray(image)[:, 1:17].tobytes() for image in new}


def tar_of(folder: Path) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for path in sorted(folder.iterdir()):
            tar.add(path, path.name)
    return buffer.getvalue()


def test_only_the_first_process_of_a_job_works(prepare, make, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    status, out = prepare(path=make.class_folders(tmp_path / "images", {"a": 3}))
    assert status == 0 and not out.exists()


def test_files_say_nothing_of_where_and_when(prepare, make, tmp_path):
    status, out = prepare(path=make.class_folders(tmp_path / "images", {"a": 10}))
    assert status == 0
    for path in out.iterdir():
        if path.name != "manifest.json":  # it records the params, and so prepare_data.path
            assert str(tmp_path).encode() not in path.read_bytes()
    index = json.loads((out / "index.json").read_text())
    assert index["source"] == "imagefolder" and index["classes"] == [{"id": "a", "name": "a"}]
