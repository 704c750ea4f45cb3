"""Batches of codes: every row once an epoch, the same for any world size and start, views evenly drawn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from torch.utils.data import DataLoader

from crt.errors import UserError
from crt.randomness import draw_seed
from crt.tokens.cache import TokenCache
from crt.tokens.sampler import BatchKeys, TokenDataset, as_batch, draw_views, training_batches
from tests.tokens.caches import make_header, write_cache

ROWS, VIEWS = 5000, 4


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Codes that tell their row and view: token 0 and 1 spell the row, token 2 the view."""
    header = make_header(rows=ROWS, views=("center", "flip", "a", "b"), grid=(2, 2), codebook_size=256)
    rows, views = np.meshgrid(np.arange(ROWS), np.arange(VIEWS), indexing="ij")
    codes = np.stack([rows // 256, rows % 256, views, np.zeros_like(rows)], axis=2)
    return write_cache(tmp_path_factory.mktemp("cache") / "tokens", header, codes, np.arange(ROWS) % 10)


def batches(cache, **options):
    options = {"batch_size": 100, "seed": 3, "first_step": 0, "steps": 100} | options
    return list(training_batches(cache, **options))


def rows_of(codes):
    return (codes[:, 0] * 256 + codes[:, 1]).numpy()


def test_each_epoch_is_a_permutation_and_labels_belong(cache):
    run = batches(cache)
    for epoch in (run[:50], run[50:]):
        rows = np.concatenate([rows_of(codes) for codes, _ in epoch])
        np.testing.assert_array_equal(np.sort(rows), np.arange(ROWS))
        np.testing.assert_array_equal(rows % 10, np.concatenate([labels.numpy() for _, labels in epoch]))
    assert not np.array_equal(rows_of(run[0][0]), rows_of(run[50][0]))
    assert run[0][0].dtype == run[0][1].dtype == torch.int64
    assert run[0][0].shape == (100, 4)


def test_batches_may_straddle_epochs(cache):
    rows = np.concatenate([rows_of(codes) for codes, _ in batches(cache, batch_size=96, steps=157)])
    np.testing.assert_array_equal(np.sort(rows[:ROWS]), np.arange(ROWS))
    np.testing.assert_array_equal(np.sort(rows[ROWS : 2 * ROWS]), np.arange(ROWS))


@pytest.mark.parametrize("world_size", [2, 4])
def test_same_global_batches_at_any_world_size(cache, world_size):
    alone = batches(cache, steps=60)
    together = [batches(cache, steps=60, rank=rank, world_size=world_size) for rank in range(world_size)]
    for step in range(60):
        for part in (0, 1):
            joined = torch.cat([shares[step][part] for shares in together])
            assert torch.equal(joined, alone[step][part])


@pytest.mark.parametrize("first_step", [1, 49, 50, 99])
def test_start_at_any_step(cache, first_step):
    whole, rest = batches(cache), batches(cache, first_step=first_step)
    assert len(rest) == 100 - first_step
    for expected, got in zip(whole[first_step:], rest, strict=True):
        assert torch.equal(expected[0], got[0])
        assert torch.equal(expected[1], got[1])


def test_seeds_differ(cache):
    first, second = batches(cache, steps=1)[0][0], batches(cache, steps=1, seed=4)[0][0]
    assert not torch.equal(first, second)


def test_indivisible_batch_is_refused(cache):
    with pytest.raises(UserError, match="batch_size 100 does not divide among 3"):
        batches(cache, world_size=3)


def splitmix64(key, row):
    """Textbook SplitMix64 in Python's integers: output number `row` of the generator seeded with `key`."""
    mask = 2**64 - 1
    state = (key + (row + 1) * 0x9E3779B97F4A7C15) & mask
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & mask
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB & mask
    return state ^ (state >> 31)


def test_splitmix64_matches_its_published_output():
    """The first numbers for seed 1234567, from the reference implementation."""
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [splitmix64(1234567, row) for row in range(3)] == expected


def test_views_follow_the_hash():
    rows, epochs = np.array([0, 7, 10**9, 7]), np.array([2, 2, 3, 5])
    expected = [
        (splitmix64(draw_seed(11, "view", int(epoch)), int(row)) >> 32) * 20 >> 32
        for row, epoch in zip(rows, epochs, strict=True)
    ]
    np.testing.assert_array_equal(draw_views(rows, epochs, 20, 11), expected)


@pytest.mark.parametrize("num_views", [2, 10, 20])
def test_views_are_uniform_and_independent(num_views):
    """Chi-square over views, and over pairs of neighbouring rows and of neighbouring epochs."""
    rows = np.arange(40_000)
    now, later = (draw_views(rows, np.full(len(rows), epoch), num_views, 5) for epoch in (0, 1))
    other_seed = draw_views(rows, np.zeros(len(rows), np.int64), num_views, 6)
    counts = [np.bincount(now, minlength=num_views)]
    for first, second in ((now[:-1:2], now[1::2]), (now, later), (now, other_seed)):
        counts.append(np.bincount(first * num_views + second, minlength=num_views**2))
    for observed in counts:
        assert stats.chisquare(observed).pvalue > 1e-3


def test_views_of_the_batches_are_those_of_their_epoch(cache):
    run = batches(cache)
    for epoch in (0, 1):
        codes = torch.cat([codes for codes, _ in run[50 * epoch : 50 * epoch + 50]])
        rows = rows_of(codes)
        expected = draw_views(rows, np.full(ROWS, epoch), VIEWS, 3)
        np.testing.assert_array_equal(codes[:, 2].numpy(), expected)


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_loader_with_workers_gives_the_same_batches(cache, context, monkeypatch):
    """Workers started after this process mapped the files, by a relative path."""
    monkeypatch.chdir(cache.folder)
    relative = TokenCache(".", "train")
    assert relative.array is not None
    keys = BatchKeys(ROWS, batch_size=100, seed=3, first_step=45, steps=60, rank=1, world_size=2)
    loader = DataLoader(
        TokenDataset(relative, 3),
        batch_sampler=keys,
        collate_fn=as_batch,
        num_workers=2,
        multiprocessing_context=context,
    )
    expected = batches(cache, first_step=45, steps=60, rank=1, world_size=2)
    got = list(loader)
    assert len(got) == len(keys) == 15
    for (codes, labels), (codes_here, labels_here) in zip(got, expected, strict=True):
        assert torch.equal(codes, codes_here)
        assert torch.equal(labels, labels_here)


def test_single_items_agree_with_batches(cache):
    dataset = TokenDataset(cache, 3)
    codes, labels = dataset.batch(np.array([[1, 17], [0, 4999]]))
    assert torch.equal(dataset[(1, 17)][0], codes[0])
    assert torch.equal(dataset[(0, 4999)][1], labels[1])
    assert len(dataset) == ROWS


def test_a_negative_seed_is_refused_before_the_first_row(cache):
    with pytest.raises(UserError, match=r"^seed -1: must be 0 or more$"):
        TokenDataset(cache, -1)


def test_rows_alone_serve_as_any_other_data_set(cache):
    """Each is the row in epoch 0, so that a loader without the samplers here sees all rows, and so does a loop."""
    dataset = TokenDataset(cache, 3)
    keys = np.stack([np.zeros(ROWS, np.int64), np.arange(ROWS)], axis=1)
    codes, labels = dataset.batch(keys)
    assert torch.equal(dataset[17][0], codes[17]) and torch.equal(dataset[np.int64(17)][1], labels[17])
    for loader in (DataLoader(dataset, batch_size=999), DataLoader(dataset, batch_size=999, num_workers=2)):
        got = list(loader)
        assert torch.equal(torch.cat([codes for codes, _ in got]), codes)
        assert torch.equal(torch.cat([labels for _, labels in got]), labels)
    assert sum(1 for _ in dataset) == ROWS
    shuffled = torch.cat([labels for _, labels in DataLoader(dataset, batch_size=999, shuffle=True)])
    assert torch.equal(shuffled.sort().values, labels.sort().values) and not torch.equal(shuffled, labels)
