"""The cache against the arrays it was written from, and against HDF5's own reading of the same files."""

from __future__ import annotations

import itertools
import pickle
import time

import h5py
import numpy as np
import pytest

from crt.errors import UserError
from crt.tokens.cache import locate_splits
from crt.tokens.layout import content_of
from crt.tokens.mapping import announce, map_end_to_end
from tests.tokens.caches import make_header, random_codes, write_cache


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A cache of three shards, the last one short, and what went into it."""
    header = make_header(rows=2 * 4096 + 1000, views=("center", "flip"), codebook_size=1000)
    codes, labels = random_codes(header)
    return write_cache(tmp_path_factory.mktemp("cache") / "tokens", header, codes, labels), codes, labels


def test_round_trip_across_shards(written):
    cache, codes, labels = written
    assert cache.header.num_shards == 3
    assert len(cache) == len(codes)
    np.testing.assert_array_equal(cache.array, codes)
    np.testing.assert_array_equal(cache.labels, labels)
    np.testing.assert_array_equal(cache.source_index, np.arange(len(codes)))
    rng = np.random.default_rng(1)
    rows, views = rng.integers(0, len(codes), 500), rng.integers(0, 2, 500)
    read = cache.codes(rows, views)
    assert read.dtype == np.int64
    np.testing.assert_array_equal(read, codes[rows, views])
    np.testing.assert_array_equal(cache.codes(rows, 1), codes[rows, 1])


def test_any_hdf5_reader_sees_one_data_set(written):
    cache, codes, labels = written
    with h5py.File(cache.folder / "train.h5") as file:
        np.testing.assert_array_equal(file["codes"][()], codes)
        np.testing.assert_array_equal(file["labels"][()], labels)
        np.testing.assert_array_equal(file["source_index"][()], np.arange(len(codes)))
        assert [name.decode() for name in file["class_names"]] == cache.class_names
        assert file["codes"].dtype == np.uint16


def test_files_describe_themselves(written):
    cache, _, _ = written
    for name in ("train.h5", cache.header.shard_name(1)):
        with h5py.File(cache.folder / name) as file:
            facts = {name: value.decode() if isinstance(value, bytes) else value for name, value in file.attrs.items()}
        assert facts["format"] == "crt-token-cache"
        assert facts["schema"] == 1
        assert (facts["rows"], facts["codebook_size"], facts["grid"]) == (9192, 1000, "[16, 16]")
        assert facts["views"] == '["center", "flip"]'
        assert facts["tokenizer_content"] == "a" * 64
        assert facts["data_content"] == "b" * 64
        assert facts["complete"]
    assert (cache.num_tokens, cache.grid, cache.num_views, cache.views) == (256, (16, 16), 2, ("center", "flip"))
    assert (cache.codebook_size, cache.num_classes) == (1000, 10)
    assert cache.tokenizer_content == "a" * 64
    assert cache.class_names[3] == "class 3, straße"


def test_codes_are_contiguous_and_uncompressed(written):
    """So that they can be memory-mapped: the bytes at the data set's offset are the codes."""
    cache, codes, _ = written
    path = cache.folder / cache.header.shard_name(2)
    with h5py.File(path) as file:
        offset, shape, kind = file["codes"].id.get_offset(), file["codes"].shape, file["codes"].dtype
    np.testing.assert_array_equal(np.memmap(path, kind, "r", offset, shape), codes[8192:])


def test_same_content_gives_same_bytes_at_any_time(tmp_path):
    header = make_header(rows=5000)
    codes, labels = random_codes(header)
    write_cache(tmp_path / "first", header, codes, labels)
    time.sleep(1.1)  # HDF5 records seconds where it records times
    write_cache(tmp_path / "second", header, codes, labels)
    names = sorted(path.name for path in (tmp_path / "first").iterdir())
    assert names == ["train-00000-of-00002.h5", "train-00001-of-00002.h5", "train.h5"]
    for name in names:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes(), name


@pytest.mark.parametrize(("codebook_size", "kind"), [(2, "uint16"), (65536, "uint16"), (65537, "uint32")])
def test_code_type_follows_the_codebook(tmp_path, codebook_size, kind):
    header = make_header(rows=10, codebook_size=codebook_size)
    codes = np.full((10, 1, 256), codebook_size - 1)
    cache = write_cache(tmp_path / "tokens", header, codes, np.zeros(10, np.int64))
    assert cache.array.dtype == kind
    assert (cache.codes(np.arange(10), 0) == codebook_size - 1).all()


def test_bytes_per_token_at_imagenet_shape(tmp_path):
    header = make_header(rows=4096, views=tuple(f"ten_crop@1.1/{n}" for n in range(10)), grid=(16, 16))
    codes, labels = random_codes(header)
    cache = write_cache(tmp_path / "tokens", header, codes, labels)
    total = sum(path.stat().st_size for path in cache.folder.iterdir())
    assert cache.file_bytes == total
    assert total / codes.size <= 2.1


@pytest.mark.parametrize("rows", [1, 4096, 4097, 50_000, 1_281_167, 14_197_122])
@pytest.mark.parametrize("tokens", [(1, 1), (3, 3), (16, 16), (24, 24)])
def test_shards_cover_the_rows_and_can_be_mapped_end_to_end(rows, tokens):
    header = make_header(rows=rows, grid=tokens, views=("center", "flip", "ten_crop@1.1/0"))
    ranges = [header.shard_range(index) for index in range(header.num_shards)]
    assert (ranges[0].start, ranges[-1].stop) == (0, rows)
    assert all(first.stop == second.start for first, second in itertools.pairwise(ranges))
    assert all(len(part) * header.row_bytes % 65536 == 0 for part in ranges[:-1])
    assert header.num_shards <= 512
    assert [block.start for block in header.blocks(0)] == list(range(0, len(ranges[0]), 256))


@pytest.mark.parametrize(
    ("rows", "grid", "expected"),
    [
        (100_000, (16, 16), 4096),  # 512 bytes a row: 2 MiB
        (100_000, (16, 15), 8192),
        (100_000, (8, 8), 16384),
        (100_000, (1, 257), 32768),  # 514 bytes a row: the fewest rows that end at a multiple of 64 KiB
        (512 * 4096, (16, 16), 4096),
        (512 * 4096 + 1, (16, 16), 8192),
    ],
)
def test_shards_have_4096_rows_and_2_mib_at_least_and_are_512_at_most(rows, grid, expected):
    assert make_header(rows=rows, grid=grid).rows_per_shard == expected


@pytest.mark.parametrize(("num_classes", "kind"), [(65536, "<u2"), (65537, "<u4")])
def test_label_type_follows_the_classes(num_classes, kind):
    assert make_header(num_classes=num_classes).label_type == np.dtype(kind)


def test_codes_of_another_shape_are_not_written(tmp_path):
    header = make_header(rows=10)
    codes, labels = random_codes(header)
    with pytest.raises(ValueError, match="needs codes of 10 rows, got shape"):
        write_cache(tmp_path / "tokens", header, codes.transpose(0, 2, 1), labels)


def test_content_of_a_folder_without_a_manifest_is_that_of_names_and_files(tmp_path):
    def content(name: str, data: bytes) -> str:
        for path in tmp_path.rglob("*"):
            path.unlink()
        (tmp_path / name).write_bytes(data)
        return content_of(tmp_path)

    assert len({content("a", b"x"), content("b", b"x"), content("a", b"y")}) == 3
    assert content("a", b"x") == content("a", b"x")


def test_rows_and_views_out_of_range_are_refused(written):
    cache, codes, _ = written
    with pytest.raises(IndexError):
        cache.codes(np.array([len(codes)]), np.array([0]))
    with pytest.raises(IndexError):
        cache.codes(np.array([0]), np.array([2]))


def test_what_is_announced_lies_where_it_is_read(tmp_path):
    path = tmp_path / "data"
    content = np.random.default_rng(0).integers(0, 256, 2**22, np.uint8)
    content.tofile(path)
    array = map_end_to_end([(path, 2**20, 2**20), (path, 0, 2**21)])
    expected = np.concatenate([content[2**20 : 2**21], content[: 2**21]])
    starts = np.array([5, 4090, 2**20 - 3, 3 * 2**20 - 512])
    announce(array, starts, 512)
    for start in starts:
        assert np.array_equal(array[start : start + 512], expected[start : start + 512])


def test_codes_are_the_same_from_a_cold_and_a_warm_file(written):
    cache, codes, _ = written
    rows, views = np.array([3, 0, len(cache) - 1, -1]), np.array([1, 0, 1, -1])
    for cold in (False, True):
        cache._cold = cold
        assert np.array_equal(cache.codes(rows, views), codes[rows, views])
    cache._cold = True
    assert np.array_equal(cache.codes(rows, 1), codes[rows, 1])
    with pytest.raises(IndexError):
        cache._cold = True
        cache.codes(np.array([len(cache)]), 0)


def test_the_mapping_cannot_be_written_to(written):
    with pytest.raises(ValueError, match="read-only"):
        written[0].array[0, 0, 0] = 1


def test_a_copy_through_pickle_carries_no_codes(written):
    cache, codes, _ = written
    assert cache.array is not None
    content = pickle.dumps(cache)
    assert len(content) < codes[:, 0].nbytes
    np.testing.assert_array_equal(pickle.loads(content).array, codes)


def test_codes_outlive_the_cache_object(tmp_path):
    header = make_header(rows=5000)
    codes, labels = random_codes(header)
    array = write_cache(tmp_path / "tokens", header, codes, labels).array
    np.testing.assert_array_equal(array, codes)


def test_places_of_splits(written, tmp_path):
    folder = written[0].folder
    assert locate_splits(folder) == (folder, ["train"])
    assert locate_splits(folder / "train.h5") == (folder, ["train"])
    with pytest.raises(UserError, match=r"train\.h5 or val\.h5"):
        locate_splits(tmp_path)
    with pytest.raises(UserError, match="is not a token cache"):
        locate_splits(folder / "train-00000-of-00003.h5")
