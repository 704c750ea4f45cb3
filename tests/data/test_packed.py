"""Oracle: what was put in, read back in every way that the reader offers."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import pickle
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import h5py
import numpy as np
import pytest

from crt.data.decode import decode
from crt.data.packed import PackedImages, create_shard, pixel_digest, read_index
from crt.errors import UserError


def build(folder, contents: list[bytes], storage: str, per_shard: int, size: int | None = None) -> None:
    """A data set of one class per three images, packed by the writer."""
    shards = []
    for number, start in enumerate(range(0, len(contents), per_shard)):
        part = contents[start : start + per_shard]
        name = f"train-{number:05d}.h5"
        offsets = create_shard(
            folder / name,
            split="train",
            storage=storage,
            image_size=size,
            labels=np.arange(start, start + len(part)) // 3,
            source_ids=[f"über/{start + row}.png" for row in range(len(part))],
            digests=np.stack([np.frombuffer(hashlib.sha256(data).digest(), np.uint8) for data in part]),
            payload_bytes=np.array([len(data) for data in part]),
        )
        with open(folder / name, "r+b") as file:
            for offset, data in reversed(list(zip(offsets, part, strict=True))):
                file.seek(offset)
                file.write(data)
        shards.append({"file": name, "images": len(part)})
    index = {
        "schema": 1,
        "storage": storage,
        "image_size": size,
        "classes": [{"id": str(label), "name": f"class {label}"} for label in range(9)],
        "splits": {"train": {"shards": shards}, "val": {"shards": []}},
    }
    (folder / "index.json").write_text(json.dumps(index))


@pytest.fixture
def pixels(tmp_path, make):
    images = np.stack([make.noise(seed, 8, 8) for seed in range(10)])
    build(tmp_path, [image.tobytes() for image in images], "pixels", 4, 8)
    return tmp_path, images


def test_pixels_come_back_in_any_order_across_shards(pixels):
    folder, images = pixels
    packed = PackedImages(folder, "train")
    assert len(packed) == 10 and packed.storage == "pixels" and packed.image_size == 8
    for rows in ([9, 0, 4, 4, 3], [2], range(10), np.array([], int)):
        assert np.array_equal(packed.pixels(rows), images[list(rows)])
    assert all(np.array_equal(packed.image(row), images[row]) for row in range(10))
    assert packed.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3] and packed.labels.dtype == np.int64
    assert packed.num_classes == 9 and packed.class_names[2] == "class 2"
    assert packed.source_id(7) == "über/7.png"
    assert packed.digests()[5].tobytes() == hashlib.sha256(images[5].tobytes()).digest()


@pytest.mark.parametrize("storage, side, mapped", [("pixels", 8, True), ("pixels", 160, False), ("encoded", 8, False)])
def test_only_small_images_are_read_through_the_memory_of_the_process(tmp_path, make, storage, side, mapped):
    """Maps of large files fetch several times what is asked for, and count as memory as far as they were ever read."""
    images = [make.noise(seed, side, side) for seed in range(5)]
    contents = [image.tobytes() if storage == "pixels" else make.encode(image, "PNG") for image in images]
    build(tmp_path, contents, storage, 2, side if storage == "pixels" else None)
    packed = PackedImages(tmp_path, "train")
    assert packed.are_small == mapped
    assert all(np.array_equal(packed.image(row), images[row]) for row in (4, 0, 3, 1, 2))
    if storage == "pixels":
        assert np.array_equal(packed.pixels([4, 0, 3, 3]), np.stack([images[row] for row in (4, 0, 3, 3)]))
    assert (str(tmp_path) in Path("/proc/self/maps").read_text()) == mapped


@pytest.mark.parametrize("storage", ["pixels", "encoded"])
def test_a_shard_that_is_cut_short_while_in_use_is_told(tmp_path, make, storage):
    images = [make.noise(seed, 160, 160) for seed in range(3)]
    contents = [image.tobytes() if storage == "pixels" else make.encode(image, "PNG") for image in images]
    build(tmp_path, contents, storage, 3, 160 if storage == "pixels" else None)
    packed = PackedImages(tmp_path, "train")
    assert np.array_equal(packed.image(0), images[0])
    shard = tmp_path / "train-00000.h5"
    os.truncate(shard, shard.stat().st_size - 70_000)
    with pytest.raises(UserError, match=r"train-00000\.h5: ends too early: delete .* and run prepare_data again$"):
        packed.image(2)


def test_encoded_files_come_back_whole_and_decoded(tmp_path, make):
    files = [make.encode(make.noise(seed, 5 + seed, 9), "PNG") for seed in range(7)]
    build(tmp_path, files, "encoded", 3)
    packed = PackedImages(tmp_path, "train")
    assert [packed.encoded(row) for row in range(7)] == files
    assert np.array_equal(packed.image(6), decode(files[6]))
    with pytest.raises(ValueError, match="storage 'pixels'"):
        packed.pixels([0])


def test_a_shard_may_be_larger_than_memory(tmp_path):
    build(tmp_path, [b"x", b"x"], "encoded", 2)
    create_shard(
        tmp_path / "train-00000.h5",
        split="train",
        storage="encoded",
        image_size=None,
        labels=np.zeros(2, int),
        source_ids=["a", "b"],
        digests=np.zeros((2, 32), np.uint8),
        payload_bytes=np.array([10, 2**36]),
    )
    assert PackedImages(tmp_path, "train").encoded(0) == bytes(10)


def test_a_damaged_image_is_named(tmp_path, make):
    files = [make.encode(make.noise(seed, 5, 9), "PNG") for seed in range(4)]
    build(tmp_path, [*files[:3], b"\0" * 30, *files[3:]], "encoded", 2)
    packed = PackedImages(tmp_path, "train")
    assert np.array_equal(packed.image(4), decode(files[3]))
    with pytest.raises(UserError, match=r"train-00001\.h5: image 1 \(über/3\.png\) is damaged \(not a .*\): delete "):
        packed.image(3)


def test_anyone_can_read_a_shard_by_its_data_sets(pixels):
    folder, images = pixels
    with h5py.File(folder / "train-00001.h5") as file:
        assert np.array_equal(file["pixels"][()], images[4:8])
        assert all(data.chunks is None and data.compression is None for data in file.values())
        assert file["source_ids"].asstr()[1] == "über/5.png"
        assert file.attrs["storage"] == b"pixels" and file.attrs["split"] == b"train"


def test_rows_outside_are_refused(pixels):
    packed = PackedImages(pixels[0], "train")
    for row in (-1, 10):
        with pytest.raises(IndexError):
            packed.pixels([row])
        with pytest.raises(IndexError):
            packed.source_id(row)


def _first(packed: PackedImages) -> np.ndarray:
    return packed.pixels([0])


def test_it_goes_to_other_processes_open_or_not(pixels):
    folder, images = pixels
    packed = PackedImages(folder, "train")
    packed.pixels(range(10))
    assert len(pickle.dumps(packed)) < 5000  # no memory map went along
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
        assert np.array_equal(pool.submit(_first, packed).result()[0], images[0])
    assert np.array_equal(pickle.loads(pickle.dumps(packed)).pixels([3])[0], images[3])


def test_equal_digests_mean_equal_images(make):
    image = make.noise(0, 4, 6)
    assert pixel_digest(image) == pixel_digest(np.asfortranarray(image)) != pixel_digest(image.reshape(6, 4, 3))


def test_mistakes_are_named(pixels, tmp_path):
    folder, _ = pixels
    with pytest.raises(UserError, match=r"has no split 'test': choose one of train, val"):
        PackedImages(folder, "test")
    again = f"delete {folder} and run prepare_data again"
    with pytest.raises(UserError, match=rf"holds no images: raise prepare_data\.val_fraction, or add images, {again}$"):
        PackedImages(folder, "val")
    with pytest.raises(UserError, match=r"index\.json: missing or damaged"):
        PackedImages(tmp_path / "nowhere", "train")
    (folder / "train-00001.h5").write_bytes(b"torn")
    with pytest.raises(UserError, match=r"train-00001\.h5: damaged"):
        PackedImages(folder, "train")
    (folder / "train-00001.h5").unlink()
    with pytest.raises(UserError, match=r"train-00001\.h5: missing"):
        PackedImages(folder, "train")
    index = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps(index | {"schema": 99}))
    with pytest.raises(UserError, match=f"has schema 99, this version reads 1: {again}$"):
        read_index(folder)
    (folder / "index.json").write_text("torn")
    with pytest.raises(UserError, match=rf"index\.json: missing or damaged: {again}$"):
        read_index(folder)


def test_a_shard_of_another_length_is_refused(pixels):
    folder, _ = pixels
    (folder / "train-00000.h5").write_bytes((folder / "train-00002.h5").read_bytes())
    with pytest.raises(UserError, match=f"holds 2 images instead of 4: delete {folder} and run prepare_data again$"):
        PackedImages(folder, "train")
