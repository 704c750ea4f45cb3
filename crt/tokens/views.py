"""Views of an image that a cache holds codes of: the centre, its mirror image, ten crops at a resize range."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from crt.data.transforms import center_crop, ten_crop
from crt.errors import UserError
from crt.params import parse_view

NUM_CROPS = 10


def view_names(views: Sequence[str]) -> tuple[str, ...]:
    """Names of the single views that `tokenize.views` stands for.

    "ten_crop@1.1" becomes "ten_crop@1.1/0" to "ten_crop@1.1/9", in the order of `ten_crop`.

    Raises:
        UserError: two entries stand for the same view, or an entry for none.
    """
    names: list[str] = []
    for view in views:
        try:
            kind, resize_range = parse_view(view)
        except ValueError as error:
            raise UserError(str(error)) from None
        if kind == "ten_crop":
            names += [f"ten_crop@{resize_range:g}/{crop}" for crop in range(NUM_CROPS)]
        else:
            names.append(kind)
    if len(set(names)) != len(names):
        raise UserError(f"views {', '.join(views)}: two of them are the same: name each once")
    return tuple(names)


def render_views(image: np.ndarray, names: Sequence[str], size: int) -> np.ndarray:
    """The named views of one image.

    Args:
        image: (H, W, 3) uint8.
        names: as `view_names` gives them.
        size: side of each view.

    Returns:
        (len(names), size, size, 3) uint8.
    """
    made: dict[str, np.ndarray] = {}
    views = np.empty((len(names), size, size, 3), np.uint8)
    for place, name in enumerate(names):
        kind, _, crop = name.partition("/")
        if kind not in made:
            made[kind] = _render(image, kind, size)
        views[place] = made[kind][int(crop or 0)]
    return views


def render_batch(images: np.ndarray, names: Sequence[str], size: int) -> np.ndarray:
    """The named views of images of one size: `render_views` of each, all at once where nothing has to be resized.

    Args:
        images: (B, S, S, 3) uint8.
        names: as `view_names` gives them.
        size: side of each view.

    Returns:
        (B, len(names), size, size, 3) uint8.
    """
    if images.shape[1:3] == (size, size) and set(names) <= {"center", "flip"}:
        return np.stack([images[:, :, ::-1] if name == "flip" else images for name in names], axis=1)
    return np.stack([render_views(image, names, size) for image in images])


def _render(image: np.ndarray, kind: str, size: int) -> np.ndarray:
    """(views, size, size, 3): all views of one kind."""
    if kind.startswith("ten_crop@"):
        return ten_crop(image, size, float(kind.partition("@")[2]))
    centre = center_crop(image, size)[None]
    return centre[:, :, ::-1] if kind == "flip" else centre
