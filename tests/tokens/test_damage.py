"""Whatever happens to the files, readers say so in one line and never return wrong codes."""

from __future__ import annotations

import shutil

import h5py
import numpy as np
import pytest

from crt.__main__ import main
from crt.errors import UserError
from crt.tokens.cache import TokenCache
from crt.tokens.layout import read_index, read_shard
from tests.tokens.caches import make_header, random_codes, write_cache


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    header = make_header(rows=4096 + 600)
    codes, labels = random_codes(header)
    return write_cache(tmp_path_factory.mktemp("cache") / "tokens", header, codes, labels), codes


@pytest.fixture
def copy(original, tmp_path):
    folder = tmp_path / "tokens"
    shutil.copytree(original[0].folder, folder)
    return folder


def flip_byte(path, offset):
    with open(path, "r+b") as file:
        file.seek(offset)
        value = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([value ^ 0x40]))


def refused(arguments, capsys):
    """Run a command that must fail with status 2; its error lines."""
    assert main([str(argument) for argument in arguments]) == 2
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]


def test_good_cache_passes(copy, capsys):
    assert main(["verify", str(copy)]) == 0
    assert "4696 rows, 2 shards, 19 blocks: good" in capsys.readouterr().out
    assert main(["verify", str(copy / "train.h5")]) == 0


def test_flipped_byte_names_its_block(copy, original, capsys):
    record = original[0].records[1]
    shard = copy / "train-00001-of-00002.h5"
    row_bytes = original[0].header.row_bytes
    flip_byte(shard, record.codes_offset + 300 * row_bytes + 5)
    assert refused(["verify", copy], capsys) == [
        f"error: {shard}: block 1 (rows 4352 to 4607) is damaged: restore the file, "
        f"or delete {copy} and run tokenize again"
    ]


def test_every_damaged_block_is_named(copy, original, capsys):
    for index, row in ((0, 0), (0, 4095), (1, 599)):
        offset = original[0].records[index].codes_offset + row * original[0].header.row_bytes
        flip_byte(copy / original[0].header.shard_name(index), offset)
    lines = refused(["verify", copy], capsys)
    assert [line.partition(": block ")[2].partition(" is")[0] for line in lines] == [
        "0 (rows 0 to 255)",
        "15 (rows 3840 to 4095)",
        "2 (rows 4608 to 4695)",
    ]


def test_a_code_that_the_codebook_does_not_have_is_told(tmp_path, capsys):
    """Only a faulty writer makes one: its checksums are right."""
    header = make_header(rows=100, split="train")
    codes, *others = random_codes(header)
    codes[7] = header.codebook_size
    write_cache(tmp_path, header, codes, *others)
    (line,) = refused(["verify", tmp_path], capsys)
    assert f"block 0 (rows 0 to 99) holds code {header.codebook_size} of a codebook of {header.codebook_size}" in line


def test_damage_in_both_splits_is_reported(copy, original, capsys):
    """A block of train, and an index of val that cannot be read: neither hides the other."""
    flip_byte(copy / "train-00000-of-00002.h5", original[0].records[0].codes_offset)
    (copy / "val.h5").write_bytes(b"no HDF5 at all" * 100)
    train, val = refused(["verify", copy], capsys)
    assert "train-00000-of-00002.h5: block 0 (rows 0 to 255) is damaged" in train
    assert f"{copy / 'val.h5'}: damaged" in val


def test_a_good_split_is_called_good_beside_a_damaged_one(copy, capsys):
    header = make_header(rows=100, split="val")
    write_cache(copy, header, *random_codes(header))
    (copy / "train.h5").write_bytes(b"no HDF5 at all" * 100)
    assert main(["verify", str(copy)]) == 2
    shown = capsys.readouterr()
    assert f"{copy / 'train.h5'}: damaged" in shown.err
    assert shown.out == f"{copy / 'val.h5'}: 100 rows, 1 shards, 1 blocks: good\n"


def test_flipped_label_is_found(copy, capsys):
    path = copy / "train-00000-of-00002.h5"
    with h5py.File(path) as file:
        offset = file["labels"].id.get_offset()
    flip_byte(path, offset + 2 * 1000)
    assert ["block 3 (rows 768 to 1023)" in line for line in refused(["verify", copy], capsys)] == [True]


@pytest.mark.parametrize("name", ["train.h5", "train-00001-of-00002.h5"])
def test_a_flipped_byte_anywhere_is_found_or_harmless(copy, original, name):
    """Definition of safety: after any single flip either a check fails, or every value reads as written."""
    cache, codes = original
    path = copy / name
    good = path.read_bytes()
    # All of the metadata in front and at the end, and a sample of the rest.
    places = {*range(0, 3000, 41), *range(max(0, len(good) - 3000), len(good), 41)}
    places |= set(np.random.default_rng(0).integers(0, len(good), 60).tolist())
    found = 0
    for place in sorted(place for place in places if place < len(good)):
        flip_byte(path, place)
        try:
            damaged = TokenCache(copy, "train")
            wrong = [line for _, lines in verify(copy) for line in lines]
        except UserError as error:
            wrong = [str(error)]
        if not wrong:
            np.testing.assert_array_equal(damaged.array, codes)
            np.testing.assert_array_equal(damaged.labels, cache.labels)
            np.testing.assert_array_equal(damaged.source_index, cache.source_index)
            assert (damaged.header, damaged.class_names) == (cache.header, cache.class_names)
        found += bool(wrong)
        path.write_bytes(good)
    assert found > 20


def verify(folder):
    from crt.tokens.verify import verify_split

    return verify_split(folder, "train")


@pytest.mark.parametrize("name", ["train.h5", "train-00000-of-00002.h5"])
@pytest.mark.parametrize("keep", [0.0, 0.3, 0.999])
def test_truncated_file(copy, capsys, name, keep):
    path = copy / name
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(UserError, match=str(path)) as caught:
        TokenCache(copy, "train")
    assert "\n" not in str(caught.value)
    lines = refused(["verify", copy], capsys)
    assert len(lines) == 1
    assert str(path) in lines[0]


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("codes", np.zeros((600, 1, 256), "<u4")),
        ("labels", np.zeros(599, "<u2")),
        ("source_index", np.zeros(601, "<u4")),
    ],
)
def test_sizes_that_disagree_with_the_header_are_damage(copy, original, name, values):
    with h5py.File(copy / "train-00001-of-00002.h5", "r+") as file:
        del file[name]
        file[name] = values
    with pytest.raises(UserError, match="its sizes or checksums disagree with its header"):
        read_shard(copy, original[0].header, 1)


def test_rows_of_a_missing_shard_hold_no_code_for_hdf5s_readers(copy):
    (copy / "train-00001-of-00002.h5").unlink()
    with h5py.File(copy / "train.h5") as file:
        assert set(file["labels"][4096:]) == {2**16 - 1}


def test_missing_shard(copy, capsys):
    path = copy / "train-00001-of-00002.h5"
    path.unlink()
    with pytest.raises(UserError, match=f"{path}: shard is missing"):
        TokenCache(copy, "train")
    assert [f"{path}: shard is missing" in line for line in refused(["verify", copy], capsys)] == [True]


def test_missing_split_and_unknown_split(copy):
    with pytest.raises(UserError, match=r"val\.h5: not found: give the tokenize stage's output folder"):
        TokenCache(copy, "val")
    with pytest.raises(UserError, match="split 'test' is unknown"):
        TokenCache(copy, "test")


def test_shard_of_another_tokenizer(copy, original, tmp_path):
    header = make_header(rows=4696, tokenizer_content="c" * 64)
    other = write_cache(tmp_path / "other", header, original[1], original[0].labels)
    shutil.copy(other.folder / "train-00000-of-00002.h5", copy)
    with pytest.raises(UserError, match="belongs to another cache: tokenizer_content"):
        TokenCache(copy, "train")


def test_shard_of_a_cache_with_the_same_facts(copy, original, tmp_path):
    codes, labels = random_codes(original[0].header, seed=1)
    other = write_cache(tmp_path / "other", original[0].header, codes, labels)
    shutil.copy(other.folder / "train-00000-of-00002.h5", copy)
    with pytest.raises(UserError, match=r"is not the shard that train\.h5 was made with"):
        TokenCache(copy, "train")


def test_shards_that_changed_places(copy):
    shutil.copy(copy / "train-00000-of-00002.h5", copy / "train-00001-of-00002.h5")
    with pytest.raises(UserError, match="train-00001-of-00002"):
        TokenCache(copy, "train")


@pytest.mark.parametrize(
    ("attribute", "value", "message"),
    [
        ("complete", False, "incomplete"),
        ("schema", 99, "has schema 99, this version reads 1"),
        ("format", "other", "is not a token cache"),
        ("rows", 4695, "digest disagrees"),
        ("codebook_size", 65, "digest disagrees"),
    ],
)
def test_index_attributes_are_checked(copy, attribute, value, message):
    with h5py.File(copy / "train.h5", "r+") as file:
        file.attrs[attribute] = value
    with pytest.raises(UserError, match=message):
        read_index(copy / "train.h5")


def test_files_that_are_no_cache(copy):
    (copy / "val.h5").write_bytes(b"no HDF5 at all" * 100)
    with pytest.raises(UserError, match=r"val\.h5: damaged"):
        TokenCache(copy, "val")
    shutil.copy(copy / "train-00000-of-00002.h5", copy / "val.h5")
    with pytest.raises(UserError, match=r"val\.h5: is a shard of a cache"):
        TokenCache(copy, "val")


def test_file_replaced_between_opening_and_reading(copy):
    cache = TokenCache(copy, "train")
    path = copy / "train-00000-of-00002.h5"
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(UserError, match="shorter than when it was opened"):
        cache.codes(np.array([0]), 0)
    path.unlink()
    with pytest.raises(UserError, match="cannot be read"):
        cache.codes(np.array([0]), 0)
