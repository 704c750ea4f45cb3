"""Oracle: labels as they are written, in the files of Kaggle, the Hugging Face Hub and StyleGAN's tool."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

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
        ("paths.csv", "id,label\ntrain/000,cat\ntrain/001,dog\n000.png,cat\n"),
        ("spaces.csv", "filename , label\n 000.png ,cat\n001.png, dog\n"),
        ("other.csv", "picture,label\n000,cat\n001,dog\n"),
        ("several.csv", "id,file_name,label\n001,000.png,cat\n000,001.png,dog\n"),
        ("semicolons.csv", "filename;label\n000.png;cat\n001.png;dog\n"),
        ("tabs.csv", "filename\tlabel\n000.png\tcat\n001.png\tdog\n"),
        ("commas.tsv", "filename\tpet, tame, or not\n000.png\tcat\n001.png\tdog\n"),
        ("windows.csv", "filename,label\ntrain\\000.png,cat\n.\\train\\001.png,dog\n"),
        ("from above.csv", "filename,label\npets/train/000.png,cat\npets/train/001.png,dog\n"),
        ("blank.jsonl", '{"path": "000.png", "cls": "cat"}\n\n{"path": "001.png", "cls": "dog"}\n'),
    ],
)
def test_images_are_found_by_what_the_file_calls_them(make, tmp_path, name, content):
    root = folder_of(make, tmp_path / "pets")
    make.write(root / "train" / "000.txt", b"a caption, which is no image")
    source = open_label_file(make.write(root / name, content.encode()))
    assert source.class_ids == ["cat", "dog"]
    assert source.splits["all"].ids == ["train/000.png", "train/001.png"]
    assert source.notes == [f"{root / name}: 6 images that it does not name are left out"]


def test_images_may_be_called_by_absolute_paths_also_through_links(make, tmp_path):
    root = folder_of(make, tmp_path / "pets")
    (tmp_path / "link").symlink_to(root)
    for folder in (root, tmp_path / "link"):
        make.write(root / "a.csv", f"path,label\n{root}/train/000.png,cat\n{folder}/train/001.png,dog\n".encode())
        assert open_label_file(folder / "a.csv").splits["all"].ids == ["train/000.png", "train/001.png"]


def test_a_path_that_is_there_counts_before_what_else_it_may_mean(make, tmp_path):
    root = folder_of(make, tmp_path / "pets", ("pets/0.png", "0.png", "b/1.png", "b\\1.png"))
    for name in ("pets/0.png", "0.png", "b\\1.png"):
        source = open_label_file(make.write(root / "a.csv", f"filename,label\n{name},cat\n".encode()))
        assert source.splits["all"].ids == [name]


SPLIT_LINES = list(zip(["train", "train", "valid", "valid", "test", "Train"], LABELS, strict=False))


def split_table(column: str, lines: list[tuple[str, str]] = SPLIT_LINES) -> bytes:
    rows = [f"{row:03d}.png,{label},{split}" for row, (split, label) in enumerate(lines)]
    return "\n".join([f"filename,label,{column}", *rows, ""]).encode()


def test_a_column_of_splits_tells_the_splits(prepare, make, tmp_path, capfd):
    root = folder_of(make, tmp_path / "pets")
    status, out = prepare(path=make.write(root / "a.csv", split_table("Split")))
    assert status == 0
    parts = [PackedImages(out, split) for split in ("train", "val")]
    found = [{part.source_id(row)[-7:-4] for row in range(len(part))} for part in parts]
    assert found == [{"000", "001", "005"}, {"002", "003"}]
    assert stored(out)["train/005.png"] == "dog"
    assert "the images of test are not used, validation images are those of val" in capfd.readouterr().err


def test_labels_that_unused_images_lack_are_no_matter(make, tmp_path):
    root = folder_of(make, tmp_path / "pets")
    lines = [(split, "" if split == "test" else label) for split, label in SPLIT_LINES]
    source = open_label_file(make.write(root / "a.csv", split_table("subset", lines)))
    assert source.class_ids == ["cat", "dog"]
    assert {split: len(listing) for split, listing in source.splits.items()} == {"train": 3, "val": 2}


def test_images_of_training_and_test_alone(make, tmp_path):
    root = folder_of(make, tmp_path / "pets")
    lines = [(split, label) for split, label in SPLIT_LINES if split != "valid"]
    source = open_label_file(make.write(root / "a.csv", split_table("split", lines)))
    assert {split: listing.ids for split, listing in source.splits.items()} == {
        "train": [f"train/{row:03d}.png" for row in (0, 1, 3)],
        "val": ["train/002.png"],
    }


@pytest.mark.parametrize(("folder", "splits"), [("valid", {"train", "val"}), ("more", {"all"}), ("", {"all"})])
def test_folders_of_splits_tell_them_where_no_column_does(make, tmp_path, folder, splits):
    """As the Hugging Face library splits image folders with one table for all."""
    names = [*(f"Train/{row % 2}/{row}.png" for row in range(3))]
    names += [*(f"{folder}/{row}.png".lstrip("/") for row in range(3, 6))]
    root = folder_of(make, tmp_path / "pets", names)
    table = "".join(f"{name},{label}\n" for name, label in zip(names, LABELS, strict=False))
    source = open_label_file(make.write(root / "metadata.csv", f"file_name,label\n{table}".encode()))
    assert set(source.splits) == splits
    if "val" in splits:
        assert source.splits["val"].ids == ["valid/4.png", "valid/3.png", "valid/5.png"]
        assert any("splits are those of the images' folders, Train, valid" in note for note in source.notes)


def test_a_column_of_splits_counts_before_folders(make, tmp_path):
    root = folder_of(make, tmp_path / "pets", ("train/0.png", "val/1.png"))
    table = b"image,label,split\n0,a,val\n1,a,train\n"
    assert open_label_file(make.write(root / "a.csv", table)).splits["val"].ids == ["train/0.png"]


def test_tables_of_one_name_in_the_folders_of_splits_are_read_together(prepare, make, tmp_path, capfd):
    """As the Hugging Face library finds them; images of different splits may be called alike."""
    root = folder_of(make, tmp_path / "pets", [f"{split}/{row}.png" for split in ("train", "val") for row in range(4)])
    for split, labels in (("train", "abab"), ("val", "bbaa")):
        lines = "".join(f"{row}.png,{label}\n" for row, label in enumerate(labels))
        make.write(root / split / "metadata.csv", f"file_name,label\n{lines}".encode())
    make.write(root / "test" / "metadata.csv", b"file_name\n0.png\n")
    status, out = prepare(path=root / "train" / "metadata.csv", storage="encoded", image_size=None)
    assert status == 0
    for split, labels in (("train", "abab"), ("val", "bbaa")):
        part = PackedImages(out, split)
        found = {part.source_id(row): (part.class_names[part.labels[row]], part.image(row)) for row in range(4)}
        assert {name: label for name, (label, _) in found.items()} == {f"{n}.png": x for n, x in enumerate(labels)}
        seeds = {f"{row}.png": row + 4 * (split == "val") for row in range(4)}
        assert all((image == make.noise(seeds[name])).all() for name, (_, image) in found.items())
    said = capfd.readouterr().err
    assert f"{root}/train/metadata.csv: beside it metadata.csv of val is read: splits are those of the folders" in said
    assert f"{root}/test/metadata.csv: columns are file_name: not read, since labels are not among them" in said


@pytest.mark.parametrize("folder", ["val", "cats"])
def test_only_a_table_of_training_images_has_others_read(make, tmp_path, folder):
    root = folder_of(make, tmp_path / "pets", [f"{name}/{row}.png" for name in (folder, "valid") for row in range(2)])
    for name in (folder, "valid"):
        make.write(root / name / "a.csv", b"image,label\n0,a\n1,b\n")
    source = open_label_file(root / folder / "a.csv")
    assert list(source.splits) == ["all"] and len(source.splits["all"]) == 2


def test_a_table_with_a_column_of_splits_is_read_alone(make, tmp_path):
    root = folder_of(make, tmp_path / "pets", [f"{name}/{row}.png" for name in ("train", "val") for row in range(2)])
    for name in ("train", "val"):
        make.write(root / name / "a.csv", b"image,label,split\n0,a,train\n1,a,val\n")
    source = open_label_file(root / "train" / "a.csv")
    assert [source.splits[split].ids for split in ("train", "val")] == [["0.png"], ["1.png"]]
    assert len(source.containers) == 1


def test_the_folder_of_a_table_is_known_where_its_path_does_not_name_it(make, tmp_path, monkeypatch):
    root = folder_of(make, tmp_path, [f"{name}/{row}.png" for name in ("Train", "VAL") for row in range(2)])
    for name, labels in (("Train", "ab"), ("VAL", "ba")):
        make.write(root / name / "a.csv", "image,label\n0,{}\n1,{}\n".format(*labels).encode())
    monkeypatch.chdir(root / "Train")
    source = open_label_file(Path("a.csv"))
    found = {split: dict(zip(part.ids, part.labels.tolist(), strict=True)) for split, part in source.splits.items()}
    assert found == {"train": {"0.png": 0, "1.png": 1}, "val": {"0.png": 1, "1.png": 0}}


@pytest.mark.parametrize("values", [["0", "1", "2"], ["train", "", "train"]])
def test_a_column_of_splits_that_names_none_is_noted(make, tmp_path, values):
    root = folder_of(make, tmp_path / "pets")
    table = split_table("partition ", [(value, "cat") for value in values])
    source = open_label_file(make.write(root / "a.csv", table))
    assert list(source.splits) == ["all"]
    assert len(source.splits["all"]) == 3
    strange = next(value for value in values if value != "train")
    assert any(f"column partition is not read, for {strange!r} is none of train" in note for note in source.notes)


def test_label_files_are_told_by_their_endings(make, tmp_path):
    names = ("a.CSV", "a.tsv", "a.jsonl", "dataset.json", "other.json", "a.txt", "a.lst", "a.mat", "a.xlsx", "a.png")
    assert [name for name in names if is_label_file(make.write(tmp_path / name, b""))] == list(names[:-2])
    (tmp_path / "folder.csv").mkdir()
    assert not is_label_file(tmp_path / "folder.csv")


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
            "90.png,cat\n91.png,dog\n",
            "columns are 90.png, cat: the first line must name them, that of images",
        ),
        ("a.csv", "file_name,text\n000.png,a cat\n", "columns are file_name, text: the first line must name them"),
        ("a.csv", "filename,label\n000.png,cat\n000.png,dog\n", "gives 000.png two labels, cat and dog: leave one"),
        ("a.csv", "filename,label\n000.png,cat\n900.png,dog\n", "names 1 images that do not lie in"),
        ("a.csv", "filename,label\n000.png,cat\n001.png,\n", "train/001.png has no label"),
        ("a.csv", "filename,label\ntwin,cat\n", "twin may be train/twin.png, twin.png: write its path from"),
        ("a.csv", "filename,label\ntwin,cat\n", "or move the others out of it"),
        ("a.csv", "image_id,partition\n000.png,0\n", "columns are image_id, partition: the first line must name them"),
        ("a.csv", "image,label,split\n000,a,train\n000,a,test\n", "gives 000 two splits, train and test: leave one"),
        ("a.csv", "filename,label\n000.png,\udce4\n", "is not UTF-8 text: save it as UTF-8"),
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
        ("a.jsonl", '{"file_name": "000.png", "label": {"cat": 1}}', "cannot be read as a list of images and labels"),
        ("a.jsonl", '{"file_name"', "cannot be read as a list of images and labels: fix it or get it again"),
        ("dataset.json", '{"splits": 0.5}', "cannot be read as a list of images and labels"),
        ("dataset.json", '{"labels": [["train/000.png", [0.5, 1]]]}', "cannot be read as a list of images and labels"),
    ],
)
def test_files_that_are_not_right_are_refused(refused, make, tmp_path, name, content, told):
    root = folder_of(make, tmp_path / "pets")
    folder_of(make, root, ("train/twin.png", "twin.png"))
    make.write(root / name, content.encode("utf-8", "surrogateescape"))
    assert told in refused(path=root / name)


NUMBERED = tuple(f"jpg/image_{number:05d}.png" for number in range(1, 7))
PAIRS = {name: str(row % 2 + 1) for row, name in enumerate(NUMBERED)}
STEMS = {Path(name).stem: label for name, label in PAIRS.items()}


def lines_of(pairs: dict[str, str], form: str) -> str:
    return "".join(form.format(name, label) + "\n" for name, label in pairs.items())


def coco(pairs: dict[str, str], names: dict[str, str]) -> str:
    return json.dumps(
        {
            "images": [{"id": row, "file_name": name} for row, name in enumerate(pairs)],
            "annotations": [{"image_id": row, "category_id": int(label)} for row, label in enumerate(pairs.values())],
            "categories": [{"id": int(label), "name": name} for label, name in names.items()],
        }
    )


LISTS = {
    "list.txt": lines_of(PAIRS, "{} {}"),
    "slashes.txt": lines_of({f"/{name}": label for name, label in PAIRS.items()}, "{} {}"),
    "stems.lst": "# two classes\n\n" + lines_of(STEMS, "{}\t{}"),
    "commas.txt": lines_of(STEMS, "{}.png, {}"),
    "behind.txt": lines_of(STEMS, "{1} jpg/{0}.png"),
    "headless.csv": lines_of(STEMS, "{}.png,{}"),
    "headless.tsv": lines_of(STEMS, "{}.png\t{}"),
    "celeba.txt": "6\nlabel\n" + lines_of(STEMS, "{}.png  {}"),
    "products.txt": "image_id class_id super_class_id path\n"
    + "".join(f"{row} {label} 7 {name}\n" for row, (name, label) in enumerate(PAIRS.items())),
    "pets.txt": "#Image CLASS-ID SPECIES BREED\n"
    + "".join(f"{name} {x} {3 - int(x)} 1\n" for name, x in STEMS.items()),
    "alone.txt": lines_of(PAIRS, "{1}"),
    "mapping.json": json.dumps(STEMS),
    "classes.json": json.dumps({x: [name for name in STEMS if STEMS[name] == x] for x in "21"}),
    "rows.json": json.dumps([{"image": name, "label": int(label)} for name, label in PAIRS.items()]),
    "coco.json": coco(PAIRS, {}),
    "labels.json": json.dumps({"labels": [[name, int(label)] for name, label in PAIRS.items()]}),
    "one_hot.csv": "image_id,1,2\n" + "".join(f"{name},{2 - int(x)},{int(x) - 1}.0\n" for name, x in STEMS.items()),
    "kaggle.csv": "id_code,diagnosis\n" + lines_of(STEMS, "{},{}"),
    "signs.csv": "Width;ClassId;Path\n" + lines_of(PAIRS, "30;{1};{0}"),
}


@pytest.mark.parametrize("name", LISTS)
def test_lists_as_data_sets_have_them(make, tmp_path, name):
    root = folder_of(make, tmp_path / "pets", NUMBERED)
    source = open_label_file(make.write(root / name, LISTS[name].encode()))
    assert source.class_ids == ["1", "2"]
    listing = source.splits["all"]
    assert {path: source.class_ids[x] for path, x in zip(listing.ids, listing.labels, strict=True)} == PAIRS


@pytest.mark.parametrize(
    ("name", "content", "labels"),
    [
        (
            "maker.txt",
            "image_00001 Boeing\nimage_00002 Douglas Aircraft Company\n",
            ["Boeing", "Douglas Aircraft Company"],
        ),
        ("quotes.csv", 'image_00001,"cat, tame"\nimage_00002,dog\n', ["cat, tame", "dog"]),
        ("blanks.txt", "my cat.png 1\nimage_00001.png 2\n", ["1", "2"]),
        ("coco.json", coco(PAIRS, {"1": "cat", "2": "dog"}), ["cat", "dog"]),
        ("same.json", coco(PAIRS, {"1": "cat", "2": "cat"}), ["1", "2"]),
    ],
)
def test_labels_are_called_as_the_list_has_them(make, tmp_path, name, content, labels):
    root = folder_of(make, tmp_path / "pets", (*NUMBERED, "my cat.png"))
    assert open_label_file(make.write(root / name, content.encode())).class_ids == labels


@pytest.mark.parametrize("start", [0, 1])
def test_a_vector_of_a_matlab_file_labels_numbered_images(make, tmp_path, start):
    """As of Flowers-102."""
    root = folder_of(make, tmp_path / "flowers", [f"jpg/image_{row + start:05d}.png" for row in range(12)])
    numbers = np.arange(12) % 3 + 8
    (root / "imagelabels.mat").parent.mkdir(exist_ok=True)
    savemat(root / "imagelabels.mat", {"labels": numbers.astype(np.uint8), "names": "x", "half": numbers + 0.5})
    source = open_label_file(root / "imagelabels.mat")
    assert source.class_ids == ["8", "9", "10"]
    listing = source.splits["all"]
    found = {path: source.class_ids[x] for path, x in zip(listing.ids, listing.labels, strict=True)}
    assert found == {f"jpg/image_{row + start:05d}.png": str(row % 3 + 8) for row in range(12)}
    assert any("its labels are those of the images by their numbers, jpg/image_0000" in note for note in source.notes)


def test_images_lie_beside_a_folder_of_annotations_and_masks_are_none(make, tmp_path):
    """As of Oxford's pets."""
    names = [
        f"{kind}/{name}_{row}.png" for kind in ("images", "annotations/trimaps") for name in "ab" for row in (1, 2)
    ]
    root = folder_of(make, tmp_path / "pets", names)
    content = "".join(f"{name}_{row} {label} 1\n" for label, name in enumerate("ab") for row in (1, 2))
    source = open_label_file(make.write(root / "annotations" / "list.txt", content.encode()))
    assert source.splits["all"].ids == names[:4]
    assert f"{root}/annotations/list.txt: its images are looked for in {root} and below" in source.notes


def test_images_may_lie_beside_the_folder_of_a_list(make, tmp_path, monkeypatch):
    """As of Places365."""
    root = folder_of(make, tmp_path / "places", ["data/a/x/1.png", "data/b/x/1.png"])
    make.write(root / "filelist" / "train.txt", b"/a/x/1.png 0\n/b/x/1.png 1\n")
    for path in (root / "filelist" / "train.txt", Path("train.txt")):
        monkeypatch.chdir(root / "filelist")
        assert open_label_file(path).splits["all"].ids == ["data/a/x/1.png", "data/b/x/1.png"]


def test_fastais_column_tells_splits(make, tmp_path):
    root = folder_of(make, tmp_path / "pets", NUMBERED)
    content = "name,label,is_valid\n" + "".join(
        f"{name},{label},{name == 'image_00003'}\n" for name, label in STEMS.items()
    )
    source = open_label_file(make.write(root / "a.csv", content.encode()))
    assert source.splits["val"].ids == ["jpg/image_00003.png"] and len(source.splits["train"]) == 5


BAD_LISTS = [
    ("a.txt", "image_00001\nimage_00002\n", "names images alone: give a file that has their labels too, or set"),
    ("a.txt", lines_of(STEMS, "{} 1 2 {}"), "has several columns and no line that names them: write one that calls"),
    (
        "a.txt",
        "".join(f"{name} {row % 2}.5 {row}\n" for row, name in enumerate(STEMS)),
        "has several columns and no line",
    ),
    ("a.txt", "".join(f"{row} {name}\n" for row, name in enumerate(PAIRS)), "gives each image a label of its own, so"),
    ("a.txt", "900.png 1\n901.png 1\n", "a.txt: none of its first lines names an image that lies with it: put it"),
    ("a.txt", "90.png 1\nimage_00001.png 2 3\n", "90.png 1 names no image that lies with it: remove what is no label"),
    ("a.txt", "90.png 1\nimage_00001.png 2\n", "90.png 1 names no image that lies with it: remove what is no label"),
    ("a.txt", "", "a.txt: none of its first lines names an image that lies with it"),
    ("a.txt", lines_of(STEMS, "{} {}") + "image_00009 1\n", "names 1 images that do not lie in"),
    ("a.txt", "1\n2\n1\n", "a.txt: holds 3 labels and names no images, and the 6 images with it are not numbered"),
    ("list_eval_partition.txt", lines_of(STEMS, "{} {}"), "tells splits, by its name, not labels: give the file of"),
    (
        "celeba.txt",
        "6\nMale Young\n" + lines_of(STEMS, "{}.png -1 {}"),
        "columns are file_name, Male, Young: the first",
    ),
    ("a.csv", "image,x,y\nimage_00001,1,1\n", "image_00001 has a 1 in 2 of 2 columns, and images have one class each"),
    ("a.csv", "image,x,y\nimage_00001,0,0\n", "image_00001 has a 1 in 0 of 2 columns, and images have one class each"),
    ("a.csv", "label,pixel0,pixel1\n1,0,0\n", "holds the pixels of images, which are not read from tables: get the"),
    ("a.csv", "emotion,pixels,Usage\n1,0 0,Training\n", "holds the pixels of images, which are not read from tables"),
    ("a.json", '{"images": [{"id": 0, "file_name": "a.png"}]}', "has images without annotations: give the file of"),
    ("a.json", '{"images": [], "annotations": [{"image_id": 1, "category_id": 1}]}', "cannot be read as a list of"),
    ("a.json", '{"image_00001": 0.5}', "cannot be read as a list of images and labels"),
    ("a.json", '{"1": [7]}', "names 1 images that do not lie in"),
    ("a.json", "1", "cannot be read as a list of images and labels"),
    ("a.json", '"images"', "cannot be read as a list of images and labels"),
    ("a.json", "{}", "a.json: names no images: fix it or get it again"),
    ("a.txt", "image_00001\t\nimage_00002\t1\n", "jpg/image_00001.png has no label"),
    ("a.json", '{"": ["image_00001"], "1": ["image_00002"]}', "jpg/image_00001.png has no label"),
    ("a.mat", "x" * 200, "a.mat: is no .mat file of version 5 or later"),
]


@pytest.mark.parametrize(("name", "content", "told"), BAD_LISTS)
def test_lists_that_do_not_tell_labels_are_refused(refused, make, tmp_path, name, content, told):
    root = folder_of(make, tmp_path / "pets", NUMBERED)
    assert told in refused(path=make.write(root / name, content.encode()))


def test_detections_of_several_classes_are_no_labels(refused, make, tmp_path):
    root = folder_of(make, tmp_path / "pets", NUMBERED)
    content = json.loads(coco(PAIRS, {}))
    content["annotations"].append({"image_id": 0, "category_id": 5})
    told = "gives jpg/image_00001.png two labels, 1 and 5: leave one"
    assert told in refused(path=make.write(root / "a.json", json.dumps(content).encode()))


@pytest.mark.parametrize(
    "vectors", [{"x": np.arange(5)}, {"x": np.arange(6), "y": np.ones(6)}, {"x": np.full(6, np.nan)}]
)
def test_matlab_files_without_one_vector_of_labels_are_refused(refused, make, tmp_path, vectors):
    root = folder_of(make, tmp_path / "pets", NUMBERED)
    savemat(root / "a.mat", vectors)
    count = "2" if len(vectors) == 2 else "no"
    assert f"holds {count} vectors of labels for the 6 images with it: write a .csv file" in refused(
        path=root / "a.mat"
    )
