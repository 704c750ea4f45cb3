"""inspect, verify and import_codes as a user calls them."""

from __future__ import annotations

import errno
import json
import os
import pickle
import re
import shutil

import numpy as np
import pytest
from PIL import Image
from scipy.stats import entropy

from crt.__main__ import main
from crt.data.packed import PackedImages
from crt.manifest import read_current
from crt.params import load_params
from crt.pipeline import stage_version
from crt.tokens.cache import TokenCache
from tests.conftest import ROOT


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def tokens(small_project):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        out = small_project.folder / "tokens"
        assert main(small_project.command(out)) == 0
    return out


def command(*arguments):
    return main([str(argument) for argument in arguments])


def errors(capsys):
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]


def test_inspect_prints_what_the_cache_holds(tokens, capsys):
    assert command("inspect", tokens) == 0
    text = capsys.readouterr().out
    cache = TokenCache(tokens, "train")
    counts = np.bincount(np.asarray(cache.array).reshape(-1), minlength=300)
    assert f"made by tokenize version {stage_version('tokenize')}" in text
    assert f"{len(cache)} images x 2 views x 16 tokens (4 x 4)" in text
    assert "center, flip" in text
    assert f"{(counts > 0).sum()} of 300" in text
    assert f"{entropy(counts, base=2):.3f} bits of at most {np.log2(300):.3f}" in text
    assert cache.tokenizer_content in text
    assert cache.data_content in text
    position = np.bincount(np.asarray(cache.array[:, :, 0]).reshape(-1))
    assert f"\n    {entropy(position, base=2):5.2f} " in text
    assert "val.h5" in text


def test_picture_shows_originals_beside_decoded_codes(small_project, tokens, tmp_path, capsys):
    out = tmp_path / "picture.png"
    assert (
        command(
            "inspect",
            tokens / "train.h5",
            "--data",
            small_project.data,
            "--tokenizer",
            small_project.tokenizer,
            "--out",
            out,
        )
        == 0
    )
    assert "gives 100.00% of the codes" in capsys.readouterr().out
    picture = np.asarray(Image.open(out).convert("RGB"))
    # Cells are enlarged to 64 px: the first original must stand in the picture pixel by pixel.
    original = PackedImages(small_project.data, "train").image(0).repeat(4, axis=0).repeat(4, axis=1)
    windows = np.lib.stride_tricks.sliding_window_view(picture[:80], original.shape)[:, :, 0]
    assert (windows == original).all(axis=(2, 3, 4)).any()


def test_a_picture_on_a_full_disk_leaves_the_old_one(small_project, tokens, tmp_path, capsys, monkeypatch):
    out = tmp_path / "picture.png"
    out.write_bytes(b"old")

    def full(image, path):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr("crt.commands.inspect.save_png", full)
    inputs = ["--data", small_project.data, "--tokenizer", small_project.tokenizer]
    assert command("inspect", tokens / "train.h5", *inputs, "--out", out) == 2
    assert "No space left" in capsys.readouterr().err
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir() if path.is_file()] == [(out.name, b"old")]


def test_picture_needs_the_cache_s_own_inputs(small_project, encoded_project, tokens, tmp_path, capsys):
    other = tmp_path / "tokenizer"
    small_project.publish_tokenizer(1, other)
    out = tmp_path / "picture.png"
    assert command("inspect", tokens, "--data", small_project.data, "--tokenizer", other, "--out", out) == 2
    told = capsys.readouterr()
    assert "is not the tokenizer that made the codes" in told.err
    assert told.out == ""  # before the counting, which may take minutes
    assert (
        command("inspect", tokens, "--data", encoded_project.data, "--tokenizer", small_project.tokenizer, "--out", out)
        == 2
    )
    assert ["is not the data set that the codes" in line for line in errors(capsys)] == [True]
    assert command("inspect", tokens, "--out", out) == 2
    assert ["needs all of --data, --tokenizer and --out" in line for line in errors(capsys)] == [True]
    assert not out.exists()


@pytest.mark.parametrize(
    ("out", "message"),
    [
        (
            "nowhere/x.png",
            "--out {tmp}/nowhere/x.png: there is no folder {tmp}/nowhere: make it, or name another place",
        ),
        ("", "--out {tmp}: is a folder: name the picture's file, such as {tmp}/codes.png"),
    ],
)
def test_the_picture_s_place_is_checked_first(small_project, tokens, tmp_path, capsys, out, message):
    inputs = ("--data", small_project.data, "--tokenizer", small_project.tokenizer)
    assert command("inspect", tokens, *inputs, "--out", tmp_path / out) == 2
    shown = capsys.readouterr()
    assert shown.err.splitlines() == [f"error: {message.format(tmp=tmp_path)}"]
    assert shown.out == ""


def test_a_place_that_takes_no_files_is_no_place_for_the_picture(small_project, tokens, capsys):
    """/proc, which looks to root as if it could be written."""
    inputs = ("--data", small_project.data, "--tokenizer", small_project.tokenizer)
    assert command("inspect", tokens, *inputs, "--out", "/proc/x.png") == 2
    shown = capsys.readouterr()
    assert re.fullmatch(r"error: --out /proc/x.png: /proc cannot be written \(.*\): make it .* place\n", shown.err)
    assert shown.out == ""


def test_verify_finds_damage_between_the_blocks(tokens, tmp_path, capsys):
    copy = tmp_path / "tokens"
    shutil.copytree(tokens, copy)
    assert command("verify", copy) == 0
    shard = copy / "train-00000-of-00001.h5"
    content = bytearray(shard.read_bytes())
    content[60_000] ^= 1  # in the gap before the aligned codes
    shard.write_bytes(content)
    assert command("verify", copy) == 2
    assert [f"{shard}: differs from manifest.json, outside its blocks" in line for line in errors(capsys)] == [True]


def test_commands_refuse_other_folders(tmp_path, capsys):
    for name in ("verify", "inspect"):
        assert command(name, tmp_path) == 2
        assert ["is not a token cache" in line for line in errors(capsys)] == [True]


# Import


def llamagen_folder(folder, codes, labels, name="imagenet256"):
    """The files that LlamaGen's extract_codes_c2i.py writes, by the same calls of numpy."""
    for kind in ("codes", "labels"):
        (folder / f"{name}_{kind}").mkdir(parents=True)
    for number, (image, label) in enumerate(zip(codes, labels, strict=True)):
        np.save(folder / f"{name}_codes" / f"{number}.npy", image[None].astype(np.int64))
        np.save(folder / f"{name}_labels" / f"{number}.npy", np.array([label], np.int64))
    return folder


@pytest.fixture
def peer(tmp_path):
    rng = np.random.default_rng(0)
    codes, labels = rng.integers(0, 500, (50, 20, 16)), np.sort(rng.integers(0, 7, 50))
    folders = [llamagen_folder(tmp_path / f"peer{n}", codes[:, 10 * n : 10 * n + 10], labels) for n in range(2)]
    return folders, codes, labels


VIEWS = ("--views", "ten_crop@1.1", "ten_crop@1.05")
REST = ("--val-fraction", "0.1", "--codebook-size", "500")


def test_import_keeps_every_code_and_label(peer, tmp_path, small_project, capsys):
    folders, codes, labels = peer
    (folders[0] / "imagenet256_codes" / ".DS_Store").touch()  # as desktops leave them
    (folders[0] / "imagenet256_labels" / "._0.npy").touch()
    (folders[0] / ".old_codes").mkdir()
    out = tmp_path / "tokens"
    assert command("import_codes", *folders, "--out", out, *VIEWS, *REST) == 0
    train, val = TokenCache(out, "train"), TokenCache(out, "val")
    assert (len(train), len(val)) == (45, 5)
    assert train.views == tuple(f"ten_crop@{size}/{n}" for size in ("1.1", "1.05") for n in range(10))
    assert val.views == ("ten_crop@1.1/4",)
    np.testing.assert_array_equal(train.array, codes[train.source_index])
    np.testing.assert_array_equal(val.array[:, 0], codes[val.source_index, 4])
    for cache in (train, val):
        np.testing.assert_array_equal(cache.labels, labels[cache.source_index])
    np.testing.assert_array_equal(np.sort(np.concatenate([train.source_index, val.source_index])), np.arange(50))
    assert (train.grid, train.codebook_size, train.num_classes, train.tokenizer_content) == ((4, 4), 500, 7, "unknown")
    # A later stage takes it, whatever params are in force.
    params = load_params(ROOT / "params.yaml").model_dump(by_alias=True)
    assert read_current(out, params, "params.yaml").stage == "tokenize"
    assert command("verify", out) == 0
    assert command("inspect", out) == 0


def test_import_of_image_and_mirror_image_without_repeats(tmp_path):
    """Two processes pad 5 images to 6: the last file repeats image 0."""
    codes = np.random.default_rng(0).integers(0, 9, (6, 2, 4))
    folder = llamagen_folder(tmp_path / "peer", codes, [0, 0, 1, 1, 2, 0])
    options = ("--views", "center", "flip", "--val-fraction", "0.4", "--codebook-size", "9", "--num-images", "5")
    assert command("import_codes", folder, "--out", tmp_path / "tokens", *options) == 0
    train, val = (TokenCache(tmp_path / "tokens", split) for split in ("train", "val"))
    assert sorted([*train.source_index, *val.source_index]) == [0, 1, 2, 3, 4]
    assert val.views == ("center",)


def test_import_with_tokenizer_and_data_set(small_project, tmp_path, capsys):
    """Codes of our own tokenizer in LlamaGen's layout: class names and fingerprint come along."""
    out = tmp_path / "own"
    assert main(small_project.command(out)) == 0
    own = TokenCache(out, "train")
    folder = llamagen_folder(tmp_path / "peer", own.array, own.labels)
    given = ("--tokenizer", small_project.tokenizer, "--data", small_project.data)
    options = ("--views", "center", "flip", "--val-fraction", "0.1", *given)
    assert command("import_codes", folder, "--out", tmp_path / "tokens", *options) == 0
    imported = TokenCache(tmp_path / "tokens", "train")
    assert imported.class_names == own.class_names
    assert imported.tokenizer_content == own.tokenizer_content
    np.testing.assert_array_equal(imported.array, own.array[imported.source_index])
    picture = tmp_path / "picture.png"
    capsys.readouterr()
    assert command("inspect", tmp_path / "tokens", *given, "--out", picture) == 0
    assert capsys.readouterr().out.count("gives 100.00% of the codes") == 2


def write_pickle(path):
    path.write_bytes(pickle.dumps([1, 2]))


def write_open_header(path):
    path.write_bytes(path.read_bytes().replace(b"}", b" ", 1))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda p: (p[0] / "imagenet256_codes" / "7.npy").unlink(), "7.npy is missing among 49 files"),
        (lambda p: (p[0] / "imagenet256_codes" / "7.npy").write_bytes(b"\x93NUMPY"), "7.npy: cannot be read"),
        (lambda p: write_open_header(p[0] / "imagenet256_codes" / "7.npy"), "7.npy: cannot be read"),
        (lambda p: write_pickle(p[0] / "imagenet256_codes" / "7.npy"), "7.npy: cannot be read"),
        (lambda p: np.save(p[0] / "imagenet256_codes" / "7.npy", np.array([{}], object)), "7.npy: cannot be read"),
        (
            lambda p: np.save(p[0] / "imagenet256_codes" / "7.npy", np.zeros((1, 9, 16), int)),
            "has shape (1, 9, 16), not (1, 10, 16)",
        ),
        (
            lambda p: np.save(p[1] / "imagenet256_codes" / "7.npy", np.full((1, 10, 16), 500)),
            "holds codes 500 to 500 of a codebook of 500",
        ),
        (lambda p: np.save(p[0] / "imagenet256_codes" / "7.npy", np.zeros((1, 10, 16))), "holds float64"),
        (lambda p: np.save(p[1] / "imagenet256_labels" / "7.npy", np.array([6])), "7.npy: differs from the label in"),
        (lambda p: np.save(p[0] / "imagenet256_labels" / "7.npy", np.array([-1])), "7.npy: holds no label"),
        (lambda p: shutil.rmtree(p[0] / "imagenet256_labels"), "imagenet256_labels: cannot be read"),
        (lambda p: (p[0] / "other_codes").mkdir(), "needs one folder *_codes, has 2"),
        (lambda p: shutil.rmtree(p[1]), "needs one folder *_codes, has 0"),
    ],
)
def test_bad_folders_are_refused_in_one_line(peer, tmp_path, capsys, spoil, message):
    folders, _, _ = peer
    spoil(folders)
    assert command("import_codes", *folders, "--out", tmp_path / "tokens", *VIEWS, *REST) == 2
    lines = errors(capsys)
    assert len(lines) == 1
    assert message in lines[0]
    assert not (tmp_path / "tokens").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--views", "ten_crop@1.1", *REST), "10 views, but the files hold 20 per image"),
        (("--views", "ten_crop@1.1", "left", *REST), "unknown view 'left'"),
        ((*VIEWS, "--val-fraction", "1.5", "--codebook-size", "500"), "give a number between 0 and 1"),
        ((*VIEWS, "--val-fraction", "0.001", "--codebook-size", "500"), "leaves one split of 50 images empty"),
        ((*VIEWS, *REST, "--num-images", "51"), "not 51 of both"),
        ((*VIEWS, "--val-fraction", "0.1", "--codebook-size", "1"), "give the number of codes, 2 to 2147483648"),
        ((*VIEWS, "--val-fraction", "0.1", "--codebook-size", "99999999999"), "--codebook-size 99999999999: give"),
    ],
)
def test_wrong_descriptions_are_refused(peer, tmp_path, capsys, options, message):
    assert command("import_codes", *peer[0], "--out", tmp_path / "tokens", *options) == 2
    lines = errors(capsys)
    assert len(lines) == 1
    assert message in lines[0]


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("mydata", "mydata: exists and is not a stage's output: choose another folder, or empty it"),
        ("peer1", "peer1: would be replaced, but is or holds {tmp}/peer1 (folder 2): choose another folder"),
        ("", ": would be replaced, but is or holds {tmp}/peer0 (folder 1)"),
    ],
)
def test_import_replaces_nothing_but_a_token_cache(peer, tmp_path, capsys, out, message):
    (tmp_path / "mydata" / "thesis").mkdir(parents=True)
    (tmp_path / "mydata" / "thesis" / "a.txt").touch()
    before = sorted(tmp_path.rglob("*"))
    assert command("import_codes", *peer[0], "--out", tmp_path / out, *VIEWS, *REST) == 2
    assert [message.format(tmp=tmp_path) in line for line in errors(capsys)] == [True]
    assert sorted(tmp_path.rglob("*")) == before


def test_labels_are_held_against_the_data_set(small_project, tokens, tmp_path, capsys):
    own = TokenCache(tokens, "train")
    labels = own.labels.copy()
    labels[3] = 1 - labels[3]
    folder = llamagen_folder(tmp_path / "peer", own.array, labels)
    options = (
        "--views",
        "center",
        "flip",
        "--val-fraction",
        "0.1",
        "--codebook-size",
        "300",
        "--data",
        small_project.data,
    )
    assert command("import_codes", folder, "--out", tmp_path / "tokens", *options) == 2
    assert [f"gives image 3 the label {own.labels[3]}, the code folder {labels[3]}" in e for e in errors(capsys)] == [
        True
    ]


def test_import_leaves_no_working_state(peer, tmp_path):
    out = tmp_path / "tokens"
    for _ in range(2):
        assert command("import_codes", *peer[0], "--out", out, *VIEWS, *REST) == 0
    assert not list((tmp_path / ".work").glob("tokens-*"))
    assert json.loads((out / "manifest.json").read_text())["summary"]["train_rows"] == 45
