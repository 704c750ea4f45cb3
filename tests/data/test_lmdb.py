"""Oracle: LMDB files in LSUN's layout, whose images are known."""

from __future__ import annotations

import shutil
from pathlib import Path

import lmdb
import pytest

from crt.data.lmdb import open_lmdb_files
from crt.data.packed import PackedImages, read_index

FILES = {"source": "lmdb", "storage": "encoded", "image_size": None}


def image(make, number: int) -> bytes:
    return make.encode(make.noise(number, 24, 20), "WEBP")


def write(path: Path, values: dict[bytes, bytes]) -> Path:
    """A folder of an LMDB file as LSUN has it, or a file alone where the path ends so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    environment = lmdb.open(str(path), map_size=2**24, subdir=path.suffix != ".lmdb")
    with environment, environment.begin(write=True) as transaction:
        for key, value in values.items():
            transaction.put(key, value)
    return path


def lsun(path: Path, make, numbers: range) -> Path:
    return write(path, {f"{number:040x}".encode(): image(make, number) for number in numbers})


def found_in(out: Path, split: str) -> dict[bytes, str]:
    """Each image of a split with its class."""
    images, names = PackedImages(out, split), [entry["name"] for entry in read_index(out)["classes"]]
    return {images.encoded(row): names[images.labels[row]] for row in range(len(images))}


def expected(make, **classes: range) -> dict[bytes, str]:
    return {image(make, number): name for name, numbers in classes.items() for number in numbers}


def test_scenes_of_lsun(prepare, make, tmp_path):
    root = tmp_path / "lsun"
    lsun(root / "bedroom_train_lmdb", make, range(5))
    lsun(root / "bedroom_val_lmdb", make, range(5, 8))
    lsun(root / "church_outdoor_train_lmdb", make, range(8, 14))
    lsun(root / "church_outdoor_val_lmdb", make, range(14, 16))
    lsun(root / "test_lmdb", make, range(16, 20))
    status, out = prepare(path=root, **FILES)
    assert status == 0
    assert found_in(out, "train") == expected(make, bedroom=range(5), church_outdoor=range(8, 14))
    assert found_in(out, "val") == expected(make, bedroom=range(5, 8), church_outdoor=range(14, 16))


@pytest.mark.parametrize("name", ["cat", "cat/data.mdb", "cat.lmdb"])
def test_one_file_is_one_class_whose_images_are_split(prepare, make, tmp_path, name):
    path = lsun(tmp_path / "lsun" / ("cat" if "data" in name else name), make, range(10))
    status, out = prepare(path=tmp_path / "lsun" / name, val_fraction=0.3, **FILES)
    assert path.exists() and status == 0
    assert found_in(out, "train") | found_in(out, "val") == expected(make, cat=range(10))
    assert len(PackedImages(out, "val")) == 3


def test_one_category_below_its_folder_is_named_after_it(prepare, make, tmp_path):
    lsun(tmp_path / "bedroom" / "train_lmdb", make, range(4))
    lsun(tmp_path / "bedroom" / "val_lmdb", make, range(4, 7))
    status, out = prepare(path=tmp_path / "bedroom", **FILES)
    assert status == 0
    assert found_in(out, "val") == expected(make, bedroom=range(4, 7))


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("pets/cat.lmdb", "cat"),
        ("church-outdoor.lmdb", "church_outdoor"),
        ("living_train_room.lmdb", "living_room"),
        ("Cat_DATA.lmdb", "Cat"),
        ("strain.lmdb", "strain"),
        ("database.lmdb", "database"),
    ],
)
def test_classes_are_what_the_path_says_most_closely_besides_the_split(tmp_path, name, label):
    write(tmp_path / name, {b"0": b"x"})
    assert open_lmdb_files(tmp_path).class_ids == [label]


def test_files_are_known_by_their_endings_in_any_case_and_alone_by_none(tmp_path):
    write(tmp_path / "some.lmdb", {b"0": b"x", b"1": b"four"})
    for number, name in enumerate(("cat.MDB", "cat.LMDB", "cat.db")):
        path = tmp_path / str(number) / name
        path.parent.mkdir()
        shutil.copy(tmp_path / "some.lmdb", path)
        source = open_lmdb_files(path if name == "cat.db" else path.parent)
        assert source.class_ids == ["cat"]
        assert source.splits["all"].places["size"].tolist() == [1, 4]


def test_keys_may_look_like_paths(prepare, make, tmp_path):
    write(tmp_path / "faces.lmdb", {f"a/{number}/x".encode(): image(make, number) for number in range(6)})
    status, out = prepare(path=tmp_path / "faces.lmdb", val_fraction=0.4, **FILES)
    assert status == 0
    assert set(found_in(out, "train") | found_in(out, "val")) == set(expected(make, faces=range(6)))
    assert PackedImages(out, "train").source_id(0).startswith("faces.lmdb/a/")


def test_values_that_are_no_images_are_rejected(prepare, make, tmp_path):
    write(tmp_path / "a.lmdb", {f"{n}".encode(): image(make, n) for n in range(9)} | {b"length": b"9"})
    status, out = prepare(path=tmp_path / "a.lmdb", val_fraction=0.3, max_rejected_fraction=0.1, **FILES)
    assert status == 0
    rejected = make.lines(out / "rejected.jsonl")
    assert [(entry["source_id"], entry["reason"][:5]) for entry in rejected] == [("a.lmdb/length", "not a")]


def test_damaged_and_strange_files_are_refused(refused, make, tmp_path):
    path = lsun(tmp_path / "cut.lmdb", make, range(20))
    path.write_bytes(path.read_bytes()[:-8192])
    assert "cut.lmdb: not an LMDB file, or damaged" in refused(path=path, **FILES)
    make.write(tmp_path / "text.lmdb", b"text" * 4096)
    assert "text.lmdb: not an LMDB file, or damaged" in refused(path=tmp_path / "text.lmdb", **FILES)
    write(tmp_path / "bytes.lmdb", {b"\xff\xfe": image(make, 0)})
    assert "has a key that is not text" in refused(path=tmp_path / "bytes.lmdb", **FILES)
    write(tmp_path / "empty.lmdb", {})
    assert "empty.lmdb: holds no images" in refused(path=tmp_path / "empty.lmdb", **FILES)
    make.write(tmp_path / "zips" / "bedroom_train_lmdb.zip", b"zip")
    assert "unpack the archives in it first" in refused(path=tmp_path / "zips", **FILES)
    make.write(tmp_path / "hub" / "train.parquet", b"PAR1")
    assert "or set prepare_data.source to parquet" in refused(path=tmp_path / "hub", **FILES)
    make.class_folders(tmp_path / "folders", {"a": 2})
    assert "holds no LMDB files" in refused(path=tmp_path / "folders", **FILES)
    assert "not found" in refused(path=tmp_path / "nowhere", **FILES)


def test_a_file_without_a_class_among_others_is_refused(refused, make, tmp_path):
    write(tmp_path / "train" / "val_lmdb", {b"0": image(make, 0)})
    lsun(tmp_path / "train" / "cat_train_lmdb", make, range(4))
    # The folder's own name says nothing either: which class it is cannot be told.
    assert "has no label" in refused(path=tmp_path / "train", **FILES)
