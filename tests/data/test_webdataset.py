"""Oracle: shards written in WebDataset's layout, whose labels and pixels are known."""

from __future__ import annotations

import gzip
import io
import json
import os
import resource
import shutil
import tarfile
from pathlib import Path

import pytest

from crt.data.packed import PackedImages, read_index
from crt.data.webdataset import open_webdataset
from crt.errors import UserError

SHARDS = {"source": "webdataset", "storage": "encoded", "image_size": None}


def write_shard(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def image(make, number: int) -> bytes:
    return make.encode(make.noise(number, 24, 20), "JPEG")


def sample(make, number: int, label: object = None, json_label: object = None) -> dict[str, bytes]:
    members = {f"{number:05d}.jpg": image(make, number)}
    if label is not None:
        members[f"{number:05d}.cls"] = f"{label}\n".encode()
    if json_label is not None:
        members[f"{number:05d}.json"] = json.dumps({"label": json_label, "filename": "x"}).encode()
    return members


def check(out: Path, make, split: str, expected: dict[int, str]) -> None:
    """The images of a split, by the number that made each, and their classes' ids."""
    images = PackedImages(out, split)
    ids = [entry["id"] for entry in read_index(out)["classes"]]
    found = {}
    for row in range(len(images)):
        number = int(images.source_id(row).rpartition("/")[2][:5])
        assert images.encoded(row) == image(make, number)
        found[number] = ids[images.labels[row]]
    assert found == expected


def test_splits_by_the_shards_names_and_numbers_in_their_order(prepare, make, tmp_path):
    folder = tmp_path / "shards"
    labels = {number: [10, 2, 0][number % 3] for number in range(9)}
    for shard in range(3):
        members = {}
        for number in range(3 * shard, 3 * shard + 3):
            # The label before its image, after it, or among other fields.
            both = sample(make, number, labels[number], json_label=5)
            members |= dict(reversed(both.items())) if number % 2 else both
        write_shard(folder / f"imagenet1k-train-{shard:04d}.tar", members)
    write_shard(folder / "imagenet1k-validation-00.tar", sample(make, 50, json_label=2) | sample(make, 51, 10))
    write_shard(folder / "imagenet1k-test-00.tar", sample(make, 60, 2))
    status, out = prepare(path=folder, **SHARDS)
    assert status == 0
    assert [entry["id"] for entry in read_index(out)["classes"]] == ["0", "2", "10"]
    check(out, make, "train", {number: str(label) for number, label in labels.items()})
    check(out, make, "val", {50: "2", 51: "10"})


def test_shards_of_no_split_or_without_labels(prepare, make, tmp_path, capfd):
    members = {f"./a/{name}": data for number in range(8) for name, data in sample(make, number).items()}
    folder = write_shard(tmp_path / "s" / "000.tar", members | {"a/00009.txt": b"a caption"}).parent
    status, out = prepare(path=folder, val_fraction=0.25, **SHARDS)
    assert status == 0
    assert [entry["id"] for entry in read_index(out)["classes"]] == ["images"]
    told = "samples have no labels (.cls, or label or labels or cls or class in .json): the images are one class"
    assert told in capfd.readouterr().err
    assert len(PackedImages(out, "train")) == 6 and len(PackedImages(out, "val")) == 2
    assert PackedImages(out, "train").source_id(0).startswith("000.tar/a/0000")


def test_labels_in_json_under_any_of_their_names(prepare, make, tmp_path):
    members, labels = {}, [{"label": "a", "class": 5}, {"label": None, "labels": "b"}, {"cls": "c"}, {"class": "d"}]
    for number in range(8):
        members |= sample(make, number) | {f"{number:05d}.json": json.dumps(labels[number % 4]).encode()}
    status, out = prepare(path=write_shard(tmp_path / "s/0.tar", members).parent, **SHARDS)
    assert status == 0
    assert [entry["id"] for entry in read_index(out)["classes"]] == ["a", "b", "c", "d"]


def test_wordnet_ids_are_named(prepare, make, tmp_path):
    classes = ["n01440764", "n02119789"]
    members = {}
    for number in range(8):
        members |= sample(make, number, classes[number % 2])
    status, out = prepare(path=write_shard(tmp_path / "s/0.tar", members).parent, val_fraction=0.25, **SHARDS)
    assert status == 0
    assert PackedImages(out, "train").class_names == ["tench", "kit fox"]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (lambda make: sample(make, 1, 0) | sample(make, 2), "00002.jpg has no label (.cls, or label or labels or"),
        (lambda make: sample(make, 1, json_label=1.0), "00001.json: label is 1.0: labels are integers or text"),
        (lambda make: sample(make, 1) | {"00001.json": b'{"class": [1]}'}, "class is [1]: "),
        (lambda make: sample(make, 1) | {"00001.json": b'{"cls": {"id": 1}}'}, 'cls is {"id": 1}: '),
        (lambda make: sample(make, 1) | {"00001.json": b'{"labels": true}'}, "labels is true: "),
        (lambda make: sample(make, 1, 0) | {"00001.png": b"x"}, "sample 00001 has two images"),
        (lambda make: sample(make, 1) | {"00001.cls": b" "}, "00001.cls is empty"),
        (lambda make: sample(make, 1) | {"00001.json": b"{"}, "00001.json is not JSON"),
        (lambda make: {"00001.txt": b"words"}, "the shards hold no images"),
        (lambda make: sample(make, 1) | {"00001.json": b"[1]", **sample(make, 2, 0)}, "00001.jpg has no label"),
        (lambda make: sample(make, 1, 0) | sample(make, 2, json_label=" "), "00002.jpg has no label"),
        (lambda make: {"folder.d/.jpg": b"x"}, "the shards hold no images"),
        (lambda make: sample(make, 1) | {"00001.json": b"[" * 100_000}, "00001.json is not JSON"),
        (lambda make: {"a\nb.jpg": b"x", "a\nb.cls": b""}, "a\\nb.cls is empty"),
        (lambda make: {"a\nb.jpg": b"x", "a\nb.png": b"x"}, "sample a\\nb has two images"),
    ],
)
def test_shards_that_are_not_right_are_refused(refused, make, tmp_path, members, message):
    folder = write_shard(tmp_path / "s" / "000.tar", members(make)).parent
    assert message in refused(path=folder, **SHARDS)


def test_a_damaged_shard_a_strange_one_and_none_are_refused(refused, make, tmp_path):
    folder = tmp_path / "shards"
    assert "not found" in refused(path=folder, **SHARDS)
    folder.mkdir()
    assert "holds no .tar shards" in refused(path=folder, **SHARDS)
    write_shard(folder / "train/0.tar", sample(make, 1, 0))
    write_shard(folder / "val/0.tar", sample(make, 2, 1))
    assert "class 1 has validation images, but no training images" in refused(path=folder, **SHARDS)
    odd = write_shard(folder / "0.tar", sample(make, 3, 0))
    assert "0.tar names no split" in refused(path=folder, **SHARDS)
    odd.unlink()
    shard = folder / "train/0.tar"
    shard.write_bytes(shard.read_bytes()[:700])
    assert "train/0.tar: cut short in 00001.jpg" in refused(path=folder, **SHARDS)
    assert "set prepare_data.source to webdataset" in refused(path=folder, **SHARDS | {"source": "imagefolder"})


def test_more_shards_than_files_that_may_be_open(prepare, make, tmp_path):
    folder = tmp_path / "shards"
    for shard in range(80):  # whose images alternate in the order of classes
        write_shard(folder / f"{shard:03d}.tar", sample(make, 2 * shard, 0) | sample(make, 2 * shard + 1, 1))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (opened + 75, limits[1]))
    try:
        status, _ = prepare(path=folder, val_fraction=0.25, **SHARDS)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert status == 0


def test_labels_are_numbers_by_their_size_whatever_that_is(prepare, make, tmp_path):
    labels = ["-1", "10", "2", "-20"]
    members = {}
    for number in range(8):
        members |= sample(make, number, labels[number % 4])
    status, out = prepare(path=write_shard(tmp_path / "s/0.tar", members).parent, val_fraction=0.25, **SHARDS)
    assert status == 0
    assert [entry["id"] for entry in read_index(out)["classes"]] == ["-20", "-1", "2", "10"]
    long = sample(make, 1, "9" * 5000) | sample(make, 2, 1) | sample(make, 3, json_label=" 1\n") | sample(make, 4, 1)
    status, out = prepare(
        path=write_shard(tmp_path / "t/0.tar", long).parent, out=tmp_path / "long", val_fraction=0.9, **SHARDS
    )
    assert status == 0
    assert [entry["id"] for entry in read_index(out)["classes"]] == ["1", "9" * 5000]


def test_the_split_named_last_in_a_path_counts(prepare, make, tmp_path, capfd):
    folder = tmp_path / "shards"
    write_shard(folder / "train_val/train-0.tar", sample(make, 1, 0) | sample(make, 2, 0))
    write_shard(folder / "train_val/training_val_0.tar", sample(make, 3, 0) | sample(make, 4, 0))
    status, out = prepare(path=folder, **SHARDS)
    assert status == 0
    check(out, make, "train", {1: "0", 2: "0"})
    check(out, make, "val", {3: "0", 4: "0"})
    (folder / "train_val/train-0.tar").rename(folder / "train_val/val-1.tar")
    capfd.readouterr()
    assert prepare(path=folder, out=tmp_path / "other", val_fraction=0.5, **SHARDS)[0] == 0
    assert "images of val only: validation images are set aside" in capfd.readouterr().err


def test_samples_without_an_image_are_counted(tmp_path):
    members = {"0.jpg": b"x", "0.cls": b"0", "1.cls": b"0", "2.txt": b"words", "README": b"words"}
    source = open_webdataset(write_shard(tmp_path / "0.tar", members))
    assert f"{tmp_path}: 2 samples have no image: left out" in source.notes


def test_a_split_without_images_is_named(tmp_path):
    for name, members in (("train", {"0.jpg": b"x"}), ("val", {"0.txt": b"words"})):
        write_shard(tmp_path / f"{name}.tar", members)
    with pytest.raises(UserError, match="the shards of val hold no images"):
        open_webdataset(tmp_path)


@pytest.mark.parametrize(("encoding", "label"), [("utf-8", "café"), ("utf-8-sig", "café"), ("latin-1", "caf\ufffd")])
def test_labels_are_utf8_with_or_without_a_byte_order_mark(tmp_path, encoding, label):
    shard = write_shard(tmp_path / "0.tar", {"0.jpg": b"x", "0.cls": "café\n".encode(encoding)})
    assert open_webdataset(shard).class_ids == [label]


def test_hard_links_are_to_paths_from_the_root_and_folders_are_no_members(tmp_path):
    shard = write_shard(tmp_path / "0.tar", {"a/0.jpg": b"first", "a/0.cls": b"0"})
    with tarfile.open(shard, "a") as tar:
        for name, kind in (("b/1.jpg", tarfile.LNKTYPE), ("b/2.jpg", tarfile.DIRTYPE), ("b/1.cls", tarfile.LNKTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, f"a/0{name[-4:]}"
            tar.addfile(info)
    found = open_webdataset(shard).splits["all"]
    assert found.ids == ["0.tar/a/0.jpg", "0.tar/b/1.jpg"]
    assert found.places["size"].tolist() == [5, 5]


def test_links_in_shards_are_followed_and_sparse_files_refused(prepare, refused, make, tmp_path):
    shard = write_shard(tmp_path / "s/0.tar", sample(make, 1, 0) | sample(make, 4, 0) | {"00002.jpg": image(make, 2)})
    with tarfile.open(shard, "a") as tar:
        for name, kind, target in [
            ("00002.cls", tarfile.LNKTYPE, "00001.cls"),
            ("x/00003.jpg", tarfile.SYMTYPE, "../00001.jpg"),
            ("x/00003.cls", tarfile.SYMTYPE, "../00002.cls"),
        ]:
            link = tarfile.TarInfo(name)
            link.type, link.linkname = kind, target
            tar.addfile(link)
    status, out = prepare(path=shard.parent, val_fraction=0.6, **SHARDS)
    assert status == 0
    names = {}
    for images in (PackedImages(out, split) for split in ("train", "val")):
        names |= {images.source_id(row): images.encoded(row) for row in range(len(images))}
    expected = {"00001.jpg": 1, "00002.jpg": 2, "x/00003.jpg": 1, "00004.jpg": 4}
    assert names == {f"0.tar/{name}": image(make, number) for name, number in expected.items()}
    shutil.rmtree(out)
    with tarfile.open(shard, "a") as tar:
        link = tarfile.TarInfo("4.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/elsewhere/4.jpg"
        tar.addfile(link)
    assert "4.jpg is a link to no file before it" in refused(path=shard.parent, **SHARDS)
    with tarfile.open(shard, "w") as tar:
        sparse = tarfile.TarInfo("5.jpg")
        sparse.type = tarfile.GNUTYPE_SPARSE
        tar.addfile(sparse)
    assert "5.jpg is stored as a sparse file" in refused(path=shard.parent, **SHARDS)


@pytest.mark.parametrize("plain", [0, 4])
def test_keys_with_dots_are_refused(refused, make, tmp_path, plain):
    members = {f"{number:05d}.jpg": image(make, number) for number in range(plain)}
    members |= {"photos.d/i.v1.JPG": image(make, 10), "photos.d/i.v2.JPG": image(make, 11)}
    message = refused(path=write_shard(tmp_path / "s/0.tar", members).parent, **SHARDS)
    assert "photos.d/i.v2.JPG is not an image of its own, since a key ends at the first dot" in message
    assert "sample photos.d/i has none: rename its members, without dots in the key" in message


def test_further_images_of_a_sample_are_no_dotted_keys(prepare, make, tmp_path):
    members = {}
    for number in range(8):
        members |= {f"{number:05d}.seg.png": b"mask"} | sample(make, number, number % 2)
    status, out = prepare(path=write_shard(tmp_path / "s/0.tar", members).parent, val_fraction=0.25, **SHARDS)
    assert status == 0 and len(PackedImages(out, "train")) == 6


def test_shards_of_other_endings_are_noted(prepare, refused, make, tmp_path, capfd):
    folder = write_shard(tmp_path / "s/0.tar", sample(make, 1, 0) | sample(make, 2, 0)).parent
    write_shard(folder / "1.TAR", sample(make, 3, 0) | sample(make, 4, 0))
    for name in ("2.tar.gz", "3.Tar.GZ", "4.tgz", "sizes.json", "README"):
        make.write(folder / name, b"x")
    status, out = prepare(path=folder, val_fraction=0.5, **SHARDS)
    assert status == 0 and len(PackedImages(out, "train")) == len(PackedImages(out, "val")) == 2
    kinds = "1 .json, 2 .tar.gz, 1 .tgz, 1 no extension"
    assert f"files that are not .tar shards by their names are ignored: {kinds}" in capfd.readouterr().err
    for name in ("0.tar", "1.TAR"):
        (folder / name).unlink()
    shutil.rmtree(out)
    assert f"holds no .tar shards (compressed ones are not read), but {kinds}: give" in refused(path=folder, **SHARDS)


def test_one_shard_alone(prepare, refused, make, tmp_path):
    members = {}
    for number in range(8):
        members |= sample(make, number, number % 2)
    shard = write_shard(tmp_path / "s" / "some.tar", members)
    make.write(shard.parent / "other.tar", b"damaged")
    packed = make.write(shard.parent / "some.tar.gz", gzip.compress(shard.read_bytes()))
    assert "some.tar.gz: compressed: a shard is read where it lies" in refused(path=packed, **SHARDS)
    status, out = prepare(path=shard, val_fraction=0.25, **SHARDS)
    assert status == 0 and len(PackedImages(out, "train")) == 6
    assert PackedImages(out, "train").source_id(0).startswith("some.tar/0000")


def test_a_shard_that_leads_nowhere_is_refused(refused, make, tmp_path):
    shard = write_shard(tmp_path / "s/0.tar", sample(make, 1, 0))
    (shard.parent / "1.tar").symlink_to("nowhere.tar")
    assert "1.tar: cannot be read (No such file or directory)" in refused(path=shard.parent, **SHARDS)
