"""Oracle: Parquet files in the Hugging Face Hub's layout, whose labels and images are known."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from crt.data import parquet
from crt.data.packed import PackedImages, read_index
from crt.errors import UserError
from crt.files import write_json
from tests.conftest import in_ascii_locale

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


def test_configurations_of_one_split_alone_are_noted(tmp_path):
    for name in ("a/test", "cropped/train", "full/train", "x/b/train"):
        write_file(tmp_path / f"{name}.parquet", {"image": [b"x"]})
    told = "files of one split lie in folders cropped, full, x/b, and all are used"
    assert any(told in note for note in parquet.open_parquet(tmp_path, tmp_path).notes)


def test_images_whose_labels_are_all_hidden_are_one_class(prepare, make, tmp_path):
    status, out = prepare(
        path=hub_file(tmp_path / "test.parquet", make, dict.fromkeys(range(4), -1)), val_fraction=0.5, **FILES
    )
    assert status == 0
    assert read_index(out)["classes"] == [{"id": "images", "name": "images"}]


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


@pytest.mark.parametrize("features", [None, {name: {"_type": "ClassLabel"} for name in ("class", "label")}])
def test_of_several_label_columns_the_one_called_label_counts(tmp_path, features):
    path = write_file(tmp_path / "0.parquet", {"image": [b"x", b"y"], "class": [1, 1], "label": [5, 3]}, features)
    source = parquet.open_parquet(path, tmp_path)
    assert source.class_ids == ["3", "5"]
    assert any("labels are those of label (there are " in note for note in source.notes)


def test_images_are_the_column_that_the_metadata_calls_so_and_that_holds_files(prepare, make, tmp_path):
    images = [image(make, number) for number in range(6)]
    columns = {"mask": [b"mask"] * 6, "thumbnail": ["0.jpg"] * 6, "photo": images, "label": [0, 1] * 3}
    features = {name: {"_type": "Image"} for name in ("thumbnail", "photo")}
    status, out = prepare(path=write_file(tmp_path / "0.parquet", columns, features), val_fraction=0.5, **FILES)
    assert status == 0
    assert set(found_in(out, "train") | found_in(out, "val")) == set(images)


def test_a_struct_without_bytes_holds_no_images(prepare, make, tmp_path):
    images = [image(make, number) for number in range(6)]
    columns = {"image": images, "extra": [{"thumbnail": b"x"}] * 6}
    status, out = prepare(path=write_file(tmp_path / "0.parquet", columns), val_fraction=0.5, **FILES)
    assert status == 0
    assert set(found_in(out, "train") | found_in(out, "val")) == set(images)


@pytest.mark.parametrize(
    "metadata",
    [
        b"no JSON",
        b"[]",
        b'{"info": null}',
        b'{"info": {"features": ["image"]}}',
        b'{"info": {"features": {"image": "Image", "label": 3}}}',
        b'{"info": {"features": {"label": {"_type": "ClassLabel", "num_classes": 2}}}}',
    ],
)
def test_metadata_of_another_form_says_nothing(make, tmp_path, metadata):
    table = pyarrow.table({"image": [b"x", b"y"], "label": ["dog ", " cat"]})
    pyarrow.parquet.write_table(table.replace_schema_metadata({b"huggingface": metadata}), tmp_path / "0.parquet")
    assert parquet.open_parquet(tmp_path / "0.parquet", tmp_path).class_ids == ["cat", "dog"]


def test_labels_of_long_text_are_read(tmp_path):
    columns = {"image": [b"x", b"y"], "label": pyarrow.array(["b", "a"], pyarrow.large_string())}
    assert parquet.open_parquet(write_file(tmp_path / "0.parquet", columns), tmp_path).class_ids == ["a", "b"]


def copied_images(folder: Path, work: Path) -> list[bytes]:
    """What lies at the places of the images, of all splits."""
    source = parquet.open_parquet(folder, work)
    found = []
    for listing in source.splits.values():
        for place in listing.places:
            content = Path(source.containers[place["container"]].path).read_bytes()
            found.append(content[place["offset"] :][: place["size"]])
    return found


def test_copies_are_of_the_files_as_they_are_now(tmp_path):
    work = tmp_path / "work"
    work.mkdir()
    first, second = (tmp_path / "f" / name for name in ("0.parquet", "1.parquet"))
    for path, content in ((first, b"aaaa"), (second, b"bbbb")):
        write_file(path, {"image": [content]})
        os.utime(path, ns=(0, 0))
    assert first.stat().st_size == second.stat().st_size
    assert copied_images(tmp_path / "f", work) == [b"aaaa", b"bbbb"]
    first.unlink()
    assert copied_images(tmp_path / "f", work) == [b"bbbb"]
    write_file(second, {"image": [b"cccc"]})
    assert copied_images(tmp_path / "f", work) == [b"cccc"]
    (work / "parquet" / "00000.images").unlink()
    assert copied_images(tmp_path / "f", work) == [b"cccc"]
    for record in ("{", "{}", "[]"):
        (work / "parquet" / "00000.json").write_text(record)
        assert copied_images(tmp_path / "f", work) == [b"cccc"]


def test_the_record_of_a_copy_is_read_in_every_locale(tmp_path):
    record = {"of": ["ä.parquet"], "sizes": [4], "labels": ["ü"], "with_path": 0}
    write_json(tmp_path / "record.json", record)
    in_ascii_locale(
        "-c",
        "from pathlib import Path; from crt.data.parquet import _read_record\n"
        f"assert _read_record(Path({str(tmp_path / 'record.json')!r})) == {record!a}",
    )


def test_a_copy_that_failed_in_the_place_of_another_leaves_no_record_of_that(tmp_path):
    write_file(tmp_path / "f" / "1.parquet", {"image": [b"aaaa"]})
    assert copied_images(tmp_path / "f", tmp_path) == [b"aaaa"]
    damaged = write_file(tmp_path / "f" / "0.parquet", {"image": [bytes([row]) * 4000 for row in range(9)]})
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:100] + bytes(400) + whole[500:])
    with pytest.raises(UserError, match="damaged"):
        copied_images(tmp_path / "f", tmp_path)
    damaged.unlink()
    assert copied_images(tmp_path / "f", tmp_path) == [b"aaaa"]


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
    "a label below the Hub's -1": (
        lambda folder, make: hub_file(folder / "0.parquet", make, {0: 0, 1: -2}),
        "label -2, but 3 classes have names",
    ),
    "a label of spaces": (
        lambda folder, make: write_file(folder / "0.parquet", {"image": [b"x", b"y"], "label": ["dog", " "]}),
        "0.parquet/000001 has no label (column label)",
    ),
    "no images in one split": (
        lambda folder, make: [
            hub_file(folder / "train.parquet", make, {0: 0}),
            hub_file(folder / "val.parquet", make, {}),
        ],
        "the files of val hold no images",
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


ARROW = {**FILES, "source": "arrow"}


def arrow_file(path: Path, make, labels: dict[int, int], writer=pyarrow.ipc.new_stream) -> Path:
    """The same rows as of `hub_file`, as the Hub's library saves them to disk."""
    table = pyarrow.parquet.read_table(hub_file(path.with_suffix(".tmp"), make, labels)).combine_chunks()
    path.with_suffix(".tmp").unlink()
    with writer(str(path), table.schema) as out:
        out.write_table(table, max_chunksize=4)
    return path


@pytest.mark.parametrize("writer", [pyarrow.ipc.new_stream, pyarrow.ipc.new_file])
def test_arrow_files_as_the_hubs_library_saves_them(prepare, make, tmp_path, monkeypatch, capfd, writer):
    monkeypatch.setattr(parquet, "_BATCH_ROWS", 3)
    folder, train = tmp_path / "saved", {number: (2, 0)[number % 2] for number in range(14)}
    parts = [{number: label for number, label in train.items() if number // 7 == part} for part in (0, 1)]
    for number, labels in enumerate(parts):
        arrow_file(folder / "train" / f"data-{number:05d}-of-00002.arrow", make, labels, writer)
    arrow_file(folder / "test" / "data-00000-of-00001.arrow", make, {50: 0, 51: 2}, writer)
    arrow_file(folder / "train" / "cache-0123456789abcdef.arrow", make, dict.fromkeys(range(7), 1), writer)
    for name in ("dataset_dict.json", "train/state.json", "train/dataset_info.json"):
        make.write(folder / name, b"{}")
    status, out = prepare(path=folder, **ARROW)
    assert status == 0
    assert read_index(out)["classes"] == [{"id": "0", "name": "tench"}, {"id": "2", "name": "great white shark"}]
    assert found_in(out, "train") == expected(make, train)
    assert found_in(out, "val") == expected(make, {50: 0, 51: 2})
    told = capfd.readouterr().err
    assert "cached results of other steps are left out: train/cache-0123456789abcdef.arrow" in told


def test_one_arrow_file_alone_whatever_it_is_called(prepare, make, tmp_path, capfd):
    path = arrow_file(tmp_path / "cache-0.ARROW", make, {number: number % 2 for number in range(10)})
    for source in (path, path.parent):
        status, out = prepare(path=source, out=tmp_path / "out" / source.name, **ARROW)
        assert status == 0 and len(found_in(out, "train") | found_in(out, "val")) == 10
    assert "left out" not in capfd.readouterr().err


def test_a_file_beside_arrow_files_is_none(refused, make, tmp_path):
    path = make.write(tmp_path / "saved" / "state.json", b"{}")
    assert "state.json: no .arrow file: set prepare_data.path to one, or to the folder" in refused(path=path, **ARROW)


def test_arrow_files_that_are_not_whole_are_refused(refused, make, tmp_path):
    """A stream that ends between two batches would be read as one of fewer images."""
    path = arrow_file(tmp_path / "f" / "0.arrow", make, dict.fromkeys(range(9), 0))
    whole = path.read_bytes()
    ends = [len(whole) - 8, len(whole) // 2, 8, 0]
    for content in (*(whole[:end] for end in ends), b"text" * 100, whole[:40] + bytes(400) + whole[440:]):
        path.write_bytes(content)
        message = refused(path=path.parent, **ARROW)
        assert "0.arrow: " in message and "damaged" in message
    offsets = np.cumsum([0, *(len(image(make, number)) for number in range(4))], dtype="<i4").tobytes()
    assert whole.count(offsets) == 1
    path.write_bytes(whole.replace(offsets, offsets[:4] + np.array([2**30], "<i4").tobytes() + offsets[8:]))
    assert "0.arrow: no Arrow file, or damaged (" in refused(path=path.parent, **ARROW)
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid x\n")
    assert "git lfs pull" in refused(path=path.parent, **ARROW)


@pytest.mark.parametrize(("source", "other"), [("arrow", "parquet"), ("parquet", "arrow")])
def test_the_other_kind_of_files_is_pointed_at(refused, make, tmp_path, source, other):
    make.write(tmp_path / "f" / f"0.{other}", b"x")
    told = f"set prepare_data.source to {other} to read images inside these files"
    assert refused(path=tmp_path / "f", **{**FILES, "source": source}).endswith(f"or {told}")


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
