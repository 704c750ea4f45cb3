"""Oracle: the layouts in which FFHQ, StyleGAN's tool, Oxford's pets, COCO and others are published, in small."""

from __future__ import annotations

import json
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


def stylegan(make, tmp_path, kind: str, below: str, content: str, names=STYLEGAN):
    root = images(make, tmp_path / "faces", [below + name for name in names])
    make.write(root / below / "dataset.json", content.encode())
    return Path(shutil.make_archive(str(root), "zip", root)) if kind == "zip" else root


@pytest.mark.parametrize(
    "names",
    [
        STYLEGAN,
        STYLEGAN[:5],
        [f"img{number:08d}.png" for number in range(5)],
        [f"{number % 3:05d}/{number}.png" for number in range(9)],
    ],
)
@pytest.mark.parametrize(("kind", "below"), [("folder", ""), ("zip", ""), ("zip", "around/")])
def test_labels_of_stylegans_tool_are_read(prepare, make, tmp_path, capfd, kind, below, names):
    labels = {name: 9 + row % 2 for row, name in enumerate(names)}
    content = json.dumps({"labels": list(labels.items())})
    status, out = prepare(path=stylegan(make, tmp_path, kind, below, content, names))
    assert status == 0
    found = {}
    for part in (PackedImages(out, split) for split in ("train", "val")):
        assert part.class_names == ["9", "10"]
        found |= {part.source_id(row): int(part.class_names[part.labels[row]]) for row in range(len(part))}
    assert found == {below + name: label for name, label in labels.items()}
    told = capfd.readouterr().err
    assert f"labels are those of {below}dataset.json" in told and "ignored" not in told


def test_images_that_stylegans_tool_gave_no_labels_are_one_class(prepare, make, tmp_path, capfd):
    status, out = prepare(path=stylegan(make, tmp_path, "zip", "", '{"labels": null}'))
    assert status == 0 and PackedImages(out, "train").num_classes == 1
    assert "dataset.json has no labels: all images are one class" in capfd.readouterr().err


def test_images_that_stylegans_tool_did_not_name_are_left_out_and_noted(prepare, make, tmp_path, capfd):
    content = json.dumps({"labels": [[name, 0] for name in STYLEGAN[:8]]})
    status, out = prepare(path=stylegan(make, tmp_path, "folder", "", content))
    assert status == 0 and sum(len(PackedImages(out, split)) for split in ("train", "val")) == 8
    assert "and 2 images that it does not name are left out" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{", "dataset.json cannot be read as labels of StyleGAN's tool: get it again, or remove it"),
        ("[]", "dataset.json cannot be read as labels of StyleGAN's tool"),
        ('{"labels": [["00000/img00000000.png", [0, 1]]]}', "dataset.json cannot be read as labels of StyleGAN's tool"),
        ('{"labels": [["00000/img00000000.png", 0.5]]}', "dataset.json cannot be read as labels of StyleGAN's tool"),
        ('{"labels": [["00000/img00000000.png", true]]}', "dataset.json cannot be read as labels of StyleGAN's tool"),
        ('{"labels": [[0, 1]]}', "dataset.json cannot be read as labels of StyleGAN's tool"),
        ('{"labels": [["a.png", 1]]}', "dataset.json names 1 images that are not there: a.png: get the data set again"),
    ],
)
def test_labels_of_stylegans_tool_that_are_not_right_are_refused(refused, make, tmp_path, content, told):
    assert told in refused(path=stylegan(make, tmp_path, "zip", "", content))


def test_a_file_of_that_name_beside_class_folders_is_no_matter(prepare, make, tmp_path):
    root = make.class_folders(tmp_path / "pets", {"cat": 4, "dog": 4})
    make.write(root / "dataset.json", b'{"labels": [["cat/000.png", 0]]}')
    status, out = prepare(path=root)
    assert status == 0 and PackedImages(out, "train").class_names == ["cat", "dog"]


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_letters_around_class_folders_are_no_classes(prepare, make, tmp_path, capfd, kind):
    """As in SUN397 and Places365."""
    folders = ("a/abbey", "a/alley", "b/bar", "c/church/indoor", "c/church/outdoor")
    root = images(make, tmp_path / "sun", [f"SUN397/{name}/{row}.png" for name in folders for row in range(3)])
    path = Path(shutil.make_archive(str(root), "zip", root)) if kind == "zip" else root
    status, out = prepare(path=path)
    assert status == 0
    part = PackedImages(out, "train")
    assert part.class_names == ["abbey", "alley", "bar", "church/indoor", "church/outdoor"]
    found = {part.source_id(row)[9:-6]: part.class_names[part.labels[row]] for row in range(len(part))}
    assert found == {name: name for name in part.class_names}
    told = "folders SUN397/a, SUN397/b, SUN397/c are the first letters of those in them, which are the classes"
    error = capfd.readouterr().err
    assert told in error and "upper folders" not in error


@pytest.mark.parametrize("folders", [("a", "b"), ("a/abbey", "b/zoo"), ("a/abbey", "b"), ("ab/abbey", "c/cat")])
def test_other_short_folders_are_classes(prepare, make, tmp_path, folders):
    status, out = prepare(path=make.class_folders(tmp_path / "x", dict.fromkeys(folders, 3)))
    assert status == 0 and PackedImages(out, "train").class_names == [name.partition("/")[0] for name in folders]


def test_a_copy_of_the_set_among_its_classes_is_refused(prepare, refused, make, tmp_path):
    """As in archives of Kaggle."""
    folders = [*("cat", "dog", "owl"), *(f"pets/{name}" for name in ("cat", "dog"))]
    root = make.class_folders(tmp_path / "pets", dict.fromkeys(folders, 3))
    assert "folder pets holds folders that are called like those beside it, cat, dog: move it away" in refused(
        path=root
    )
    shutil.rmtree(root / "pets" / "dog")  # one alone may be anything
    status, out = prepare(path=root)
    assert status == 0 and PackedImages(out, "train").num_classes == 4


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


ALIKE = [
    ("train2017", "val2017"),
    ("cars_train", "cars_test"),
    ("training_set", "test_set"),
    ("Final_Training", "Final_Test"),
]


@pytest.mark.parametrize("kind", ["folder", "zip"])
@pytest.mark.parametrize("inner", ["", "a/", "images/", "{split}/"])
@pytest.mark.parametrize("splits", ALIKE)
def test_folders_called_alike_but_for_the_split_are_splits(prepare, make, tmp_path, capfd, splits, inner, kind):
    """As of COCO, Stanford's cars and GTSRB, and in archives of Kaggle."""
    names = [f"{split}/{inner.format(split=split)}{row}.png" for split in splits for row in range(3)]
    root = files(make, tmp_path / "images", [*names, "devkit/x.xml"])
    path = Path(shutil.make_archive(str(root), "zip", root)) if kind == "zip" else root
    status, out = prepare(path=path)
    assert status == 0
    for split, folder in zip(("train", "val"), splits, strict=True):
        part = PackedImages(out, split)
        assert part.class_names == (["a"] if inner == "a/" else ["images"])
        assert [part.source_id(row).partition("/")[0] for row in range(len(part))] == [folder] * 3
    error = capfd.readouterr().err
    assert f"training images are those of {splits[0]}/, validation images those of {splits[1]}/" in error


def test_of_folders_called_alike_those_for_validation_come_first(prepare, make, tmp_path, capfd):
    names = [f"{split}2017/{row}.png" for split in ("test", "train", "val") for row in range(3)]
    status, out = prepare(path=images(make, tmp_path / "coco", names))
    assert status == 0 and PackedImages(out, "val").source_id(0).startswith("val2017/")
    assert "validation images those of val2017/; test2017 unused" in capfd.readouterr().err


def test_splits_beside_another_folder_are_no_classes(refused, make, tmp_path):
    """As of Market-1501."""
    names = [f"{split}/{row}.png" for split in ("bounding_box_train", "bounding_box_test", "query") for row in range(3)]
    told = "folders bounding_box_test, bounding_box_train, query look like splits"
    assert told in refused(path=images(make, tmp_path / "persons", names))


def test_classes_may_have_words_of_splits_in_their_names(prepare, make, tmp_path):
    names = [f"{name}/{row}.png" for name in ("bullet_train", "test_tube", "valley") for row in range(3)]
    status, out = prepare(path=images(make, tmp_path / "x", names))
    assert status == 0 and PackedImages(out, "train").num_classes == 3


def test_pictures_beside_a_folder_of_other_annotations_are_entered(prepare, make, tmp_path, capfd):
    pictures = [f"{split}/images/{row}.png" for split in ("train", "valid") for row in range(8)]
    root = files(make, tmp_path / "yolo", [*pictures, "train/labels/0.txt", "valid/labels/0.txt"])
    status, out = prepare(path=root)
    assert status == 0 and [len(PackedImages(out, split)) for split in ("train", "val")] == [8, 8]
    assert PackedImages(out, "train").class_names == ["images"]
    told = "images are those in train/images/; folders without images beside it are ignored: labels"
    assert told in capfd.readouterr().err


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
        *(["train2017", "val2018"], ["train", "test1"], ["train_mini", "val"]),
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
        (
            ["jpg/0.png"],
            "imagelabels.mat",
            "for imagelabels.mat is not read: if labels are in there, set prepare_data.",
        ),
        (["0.png"], "labels.txt", "for labels.txt is not read: if labels are in there, set prepare_data.path to that"),
        (["0.png"], "meta/labels.tsv", "for meta/labels.tsv is not read: if labels are in there"),
        (["0.png"], "metadata.jsonl", "for metadata.jsonl is not read: if labels are in there"),
        (["0.png"], "0.cls", "set prepare_data.source to webdataset to have their labels from the .tar files"),
    ],
)
def test_labels_that_are_not_read_are_noted(prepare, make, tmp_path, capfd, names, file, told):
    root = images(make, tmp_path / "x", [name.replace("0", str(number)) for name in names for number in range(8)])
    make.write(root / file, b"labels")
    assert prepare(path=root)[0] == 0
    assert told in capfd.readouterr().err


def test_lists_that_name_images_are_noted(prepare, make, tmp_path, capfd):
    root = images(make, tmp_path / "x", [f"jpg/{row:04d}.png" for row in range(8)])
    make.write(root / "list.txt", b"0000.png 1\n0001.png 2\n")
    make.write(root / "instances.json", b'{"images": [{"file_name": "x/0000.png"}, {"file_name": "x/0001.png"}]}')
    make.write(root / "README.txt", b"0000.png is the first of 8 images, 1 to 8")
    make.write(root / "captions" / "0000.txt", b"0000.png 0001.png")  # one for each image
    assert prepare(path=root)[0] == 0
    told = (
        "one class, for instances.json, list.txt are not read: if labels are in there, set prepare_data.path to the one"
    )
    assert told in capfd.readouterr().err


def test_labels_beside_pictures_and_masks_are_pointed_at(refused, make, tmp_path):
    root = images(make, tmp_path / "pets", ["images/Beagle_1.png", "images/Beagle_2.png", "annotations/Beagle_1.png"])
    make.write(root / "annotations" / "list.txt", b"Beagle_1 1\nBeagle_2 1\n")
    assert "or, if labels are in annotations/list.txt, set prepare_data.path to that file" in refused(path=root)


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
