"""Oracles: the real labels of held-out digits, an uninterrupted training run, explicit shifts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from crt.errors import UserError
from crt.evaluation import classifier
from crt.evaluation.classifier import (
    ClassifierFeatures,
    ConvClassifier,
    ResidualBlock,
    random_shift,
    random_turns,
)
from crt.evaluation.precision_recall import class_agreement
from crt.interrupt import Stopped


def test_default_params_read_held_out_digits(digits, classifier_path):
    """At least 97% on digits that it never saw; agreement of real images with their own labels is that accuracy."""
    network = ClassifierFeatures(classifier_path, "cpu")
    features = network(digits.val)
    probabilities = network.probabilities(features)
    assert features.shape == (360, network.dimension)
    assert features.dtype == probabilities.dtype == np.float32
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-5)
    accuracy = (probabilities.argmax(axis=1) == digits.val_labels).mean()
    assert accuracy >= 0.97
    assert class_agreement(probabilities.argmax(axis=1), digits.val_labels) == accuracy


def test_training_is_a_function_of_params_and_seed(digits, tmp_path):
    first = digits.train_classifier(tmp_path / "a/classifier.safetensors", steps=6, channels=4)
    second = digits.train_classifier(tmp_path / "b/classifier.safetensors", steps=6, channels=4)
    other = digits.train_classifier(tmp_path / "c/classifier.safetensors", steps=6, channels=4, seed=1)
    assert first.read_bytes() == second.read_bytes()
    assert first.read_bytes() != other.read_bytes()
    checksums = {ClassifierFeatures(path, "cpu").checksum for path in (first, second, other)}
    assert len(checksums) == 2


@pytest.mark.parametrize("inputs", [2, 4, 7, 8])
def test_the_skip_is_a_strided_convolution_also_where_that_is_done_without(inputs):
    block = ResidualBlock(inputs, 2 * inputs, stride=2).eval()
    torch.nn.init.zeros_(block.norm2.weight)
    x = torch.randn(3, inputs, 8, 8).contiguous(memory_format=torch.channels_last)
    expected = torch.relu(torch.nn.functional.conv2d(x.double(), block.skip.weight.double(), stride=2))
    torch.testing.assert_close(block(x).double(), expected, rtol=1e-5, atol=1e-5)
    assert block.skip.stride == ((2, 2) if inputs == 8 else (1, 1))


def test_images_are_shifted_as_far_as_the_params_say_and_otherwise_in_each_step(digits, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(classifier, "random_shift", lambda *args: drawn.append(args) or random_shift(*args))
    digits.train_classifier(tmp_path / "classifier.safetensors", steps=2, channels=4, max_shift=0.3)
    (images, reach, first), (_, _, second) = drawn
    assert reach == 0.3
    assert not np.array_equal(random_shift(images, reach, first), random_shift(images, reach, second))


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5])
def test_any_number_of_steps_trains(digits, tmp_path, steps):
    path = digits.train_classifier(tmp_path / "classifier.safetensors", steps=steps, channels=4)
    features = ClassifierFeatures(path, "cpu")(digits.val[:8])
    assert np.isfinite(features).all()


def test_training_that_diverges_is_one_line_and_leaves_no_weights(digits, tmp_path):
    path = tmp_path / "classifier.safetensors"
    with pytest.raises(UserError, match=r"^evaluate.classifier: its training diverged, .*: lower evaluate.classifier."):
        digits.train_classifier(path, steps=6, channels=4, learning_rate=1e20)
    assert not path.exists()


def test_weights_do_not_depend_on_the_number_of_threads(digits, tmp_path):
    threads, weights = torch.get_num_threads(), []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            weights.append(digits.train_classifier(tmp_path / f"{number}/classifier.safetensors", steps=6).read_bytes())
            assert torch.get_num_threads() == number
    finally:
        torch.set_num_threads(threads)
    assert weights[0] == weights[1] == weights[2]


def test_stopped_training_continues_to_the_same_weights(digits, tmp_path, monkeypatch):
    whole = digits.train_classifier(tmp_path / "whole/classifier.safetensors", steps=12, channels=4)
    path = tmp_path / "stopped/classifier.safetensors"
    calls = []

    def stop_at_fifth_checkpoint():
        calls.append(1)
        if len(calls) == 5:
            raise Stopped(15)

    monkeypatch.setattr("crt.evaluation.classifier.raise_if_stopped", stop_at_fifth_checkpoint)
    with pytest.raises(Stopped):
        digits.train_classifier(path, steps=12, channels=4)
    assert not path.exists()
    digits.train_classifier(path, steps=12, channels=4)
    assert len(calls) == 11  # went on after the fifth of eleven checkpoints, did not start again
    assert path.read_bytes() == whole.read_bytes()
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_images_of_one_class_teach_it_to_tell_quarter_turns(digits, tmp_path):
    """Real digits of one class, the sevens: held-out ones, turned, are recognised by how far."""
    sevens, others = digits.train[digits.train_labels == 7], digits.val[digits.val_labels == 7]
    one_class = replace(digits, train=sevens, train_labels=np.zeros(len(sevens), np.int64))
    path = one_class.train_classifier(tmp_path / "classifier.safetensors", steps=60)
    network = ClassifierFeatures(path, "cpu")
    assert network.task == "quarter turns"
    turned, turns = random_turns(np.concatenate([others] * 4), np.random.default_rng(0))
    assert set(turns) == {0, 1, 2, 3}
    np.testing.assert_array_equal(turned[3], np.rot90(others[3], turns[3]))
    assert (network.probabilities(network(turned)).argmax(axis=1) == turns).mean() > 0.9


@pytest.mark.parametrize("side", [15, 16, 32, 64, 256])
def test_blocks_see_small_images_whatever_the_side(side):
    network = ConvClassifier(channels=4, classes=3, image_size=side).eval()
    images = torch.zeros(2, side, side, 3, dtype=torch.uint8)
    assert network.stem(images.permute(0, 3, 1, 2).float()).shape[-1] == min(side, 32)
    assert network.features(images).shape == (2, 16)
    assert network(images).shape == (2, 3)


def test_shift_moves_each_image_and_repeats_the_border():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (6, 10, 10, 3), np.uint8)
    offsets = np.random.default_rng(7).integers(-2, 3, (6, 2, 1))
    shifted = random_shift(images, 0.2, np.random.default_rng(7))
    for image, result, (dy, dx) in zip(images, shifted, offsets[..., 0], strict=True):
        padded = np.pad(image, ((2, 2), (2, 2), (0, 0)), mode="edge")
        np.testing.assert_array_equal(result, padded[2 + dy : 12 + dy, 2 + dx : 12 + dx])
    assert random_shift(images, 0.0, rng) is images
