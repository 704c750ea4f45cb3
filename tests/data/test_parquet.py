"""Oracle: Parquet files in the Hugging Face Hub's layout, whose labels and images are known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from crt.data import parquet
from crt.data.packed import PackedImages, read_index

HUB_IMAGE = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
NAMES = ["tench", "goldfish", "great white shark"]
FILES = {"source": "parquet", "storage": "encoded", "image_size": None}


def image(make, number: int) -> bytes:
    return make.encode(make.noise(number, 24, 20), "JPEG")


def write_file(path: Path, columns: dict[str, Any], features: dict[str, Any] | None = None, **options: Any) -> Path:
    """A Parquet file of a few rows to a group; columns are arrays, or lists whose type Arrow finds."""
    metadata = {b"huggingface": json.dumps({"info": {"features": features}}).encode()} if features else None
    table = pyarrow.table(columns).replace_schema_metadata(metadata)
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(table, path, row_group_size=3, **options)
    return path


def hub_file(path: Path, make, labels: dict[int, int], names: list[str] = NAMES) -> Path:
    """As the Hub's own library writes them: images of these numbers, and class labels with names."""
    rows = [{"bytes": image(make, number), "path": f"{number}.JPEG"} for number in labels]
    features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
    columns = {"image": pyarrow.array(rows, HUB_IMAGE), "label": pyarrow.array(labels.values(), pyarrow.int64())}
    return write_file(path, columns, features)


def found_in(out: Path, split: str) -> dict[bytes, str]:
    """Each image of a split with the name of its class."""
    images, names = PackedImages(out, split), [entry["name"] for entry in read_index(out)["classes"]]
    return {images.encoded(row): names[images.labels[row]] for row in range(len(images))}


def expected(make, labels: dict[int, int]) -> dict[bytes, str]:
    return {image(make, number): NAMES[label] for number, label in labels.items()}


def test_files_of_the_hub(prepare, make, tmp_path):
    parts = [{number: (2, 0)[number % 2] for number in range(start, start + 7)} for start in (0, 7)]
    for number, labels in enumerate(parts):
        hub_file(tmp_path / "hub" / "data" / f"train-{number:05d}-of-00002.parquet", make, labels)
    hub_file(tmp_path / "hub" / "data" / "validation-00000-of-00001.parquet", make, {50: 0, 51: 2})
    hub_file(tmp_path / "hub" / "data" / "test-00000-of-00001.parquet", make, {60: -1, 61: -1})
    status, out = prepare(path=tmp_path / "hub", **FILES)
    assert status == 0
    # Label 1 has no images: the classes that are left keep their order.
    assert read_index(out)["classes"] == [{"id": "0", "name": "tench"}, {"id": "2", "name": "great white shark"}]
    assert found_in(out, "train") == expected(make, parts[0] | parts[1])
    assert found_in(out, "val") == expected(make, {50: 0, 51: 2})
    assert PackedImages(out, "train").source_id(0).startswith("data/train-00000-of-00002.parquet/0000")


def test_configurations_beside_each_other_are_noted(prepare, make, tmp_path, capfd):
    for number, name in enumerate(("cropped", "full")):
        labels = {10 * number + row: row % 2 for row in range(8)}
        hub_file(tmp_path / name / "train-00000-of-00001.parquet", make, labels)
        hub_file(tmp_path / name / "test-00000-of-00001.parquet", make, {number + 100: 0, number + 200: 1})
    assert prepare(path=tmp_path, **FILES)[0] == 0
    assert "files of one split lie in folders cropped, full, and all are used: if those" in capfd.readouterr().err
    assert prepare(path=tmp_path / "full", out=tmp_path / "out/full", **FILES)[0] == 0
    assert "lie in folders" not in capfd.readouterr().err


def test_one_file_without_metadata(prepare, make, tmp_path):
    images = [image(make, number) for number in range(8)]
    columns = {"label": ["dog", "cat"] * 4, "photo": images, "text": ["a caption"] * 8}
    status, out = prepare(path=write_file(tmp_path / "pets.parquet", columns, compression="zstd"), **FILES)
    assert status == 0
    assert [entry["id"] for entry in read_index(out)["classes"]] == ["cat", "dog"]
    found = found_in(out, "train") | found_in(out, "val")
    assert found == {content: ["dog", "cat"][number % 2] for number, content in enumerate(images)}


def test_rows_without_image_or_labels(prepare, make, tmp_path, capfd):
    rows = [{"bytes": image(make, number), "path": None} for number in range(6)]
    rows += [None, {"bytes": None, "path": "elsewhere.jpg"}, {"bytes": b"", "path": None}]
    write_file(tmp_path / "f" / "0.parquet", {"image": pyarrow.array(rows, HUB_IMAGE)})
    status, out = prepare(path=tmp_path / "f", val_fraction=0.5, **FILES)
    assert status == 0
    assert [entry["name"] for entry in read_index(out)["classes"]] == ["images"]
    assert len(found_in(out, "train")) == len(found_in(out, "val")) == 3
    told = capfd.readouterr().err
    assert "3 rows have no image (1 only name a file elsewhere: write the files' bytes" in told
    assert "samples have no labels (column label or labels or cls or class): the images are one class" in told


def test_rows_that_only_name_files(refused, tmp_path):
    rows = [{"bytes": None, "path": "1.jpg"}, {"bytes": None, "path": "2.jpg"}]
    path = write_file(tmp_path / "f" / "0.parquet", {"image": pyarrow.array(rows, HUB_IMAGE)}).parent
    message = refused(path=path, **FILES)
    assert "the files hold no images (2 only name a file elsewhere: write the files' bytes into the column)" in message


def test_images_as_structs_without_paths(prepare, make, tmp_path):
    rows = pyarrow.array([{"bytes": image(make, number)} for number in range(6)])
    status, out = prepare(path=write_file(tmp_path / "0.parquet", {"image": rows}), val_fraction=0.5, **FILES)
    assert status == 0 and len(found_in(out, "train") | found_in(out, "val")) == 6


def test_files_of_other_endings_are_noted(prepare, make, tmp_path, capfd):
    hub_file(tmp_path / "f" / "0.PARQUET", make, {number: number % 2 for number in range(10)})
    for name in ("1.parquet.gz", "2.arrow"):
        make.write(tmp_path / "f" / name, b"x")
    status, out = prepare(path=tmp_path / "f", **FILES)
    assert status == 0 and len(found_in(out, "train") | found_in(out, "val")) == 10
    told = "files that are not .parquet shards by their names are ignored: 1 .arrow, 1 .parquet.gz"
    assert told in capfd.readouterr().err


def test_several_label_columns(prepare, make, tmp_path, capfd):
    rows = [{"bytes": image(make, number), "path": None} for number in range(6)]
    names = {"fine_label": ["apple", "bear", "cat"], "coarse_label": ["plant", "animal"]}
    features = {"img": {"_type": "Image"}}
    features |= {name: {"names": values, "_type": "ClassLabel"} for name, values in names.items()}
    columns = {"img": pyarrow.array(rows, HUB_IMAGE), "fine_label": [0, 1, 2] * 2, "coarse_label": [0, 1, 1] * 2}
    write_file(tmp_path / "f" / "0.parquet", columns, features)
    status, out = prepare(path=tmp_path / "f", **FILES)
    assert status == 0
    assert [entry["name"] for entry in read_index(out)["classes"]] == names["fine_label"]
    assert "labels are those of fine_label (there are fine_label, coarse_label)" in capfd.readouterr().err


def test_a_killed_run_continues_behind_the_last_whole_file(prepare, make, tmp_path, monkeypatch):
    folder = tmp_path / "f"
    for number in range(2):
        hub_file(folder / f"{number}.parquet", make, {10 * number + row: row % 2 for row in range(6)})
    copied = []
    copy = parquet._copy

    def watched(source, *arguments):
        copied.append(source.name)
        if copied == ["0.parquet", "1.parquet"]:
            raise KeyboardInterrupt
        return copy(source, *arguments)

    monkeypatch.setattr(parquet, "_copy", watched)
    assert prepare(path=folder, **FILES)[0] != 0
    hub_file(folder / "1.parquet", make, {30 + row: row % 2 for row in range(6)})
    status, out = prepare(path=folder, **FILES)
    assert status == 0 and copied == ["0.parquet", "1.parquet", "1.parquet"]
    numbers = {start + row: row % 2 for start in (0, 30) for row in range(6)}
    assert found_in(out, "train") | found_in(out, "val") == expected(make, numbers)


BAD = {
    "there is none": (lambda folder, make: folder.mkdir(), "holds no .parquet shards"),
    "no Parquet": (lambda folder, make: make.write(folder / "0.parquet", b"text" * 100), "no Parquet file, or damaged"),
    "LFS pointer": (
        lambda folder, make: make.write(folder / "0.parquet", b"version https://git-lfs.github.com/spec/v1\noid x\n"),
        "git lfs pull",
    ),
    "no images": (
        lambda folder, make: write_file(folder / "0.parquet", {"label": [1, 2], "text": ["a", "b"]}),
        "has no column of images",
    ),
    "two columns of images": (
        lambda folder, make: write_file(folder / "0.parquet", {"a": [b"x"], "b": [b"y"], "label": [1]}),
        "several columns of images (a, b)",
    ),
    "labels of many": (
        lambda folder, make: write_file(folder / "0.parquet", {"image": [image(make, 0)], "label": [[1, 2]]}),
        "column label holds list",
    ),
    "a label is missing": (
        lambda folder, make: hub_file(folder / "0.parquet", make, {0: 0, 1: 1, 2: -1}),
        "0.parquet/000002 has no label (column label), others do",
    ),
    "a label beyond the names": (
        lambda folder, make: hub_file(folder / "0.parquet", make, {0: 0, 1: 3}),
        "label 3, but 3 classes have names",
    ),
    "other names": (
        lambda folder, make: [
            hub_file(folder / f"{number}.parquet", make, {number: 0, 5 + number: 1}, names)
            for number, names in enumerate((NAMES, NAMES[::-1]))
        ],
        "1.parquet has other columns or class names than 0.parquet",
    ),
    "no rows": (
        lambda folder, make: hub_file(folder / "0.parquet", make, {}),
        "the files hold no images",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_refused(refused, make, tmp_path, case):
    build, message = BAD[case]
    build(tmp_path / "f", make)
    assert message in refused(path=tmp_path / "f", **FILES)


def test_a_file_cut_short_is_refused(refused, make, tmp_path):
    path = hub_file(tmp_path / "f" / "0.parquet", make, dict.fromkeys(range(9), 0))
    whole = path.read_bytes()
    path.write_bytes(whole[:100] + bytes(400) + whole[500:])  # pages of images, which the end of the file lists
    assert "damaged" in refused(path=path.parent, **FILES)
    path.write_bytes(whole[:-50])
    assert "no Parquet file, or damaged" in refused(path=path.parent, **FILES)


def test_columns_the_metadata_does_not_name_are_found_by_their_types(prepare, make, tmp_path):
    columns = {"image": pyarrow.array([image(make, number) for number in range(4)], pyarrow.large_binary())}
    columns["label"] = pyarrow.array([7, 7, 3, 3], pyarrow.uint8())
    write_file(tmp_path / "f" / "0.parquet", columns)
    status, out = prepare(path=tmp_path / "f", val_fraction=0.5, **FILES)
    assert status == 0
    assert [entry["id"] for entry in read_index(out)["classes"]] == ["3", "7"]


@pytest.mark.parametrize("values", [["dog", "cat", "dog"], [7, 3, 7]])
def test_labels_as_pandas_categories(prepare, make, tmp_path, values):
    images = {image(make, number): str(values[number % 3]) for number in range(12)}
    columns = {"image": list(images), "label": pyarrow.array(values * 4).dictionary_encode()}
    status, out = prepare(path=write_file(tmp_path / "f" / "0.parquet", columns).parent, **FILES)
    assert status == 0
    assert [entry["id"] for entry in read_index(out)["classes"]] == sorted(set(images.values()))
    assert found_in(out, "train") | found_in(out, "val") == images


def test_a_missing_category_is_a_missing_label(refused, make, tmp_path):
    columns = {"image": [b"x", b"y"], "label": pyarrow.array(["dog", None]).dictionary_encode()}
    path = write_file(tmp_path / "f" / "0.parquet", columns).parent
    assert "0.parquet/000001 has no label (column label)" in refused(path=path, **FILES)
