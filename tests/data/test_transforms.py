"""Oracles: torchvision's crops, block means, exact inverses, and what the definitions allow."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as F
from PIL import Image

from crt.data.transforms import center_crop, crop_at, resize_shorter_side, ten_crop, to_uint8, to_unit_range


def test_center_crop_of_the_right_size_is_the_image(make):
    image = make.noise(0, 16, 16)
    assert np.array_equal(center_crop(image, 16), image)


@pytest.mark.parametrize("height, width", [(30, 44), (31, 25), (12, 17), (16, 40)])
def test_center_crop_is_torchvisions_resize_and_crop(make, height, width):
    # Below twice the size no halving takes place, and Pillow's bicubic is all there is.
    picture = Image.fromarray(make.noise(1, height, width))
    scale = 16 / min(height, width)
    resized = F.resize(picture, [round(height * scale), round(width * scale)], F.InterpolationMode.BICUBIC)
    top, left = (resized.height - 16) // 2, (resized.width - 16) // 2
    assert np.array_equal(center_crop(np.asarray(picture), 16), np.asarray(F.crop(resized, top, left, 16, 16)))


def test_large_images_are_halved_by_means_of_blocks(make):
    image = make.noise(2, 64, 64)
    expected = image
    for _ in range(2):
        # Pillow resizes in two passes, rows first, and rounds after each.
        expected = np.floor((expected[:, ::2] + expected[:, 1::2].astype(float)) / 2 + 0.5).astype(np.uint8)
        expected = np.floor((expected[::2] + expected[1::2].astype(float)) / 2 + 0.5).astype(np.uint8)
    assert np.array_equal(center_crop(image, 16), expected)


def test_resize_gives_the_shorter_side_exactly(make):
    for height, width in [(500, 375), (33, 100), (7, 9), (1023, 512)]:
        assert min(resize_shorter_side(make.noise(3, height, width), 32).shape[:2]) == 32


def test_random_crop_of_a_whole_square_is_the_image_or_its_mirror(make):
    image = make.noise(4, 16, 16)
    rng = np.random.default_rng(0)
    assert all(np.array_equal(crop_at(image, 16, 1.0, False, rng.random(4)), image) for _ in range(20))
    crops = [crop_at(image, 16, 1.0, True, rng.random(4)) for _ in range(400)]
    mirrored = sum(np.array_equal(crop, image[:, ::-1]) for crop in crops)
    assert all(np.array_equal(crop, image) or np.array_equal(crop, image[:, ::-1]) for crop in crops)
    assert 150 < mirrored < 250  # 200 expected, deviation 10


def test_random_crop_reaches_every_place(make):
    image = make.noise(5, 16, 19)
    rng = np.random.default_rng(1)
    windows = [image[:, left : left + 16] for left in range(4)]
    counts = [0, 0, 0, 0]
    for _ in range(400):
        crop = crop_at(image, 16, 1.0, False, rng.random(4))
        counts[[np.array_equal(crop, window) for window in windows].index(True)] += 1
    assert min(counts) > 60  # 100 expected, deviation 9


def test_random_crop_scales_are_the_integers_up_to_the_smallest_share(make):
    # A diagonal ramp of one gray level per pixel of the 40-pixel side: its slope in a crop tells the scale.
    image = np.repeat(np.tile(np.arange(40, dtype=np.uint8) * 4, (40, 1))[..., None], 3, axis=-1)
    rng = np.random.default_rng(2)
    sides = set()
    for _ in range(300):
        crop = crop_at(image, 20, 0.8, False, rng.random(4)).astype(float)
        slope = np.polyfit(np.arange(16), crop[10, 2:18, 0], 1)[0]
        sides.add(round(160 / slope))
    assert sides == set(range(20, 26))  # 20 to ceil(20 / 0.8)


def test_small_images_are_enlarged(make):
    image = make.noise(7, 5, 8)
    assert center_crop(image, 16).shape == (16, 16, 3)
    assert crop_at(image, 16, 0.8, True, np.zeros(4)).shape == (16, 16, 3)
    assert ten_crop(image, 16, 1.1).shape == (10, 16, 16, 3)


@pytest.mark.parametrize("resize_range, side", [(1.0, 20), (1.05, 21), (1.1, 22), (1.15, 23), (1.5, 30)])
def test_ten_crop_is_torchvisions_of_the_centre_square(make, resize_range, side):
    image = make.noise(8, 70, 55)
    square = Image.fromarray(center_crop(image, side))
    expected = np.stack([np.asarray(view) for view in F.ten_crop(square, [20, 20])])
    assert np.array_equal(ten_crop(image, 20, resize_range), expected)


def test_pixels_survive_the_way_to_a_model_and_back():
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1).repeat(2, 1, 1, 3)
    scaled = to_unit_range(pixels)
    assert scaled.shape == (2, 3, 16, 16) and scaled.dtype == torch.float32
    assert scaled.min() == -1 and scaled.max() == 1
    assert torch.equal(to_uint8(scaled), pixels)
    assert to_unit_range(pixels)[0, 0, 0, 5].item() == pytest.approx(5 / 127.5 - 1, abs=1e-7)


def test_model_outputs_are_clamped_and_halves_rounded_to_even():
    outputs = torch.tensor([-7.0, 7.0, 0.0, 1.0 / 127.5]).reshape(1, 1, 2, 2).repeat(1, 3, 1, 1)
    # 0 lies at 127.5, which rounds to the even 128; the last at 128.5, which rounds to 128 too.
    assert to_uint8(outputs)[0, ..., 0].tolist() == [[0, 255], [128, 128]]
    assert to_uint8(outputs.bfloat16()).dtype == torch.uint8
