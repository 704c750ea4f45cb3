"""Oracle: pixels and labels as they were put into files of the published formats."""

from __future__ import annotations

import gzip
import shutil
import struct

import h5py
import numpy as np
import pytest

from crt.data.arrays import open_arrays
from crt.data.packed import PackedImages
from crt.interrupt import Stopped

ARRAYS = {"source": "arrays", "image_size": 8}


def pixels(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def idx(values: np.ndarray) -> bytes:
    return struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape) + values.tobytes()


def check(out, split: str, images: np.ndarray, labels) -> None:
    part = PackedImages(out, split)
    rows = np.array([int(part.source_id(row)[-6:]) for row in range(len(part))])
    assert sorted(rows) == list(range(len(images)))
    rgb = images if images.ndim == 4 else np.repeat(images[..., None], 3, axis=-1)
    for row, origin in enumerate(rows):
        assert np.array_equal(part.image(row), rgb[origin])
        assert part.class_names[part.labels[row]] == str(labels[origin])


@pytest.mark.parametrize("packed", [True, False])
def test_mnist(prepare, make, tmp_path, packed):
    made = {}
    for number, (name, count) in enumerate({"train": 24, "t10k": 11}.items()):
        images, labels = made[name] = pixels(number, count, 8, 8), np.arange(count, dtype=np.uint8) % 11
        for kind, values in (("images-idx3", images), ("labels-idx1", labels)):
            path = tmp_path / "MNIST" / "raw" / f"{name}-{kind}-ubyte"
            if packed or name == "train":  # torchvision leaves both
                make.write(path.with_name(f"{path.name}.gz"), gzip.compress(idx(values)))
            if not packed:
                make.write(path, idx(values))
    status, out = prepare(path=tmp_path / "MNIST", **ARRAYS)
    assert status == 0 and PackedImages(out, "train").class_names == [str(number) for number in range(11)]
    check(out, "train", *made["train"])
    check(out, "val", *made["t10k"])


KAGGLE_FORMS = ["{}.idx{}-ubyte", "{}-idx{}-ubyte/{}-idx{}-ubyte"]


@pytest.mark.parametrize("forms", [KAGGLE_FORMS, KAGGLE_FORMS[:1], KAGGLE_FORMS[1:]])
def test_mnist_as_kaggle_has_it(prepare, make, tmp_path, forms):
    made = {
        name: (pixels(seed, 11, 8, 8), np.arange(11, dtype=np.uint8)) for seed, name in enumerate(("train", "t10k"))
    }
    for name, arrays in made.items():
        for kind, values in zip((("images", 3), ("labels", 1)), arrays, strict=True):
            for form in forms:
                make.write(tmp_path / "mnist" / form.format(*(f"{name}-{kind[0]}", kind[1]) * 2), idx(values))
    status, out = prepare(path=tmp_path / "mnist", **ARRAYS)
    assert status == 0
    check(out, "train", *made["train"])
    check(out, "val", *made["t10k"])


@pytest.mark.parametrize("width", [8, 4])
def test_imagenets_downsampled_versions(prepare, tmp_path, width):
    """As published: a row of 3 x side x side values for each image, channel by channel, and labels from 1."""
    made = {
        name: (pixels(seed, 11, width, width, 3), np.arange(11) % 5 + 1)
        for seed, name in enumerate(("train_data_batch_1", "train_data_batch_2", "val_data"))
    }
    for name, (images, labels) in made.items():
        rows = images.transpose(0, 3, 1, 2).reshape(11, -1)
        np.savez(tmp_path / f"{name}.npz", data=rows, labels=labels, mean=rows.mean(0))
    status, out = prepare(path=tmp_path, source="arrays", image_size=width)
    assert status == 0 and len(PackedImages(out, "train")) == 22
    check(out, "val", *made["val_data"])
    part = PackedImages(out, "train")
    for row in range(22):
        name, _, origin = part.source_id(row).replace(".npz/data", "").partition("/")
        assert np.array_equal(part.image(row), made[name][0][int(origin)])


@pytest.mark.parametrize("saved", [np.savez, np.savez_compressed])
def test_kmnist(prepare, tmp_path, saved):
    made = {name: (pixels(seed, 11, 8, 8), np.arange(11)) for seed, name in enumerate(("train", "test"))}
    for name, arrays in made.items():
        for kind, values in zip(("imgs", "labels"), arrays, strict=True):
            saved(tmp_path / f"kmnist-{name}-{kind}.npz", values)
    status, out = prepare(path=tmp_path, **ARRAYS)
    assert status == 0
    check(out, "train", *made["train"])
    check(out, "val", *made["test"])


def test_a_file_called_labels_may_hold_both(tmp_path):
    np.savez(tmp_path / "with_labels.npz", RGB, np.array(list("baaba")))
    assert open_arrays(tmp_path, tmp_path).class_ids == ["a", "b"]


@pytest.mark.parametrize(("beside", "told"), [({}, True), ({"labels": np.arange(5)}, False)])
def test_arrays_that_may_be_labels_are_told_of_where_images_have_none(tmp_path, beside, told):
    """As of Galaxy10, where they are called ans."""
    with h5py.File(tmp_path / "galaxies.h5", "w") as file:
        for name, values in {"images": RGB, "ans": np.arange(5), **beside}.items():
            file[name] = values
    note = "arrays galaxies.h5/ans are not read: if one holds the labels, call it labels or y or arr_1"
    assert any(note in line for line in open_arrays(tmp_path, tmp_path).notes) == told


@pytest.mark.parametrize("names", [("{}_images", "{}_labels"), ("x_{}", "y_{}")])
@pytest.mark.parametrize("held_out", ["val", "test"])
def test_splits_in_an_npz_file(prepare, tmp_path, names, held_out):
    train, val = pixels(1, 30, 8, 8, 3), pixels(2, 10, 8, 8, 3)
    labels = np.arange(30, dtype=np.uint8) % 5
    values = {"train": (train, labels[:, None]), held_out: (val, labels[:10, None])}
    values |= {"test": (pixels(3, 4, 8, 8, 3), labels[:4, None])} if held_out == "val" else {}
    stored = {
        name.format(split): array for split, pair in values.items() for name, array in zip(names, pair, strict=True)
    }
    np.savez(tmp_path / "pathmnist.npz", **stored)
    status, out = prepare(path=tmp_path / "pathmnist.npz", **ARRAYS)
    assert status == 0
    check(out, "train", train, labels)
    check(out, "val", val, labels)


@pytest.mark.parametrize("labelled", [True, False])
def test_adms_files(prepare, tmp_path, labelled):
    images = pixels(1, 20, 8, 8, 3)
    np.savez(tmp_path / "a.npz", images, *([np.arange(20) % 2] if labelled else []), mu=np.zeros(3))
    status, out = prepare(path=tmp_path, **ARRAYS)
    assert status == 0
    assert PackedImages(out, "train").class_names == (["0", "1"] if labelled else ["images"])
    assert len(PackedImages(out, "train")) + len(PackedImages(out, "val")) == 20


@pytest.mark.parametrize("images", ["X", "Images", "DATA"])
def test_names_count_in_upper_case_too_but_not_inside_words(tmp_path, images):
    labels = "y" if images == "X" else "labels"
    np.savez(tmp_path / "faces.npz", **{images: RGB, labels: np.array(list("baaba")), "index": np.arange(5)})
    (tmp_path / "faces.npz").rename(tmp_path / "Faces.NPZ")
    (tmp_path / "work").mkdir()
    for path in (tmp_path, tmp_path / "Faces.NPZ"):
        source = open_arrays(path, tmp_path / "work")
        assert source.class_ids == ["a", "b"]
        assert source.splits["all"].labels.tolist() == [0, 0, 0, 1, 1]


def test_labels_may_be_bytes_of_text(tmp_path):
    np.savez(tmp_path / "a.npz", images=RGB, labels=np.char.encode(["b", "é", "é", "b", "é"], "utf-8"))
    source = open_arrays(tmp_path / "a.npz", tmp_path)
    assert source.class_ids == ["b", "é"] and source.splits["all"].labels.tolist() == [0, 0, 1, 1, 1]


def test_images_of_which_the_disk_cannot_hold_a_copy_are_refused_before_it_is_full(refused, make, tmp_path):
    """An HDF5 file of a few bytes may tell of terabytes."""
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("images", (10**9, 64, 64, 3), "u1", chunks=(1, 64, 64, 3))
    assert "a.h5/images: uint8 (1000000000, 64, 64, 3) takes 12.3 TB in " in refused(path=tmp_path, **ARRAYS)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("images", (10**9, 64, 64), "u1", chunks=(1, 64, 64))
    assert "takes 12.3 TB in " in refused(path=tmp_path, **ARRAYS)


def test_labels_are_no_images_whatever_else_their_name_says(tmp_path):
    np.savez(tmp_path / "a.npz", x_data=RGB, y_data=np.array(list("baaba")))
    source = open_arrays(tmp_path, tmp_path)
    assert source.class_ids == ["a", "b"]
    assert len(source.splits["all"]) == len(RGB)


def test_a_signal_ends_the_copying(tmp_path, monkeypatch):
    np.savez(tmp_path / "a.npz", images=RGB)
    monkeypatch.setattr("crt.interrupt._received", [15])
    with pytest.raises(Stopped):
        open_arrays(tmp_path / "a.npz", tmp_path)


def test_files_of_the_splits_are_one_data_set_in_upper_case_too(tmp_path):
    for name in ("Train.npz", "val.npz"):
        np.savez(tmp_path / name, images=RGB)
    assert {split: len(found) for split, found in open_arrays(tmp_path, tmp_path).splits.items()} == {
        "train": 5,
        "val": 5,
    }


@pytest.mark.parametrize(
    "names",
    [
        ("{}_images.npy", "{}_labels.npy"),
        ("x_{}.npy", "y_{}.npy"),
        ("{}/X.npy", "{}/Y.npy"),
        ("images/{}_images.npy", "labels/{}_labels.npy"),
        ("level_2_{}_x.h5 x", "level_2_{}_y.h5 y"),
        ("{}.h5 images", "{}.h5 labels"),
        ("all.hdf5 {}/images", "all.hdf5 {}/labels"),
        ("all.hdf5 images/{}", "all.hdf5 labels/{}"),
        ("data_{}.npz data", "data_{}.npz labels"),
    ],
)
def test_splits_and_labels_in_files_of_their_own(prepare, tmp_path, names):
    root, made = tmp_path / "arrays", {}
    for seed, (split, count) in enumerate({"train": 30, "test": 10}.items()):
        made[split] = pixels(seed, count, 8, 8, 3), np.arange(count) % 5
        for name, array in zip(names, made[split], strict=True):
            path, _, key = name.format(split).partition(" ")
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            if path.endswith(".npy"):
                np.save(root / path, array)
            elif path.endswith(".npz"):
                stored = dict(np.load(root / path)) if (root / path).exists() else {}
                np.savez(root / path, **stored, **{key: array})
            else:
                with h5py.File(root / path, "a") as file:
                    file[key] = array
    status, out = prepare(path=root, **ARRAYS)
    assert status == 0
    check(out, "train", *made["train"])
    check(out, "val", *made["test"])


@pytest.mark.parametrize("name", ["faces.npy", "faces.h5"])
@pytest.mark.parametrize("shape", [(40, 8, 8), (40, 8, 8, 1), (40, 3, 8, 8), (40, 1, 8, 8)])
def test_large_arrays_are_copied_in_parts(monkeypatch, tmp_path, name, shape):
    monkeypatch.setattr("crt.data.arrays._PART_BYTES", 1000)
    images = pixels(1, *shape)
    if name.endswith(".npy"):
        name = "images.npy"
        np.save(tmp_path / name, images)
    else:
        with h5py.File(tmp_path / name, "w") as file:
            file["images"] = images
    container = open_arrays(tmp_path / name, tmp_path).containers[0]
    with open(container.path, "rb") as file:
        copied = np.frombuffer(file.read(), np.uint8).reshape(40, 8, 8, 3)
    expected = images if images.ndim == 4 else images[..., None]
    expected = np.moveaxis(expected, 1, -1) if shape[1] != 8 else expected
    assert np.array_equal(copied, np.broadcast_to(expected, copied.shape))


@pytest.mark.parametrize(
    "labels", [[b"b", b"a", b"a", b"b", b"a"], ["b", "a", "a", "b", "a"], [[[1]], [[0]], [[0]], [[1]], [[0]]]]
)
def test_labels_in_hdf5(tmp_path, labels):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["images"], file["labels"], file["names/other"], file[b"na\xefve"] = RGB, labels, [1, 2], [3]
    source = open_arrays(tmp_path, tmp_path)
    assert source.class_ids == (["0", "1"] if isinstance(labels[0], list) else ["a", "b"])
    assert source.splits["all"].labels.tolist() == [0, 0, 0, 1, 1]


def test_hdf5_files_that_are_not_right_are_refused(refused, make, tmp_path):
    with h5py.File(tmp_path / "a.h5", "w", libver="latest") as file:
        file.create_dataset("images", data=pixels(1, 40, 8, 8, 3), chunks=(4, 8, 8, 3), fletcher32=True)
    clean = (tmp_path / "a.h5").read_bytes()
    place = clean.index(pixels(1, 40, 8, 8, 3)[20:24].tobytes())
    for damaged in (b"", b"text", clean[:500], clean[:-2000], clean[:place] + b"\0\1\2" + clean[place + 3 :]):
        make.write(tmp_path / "a.h5", damaged)
        assert "a.h5" in (message := refused(path=tmp_path, **ARRAYS)) and ": damaged" in message
    lzf, unknown = (struct.pack("<H", number) for number in (h5py.h5z.FILTER_LZF, 32004))
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("images", data=pixels(1, 40, 8, 8, 3) // 64, chunks=(4, 8, 8, 3), compression="lzf")
    make.write(tmp_path / "a.h5", (tmp_path / "a.h5").read_bytes().replace(lzf, unknown, 1))
    assert "a.h5/images: packed by a filter that is no part of HDF5" in refused(path=tmp_path, **ARRAYS)
    (tmp_path / "a.h5").unlink()
    np.save(tmp_path / "x.npy", pixels(1, 20, 8, 8))
    clean = (tmp_path / "x.npy").read_bytes()
    for damaged in (clean.replace(b"}", b" ", 1), clean[:-1], clean[:20], b""):
        make.write(tmp_path / "x.npy", damaged)
        assert "x.npy: damaged" in refused(path=tmp_path, **ARRAYS)
    make.write(tmp_path / "x.npy", clean)
    np.save(tmp_path / "names.npy", np.arange(20))
    assert "names.npy: holds the arrays names: call that" in refused(path=tmp_path, **ARRAYS)
    np.save(tmp_path / "names.npy", np.array([{}], object))
    assert "names.npy: holds the arrays names: call that" in refused(path=tmp_path, **ARRAYS)
    (tmp_path / "names.npy").rename(tmp_path / "y.npy")
    assert "x.npy: damaged, or holds Python objects" in refused(path=tmp_path, **ARRAYS)


RGB = np.zeros((5, 8, 8, 3), np.uint8)


@pytest.mark.parametrize(
    ("arrays", "told"),
    [
        ({"images": np.zeros((5, 8, 8, 8), np.uint8)}, "a.npz/images: is uint8 (5, 8, 8, 8): images are uint8 of (n, "),
        ({"data": np.zeros((5, 192), np.uint8)}, "a.npz/data: is uint8 (5, 192): images are"),
        ({"images": np.zeros((5, 8, 8, 4), np.uint8)}, "is uint8 (5, 8, 8, 4)"),
        ({"images": np.zeros((5, 8, 8, 3))}, "is float64 (5, 8, 8, 3)"),
        ({"images": np.zeros((0, 8, 8, 3), np.uint8)}, "is uint8 (0, 8, 8, 3)"),
        ({"images": RGB, "labels": np.zeros((5, 14), np.int64)}, "5 images, their labels are int64 (5, 14): they must"),
        ({"images": RGB, "labels": np.zeros((1, 5), np.int64)}, "5 images, their labels are int64 (1, 5)"),
        ({"images": RGB, "labels": np.zeros(5)}, "5 images, their labels are float64 (5)"),
        ({"images": RGB, "labels": np.zeros(4, np.int64)}, "5 images, their labels are int64 (4)"),
        (
            {"faces": RGB},
            "arrays faces: call that of images images, imgs, x, data, arr_0, that of labels labels, y, arr_1, or move",
        ),
        ({"imgs": RGB + (np.arange(5) % 2).astype(np.uint8)[:, None, None, None]}, "a.npz/imgs: holds zeros and ones"),
        ({"images": np.array([{}], object)}, "damaged, or holds Python objects, which are not read: get it again"),
    ],
)
def test_other_arrays_are_refused(refused, tmp_path, arrays, told):
    np.savez(tmp_path / "a.npz", **arrays)
    assert told in refused(path=tmp_path, **ARRAYS)


def test_files_that_are_not_right_are_refused(refused, make, tmp_path):
    np.savez(tmp_path / "a.npz", images=pixels(1, 20, 8, 8, 3))
    make.write(tmp_path / "cut" / "a.npz", (tmp_path / "a.npz").read_bytes()[:500])
    assert "cut/a.npz: damaged" in refused(path=tmp_path / "cut", **ARRAYS)
    np.savez(tmp_path / "b.npz", images=RGB)
    shutil.rmtree(tmp_path / "cut")
    assert "a.npz and b.npz look like two data sets" in refused(path=tmp_path, **ARRAYS)
    for folder in ("d/one", "d/two"):
        make.write(tmp_path / folder / "a.npz", (tmp_path / "a.npz").read_bytes())
    assert "one/a.npz and two/a.npz look like two data sets" in refused(path=tmp_path / "d", **ARRAYS)
    raw = tmp_path / "raw"
    path = make.write(raw / "train-images-idx3-ubyte", idx(pixels(1, 5, 8, 8)))
    assert "train-labels-idx1-ubyte: not found: put it beside the images" in refused(path=raw, **ARRAYS)
    assert "is neither a folder nor a file .npz, .npy, .h5, .hdf5" in refused(path=path, **ARRAYS)
    for damaged in (idx(np.arange(5, dtype=np.uint8))[:-1], b"\x1f\x8b", b""):
        make.write(raw / "train-labels-idx1-ubyte", damaged)
        assert "train-images-idx3-ubyte: damaged" in refused(path=raw, **ARRAYS)
    assert "gone: not found: set prepare_data.path" in refused(path=tmp_path / "gone", **ARRAYS)
    for name, other in (("x.txt", ""), ("data_batch_1.bin", ", or set prepare_data.source to cifar10 to read")):
        told = f"holds no files .npz, .npy, .h5, .hdf5, .mat or *-images-idx3-ubyte: give the folder that does{other}"
        assert told in refused(path=make.write(tmp_path / "c" / name, b"").parent, **ARRAYS)
    told = "a folder nor a file .npz, .npy, .h5, .hdf5, .mat: unpack it and set prepare_data.path to such a file"
    assert told in refused(path=make.write(tmp_path / "stl10_binary.tar.gz", b""), **ARRAYS)


PACKED = gzip.compress(idx(pixels(1, 50, 8, 8)))


@pytest.mark.parametrize(
    "damaged",
    [PACKED[:-20], b"text" + PACKED[4:], PACKED[:10] + b"\xff" + PACKED[11:]],
    ids=["cut", "text", "bytes"],
)
def test_damaged_gzip_files_are_refused(refused, make, tmp_path, damaged):
    make.write(tmp_path / "train-labels-idx1-ubyte.gz", gzip.compress(idx(np.zeros(50, np.uint8))))
    make.write(tmp_path / "train-images-idx3-ubyte.gz", damaged)
    assert "train-images-idx3-ubyte.gz: damaged" in refused(path=tmp_path, **ARRAYS)


def test_files_of_rows_of_pixels_are_a_class_each(prepare, make, tmp_path, capfd):
    """As QuickDraw has them."""
    made = {name: pixels(seed, 6, 64) for seed, name in enumerate(("cat", "sea turtle", "train"))}
    (tmp_path / "sketches").mkdir()
    for name, rows in made.items():
        np.save(tmp_path / "sketches" / f"{name}.npy", rows)
    status, out = prepare(path=tmp_path / "sketches", **ARRAYS)
    assert status == 0
    count = 0
    for part in (PackedImages(out, split) for split in ("train", "val")):
        assert part.class_names == list(made)
        for row in range(len(part)):
            name = part.class_names[part.labels[row]]
            image = made[name][int(part.source_id(row)[-6:])].reshape(8, 8, 1)
            assert np.array_equal(part.image(row), np.repeat(image, 3, axis=-1))
            count += 1
    assert count == 18
    assert "each file holds images of one class, which is called like it" in capfd.readouterr().err


def test_images_may_be_rows_of_pixels(prepare, make, tmp_path):
    made = pixels(0, 12, 64), np.arange(12) % 2
    np.savez(tmp_path / "mnist.npz", x_train=made[0], y_train=made[1], x_test=made[0][::-1] // 2, y_test=made[1])
    status, out = prepare(path=tmp_path / "mnist.npz", **ARRAYS)
    assert status == 0
    check(out, "train", made[0].reshape(12, 8, 8), made[1])


@pytest.mark.parametrize(
    "arrays",
    [
        *({"cat": (6, 64)}, {"cat": (6, 64), "dog": (6, 8, 8)}, {"cat": (6, 64), "y": (6, 64)}),
        *({"cat": (6, 63), "dog": (6, 63)}, {"cat": (6, 49), "dog": (6, 49)}, {"cat": (64,), "dog": (64,)}),
    ],
)
def test_other_arrays_without_a_name_are_no_classes(refused, make, tmp_path, arrays):
    (tmp_path / "x").mkdir()
    for name, shape in arrays.items():
        np.save(tmp_path / "x" / f"{name}.npy", pixels(0, *shape))
    assert "call that of images images, imgs, x, data, arr_0" in refused(path=tmp_path / "x", **ARRAYS)


def test_files_that_may_be_classes_are_told_when_they_are_damaged(refused, make, tmp_path):
    for name in ("cat", "dog"):
        make.write(tmp_path / "x" / f"{name}.npy", b"\x93NUMPY\x01\x00v\x00{'descr': '|u1',")
    assert "cat.npy: " in (told := refused(path=tmp_path / "x", **ARRAYS)) and "call that" not in told
