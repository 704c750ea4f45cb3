"""Oracle: labels as they are written, in the files of Kaggle, the Hugging Face Hub and StyleGAN's tool."""

from __future__ import annotations

import json

import pytest

from crt.data.label_files import is_label_file, open_label_file
from crt.data.packed import PackedImages

LABELS = ["cat", "dog", "cat", "dog", "cat", "dog", "cat", "dog"]


def folder_of(make, root, names=tuple(f"train/{number:03d}.png" for number in range(8))):
    for seed, name in enumerate(names):
        make.write(root / name, make.encode(make.noise(seed)))
    return root


def stored(out) -> dict[str, str]:
    """Class by path, of both splits."""
    parts = [PackedImages(out, split) for split in ("train", "val")]
    return {part.source_id(row): part.class_names[part.labels[row]] for part in parts for row in range(len(part))}


CONTENTS = {
    "labels.csv": "id,breed\n" + "".join(f"{row:03d},{label}\n" for row, label in enumerate(LABELS)),
    "train.csv": ",image_id,x,label\n"
    + "".join(f"{row},{row:03d}.png,0,{label}\n" for row, label in enumerate(LABELS)),
    "x.TSV": "Label\tFilename\n" + "".join(f"{label}\ttrain/{row:03d}.png\n" for row, label in enumerate(LABELS)),
    "metadata.jsonl": "".join(
        json.dumps({"file_name": f"./train/{row:03d}.png", "text": "a pet", "label": label}) + "\n"
        for row, label in enumerate(LABELS)
    ),
}


@pytest.mark.parametrize("name", CONTENTS)
def test_labels_are_those_of_the_file(prepare, make, tmp_path, capfd, name):
    root = folder_of(make, tmp_path / "pets")
    make.write(root / "test" / "900.png", make.encode(make.noise(90)))
    make.write(root / name, CONTENTS[name].encode("utf-8-sig"))
    status, out = prepare(path=root / name)
    assert status == 0
    assert stored(out) == {f"train/{row:03d}.png": label for row, label in enumerate(LABELS)}
    assert "1 images that it does not name are left out" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("paths.csv", "id,label\ntrain/000,cat\ntrain/001,dog\n"),
        ("spaces.csv", "filename , label\n 000.png ,cat\n001.png, dog\n"),
        ("other.csv", "picture,label\n000,cat\n001,dog\n"),
        ("several.csv", "id,file_name,label\n001,000.png,cat\n000,001.png,dog\n"),
        ("blank.jsonl", '{"path": "000.png", "cls": "cat"}\n\n{"path": "001.png", "cls": "dog"}\n'),
    ],
)
def test_images_are_found_by_what_the_file_calls_them(make, tmp_path, name, content):
    root = folder_of(make, tmp_path / "pets")
    make.write(root / "train" / "000.txt", b"a caption, which is no image")
    source = open_label_file(make.write(root / name, content.encode()))
    assert source.class_ids == ["cat", "dog"]
    assert source.splits["all"].ids == ["train/000.png", "train/001.png"]


def test_label_files_are_tables_and_the_one_of_stylegans_tool(make, tmp_path):
    names = ("a.CSV", "a.tsv", "a.jsonl", "dataset.json", "other.json", "a.txt")
    assert [name for name in names if is_label_file(make.write(tmp_path / name, b""))] == list(names[:4])


@pytest.mark.parametrize("labelled", [True, False])
def test_stylegans_labels(prepare, make, tmp_path, labelled):
    names = [f"{row % 2:05d}/img{1000 * (row % 2) + row:08d}.png" for row in range(24)]
    root = folder_of(make, tmp_path / "faces", names)
    labels = [[name, row % 3 + 9] for row, name in enumerate(names)] if labelled else None
    make.write(root / "dataset.json", json.dumps({"labels": labels}).encode())
    status, out = prepare(path=root / "dataset.json")
    assert status == 0
    assert stored(out) == {name: str(row % 3 + 9) if labelled else "images" for row, name in enumerate(names)}
    assert PackedImages(out, "train").class_names == (["9", "10", "11"] if labelled else ["images"])


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        (
            "a.csv",
            "000.png,cat\n001.png,dog\n",
            "columns are 000.png, cat: the first line must name them, that of images",
        ),
        ("a.csv", "file_name,text\n000.png,a cat\n", "columns are file_name, text: the first line must name them"),
        ("a.csv", "filename,label\n000.png,cat\n000.png,dog\n", "gives 000.png two labels, cat and dog: leave one"),
        ("a.csv", "filename,label\n000.png,cat\n900.png,dog\n", "names 1 images that do not lie in"),
        ("a.csv", "filename,label\n000.png,cat\n001.png,\n", "train/001.png has no label"),
        ("a.csv", "filename,label\ntwin,cat\n", "twin may be train/twin.png, twin.png: write its path from"),
        ("a.csv", "filename,label\n", "a.csv: names no images: "),
        ("dataset.json", '{"labels": []}', "dataset.json: names no images: "),
        ("a.csv", "filename,breed,caption\n000.png,cat,a cat\n", "columns are filename, breed, caption: the first"),
        ("a.csv", f"filename,label\n000.png,{'x' * 200_000}\n", "cannot be read as a list of images and labels"),
        ("a.jsonl", '{"file_name": "000.png", "label": true}', "cannot be read as a list of images and labels"),
        ("a.jsonl", '{"file_name": "000.png", "label": 1.0}', "cannot be read as a list of images and labels"),
        ("a.jsonl", "[1]", "cannot be read as a list of images and labels"),
        ("a.jsonl", "[" * 100_000, "cannot be read as a list of images and labels"),
        ("a.csv", "", "columns are : the first line must name them"),
        ("a.jsonl", '{"file_name": "000.png", "label": ["cat"]}', "cannot be read as a list of images and labels"),
        ("a.jsonl", '{"file_name"', "cannot be read as a list of images and labels: fix it or get it again"),
        ("dataset.json", '{"splits": []}', "cannot be read as a list of images and labels"),
        ("dataset.json", '{"labels": [["train/000.png", [0.5, 1]]]}', "cannot be read as a list of images and labels"),
    ],
)
def test_files_that_are_not_right_are_refused(refused, make, tmp_path, name, content, told):
    root = folder_of(make, tmp_path / "pets")
    folder_of(make, root, ("train/twin.png", "twin.png"))
    make.write(root / name, content.encode())
    assert told in refused(path=root / name)
