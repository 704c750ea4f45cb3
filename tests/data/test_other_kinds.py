"""Oracle: the files of published data sets by their names."""

from __future__ import annotations

import shutil

import pytest

KINDS = [
    ("train-images-idx3-ubyte.gz", "set prepare_data.source to arrays"),
    ("pathmnist.npz", "set prepare_data.source to arrays"),
    ("data_batch_1", "set prepare_data.source to cifar10"),
    ("train_32x32.mat", "set prepare_data.source to arrays to read arrays of images in .npz, .npy, HDF5, .mat and idx"),
    (
        "stl10_binary/train_X.bin",
        "set prepare_data.source to arrays to read the binary versions of CIFAR-100 and STL-10",
    ),
    ("train.rec", "write the images as files into a folder for each class, or get the data set as Parquet files"),
    ("cifar-100-python/file.txt~", "get CIFAR-100's binary version, unpack it and set prepare_data.source to arrays"),
    ("mnist-train.tfrecord-00000-of-00001", "set prepare_data.source to tfrecord"),
    ("train-00000-of-01024", "set prepare_data.source to tfrecord to read TFRecord files"),
    ("bedroom_train_lmdb/data.mdb", "set prepare_data.source to lmdb"),
    ("train/data-00000-of-00001.arrow", "set prepare_data.source to arrow to read images inside these files"),
    *(
        (f"a/{name}", "unpack it, from all its parts")
        for name in ("x.rar", "x.7z", "x.tar.zst", "x.zip.001", "x.tar.ab")
    ),
    ("a/photo.jxl", "convert them to PNG or JPEG"),
]


@pytest.mark.parametrize(("name", "told"), KINDS)
def test_folders_of_other_kinds_of_files_are_told_what_to_do(refused, make, tmp_path, name, told):
    make.write(tmp_path / "data" / name, b"data")
    for source in ("imagefolder", "webdataset"):
        assert refused(path=tmp_path / "data", source=source).count(f", or {told}") == 1
    assert f"no folder or archive of image files: {told}" in refused(path=tmp_path / "data" / name)


def test_cifar100_and_archives_in_folders(refused, make, tmp_path):
    make.write(tmp_path / "a" / "fine_label_names.txt", b"apple")
    make.write(tmp_path / "a" / "train.bin", b"data")
    told = "set prepare_data.source to arrays to read the binary versions of CIFAR-100"
    assert told in refused(path=tmp_path / "a", source="cifar10")
    make.write(tmp_path / "b" / "faces.zip", b"data")
    assert "set prepare_data.path to the archive itself, such as faces.zip, or unpack it" in refused(
        path=tmp_path / "b"
    )


def test_archives_in_an_archive_are_to_be_unpacked(refused, make, tmp_path):
    """Caltech-101 is one of these."""
    for name in ("101_ObjectCategories.tar.gz", "Annotations.tar", "show_annotation.m"):
        make.write(tmp_path / "x" / "caltech" / name, b"data")
    archive = shutil.make_archive(str(tmp_path / "caltech"), "zip", tmp_path / "x")
    told = "set prepare_data.path to the archive itself, such as caltech/101_ObjectCategories.tar.gz, or unpack it"
    assert refused(path=archive).endswith(f"or unpack it and {told}")
    assert refused(path=tmp_path / "x").endswith(f"or {told}")
    shutil.rmtree(tmp_path / "x")
    make.write(tmp_path / "x" / "train.rec", b"data")
    archive = shutil.make_archive(str(tmp_path / "svhn"), "zip", tmp_path / "x")
    assert "or write the images as files into a folder for each class" in refused(path=archive)


@pytest.mark.parametrize("name", ["labels.xml", "labels.xlsx"])
def test_lists_of_labels_in_other_formats_are_told_what_to_become(refused, make, tmp_path, name):
    told = "labels are read from .csv, .tsv, .jsonl, .json, .txt, .lst, .mat files alone: write it as one, with the"
    assert told in refused(path=make.write(tmp_path / name, b"labels"))


def test_pictures_that_are_not_read_among_others_are_noted(prepare, make, tmp_path, capfd):
    root = make.class_folders(tmp_path / "images", {"a": 4, "b": 4})
    make.write(root / "a" / "x.JXL", b"jxl")
    assert prepare(path=root)[0] == 0
    assert "are ignored: 1 .jxl; convert .jxl to PNG or JPEG to have them read" in capfd.readouterr().err
