"""Oracle: the promises of `split_by_content`, checked on many random data sets."""

from __future__ import annotations

import numpy as np
import pytest

from crt.data.splits import shared_with, split_by_content


def digests_of(contents) -> np.ndarray:
    """A digest of its own for each content."""
    table = np.random.default_rng(0).integers(0, 256, (1000, 32), np.uint8)
    table[::2, -1] = 0  # digests may end in zeros
    return table[np.asarray(contents, int)]


@pytest.mark.parametrize("seed", range(30))
def test_equal_images_stay_together_and_classes_get_their_share(seed):
    rng = np.random.default_rng(seed)
    labels = np.sort(rng.integers(0, 6, 200))
    contents = labels * 100 + rng.integers(0, 60, 200)  # some equal within a class, none across
    in_val = split_by_content(labels, digests_of(contents), 0.25)
    assert not set(contents[in_val]) & set(contents[~in_val])
    for label in np.unique(labels):
        inside = labels == label
        wanted = round(0.25 * inside.sum())
        largest_group = np.bincount(contents[inside]).max()
        assert wanted <= in_val[inside].sum() < wanted + largest_group


@pytest.mark.parametrize("seed", range(30))
def test_images_shared_by_classes_stay_together(seed):
    rng = np.random.default_rng(seed)
    labels = np.sort(rng.integers(0, 8, 60))
    contents = rng.integers(0, 30, 60)
    in_val = split_by_content(labels, digests_of(contents), 0.3)
    assert not set(contents[in_val]) & set(contents[~in_val])
    assert in_val.any() and not in_val.all()


def test_copies_of_an_earlier_class_images_count_to_the_share():
    """Half of ten images is set aside; another class has that half twice over, and ten images of its own."""
    half = np.flatnonzero(split_by_content(np.zeros(10, int), digests_of(np.arange(10)), 0.5))
    contents = np.concatenate([np.arange(10), half, half, np.arange(20, 30)])
    in_val = split_by_content(np.repeat([0, 1], [10, 20]), digests_of(contents), 0.5)
    assert in_val[10:].tolist() == [True] * 10 + [False] * 10


def test_a_class_whose_training_image_an_earlier_class_chose_sets_its_other_one_aside():
    trained = np.flatnonzero(~split_by_content(np.zeros(2, int), digests_of([0, 1]), 0.5))
    in_val = split_by_content(np.array([0, 0, 1, 1]), digests_of([0, 1, *trained, 2]), 0.5)
    assert in_val[2:].tolist() == [False, True]


@pytest.mark.parametrize("fraction", [0.01, 0.5, 0.99])
def test_two_distinct_images_give_one_to_each_side(fraction):
    labels = np.array([0, 0, 1, 1, 1, 2, 2])
    contents = np.array([1, 2, 3, 3, 4, 5, 6])
    in_val = split_by_content(labels, digests_of(contents), fraction)
    for label in range(3):
        assert 0 < in_val[labels == label].sum() < (labels == label).sum()


def test_a_class_of_one_distinct_image_trains():
    labels, contents = np.array([0, 0, 0, 1, 1]), np.array([1, 1, 1, 2, 3])
    in_val = split_by_content(labels, digests_of(contents), 0.5)
    assert not in_val[:3].any() and in_val[3:].sum() == 1


def test_where_no_class_has_two_images_all_are_split_together():
    in_val = split_by_content(np.arange(20), digests_of(np.arange(20)), 0.2)
    assert in_val.sum() == 4


def test_a_single_image_trains_and_nothing_is_set_aside_at_zero():
    assert not split_by_content(np.zeros(2, int), digests_of([1, 1]), 0.5).any()
    assert not split_by_content(np.arange(9) % 3, digests_of(np.arange(9)), 0.0).any()


def test_the_split_depends_on_content_not_on_order():
    labels, contents = np.arange(90) // 30, np.arange(90)
    in_val = split_by_content(labels, digests_of(contents), 0.2)
    order = np.random.default_rng(5).permutation(90)
    assert np.array_equal(split_by_content(labels[order], digests_of(contents[order]), 0.2), in_val[order])


def test_shared_images_are_found():
    assert shared_with(digests_of([1, 2, 3, 2]), digests_of([2, 9])).tolist() == [False, True, False, True]
    assert shared_with(digests_of([1]), digests_of([])).tolist() == [False]
