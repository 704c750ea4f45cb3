"""Views against the transforms that they name, and torchvision's ten crops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchvision.transforms import TenCrop

from crt.data.transforms import center_crop
from crt.errors import UserError
from crt.tokens.views import render_batch, render_views, view_names


def test_names():
    assert view_names(["flip", "center"]) == ("flip", "center")
    assert view_names(["ten_crop@1.10", "center"]) == (*(f"ten_crop@1.1/{n}" for n in range(10)), "center")


@pytest.mark.parametrize("views", [["center", "center"], ["ten_crop@1.1", "ten_crop@1.10"]])
def test_the_same_view_twice_is_refused(views):
    with pytest.raises(UserError, match="two of them are the same"):
        view_names(views)


def test_unknown_view_is_refused():
    with pytest.raises(UserError, match="unknown view 'left'"):
        view_names(["left"])


@pytest.mark.parametrize("shape", [(40, 60, 3), (61, 45, 3), (100, 32, 3)])
def test_rendering(shape):
    image = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    names = view_names(["flip", "ten_crop@1.25", "center"])
    views = render_views(image, names, 16)
    np.testing.assert_array_equal(views[0], center_crop(image, 16)[:, ::-1])
    np.testing.assert_array_equal(views[-1], center_crop(image, 16))
    square = torch.from_numpy(center_crop(image, 20).copy()).permute(2, 0, 1)
    for view, crop in zip(views[1:11], TenCrop(16)(square), strict=True):
        np.testing.assert_array_equal(view, crop.permute(1, 2, 0).numpy())
    # One by one, in another order.
    for place in (7, 0, 3):
        np.testing.assert_array_equal(render_views(image, [names[place]], 16)[0], views[place])


@pytest.mark.parametrize("views", [["flip", "center"], ["center", "ten_crop@1.25"]])
@pytest.mark.parametrize("side", [16, 20])
def test_batches_are_rendered_like_single_images(views, side):
    images = np.random.default_rng(0).integers(0, 256, (5, side, side, 3), np.uint8)
    names = view_names(views)
    expected = np.stack([render_views(image, names, 16) for image in images])
    np.testing.assert_array_equal(render_batch(images, names, 16), expected)
