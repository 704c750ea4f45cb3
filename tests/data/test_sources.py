"""Oracle: sources synthesised in the official formats, whose labels and pixels are known."""

from __future__ import annotations

import gzip
import io
import os
import shutil
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

from crt.data.arrays import open_arrays
from crt.data.decode import decode
from crt.data.imagenet import open_imagenet
from crt.data.lmdb import open_lmdb_files
from crt.data.packed import PackedImages, read_index
from crt.data.parquet import open_parquet
from crt.data.synsets import imagenet_names
from crt.data.webdataset import open_webdataset
from crt.interrupt import Stopped
from tests.data.test_lmdb import write as write_lmdb
from tests.data.test_parquet import write_file
from tests.data.test_webdataset import write_shard

# In the devkit's own order, which is not that of published models; the last is an inner node of the hierarchy.
DEVKIT_WNIDS = ["n02119789", "n01440764", "n02100735", "n00001740"]
VAL_NUMBERS = [2, 1, 1, 3, 2]  # the ground truth: the devkit's class number of each validation image
CLASSES = sorted(DEVKIT_WNIDS[:3])


def train_image(make, wnid: str, number: int) -> bytes:
    return make.encode(make.noise(1000 * DEVKIT_WNIDS.index(wnid) + number, 30, 26), "JPEG")


def val_image(make, number: int) -> bytes:
    return make.encode(make.noise(9000 + number, 28, 40), "JPEG")


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def extract_all(tar: tarfile.TarFile, folder: Path) -> None:
    tar.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))  # from Python 3.11.4


def meta_mat() -> bytes:
    fields = ["ILSVRC2012_ID", "WNID", "words", "gloss", "num_children", "children", "wordnet_height"]
    synsets = np.zeros((4, 1), [(name, "O") for name in [*fields, "num_train_images"]])
    for row, wnid in enumerate(DEVKIT_WNIDS):
        leaf = row < 3
        children = np.zeros(0) if leaf else np.array([1.0, 2.0, 3.0])
        synsets[row, 0] = (row + 1.0, wnid, f"name {row}", "gloss", float(len(children)), children, 0.0, 3.0)
    buffer = io.BytesIO()
    savemat(buffer, {"synsets": synsets})
    return buffer.getvalue()


def official(folder: Path, make) -> Path:
    """ILSVRC2012's three archives in small."""
    folder.mkdir()
    with tarfile.open(folder / "ILSVRC2012_img_train.tar", "w") as outer:
        for wnid in DEVKIT_WNIDS[:3]:
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as tar:
                for number in range(4):
                    add(tar, f"{wnid}_{number}.JPEG", train_image(make, wnid, number))
            add(outer, f"{wnid}.tar", inner.getvalue())
    with tarfile.open(folder / "ILSVRC2012_img_val.tar", "w") as tar:
        for number in (3, 1, 5, 2, 4):  # not in order
            add(tar, f"ILSVRC2012_val_{number:08d}.JPEG", val_image(make, number))
    with tarfile.open(folder / "ILSVRC2012_devkit_t12.tar.gz", "w:gz") as tar:
        truth = "".join(f"{number}\n" for number in VAL_NUMBERS).encode()
        add(tar, "ILSVRC2012_devkit_t12/readme.txt", b"...")
        add(tar, "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt", truth)
        add(tar, "ILSVRC2012_devkit_t12/data/meta.mat", meta_mat())
    return folder


def extracted(folder: Path, make, flat_val: bool) -> Path:
    """The same images as trees of files."""
    for wnid in DEVKIT_WNIDS[:3]:
        for number in range(4):
            make.write(folder / "train" / wnid / f"{wnid}_{number}.JPEG", train_image(make, wnid, number))
    for number in range(1, 6):
        wnid = "" if flat_val else DEVKIT_WNIDS[VAL_NUMBERS[number - 1] - 1]
        make.write(folder / "val" / wnid / f"ILSVRC2012_val_{number:08d}.JPEG", val_image(make, number))
    return folder


def check_imagenet(out: Path, make) -> None:
    assert [entry["id"] for entry in read_index(out)["classes"]] == CLASSES
    train, val = PackedImages(out, "train"), PackedImages(out, "val")
    assert train.class_names == [imagenet_names()[wnid] for wnid in CLASSES]
    assert len(train) == 12 and len(val) == 5
    for row in range(12):
        wnid = CLASSES[train.labels[row]]
        assert train.source_id(row) == f"train/{wnid}/{wnid}_{row % 4}.JPEG"
        assert train.encoded(row) == train_image(make, wnid, row % 4)
    for row in range(5):
        number = int(val.source_id(row)[-10:-5])
        assert CLASSES[val.labels[row]] == DEVKIT_WNIDS[VAL_NUMBERS[number - 1] - 1]
        assert val.encoded(row) == val_image(make, number)


IMAGENET = {"source": "imagenet", "storage": "encoded", "image_size": None}


@pytest.mark.parametrize("kind", ["parquet", "webdataset", "arrays", "lmdb"])
def test_places_tell_when_their_file_was_changed(tmp_path, kind):
    path = tmp_path / "file"
    if kind == "parquet":
        source = open_parquet(touched(write_file(path, {"image": [b"x", b"y"]})), tmp_path)
    elif kind == "webdataset":
        source = open_webdataset(touched(write_shard(path, {"0.jpg": b"x", "1.jpg": b"y"})))
    elif kind == "arrays":
        np.savez(path.with_suffix(".npz"), images=np.zeros((2, 8, 8, 3), np.uint8))
        source = open_arrays(touched(path.with_suffix(".npz")), tmp_path)
    else:
        source = open_lmdb_files(touched(write_lmdb(path.with_suffix(".lmdb"), {b"0": b"x", b"1": b"y"})))
    assert source.splits["all"].places["modified"].tolist() == [123_456_789] * 2


def test_places_in_imagenets_archives_tell_so_too(make, tmp_path):
    folder = official(tmp_path / "imagenet", make)
    for name in ("train", "val"):
        touched(folder / f"ILSVRC2012_img_{name}.tar")
    for split, places in ((split, listing.places) for split, listing in open_imagenet(folder).splits.items()):
        assert set(places["modified"].tolist()) == {123_456_789}, split


def touched(path: Path) -> Path:
    os.utime(path, ns=(0, 123_456_789))
    return path


def test_imagenet_as_downloaded(prepare, make, tmp_path):
    status, out = prepare(path=official(tmp_path / "imagenet", make), **IMAGENET)
    assert status == 0
    check_imagenet(out, make)


def test_clutter_in_imagenets_archives_is_skipped(prepare, make, tmp_path):
    folder = official(tmp_path / "imagenet", make)
    clutter = ["._n02119789_0.JPEG", "__MACOSX/n02119789_0.JPEG", "./.hidden/x.JPEG"]
    with tarfile.open(folder / "ILSVRC2012_img_train.tar", "w") as outer:
        add(outer, "._n01440764.tar", b"clutter")
        for wnid in DEVKIT_WNIDS[:3]:
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as tar:
                for name in clutter:
                    add(tar, name, b"clutter")
                for number in range(4):
                    add(tar, f"./{wnid}_{number}.JPEG", train_image(make, wnid, number))
            add(outer, f"./{wnid}.tar", inner.getvalue())
    with tarfile.open(folder / "ILSVRC2012_img_val.tar", "a") as tar:
        for name in ("._ILSVRC2012_val_00000001.JPEG", "__MACOSX/ILSVRC2012_val_00000001.JPEG"):
            add(tar, name, b"clutter")
    status, out = prepare(path=folder, max_rejected_fraction=0.0, **IMAGENET)
    assert status == 0
    check_imagenet(out, make)


def test_a_path_may_begin_at_home(prepare, make, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    make.class_folders(tmp_path / "images", {"a": 5, "b": 5})
    status, out = prepare(path="~/images")
    assert status == 0 and PackedImages(out, "train").class_names == ["a", "b"]


def test_the_source_proposed_for_archives_is_one_that_reads_them(refused, make, tmp_path):
    folder = official(tmp_path / "imagenet", make)
    assert "or set prepare_data.source to imagenet" in (message := refused(path=folder))
    assert "webdataset" not in message
    make.write(tmp_path / "unpacked" / "train" / "n01440764.tar", b"tar")
    message = refused(path=tmp_path / "unpacked")
    assert message.endswith("or unpack each class archive (nXXXXXXXX.tar) into a folder of its name")


@pytest.mark.parametrize(("classes", "told"), [("ab", "1 class has"), ("a", "2 classes have")])
def test_classes_without_validation_images_are_counted(prepare, make, tmp_path, capfd, classes, told):
    root = make.class_folders(tmp_path / "images" / "train", dict.fromkeys("abc", 2)).parent
    make.class_folders(root / "val", dict.fromkeys(classes, 2), first_seed=50)
    assert prepare(path=root)[0] == 0
    assert f"images: {told} no validation images: " in capfd.readouterr().err


@pytest.mark.parametrize("flat_val", [True, False])
def test_imagenet_extracted_is_packed_to_the_same_images(prepare, make, tmp_path, flat_val):
    folder = official(tmp_path / "imagenet", make)
    _, from_archives = prepare(path=folder, out=tmp_path / "archives", **IMAGENET)
    (folder / "ILSVRC2012_img_train.tar").unlink()
    (folder / "ILSVRC2012_img_val.tar").unlink()
    if not flat_val:
        (folder / "ILSVRC2012_devkit_t12.tar.gz").unlink()
    status, out = prepare(path=extracted(folder, make, flat_val), out=tmp_path / "trees", **IMAGENET)
    assert status == 0
    check_imagenet(out, make)
    for split in ("train", "val"):
        first, second = PackedImages(from_archives, split), PackedImages(out, split)
        assert np.array_equal(first.digests(), second.digests()) and np.array_equal(first.labels, second.labels)


def test_the_devkit_may_be_extracted(prepare, make, tmp_path):
    folder = official(tmp_path / "imagenet", make)
    with tarfile.open(folder / "ILSVRC2012_devkit_t12.tar.gz") as tar:
        extract_all(tar, folder)
    (folder / "ILSVRC2012_devkit_t12.tar.gz").unlink()
    status, out = prepare(path=folder, **IMAGENET)
    assert status == 0
    check_imagenet(out, make)


KAGGLE_LINES = [
    f"ILSVRC2012_val_{number:08d},{DEVKIT_WNIDS[VAL_NUMBERS[number - 1] - 1]} 85 1 499 272 {DEVKIT_WNIDS[0]} 1 2 3 4 "
    for number in (4, 1, 5, 3, 2)  # not in order
]


def kaggle(root: Path, make, lines: list[str] = KAGGLE_LINES) -> Path:
    """Kaggle's download in small, extracted."""
    folder = extracted(root / "ILSVRC" / "Data" / "CLS-LOC", make, flat_val=True)
    make.write(folder / "test" / "ILSVRC2012_test_00000001.JPEG", val_image(make, 77))
    (root / "LOC_val_solution.csv").write_text("\n".join(["ImageId,PredictionString", *lines, ""]))
    return root


@pytest.mark.parametrize("below", ["", "ILSVRC/Data/CLS-LOC"])
def test_imagenet_from_kaggle(prepare, make, tmp_path, below):
    status, out = prepare(path=kaggle(tmp_path / "kaggle", make) / below, **IMAGENET)
    assert status == 0
    check_imagenet(out, make)


def test_validation_folders_that_are_no_classes_are_refused_as_such(refused, make, tmp_path):
    """As of Tiny ImageNet, which another source reads."""
    folder = official(tmp_path / "imagenet", make)
    make.write(folder / "val" / "images" / "val_0.JPEG", val_image(make, 0))
    (folder / "ILSVRC2012_img_val.tar").unlink()
    message = refused(path=folder, **IMAGENET)
    assert "val: folder images is not a class of this source" in message
    assert message.endswith("remove it, or set prepare_data.source to imagefolder")


def test_kaggles_labels_may_lie_beside_the_images_or_be_damaged(prepare, refused, make, tmp_path):
    root = kaggle(tmp_path / "kaggle", make)
    folder = (root / "ILSVRC/Data/CLS-LOC").rename(tmp_path / "imagenet")
    assert "or by Kaggle's LOC_val_solution.csv" in refused(path=folder, **IMAGENET)
    labels = (root / "LOC_val_solution.csv").rename(folder / "LOC_val_solution.csv")
    labels.write_text(labels.read_text(), encoding="utf-8-sig")  # as a spreadsheet saves it
    assert prepare(path=folder, out=tmp_path / "beside", **IMAGENET)[0] == 0
    text = labels.read_text()
    for damaged in ("", text[:40], text.replace(" ", ""), text.replace("ImageId", "Id"), text.replace("_0000", "_x")):
        labels.write_text(damaged)
        assert "LOC_val_solution.csv" in refused(path=folder, **IMAGENET), damaged
    labels.write_text(text.replace(KAGGLE_LINES[1] + "\n", ""))
    message = refused(path=folder, **IMAGENET)
    assert "val/ILSVRC2012_val_00000001.JPEG is not a validation image that" in message and str(labels) in message


def test_imagenet_from_the_hub_is_labelled_by_names(prepare, refused, make, tmp_path):
    folder = tmp_path / "imagenet"
    for wnid in DEVKIT_WNIDS[:3]:
        for number in range(4):
            make.write(folder / "train" / f"{wnid}_{number}_{wnid}.JPEG", train_image(make, wnid, number))
    for number in range(1, 6):
        wnid = DEVKIT_WNIDS[VAL_NUMBERS[number - 1] - 1]
        make.write(folder / "val" / f"ILSVRC2012_val_{number:08d}_{wnid}.JPEG", val_image(make, number))
    status, out = prepare(path=folder, out=tmp_path / "hub", **IMAGENET)
    assert status == 0
    train, val = PackedImages(out, "train"), PackedImages(out, "val")
    assert [entry["id"] for entry in read_index(out)["classes"]] == CLASSES and len(train) == 12 and len(val) == 5
    for images in (train, val):
        assert all(CLASSES[images.labels[row]] in images.source_id(row) for row in range(len(images)))
    for path in (folder / "train").glob("n02119789*"):
        path.unlink()
    told = "class n02119789 has validation images, but no training images"
    assert told in refused(path=folder, **IMAGENET)
    make.write(folder / "train" / "mine.JPEG", val_image(make, 9))
    assert "train/mine.JPEG lies in no class folder, and its name has no WordNet id" in refused(path=folder, **IMAGENET)


@pytest.mark.parametrize("name", ["ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12.tar.gz"])
def test_imagenet_says_which_file_is_missing(refused, make, tmp_path, name):
    folder = official(tmp_path / "imagenet", make)
    (folder / name).unlink()
    assert name in refused(path=folder, **IMAGENET)


@pytest.mark.parametrize("name", ["ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12.tar.gz"])
def test_imagenet_archives_cut_short_are_refused(refused, make, tmp_path, name):
    path = official(tmp_path / "imagenet", make) / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])
    assert name in refused(path=path.parent, **IMAGENET)


@pytest.mark.parametrize("name", ["ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"])
def test_imagenet_archives_that_were_compressed_are_refused(refused, make, tmp_path, name):
    path = official(tmp_path / "imagenet", make) / name
    path.write_bytes(gzip.compress(path.read_bytes()))
    assert f"{name}: compressed, or no tar: put it there as it was downloaded" in refused(path=path.parent, **IMAGENET)


@pytest.mark.parametrize(
    ("split", "told"), [("train", "imagenet/train: holds no images: put"), ("val", "imagenet: holds no validation")]
)
def test_folders_of_imagenet_without_images_are_refused(refused, make, tmp_path, split, told):
    folder = extracted(tmp_path / "imagenet", make, flat_val=False)
    shutil.rmtree(folder / split)
    (folder / split).mkdir()
    assert told in refused(path=folder, **IMAGENET)


def test_a_class_archive_without_images_is_refused(refused, make, tmp_path):
    folder, nothing = official(tmp_path / "imagenet", make), io.BytesIO()
    tarfile.open(fileobj=nothing, mode="w").close()
    with tarfile.open(folder / "ILSVRC2012_img_train.tar", "a") as outer:
        add(outer, "n02129165.tar", nothing.getvalue())
    assert "img_train.tar: n02129165.tar holds no images: fetch the archive again" in refused(path=folder, **IMAGENET)


def test_a_part_of_the_validation_images_is_noted(prepare, make, tmp_path, capfd):
    folder = official(tmp_path / "imagenet", make)
    assert prepare(path=folder, out=tmp_path / "whole", **IMAGENET)[0] == 0
    assert "validation images" not in capfd.readouterr().err
    with tarfile.open(folder / "ILSVRC2012_img_val.tar", "w") as tar:
        for number in (1, 2, 4):  # one of each class
            add(tar, f"ILSVRC2012_val_{number:08d}.JPEG", val_image(make, number))
    assert prepare(path=folder, out=tmp_path / "part", **IMAGENET)[0] == 0
    assert "img_val.tar: has 3 of the 5 validation images" in capfd.readouterr().err


def test_a_folder_that_is_no_synset_is_refused_for_imagenet(refused, make, tmp_path):
    folder = extracted(tmp_path / "imagenet", make, flat_val=False)
    make.write(folder / "train" / "cats" / "1.JPEG", val_image(make, 1))
    assert "folder cats is not a class of this source" in refused(path=folder, **IMAGENET)
    with tarfile.open(folder / "ILSVRC2012_img_train.tar", "w") as outer:
        inner = io.BytesIO()
        with tarfile.open(fileobj=inner, mode="w") as tar:
            add(tar, "1.JPEG", val_image(make, 1))
        add(outer, "cats.tar", inner.getvalue())
    assert "img_train.tar: folder cats is not a class of this source" in refused(path=folder, **IMAGENET)
    with tarfile.open(folder / "ILSVRC2012_img_train.tar", "w") as outer:
        add(outer, "readme.txt", b"no classes")
    assert "img_train.tar: holds no class archives (nXXXXXXXX.tar)" in refused(path=folder, **IMAGENET)


def test_a_validation_class_without_training_images_is_refused(refused, make, tmp_path):
    folder = extracted(tmp_path / "imagenet", make, flat_val=False)
    shutil.rmtree(folder / "train" / "n02119789")
    assert "class n02119789 has validation images, but no training images" in refused(path=folder, **IMAGENET)


def test_a_path_that_is_no_folder_is_refused_for_imagenet(refused, make, tmp_path):
    assert "not found" in refused(path=tmp_path / "gone", **IMAGENET)
    assert "is not a folder" in refused(path=make.write(tmp_path / "file.tar", b"x"), **IMAGENET)


def test_a_damaged_devkit_is_refused(refused, make, tmp_path):
    folder = official(tmp_path / "imagenet", make)
    for truth in (b"1\n5\n", b"1\nx\n"):
        path = make.write(folder / "data" / "ILSVRC2012_validation_ground_truth.txt", truth)
        told = "names a class that data/meta.mat lacks: fetch the devkit again"
        assert told in refused(path=folder, **IMAGENET)
    path.unlink()
    make.write(folder / "ILSVRC2012_devkit_t12" / "data" / "meta.mat", b"MATLAB 5.0 MAT-file, or so it says" * 9)
    assert "meta.mat of the devkit is damaged" in refused(path=folder, **IMAGENET)


def test_what_a_devkit_lacks_is_named(refused, make, tmp_path):
    folder = official(tmp_path / "imagenet", make)
    extracted, archive = folder / "ILSVRC2012_devkit_t12", folder / "ILSVRC2012_devkit_t12.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        add(tar, "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt", b"1\n")
    assert f"{archive}: holds no data/meta.mat: fetch it again" in refused(path=folder, **IMAGENET)
    archive.unlink()
    assert f"{archive}: not found: the validation images are labelled by it" in refused(path=folder, **IMAGENET)
    make.write(extracted / "data" / "ILSVRC2012_validation_ground_truth.txt", b"1\n")
    assert f"{extracted}/data/meta.mat: not found: the validation images" in refused(path=folder, **IMAGENET)


def test_the_reading_of_imagenets_archive_heeds_a_signal(make, tmp_path, monkeypatch):
    folder = official(tmp_path / "imagenet", make)
    (folder / "ILSVRC2012_img_val.tar").unlink()  # which comes after it
    monkeypatch.setattr("crt.interrupt._received", [15])
    with pytest.raises(Stopped):
        open_imagenet(folder)


def cifar_records(seed: int, count: int) -> tuple[np.ndarray, np.ndarray, bytes]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 10, count, np.uint8)
    pixels = rng.integers(0, 256, (count, 32, 32, 3), np.uint8)
    records = np.concatenate([labels[:, None], pixels.transpose(0, 3, 1, 2).reshape(count, -1)], axis=1)
    return labels, pixels, records.tobytes()


def cifar_binary(path: Path, prefix: str = "cifar-10-batches-bin/") -> dict[str, tuple[np.ndarray, np.ndarray]]:
    batches = {}
    with tarfile.open(path, "w:gz") as tar:
        for seed, name in enumerate([*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]):
            labels, pixels, data = cifar_records(seed, 12)
            add(tar, f"{prefix}{name}.bin", data)
            batches[name] = labels, pixels
        add(tar, f"{prefix}batches.meta.txt", b"airplane\nautomobile\n")
    return batches


@pytest.mark.parametrize("as_folder", [False, True])
@pytest.mark.parametrize("storage", ["pixels", "encoded"])
def test_cifar10_in_its_binary_version(prepare, tmp_path, as_folder, storage):
    path = tmp_path / "cifar-10-binary.tar.gz"
    batches = cifar_binary(path)
    if as_folder:
        with tarfile.open(path) as tar:
            extract_all(tar, tmp_path / "folder")
        path = tmp_path / "folder"
    status, out = prepare(source="cifar10", path=path, storage=storage, image_size=32)
    assert status == 0
    for split, count in (("train", 60), ("val", 12)):
        packed = PackedImages(out, split)
        assert len(packed) == count and packed.class_names[3] == "cat"
        for row in range(count):
            batch, _, place = packed.source_id(row).partition("/")
            labels, pixels = batches[batch]
            assert (batch == "test_batch") == (split == "val")
            assert packed.labels[row] == labels[int(place)]
            assert np.array_equal(packed.image(row), pixels[int(place)])


def test_cifar10_refuses_pickles_and_torn_batches(refused, make, tmp_path):
    make.write(tmp_path / "python" / "cifar-10-batches-py" / "data_batch_1", b"\x80\x02}q\x00.")
    assert "pickles" in refused(source="cifar10", path=tmp_path / "python", image_size=32)
    cifar_binary(tmp_path / "x.tar.gz")
    with tarfile.open(tmp_path / "x.tar.gz") as tar:
        extract_all(tar, tmp_path / "binary")
    batch = tmp_path / "binary" / "cifar-10-batches-bin" / "data_batch_4.bin"
    batch.write_bytes(batch.read_bytes()[:-5])
    assert "no whole number of records" in refused(source="cifar10", path=tmp_path / "binary", image_size=32)
    batch.unlink()
    assert "data_batch_4.bin is missing" in refused(source="cifar10", path=tmp_path / "binary", image_size=32)


def test_cifar10_refuses_other_classes(refused, make, tmp_path):
    make.class_folders(tmp_path / "images", {"cat": 3, "cow": 3})
    assert "folder cow is not a class" in refused(source="cifar10", path=tmp_path / "images")


def test_cifar10_without_a_network_says_what_to_do(refused, monkeypatch):
    for name in ("http_proxy", "https_proxy"):  # nothing listens there, so no connection succeeds
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    message = refused(source="cifar10", path=None, image_size=32)
    assert "cifar10 cannot be fetched" in message and "set prepare_data.path" in message


def test_the_real_cifar10_archive(prepare, cifar10_archive):
    status, out = prepare(source="cifar10", path=cifar10_archive, image_size=32, max_images_per_class=20)
    assert status == 0
    train, val = PackedImages(out, "train"), PackedImages(out, "val")
    assert np.bincount(train.labels).tolist() == [20] * 10 == np.bincount(val.labels).tolist()
    assert train.class_names == sorted(train.class_names) and train.class_names[0] == "airplane"
    assert train.source_id(21) == "train/automobile/0001.jpg"
    with tarfile.open(cifar10_archive) as tar:
        first = next(member for member in tar if member.name == train.source_id(0))
        content = tar.extractfile(first).read()
    assert np.array_equal(train.image(0), decode(content))


def test_the_real_imagenet_sample(prepare, imagenet_sample):
    status, out = prepare(path=imagenet_sample, storage="encoded", image_size=64)
    assert status == 0
    train, val = PackedImages(out, "train"), PackedImages(out, "val")
    files = sorted(imagenet_sample.glob("n*/*"))
    assert len(train) + len(val) == len(files) and len(val) == round(0.2 * len(files))
    assert train.class_names[0] == "tench" and train.num_classes == len(files)
    assert all(min(train.image(row).shape[:2]) <= 64 for row in range(len(train)))
    # The file's own shape is kept, and the pixels are those of the file, shrunk.
    for row in range(0, len(train), 9):
        original = decode((imagenet_sample / train.source_id(row)).read_bytes())
        shrunk = train.image(row)
        assert abs(shrunk.shape[0] / shrunk.shape[1] - original.shape[0] / original.shape[1]) < 0.02
        assert np.abs(shrunk.mean((0, 1)) - original.mean((0, 1))).max() < 2


@pytest.mark.parametrize("kind", ["folder", "tar", "tar.gz", "zip", "wrapped zip"])
def test_class_folders_from_folders_and_archives_are_the_same(prepare, make, tmp_path, kind):
    root = make.class_folders(tmp_path / "images", {"a b": 4, "žluť": 5})
    make.write(root / "a b" / "deep" / "er" / "x.JPG", make.encode(make.noise(99), "JPEG"))
    _, expected = prepare(path=root, out=tmp_path / "expected")
    path = tmp_path / f"x.{kind}"
    files = sorted(file for file in root.rglob("*") if file.is_file())
    if kind == "folder":
        path = tmp_path / "links"
        path.mkdir()
        for folder in root.iterdir():
            (path / folder.name).symlink_to(folder)
    elif kind.endswith("zip"):
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for file in files:
                archive.write(file, ("my data/" if "wrapped" in kind else "") + str(file.relative_to(root)))
    else:
        with tarfile.open(path, "w:gz" if kind == "tar.gz" else "w") as tar:
            tar.add(root, ".")
    status, out = prepare(path=path, out=tmp_path / "found")
    assert status == 0
    for split in ("train", "val"):
        first, second = PackedImages(expected, split), PackedImages(out, split)
        assert first.class_names == second.class_names == ["a b", "žluť"]
        assert np.array_equal(first.digests(), second.digests()) and np.array_equal(first.labels, second.labels)
        ids = [second.source_id(row).removeprefix("my data/") for row in range(len(second))]
        assert ids == [first.source_id(row) for row in range(len(first))]


@pytest.mark.parametrize(
    ("train", "val"),
    [
        *(("train", val) for val in ("val", "valid", "validation", "test")),
        *(("training", "testing"), ("Train", "Test"), ("TRAIN", "val"), ("Training", "Validation")),
    ],
)
def test_train_and_val_folders_are_the_splits(prepare, make, tmp_path, capfd, train, val):
    make.class_folders(tmp_path / "images" / train, {"a": 3, "b": 4})
    make.class_folders(tmp_path / "images" / val, {"a": 2, "b": 1}, first_seed=50)
    status, out = prepare(path=tmp_path / "images")
    assert status == 0
    assert np.bincount(PackedImages(out, "train").labels).tolist() == [3, 4]
    assert np.bincount(PackedImages(out, "val").labels).tolist() == [2, 1]
    assert PackedImages(out, "val").source_id(0) == f"{val}/a/000.png"
    assert f"training images are those of {train}/, validation images those of {val}/" in capfd.readouterr().err


def test_val_is_preferred_to_test_and_train_alone_is_split(prepare, make, tmp_path, capfd):
    root = make.class_folders(tmp_path / "images" / "train", {"a": 5, "b": 5}).parent
    status, out = prepare(path=root, out=tmp_path / "one")
    assert status == 0 and len(PackedImages(out, "train")) == 8 and len(PackedImages(out, "val")) == 2
    make.class_folders(root / "test", {"a": 1, "b": 1}, first_seed=50)
    make.class_folders(root / "val", {"a": 2, "b": 2}, first_seed=60)
    status, out = prepare(path=root, out=tmp_path / "two")
    assert status == 0 and len(PackedImages(out, "train")) == 10 and len(PackedImages(out, "val")) == 4
    assert "validation images those of val/; test unused\n" in capfd.readouterr().err


def test_a_folder_around_the_splits_is_entered(prepare, make, tmp_path):
    root = tmp_path / "around"
    make.class_folders(root / "images" / "train", {"a": 5, "b": 5})
    status, out = prepare(path=root, out=tmp_path / "one")
    assert status == 0 and PackedImages(out, "train").class_names == ["a", "b"]
    make.class_folders(root / "images" / "test", {"a": 2, "b": 1}, first_seed=50)
    status, out = prepare(path=root, out=tmp_path / "two")
    assert status == 0 and len(PackedImages(out, "train")) == 10 and len(PackedImages(out, "val")) == 3


def test_split_folders_of_two_spellings_are_refused(refused, make, tmp_path):
    make.class_folders(tmp_path / "images" / "train", {"a": 3})
    make.class_folders(tmp_path / "images" / "Training", {"a": 3}, first_seed=10)
    make.class_folders(tmp_path / "images" / "Test", {"a": 3}, first_seed=20)
    assert "folder Training beside train/ and Test/: neither split nor class" in refused(path=tmp_path / "images")


@pytest.mark.parametrize("kind", ["folder", "zip"])
@pytest.mark.parametrize("inside", ["", "train/"])
def test_folders_around_folders_are_entered(prepare, make, tmp_path, capfd, inside, kind):
    root = tmp_path / "around"
    make.class_folders(root, {f"archive/pets/{inside}cat": 2, f"archive/pets/{inside}dog": 2})
    path = Path(shutil.make_archive(str(root), "zip", root)) if kind == "zip" else root
    status, out = prepare(path=path, val_fraction=0.5)
    assert status == 0 and PackedImages(out, "train").class_names == ["cat", "dog"]
    assert "class folders are those in archive/pets/" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("folders", "note"),
    [
        (["only/deep/er"], None),
        (["only", "only/cat", "only/dog"], "folders cat, dog: set prepare_data.path to its folder only if"),
        (
            ["only/pets/cat", "only/pets/dog", "only/pets/empty"],
            "folders cat, dog: set prepare_data.path to its folder",
        ),
        (["train/pets/cat", "train/pets/dog"], "one class pets, which holds folders cat, dog"),
        ([f"train/pets/{n}" for n in range(4)], "folders 0, 1, 2, ...: set prepare_data.path to its folder train/pets"),
    ],
)
def test_one_class_whose_images_lie_in_several_folders_is_noted(prepare, make, tmp_path, capfd, folders, note):
    root = tmp_path / "images"
    for number, folder in enumerate(folders):
        make.class_folders(root, {folder: 0 if "empty" in folder else 4}, first_seed=10 * number)
        (root / folder).mkdir(exist_ok=True)
    status, out = prepare(path=root, val_fraction=0.5)
    assert status == 0 and len(PackedImages(out, "train").class_names) == 1
    told = capfd.readouterr().err
    assert note in told if note else "which holds" not in told


@pytest.mark.parametrize("kind", ["folder", "zip"])
@pytest.mark.parametrize("splits", [[""], ["train/", "val/"], ["train/"]])
def test_images_without_class_folders_are_one_class(prepare, make, tmp_path, capfd, splits, kind):
    root = tmp_path / "photos"
    for number, split in enumerate(splits):
        make.class_folders(root, {split: 4}, first_seed=10 * number)
    path = Path(shutil.make_archive(str(root), "zip", root)) if kind == "zip" else root
    status, out = prepare(path=path, val_fraction=0.5)
    assert status == 0
    assert "no class folders: its images are one class" in capfd.readouterr().err
    train, val = PackedImages(out, "train"), PackedImages(out, "val")
    assert (len(train), len(val)) == ((4, 4) if "val/" in splits else (2, 2))
    assert train.num_classes == val.num_classes == 1
    assert {train.source_id(row) for row in range(len(train))} <= {f"{s}{n:03d}.png" for s in splits for n in range(4)}
    assert not train.labels.any()


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_tiny_imagenet_as_downloaded(prepare, make, tmp_path, kind):
    root = tmp_path / "tiny-imagenet-200"
    make.class_folders(root / "train", {"n01443537/images": 3, "n01629819/images": 2})
    make.write(root / "train" / "n01443537" / "n01443537_boxes.txt", b"000.png\t0\t0\t1\t1\n")
    make.class_folders(root / "val", {"images": 3}, first_seed=50)
    make.class_folders(root / "test", {"images": 2}, first_seed=60)
    lines = b"000.png\tn01629819\t0\t32\t44\t62\n001.png\tn01443537\t52\t55\t57\t59\n002.png\tn01629819\t4\t0\t60\t55\n"
    make.write(root / "val" / "val_annotations.txt", lines + b"\n")
    path = Path(shutil.make_archive(str(root), "zip", tmp_path, root.name)) if kind == "zip" else root
    status, out = prepare(path=path)
    assert status == 0
    train, val = PackedImages(out, "train"), PackedImages(out, "val")
    assert train.class_names == ["goldfish", "European fire salamander"]
    assert np.bincount(train.labels).tolist() == [3, 2]
    names = [val.source_id(row).removeprefix("tiny-imagenet-200/") for row in range(3)]
    assert names == [f"val/images/{name}.png" for name in ("001", "000", "002")]
    assert val.labels.tolist() == [0, 1, 1]


def test_tiny_imagenets_annotations_must_be_whole(refused, make, tmp_path):
    root = make.class_folders(tmp_path / "tiny" / "train", {"a/images": 2, "b/images": 2}).parent
    make.class_folders(root / "val", {"images": 2}, first_seed=50)
    annotations = make.write(root / "val" / "val_annotations.txt", b"000.png\ta\t0\t0\t1\t1\n")
    assert "val_annotations.txt gives val/images/001.png no class" in refused(path=root)
    annotations.write_bytes(b"000.png\ta\t0\n001.png\n")
    assert "val_annotations.txt: line 2 gives no class" in refused(path=root)


def test_validation_images_that_were_sorted_need_no_annotations(prepare, make, tmp_path):
    root = make.class_folders(tmp_path / "tiny" / "train", {"a": 2, "b": 2}).parent
    make.class_folders(root / "val", {"a": 1, "b": 2}, first_seed=50)
    make.write(root / "val" / "val_annotations.txt", b"val_0.JPEG\ta\t0\t0\t1\t1\n")
    status, out = prepare(path=root)
    assert status == 0 and PackedImages(out, "val").labels.tolist() == [0, 1, 1]


@pytest.mark.parametrize("names", [["exam", "test", "training"], ["testing", "validation"], ["Train", "bus"]])
def test_folders_named_like_splits_are_classes_beside_others(prepare, make, tmp_path, names):
    status, out = prepare(path=make.class_folders(tmp_path / "images", dict.fromkeys(names, 3)))
    assert status == 0 and PackedImages(out, "train").class_names == sorted(names)


def test_validation_images_outside_the_classes_of_training_are_refused(refused, make, tmp_path):
    root = make.class_folders(tmp_path / "pets" / "train", {"cat": 2, "dog": 2}).parent
    make.class_folders(root, {"test": 2}, first_seed=50)
    message = refused(path=root)
    assert "test/ holds images without class folders: give it class folders, or remove it" in message
    assert "validation images are then set aside from train/" in message
    make.class_folders(root, {"test/cat": 2}, first_seed=60)
    assert "image test/000.png lies outside the class folders" in refused(path=root)


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_class_folders_beside_folders_of_other_files_are_entered(prepare, refused, make, tmp_path, capfd, kind):
    """As of Food-101, CUB-200-2011, DTD, Stanford's dogs and Caltech-101."""
    root = tmp_path / "food"
    make.class_folders(root / "images", {"pizza": 3, "soup": 3})
    make.write(root / "meta" / "train.txt", b"pizza/000\n")
    path = Path(shutil.make_archive(str(root), "zip", root)) if kind == "zip" else root
    status, out = prepare(path=path)
    assert status == 0 and PackedImages(out, "train").class_names == ["pizza", "soup"]
    told = "class folders are those in images/; folders without images beside it are ignored: meta"
    assert told in capfd.readouterr().err
    if kind == "folder":
        make.class_folders(root / "photos", {"pizza": 2}, first_seed=50)
        shutil.rmtree(tmp_path / "out")
        assert refused(path=root).endswith("): add some, or move the folder away")  # two may hold them


@pytest.mark.parametrize("file", ["x.jxl", "x.tar.gz", None])
@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_class_folders_one_level_deeper_are_pointed_at(refused, make, tmp_path, kind, file):
    """Where the folder beside may be a class whose images are missing."""
    root = tmp_path / "food"
    make.class_folders(root / "images", {"pizza": 2, "soup": 2})
    (root / "meta").mkdir()
    if file is not None:
        make.write(root / "meta" / file, b"x")
    path = Path(shutil.make_archive(str(root), "zip", root)) if kind == "zip" else root
    error = refused(path=path)
    assert "class folder meta holds no images" in error
    assert ("unpack it and set" if kind == "zip" else "or set") + " prepare_data.path to its folder images" in error


def test_an_empty_class_folder_in_a_folder_around_them_is_refused(refused, make, tmp_path):
    make.class_folders(tmp_path / "around", {"pets/cat": 2, "pets/dog": 2})
    (tmp_path / "around" / "pets" / "owl").mkdir()
    assert "class folder pets/owl holds no images" in refused(path=tmp_path / "around")


def test_images_beside_splits_in_a_folder_around_them_are_refused(refused, make, tmp_path):
    make.class_folders(tmp_path / "around", {f"all/{folder}/a": 2 for folder in ("train", "val", "more")})
    told = "folder all/more beside train/ and val/: neither split nor class: move it"
    assert told in refused(path=tmp_path / "around")


def test_folders_beside_train_and_test_in_upper_case_are_refused(refused, make, tmp_path):
    """As Kaggle has the traffic signs of GTSRB."""
    make.class_folders(tmp_path / "signs", {"Train/0": 2, "Train/1": 2, "Test": 2, "Meta": 2})
    told = "folder Meta beside Train/ and Test/: neither split nor class: move it"
    assert told in refused(path=tmp_path / "signs")


def test_a_class_may_be_called_train(prepare, make, tmp_path):
    status, out = prepare(path=make.class_folders(tmp_path / "images", {"bus": 3, "train": 3}))
    assert status == 0 and PackedImages(out, "train").class_names == ["bus", "train"]


@pytest.mark.parametrize("kind", ["folder", "zip"])
@pytest.mark.parametrize(
    "folders",
    [
        *(["train/x", "dev/x"], ["train/x", "train/y", "Eval/x"], ["train2017/x", "val2018/y"]),
        *(["training_set/x", "dev_set/x"], ["trainset/x", "test/x"], ["2019/x", "2019/y", "2020/x", "2020/y"]),
        ["wrapper/mine/x", "wrapper/mine/y", "wrapper/eval/x", "wrapper/eval/z"],
    ],
)
def test_splits_under_other_names_are_no_classes(refused, make, tmp_path, folders, kind):
    root = tmp_path / "images"
    for number, folder in enumerate(folders):
        make.class_folders(root, {folder: 2}, first_seed=10 * number)
    path = Path(shutil.make_archive(str(root), "zip", root)) if kind == "zip" else root
    names = ", ".join(sorted({folder.removeprefix("wrapper/").partition("/")[0] for folder in folders}))
    message = refused(path=path)
    assert f"folders {names} look like splits" in message and "name them train and val; or, if they are" in message
    unpack, first = "unpack it and " if kind == "zip" else "", min(folders).rpartition("/")[0]
    if "look like splits, since" in message:
        assert message.endswith(
            f"if they are versions of one set, {unpack}set prepare_data.path to one, such as {first}"
        )


@pytest.mark.parametrize(
    ("folders", "note"),
    [
        (
            ["animals/x", "animals/y", "vehicles/x", "vehicles/z"],
            "the classes are the 2 upper folders animals, vehicles, whose images lie in folders x, y, z: to have",
        ),
        (["train/a/x", "train/a/y", "train/b/x", "train/b/y"], "the classes are the 2 upper folders a, b"),
        (["a/images/x", "a/images/y", "b/images/x"], "the classes are the 2 upper folders a, b, whose images lie in"),
        (["valley/x", "testudo/y"], "the classes are the 2 upper folders testudo, valley"),
        (["a/images", "b/images"], None),
        (["animals/x", "vehicles"], None),
        (["animals", "val2017"], None),
        (["animals/images", "val2017/images"], None),
        (["val2017", "test2017"], "the classes are test2017, val2017: if those are splits, name them train and val"),
    ],
)
def test_classes_whose_images_lie_deeper_are_noted(prepare, make, tmp_path, capfd, folders, note):
    root = tmp_path / "images"
    for number, folder in enumerate(folders):
        make.class_folders(root, {folder: 6}, first_seed=10 * number)
    status, out = prepare(path=root)
    told = capfd.readouterr().err
    assert status == 0 and PackedImages(out, "train").num_classes == 2
    assert note in told if note else "the classes are" not in told


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_folders_without_images_beside_splits_are_ignored(prepare, make, tmp_path, capfd, kind):
    root = make.class_folders(tmp_path / "images" / "train", {"a": 3, "b": 3}).parent
    make.class_folders(root / "val", {"a": 1, "b": 1}, first_seed=50)
    make.write(root / "annotations" / "x.xml", b"<x/>")
    make.write(root / "labels" / "deep" / "x.txt", b"0")
    path = Path(shutil.make_archive(str(root), "zip", root)) if kind == "zip" else root
    status, out = prepare(path=path)
    assert status == 0 and (len(PackedImages(out, "train")), len(PackedImages(out, "val"))) == (6, 2)
    told = "folders without images beside train, val are ignored: annotations, labels"
    assert told in capfd.readouterr().err


def test_an_image_of_strange_name_is_told_of_in_one_line(refused, make, tmp_path):
    lines = ["\ufeffImageId,PredictionString", *KAGGLE_LINES, ""]
    folder = kaggle(tmp_path / "kaggle", make)
    (folder / "LOC_val_solution.csv").write_text("\n".join(lines), encoding="utf-8")  # as a spreadsheet saves it
    make.write(folder / "ILSVRC" / "Data" / "CLS-LOC" / "val" / "a\nb.JPEG", val_image(make, 90))
    assert "val/a\\nb.JPEG is not a validation image that" in refused(path=folder, **IMAGENET)
