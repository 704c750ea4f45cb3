"""Oracle: torchvision's own readers of SVHN and STL-10, and files written by the published layouts."""

from __future__ import annotations

import gzip
import struct
from contextlib import suppress

import h5py
import numpy as np
import pytest
from scipy.io import savemat
from torchvision.datasets import STL10, SVHN

from crt.data.array_files import reading
from crt.data.arrays import open_arrays
from crt.data.matlab import matlab_arrays
from crt.data.packed import PackedImages
from crt.errors import UserError
from tests.data.test_arrays import ARRAYS, check, idx, pixels

OF_TORCHVISION = {"_check_integrity": lambda self: True}  # which wants the real files' checksums


def write_svhn(folder, made, *, is_hdf5=False):
    """X (32, 32, 3, n) and y (n, 1), 10 for the digit 0; HDF5 has MATLAB's axes in reverse, and numbers as floats."""
    folder.mkdir(exist_ok=True)
    for split, (images, labels) in made.items():
        values = {"X": images.transpose(1, 2, 3, 0), "y": np.where(labels == 0, 10, labels)[:, None]}
        path = folder / f"{split}_32x32.mat"
        if is_hdf5:
            with h5py.File(path, "w", userblock_size=512) as file:
                for name, value in values.items():
                    file[name] = value.T if name == "X" else value.T.astype(float)
                file["#refs#/images"] = [1]
            with open(path, "r+b") as start:
                start.write(b"MATLAB 7.3 MAT-file")
        else:
            savemat(path, values, do_compression=True)
    return folder


@pytest.mark.parametrize("is_hdf5", [False, True])
def test_svhn(prepare, tmp_path, is_hdf5):
    made = {split: (pixels(seed, 11, 32, 32, 3), np.arange(11) % 10) for seed, split in enumerate(("train", "test"))}
    folder = write_svhn(tmp_path / "svhn", made, is_hdf5=is_hdf5)
    status, out = prepare(path=folder, source="arrays", image_size=32)
    assert status == 0
    assert PackedImages(out, "train").class_names == [str(digit) for digit in range(10)]
    for split, part in (("train", "train"), ("test", "val")):
        images, labels = made[split]
        if not is_hdf5:
            theirs = type("Svhn", (SVHN,), OF_TORCHVISION)(folder, split)
            assert (
                np.array_equal(theirs.data.transpose(0, 2, 3, 1), images) and theirs.labels.tolist() == labels.tolist()
            )
        check(out, part, images, labels)


def test_svhns_extra_images_are_training_images(tmp_path):
    made = {
        split: (pixels(seed, 10 + seed, 32, 32, 3), np.arange(10 + seed) % 10)
        for seed, split in enumerate(("train", "test", "extra"))
    }
    source = open_arrays(write_svhn(tmp_path, made), tmp_path)
    assert {split: len(found) for split, found in source.splits.items()} == {"train": 22, "val": 11}
    assert any("images of extra_32x32.mat are training images too: move it away" in note for note in source.notes)


@pytest.mark.parametrize(
    "shape", [(6, 8, 8, 3), (8, 8, 3, 6), (6, 8, 8), (8, 8, 6), (7, 8, 6), (8, 8, 1, 6), (8, 8, 8)]
)
@pytest.mark.parametrize("kind", [np.uint8, float])
def test_the_axis_of_images_in_mat_files(tmp_path, shape, kind):
    images = pixels(1, *shape)
    savemat(tmp_path / "faces.mat", {"images": images.astype(kind)})
    source = open_arrays(tmp_path / "faces.mat", tmp_path)
    with open(source.containers[0].path, "rb") as file:
        copied = np.frombuffer(file.read(), np.uint8).reshape(len(source.splits["all"]), *source.containers[0].shape, 3)
    expected = images if shape[0] == 6 else np.moveaxis(images, -1, 0)
    assert np.array_equal(
        copied, np.broadcast_to(expected if expected.ndim == 4 else expected[..., None], copied.shape)
    )


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (np.arange(5.0)[None], ["0", "1", "2", "3", "4"]),
        (np.arange(5.0) - 3, ["-3", "-2", "-1", "0", "1"]),
        (np.arange(5.0)[:, None] * 1000, ["0", "1000", "2000", "3000", "4000"]),
    ],
)
def test_labels_in_mat_files(tmp_path, labels, classes):
    savemat(tmp_path / "faces.mat", {"images": pixels(1, 8, 8, 3, 5), "labels": labels})
    assert open_arrays(tmp_path, tmp_path).class_ids == classes


@pytest.mark.parametrize(
    ("values", "told"),
    [
        (
            {"X": np.array([pixels(1, 8, 8), "a"], object)},
            "a.mat: X is no array of numbers, as alone are",
        ),
        ({"X": {"a": pixels(1, 8, 8)}}, "a.mat: X is no array of numbers"),
        ({"X": np.random.default_rng(0).random((8, 8, 3, 5))}, "X: is float64 (5, 8, 8, 3): images are uint8"),
        ({"X": pixels(1, 784, 5)}, "X: is uint8 (784, 5): images are uint8"),
        ({"faces": pixels(1, 8, 8, 3, 5)}, "holds the arrays faces: call that of images images"),
    ],
)
def test_other_contents_of_mat_files_are_refused(refused, tmp_path, values, told):
    savemat(tmp_path / "a.mat", values)
    assert told in refused(path=tmp_path, **ARRAYS)


def test_damaged_mat_files_are_refused(refused, make, tmp_path):
    savemat(tmp_path / "a.mat", {"X": pixels(1, 8, 8, 3, 5)}, do_compression=True)
    clean = (tmp_path / "a.mat").read_bytes()
    for damaged in (clean[:132], clean[:-100], clean[:300] + b"\0\1\2\3" + clean[304:], clean[:-1] + b"\0"):
        make.write(tmp_path / "a.mat", damaged)
        message = refused(path=tmp_path, **ARRAYS)
        assert "a.mat" in message and ": damaged" in message
    for other in (b"", b"text" * 99, clean[:127]):
        make.write(tmp_path / "a.mat", other)
        assert "a.mat: is no .mat file of version 5 or later: save it with -v7" in refused(path=tmp_path, **ARRAYS)


@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize("dtype", ["u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f4", "f8"])
def test_numbers_in_mat_files(tmp_path, dtype, compressed):
    """Oracle: SciPy's writer. Small contents and names lie in the place of their length."""
    values = {name: (np.arange(size) * 7).astype(dtype).reshape(-1, 1) for name, size in (("a", 1), ("longer", 9))}
    values |= {"empty": np.zeros((0, 3), dtype), "deep": (np.arange(24) * 5).astype(dtype).reshape(2, 3, 4)}
    savemat(tmp_path / "a.mat", values, do_compression=compressed)
    found = {name: read() for name, read in matlab_arrays(tmp_path / "a.mat")}
    assert found.keys() == values.keys()
    for name, value in values.items():
        assert np.array_equal(found[name], value) and found[name].dtype == value.dtype


def test_shapes_of_other_sizes_and_what_matlab_keeps_for_itself(tmp_path):
    savemat(tmp_path / "a.mat", {"X": pixels(1, 8, 8, 3, 5), "o": np.arange(3.0)})
    clean = (tmp_path / "a.mat").read_bytes()
    shape, name = struct.pack("<4i", 8, 8, 3, 5), b"\1\0\1\0o\0\0\0"
    assert clean.count(shape) == clean.count(name) == 1
    (tmp_path / "a.mat").write_bytes(clean.replace(name, struct.pack("<2I", 1, 0)))
    assert [found for found, _ in matlab_arrays(tmp_path / "a.mat")] == ["X"]
    for other in (4, 6):
        (tmp_path / "a.mat").write_bytes(clean.replace(shape, struct.pack("<4i", 8, 8, 3, other)))
        with pytest.raises(UserError, match="damaged"):
            open_arrays(tmp_path / "a.mat", tmp_path)


def test_random_damage_to_mat_files_is_told(tmp_path):
    draw = np.random.default_rng(0)
    for compressed in (True, False):
        savemat(tmp_path / "a.mat", {"X": pixels(1, 4, 4, 3, 5), "s": {"a": 1}}, do_compression=compressed)
        clean = (tmp_path / "a.mat").read_bytes()
        for _ in range(300):
            damaged = bytearray(clean)
            damaged[draw.integers(len(clean))] = draw.integers(256)
            (tmp_path / "a.mat").write_bytes(damaged[: draw.integers(len(clean)) if draw.random() < 0.1 else None])
            with suppress(UserError), reading("a.mat"):
                for _, read in matlab_arrays(tmp_path / "a.mat"):
                    read()


@pytest.mark.parametrize("is_named", [True, False])
def test_stl10(prepare, make, tmp_path, capfd, is_named):
    """Labels count from 1, channels are stored column by column; images without labels are left out."""
    names = ["airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck"]
    folder = tmp_path / "stl10_binary"
    counts = {"train": 30, "test": 20, "unlabeled": 2}
    for seed, (split, count) in enumerate(counts.items()):
        make.write(folder / f"{split}_X.bin", pixels(seed, count, 3, 96, 96).tobytes())
        if split != "unlabeled":
            make.write(folder / f"{split}_y.bin", (np.arange(count) % 10 + 1).astype(np.uint8).tobytes())
    make.write(folder / "fold_indices.txt", b"0 1 2\n")
    make.write(folder / "class_names.txt", "\n".join(names).encode())
    made = {split: type("Stl10", (STL10,), OF_TORCHVISION)(tmp_path, split) for split in ("train", "test")}
    if not is_named:
        (folder / "class_names.txt").unlink()
        names = [str(number) for number in range(1, 11)]
    status, out = prepare(path=folder, source="arrays", image_size=96)
    assert status == 0
    told = "unlabeled_X.bin is not used: to have it, set prepare_data.path to a folder of it alone"
    assert told in capfd.readouterr().err
    assert PackedImages(out, "train").class_names == names
    for split, part in (("train", "train"), ("test", "val")):
        check(out, part, made[split].data.transpose(0, 2, 3, 1), [names[label] for label in made[split].labels])


def test_images_without_labels_alone_are_one_class(make, tmp_path):
    make.write(tmp_path / "unlabeled_X.bin", pixels(1, 4, 3, 96, 96).tobytes())
    source = open_arrays(tmp_path, tmp_path)
    assert source.class_ids == ["images"] and len(source.splits["all"]) == 4


def test_cifar100(prepare, make, tmp_path):
    """A record is a coarse label, a fine label and 3,072 bytes of pixels, channel by channel, row by row."""
    names = [f"kind_{number:02d}" for number in range(100)]
    made = {}
    for seed, (split, count) in enumerate({"train": 120, "test": 100}.items()):
        images, fine = pixels(seed, count, 32, 32, 3), np.arange(count) % 100
        records = np.concatenate(
            [fine[:, None] // 5, fine[:, None], images.transpose(0, 3, 1, 2).reshape(count, -1)],
            axis=1,
            dtype=np.uint8,
            casting="unsafe",
        )
        make.write(tmp_path / "cifar-100-binary" / f"{split}.bin", records.tobytes())
        made[split] = images, [names[label] for label in fine]
    make.write(tmp_path / "cifar-100-binary" / "fine_label_names.txt", "\n".join([*names, ""]).encode())
    make.write(tmp_path / "cifar-100-binary" / "coarse_label_names.txt", b"fish\n")
    status, out = prepare(path=tmp_path / "cifar-100-binary", source="arrays", image_size=32)
    assert status == 0
    check(out, "train", *made["train"])
    check(out, "val", *made["test"])


def test_binary_files_that_are_not_right_are_refused(refused, make, tmp_path):
    make.write(tmp_path / "train.bin", b"\0" * 3074)
    assert "holds no files" in refused(path=tmp_path, **ARRAYS)  # any data may be called so
    make.write(tmp_path / "fine_label_names.txt", b"")
    assert "train.bin/images: damaged" in refused(path=tmp_path, **ARRAYS)
    make.write(tmp_path / "fine_label_names.txt", b"apple")
    for damaged in (b"\0" * 3073, b"\0\1" + b"\0" * 3072, b""):
        make.write(tmp_path / "train.bin", damaged)
        assert "train.bin/images: damaged" in refused(path=tmp_path, **ARRAYS)
    for labels, images in ((b"\0", 3 * 96 * 96), (b"", 3 * 96 * 96), (b"\1", 3 * 96 * 95)):
        make.write(tmp_path / "b" / "train_y.bin", labels)
        make.write(tmp_path / "b" / "train_X.bin", b"\1" * images)
        assert "train_X.bin: damaged" in refused(path=tmp_path / "b", **ARRAYS)


@pytest.mark.parametrize(("prefix", "is_transposed"), [("emnist-letters-", True), ("", False)])
def test_emnists_images_stand_upright(prepare, make, tmp_path, prefix, is_transposed):
    """As its authors say, and unlike MNIST's, they are stored column by column."""
    images, labels = pixels(1, 40, 8, 8), np.arange(40, dtype=np.uint8) % 10
    for kind, values in (("images-idx3", images), ("labels-idx1", labels)):
        make.write(tmp_path / f"{prefix}train-{kind}-ubyte.gz", gzip.compress(idx(values)))
    status, out = prepare(path=tmp_path, **ARRAYS)
    assert status == 0
    part = PackedImages(out, "train")
    expected = images.transpose(0, 2, 1) if is_transposed else images
    for row in range(len(part)):
        assert np.array_equal(part.image(row)[..., 0], expected[int(part.source_id(row)[-6:])])
