"""Oracle: the layouts in which FFHQ, StyleGAN's tool, Oxford's pets, COCO and others are published, in small."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from crt.data.packed import PackedImages


def images(make, root: Path, names: list[str]) -> Path:
    for seed, name in enumerate(names):
        make.write(root / name, make.encode(make.noise(seed)))
    return root


def files(make, root: Path, names: list[str]) -> Path:
    """The same, and text in those that are no .png files."""
    for name in names:
        if not name.endswith(".png"):
            make.write(root / name, b"text")
    return images(make, root, [name for name in names if name.endswith(".png")])


FFHQ = [f"{part:05d}/{part + number:05d}.png" for part in (0, 1000, 2000) for number in (0, 1, 999)]
STYLEGAN = [f"{part:05d}/img{1000 * part + number:08d}.png" for part in (0, 1) for number in (0, 1, 2, 3, 999)]
DANBOORU = [f"512px/{part:04d}/{number}{part:03d}.jpg" for part in (0, 1, 999) for number in (1, 23, 456)]
IMG2DATASET = [f"{part:05d}/{10000 * part + number:09d}.jpg" for part in (0, 1) for number in (0, 1, 2, 3, 9999)]


@pytest.mark.parametrize("names", [FFHQ, [f"images1024x1024/{name}" for name in FFHQ], STYLEGAN, IMG2DATASET, DANBOORU])
def test_numbered_parts_of_one_set_are_one_class(prepare, make, tmp_path, capfd, names):
    status, out = prepare(path=images(make, tmp_path / "faces", names))
    assert status == 0
    assert "they are parts of one set, not classes: all are one class" in capfd.readouterr().err
    splits = [PackedImages(out, split) for split in ("train", "val")]
    assert [images.num_classes for images in splits] == [1, 1]
    assert sum(map(len, splits)) == len(names)


def test_numbered_parts_of_splits_are_one_class_in_both(prepare, make, tmp_path):
    names = [f"train/{name}" for name in FFHQ] + [f"val/{name}" for name in FFHQ[:6]]
    status, out = prepare(path=images(make, tmp_path / "faces", names))
    assert status == 0
    assert [len(PackedImages(out, split)) for split in ("train", "val")] == [len(FFHQ), 6]
    assert PackedImages(out, "val").num_classes == 1


def test_folders_of_one_image_called_like_them_are_no_parts(prepare, make, tmp_path):
    status, out = prepare(path=images(make, tmp_path / "images", [f"{row:03d}/{row:03d}.png" for row in range(12)]))
    assert status == 0 and PackedImages(out, "train").num_classes == 12


@pytest.mark.parametrize("below", ["", "around/"])
@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_labels_of_stylegans_tool_are_pointed_at(refused, make, tmp_path, kind, below):
    root = images(make, tmp_path / "faces", [below + name for name in STYLEGAN])
    make.write(root / below / "dataset.json", b'{"labels": null}')
    path = Path(shutil.make_archive(str(root), "zip", root)) if kind == "zip" else root
    unpack = "unpack it and " if kind == "zip" else ""
    assert f"{unpack}set prepare_data.path to its {below}dataset.json to read labels" in refused(path=path)


@pytest.mark.parametrize(
    "names",
    [
        [f"{label:05d}/{number}.png" for label in range(3) for number in range(4)],
        [f"{label:05d}_class/{1000 * label + number:05d}.png" for label in range(3) for number in range(4)],
        [f"{label}/{1000 * label + number:05d}.png" for label in range(3) for number in range(4)],
        [f"{label:05d}/{4 * label + number:05d}.png" for label in range(3) for number in range(4)],
        [f"{label:05d}/x.{number}.d.png" for label in range(3) for number in range(4)],
        [f"{label:03d}/{camera}_{label:03d}.png" for label in range(3) for camera in range(4)],
        [f"{label:03d}/{camera}_{1000 + label}.png" for label in range(3) for camera in range(4)],
        [f"{label:03d}/{number}_{label:03d}7.png" for label in range(3) for number in range(4)],
    ],
)
def test_classes_called_by_numbers_are_classes(prepare, make, tmp_path, names):
    status, out = prepare(path=images(make, tmp_path / "images", names))
    assert status == 0 and PackedImages(out, "train").num_classes == 3


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (
            ["CelebA-HQ-img/0.png", "CelebAMask-HQ-mask-anno/0/00000_hair.png", "mapping.txt"],
            "move CelebAMask-HQ-mask-anno elsewhere, or set prepare_data.path to CelebA-HQ-img",
        ),
        (
            ["VOC/JPEGImages/a.png", "VOC/SegmentationClass/a.png", "VOC/Annotations/a.xml", "VOC/ImageSets/a.txt"],
            "move SegmentationClass elsewhere, or set prepare_data.path to VOC/JPEGImages",
        ),
        (
            ["images/a.png", "annotations/trimaps/a.png"],
            "move annotations elsewhere, or set prepare_data.path to images",
        ),
        (["x/Images/a.png", "x/masks/a.png"], "move masks elsewhere, or set prepare_data.path to x/Images"),
        (
            [f"VOC/2012/{name}/a.png" for name in ("JPEGImages", "SegmentationClass", "SegmentationObject")],
            "move SegmentationClass elsewhere, or set prepare_data.path to VOC/2012/JPEGImages",
        ),
        (
            ["VOC/2012/JPEGImages/a.png", "VOC/2012/SegmentationClass/a.png", "VOC/2012/Annotations/a.xml"],
            "move SegmentationClass elsewhere, or set prepare_data.path to VOC/2012/JPEGImages",
        ),
    ],
)
def test_pictures_beside_their_masks_are_no_classes(refused, make, tmp_path, names, told):
    assert told in refused(path=files(make, tmp_path / "pets", names))


@pytest.mark.parametrize("splits", [("train2017", "val2017"), ("cars_train", "cars_test")])
def test_splits_beside_a_folder_without_images_are_told_of_before_that_one(prepare, refused, make, tmp_path, splits):
    """Since under their right names it is no matter."""
    names = [f"{split}/{row}.png" for split in splits for row in range(3)]
    root = files(make, tmp_path / "images", [*names, "devkit/x.mat"])
    assert "look like splits: name them train and val" in refused(path=root)
    for name, split in zip(splits, ("train", "val"), strict=True):
        (root / name).rename(root / split)
    status, out = prepare(path=root)
    assert status == 0 and [len(PackedImages(out, split)) for split in ("train", "val")] == [3, 3]


def test_pictures_beside_a_folder_of_other_annotations_are_pointed_at(prepare, refused, make, tmp_path):
    pictures = [f"{split}/images/{row}.png" for split in ("train", "valid") for row in range(8)]
    root = files(make, tmp_path / "yolo", [*pictures, "train/labels/0.txt", "valid/labels/0.txt"])
    told = "or set prepare_data.path to its folder train/images, whose images are then one class"
    assert refused(path=root).endswith(told)
    status, out = prepare(path=root / "train" / "images")
    assert status == 0 and PackedImages(out, "train").num_classes == 1


def test_a_split_beside_folders_of_class_folders_is_noted(prepare, make, tmp_path, capfd):
    """As Places365 is unpacked, large."""
    names = [f"data_large/{name}/{row}.png" for name in ("a/airfield", "b/bar") for row in range(4)]
    root = images(make, tmp_path / "places", [*names, *(f"val_large/{row}.png" for row in range(4))])
    assert prepare(path=root)[0] == 0
    assert "class val_large may be a split, since other folders hold folders of images: if it is, move it away" in (
        capfd.readouterr().err
    )


def test_classes_may_be_called_images_and_masks_beside_others(prepare, make, tmp_path):
    names = [f"{folder}/{number}.png" for folder in ("images", "masks", "toys") for number in range(3)]
    status, out = prepare(path=images(make, tmp_path / "x", names))
    assert status == 0 and PackedImages(out, "train").class_names == ["images", "masks", "toys"]


@pytest.mark.parametrize(
    "folders",
    [
        *(["train2017", "val2017"], ["train", "test1"], ["cars_train", "cars_test"]),
        *(["trainA", "trainB", "testA", "testB"], ["Training/x", "Test/x", "test-multiple"]),
        ["seg_train/seg_train/x", "seg_test/seg_test/x", "seg_pred/seg_pred"],
    ],
)
def test_folders_called_like_splits_are_no_classes(refused, make, tmp_path, folders):
    root = images(make, tmp_path / "images", [f"{folder}/{number}.png" for folder in folders for number in range(3)])
    assert "look like splits: name them train and val; or, if they are the classes, give them" in refused(path=root)


@pytest.mark.parametrize(
    ("names", "file", "told"),
    [
        (
            ["jpg/0.png"],
            "labels.csv",
            "for labels.csv is not read: if labels are in there, set prepare_data.path to that",
        ),
        (["train/0.png", "test/0.png"], "Train.CSV", "for Train.CSV is not read: if labels are in there"),
        (["jpg/0.png"], "imagelabels.mat", "put images into a folder for each class, or write a .csv file with the"),
        (["0.png"], "meta/labels.tsv", "for meta/labels.tsv is not read: if labels are in there"),
        (["0.png"], "metadata.jsonl", "for metadata.jsonl is not read: if labels are in there"),
        (["0.png"], "dataset.json", "for dataset.json is not read: if labels are in there"),
        (["0.png"], "0.cls", "set prepare_data.source to webdataset to have their labels from the .tar files"),
    ],
)
def test_labels_that_are_not_read_are_noted(prepare, make, tmp_path, capfd, names, file, told):
    root = images(make, tmp_path / "x", [name.replace("0", str(number)) for name in names for number in range(8)])
    make.write(root / file, b"labels")
    assert prepare(path=root)[0] == 0
    assert told in capfd.readouterr().err


@pytest.mark.parametrize(("stem", "beside"), [("HAM10000_images_part_", True), ("images_00", False), ("v_00", None)])
def test_folders_called_like_parts_are_noted(prepare, make, tmp_path, capfd, stem, beside):
    root = make.class_folders(tmp_path / "x", {f"{stem}{number}": 4 for number in (1, 2)})
    if beside:
        make.write(root / "HAM10000_metadata.csv", b"image_id,dx\n")
    assert prepare(path=root)[0] == 0
    told = (
        f"the classes {stem}1, {stem}2 are called like parts of one set: if they are, put their images into one folder"
    )
    labels = ", or, if labels are in HAM10000_metadata.csv, set prepare_data.path to that file"
    error = capfd.readouterr().err
    assert (told in error) == (beside is not None) and (told + labels in error) == bool(beside)


def test_the_order_of_numbers_is_noted(prepare, make, tmp_path, capfd):
    assert prepare(path=make.class_folders(tmp_path / "a", {str(number): 3 for number in range(11)}))[0] == 0
    assert "class index 2 is folder 10; to have them by size" in capfd.readouterr().err
    for name, classes in (("b", ["1", "2"]), ("c", ["10", "9", "nine"])):
        root = make.class_folders(tmp_path / name, dict.fromkeys(classes, 3))
        assert prepare(path=root, out=tmp_path / "out" / name)[0] == 0
        assert "class index" not in capfd.readouterr().err
