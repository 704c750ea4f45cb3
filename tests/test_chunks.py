"""Oracle: the same work done in one go."""

from __future__ import annotations

import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

from crt import chunks as module
from crt.chunks import ChunkStore
from crt.distributed import World
from crt.evaluation.metrics import store_statistics
from crt.interrupt import Stopped
from crt.pictures import spread
from crt.progress import logger, start_logging

ALONE = World(0, 1, torch.device("cpu"))
VALUES = np.random.default_rng(0).normal(size=(23, 3)).astype(np.float32)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(module, "_CHUNK_IMAGES", 6)


def work(start: int, stop: int) -> dict[str, np.ndarray]:
    return {"values": VALUES[start:stop], "rows": np.arange(start, stop)}


def test_columns_come_back_in_order(tmp_path):
    store = ChunkStore(tmp_path, len(VALUES), batch_size=4)
    store.fill("test", work, ALONE)
    np.testing.assert_array_equal(store.column("values"), VALUES)
    np.testing.assert_array_equal(np.concatenate(list(store.parts("rows"))), np.arange(23))
    for rows in ([0, 5, 6, 22], [], [7]):
        np.testing.assert_array_equal(store.column("values", np.array(rows, np.int64)), VALUES[rows])


@pytest.mark.parametrize(
    ("batch_size", "ends"), [(3, [6, 12, 18, 23]), (4, [4, 8, 12, 16, 20, 23]), (10, [10, 20, 23])]
)
def test_chunks_are_whole_batches(tmp_path, batch_size, ends):
    """Of six images at most, unless a batch has more."""
    store = ChunkStore(tmp_path, 23, batch_size)
    assert store.bounds == list(zip([0, *ends], ends, strict=False))
    assert ChunkStore(tmp_path, 23, 3, chunk_images=10).bounds == [(0, 9), (9, 18), (18, 23)]


def test_a_stopped_pass_continues_with_the_missing_chunks_in_the_same_batches(tmp_path, monkeypatch):
    store = ChunkStore(tmp_path, len(VALUES), batch_size=3)
    batches = []

    def failing(start: int, stop: int) -> dict[str, np.ndarray]:
        if len(batches) == 5:
            raise KeyboardInterrupt
        batches.append((start, stop))
        return work(start, stop)

    with pytest.raises(KeyboardInterrupt):
        store.fill("test", failing, ALONE)
    batches.clear()
    again = ChunkStore(tmp_path, len(VALUES), batch_size=3)
    again.fill("test", lambda a, b: batches.append((a, b)) or work(a, b), ALONE)
    assert batches == [(12, 15), (15, 18), (18, 21), (21, 23)]  # the first two chunks of six images were whole
    np.testing.assert_array_equal(again.column("values"), VALUES)
    assert not list(tmp_path.glob("*.tmp"))


def test_a_pass_that_was_done_before_says_so_instead_of_a_rate(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(logger, "handlers", [])
    start_logging(None)
    ChunkStore(tmp_path, len(VALUES), batch_size=4).fill("reference val", work, ALONE)
    assert "reference val: 23/23 images" in capfd.readouterr().err
    ChunkStore(tmp_path, len(VALUES), batch_size=4).fill("reference val", work, ALONE)
    assert capfd.readouterr().err == "reference val: all 23 images were done before\n"


def test_chunks_are_on_the_disk_before_they_have_their_names(tmp_path, monkeypatch):
    """Without that a node that goes down can leave an empty file, which every later evaluation would trip over."""
    flushed = set()
    monkeypatch.setattr(module.os, "fsync", lambda descriptor: flushed.add(os.fstat(descriptor).st_ino))
    ChunkStore(tmp_path, len(VALUES), batch_size=4).fill("test", work, ALONE)
    assert {path.stat().st_ino for path in tmp_path.iterdir()} == flushed


def test_a_signal_stops_after_a_whole_chunk(tmp_path, monkeypatch):
    store = ChunkStore(tmp_path, len(VALUES), batch_size=6)
    monkeypatch.setattr("crt.interrupt._received", [15])
    with pytest.raises(Stopped):
        store.fill("test", work, ALONE)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1


def test_chunks_of_another_size_are_not_taken(tmp_path):
    for chunk_images in (8, 12):
        store = ChunkStore(tmp_path, len(VALUES), 4, chunk_images)
        store.fill("test", work, ALONE)
        np.testing.assert_array_equal(store.column("values"), VALUES)


def test_a_signal_stops_the_reading(tmp_path, monkeypatch):
    store = ChunkStore(tmp_path, len(VALUES), batch_size=6)
    store.fill("test", work, ALONE)
    monkeypatch.setattr("crt.interrupt._received", [15])
    with pytest.raises(Stopped):
        store.column("values")


def test_three_processes_share_the_chunks(tmp_path):
    """Each does every third of four chunks; together they leave what one alone leaves, bit for bit."""
    torch.multiprocessing.start_processes(_fill_as_rank, (str(tmp_path),), nprocs=3, start_method="fork")
    alone = ChunkStore(tmp_path / "alone", len(VALUES), batch_size=6)
    alone.fill("test", work, ALONE)
    names = [path.name for path in sorted((tmp_path / "alone").iterdir())]
    assert names == [path.name for path in sorted((tmp_path / "shared").iterdir())]
    for name in names:
        assert (tmp_path / "alone" / name).read_bytes() == (tmp_path / "shared" / name).read_bytes()
    assert [(tmp_path / f"rank{rank}").read_text() for rank in range(3)] == ["0 6\n18 23\n", "6 12\n", "12 18\n"]


def _fill_as_rank(rank: int, folder: str) -> None:
    import torch.distributed as dist

    module._CHUNK_IMAGES = 6
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=3)
    store = ChunkStore(Path(folder) / "shared", len(VALUES), batch_size=6)

    def logged(start: int, stop: int) -> dict[str, np.ndarray]:
        with open(f"{folder}/rank{rank}", "a") as file:
            file.write(f"{start} {stop}\n")
        return work(start, stop)

    store.fill("test", logged, World(rank, 3, torch.device("cpu")))
    dist.barrier()
    dist.destroy_process_group()


def test_a_large_set_is_streamed(tmp_path, monkeypatch):
    """Statistics and chosen rows of many features take the memory of a few chunks; oracle: the whole array."""
    monkeypatch.setattr(module, "_CHUNK_IMAGES", 1000)
    count, dimension = 100_000, 32
    features = np.random.default_rng(0).normal(size=(count, dimension)).astype(np.float32)
    store = ChunkStore(tmp_path, count, 500)
    store.fill("test", lambda start, stop: {"features": features[start:stop]}, ALONE)
    rows = spread(count, 2000)
    tracemalloc.start()
    statistics = store_statistics(store, "features", dimension)
    column = store.column("features", rows)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    np.testing.assert_allclose(statistics.mean, features.mean(axis=0, dtype=np.float64), rtol=1e-6, atol=1e-9)
    np.testing.assert_array_equal(column, features[rows])
    assert peak < features.nbytes / 5
