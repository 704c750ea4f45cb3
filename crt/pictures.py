"""Pictures for people: samples by class, and originals above their reconstructions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

_MIN_CELL = 64
_GAP = 4
_FONT_SIZE = 16
_MAX_LABEL = 160
_BACKGROUND = (255, 255, 255)
_INK = (20, 20, 20)


def image_grid(rows: Sequence[np.ndarray], labels: Sequence[str] | None = None) -> Image.Image:
    """Lay out rows of images, each row with a label on its left if there are labels.

    Small images are enlarged a whole number of times by repeating pixels, so that a cell has 64 pixels a side at
    least and every pixel can still be seen.

    Args:
        rows: uint8 (n, S, S, 3) each; n may differ.
        labels: one per row; too long ones are cut, and line breaks are drawn as spaces.
    """
    side = rows[0].shape[1]
    factor = -(-_MIN_CELL // side)
    cell = side * factor
    font = ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"), _FONT_SIZE)
    # Folder names may hold line breaks, which Pillow's text layout refuses.
    texts = [_fit(" ".join(text.split()), font) for text in labels] if labels else []
    margin = _GAP + max((round(font.getlength(text)) for text in texts), default=-_GAP) + _GAP
    columns = max(len(row) for row in rows)
    size = (margin + columns * (cell + _GAP), _GAP + len(rows) * (cell + _GAP))
    canvas = Image.new("RGB", size, _BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    for y, images in enumerate(rows):
        top = _GAP + y * (cell + _GAP)
        if texts:
            draw.text((_GAP, top + cell // 2), texts[y], fill=_INK, font=font, anchor="lm")
        for x, image in enumerate(images):
            enlarged = image.repeat(factor, axis=0).repeat(factor, axis=1)
            canvas.paste(Image.fromarray(np.ascontiguousarray(enlarged)), (margin + x * (cell + _GAP), top))
    return canvas


def reconstruction_grid(originals: np.ndarray, reconstructions: np.ndarray, columns: int = 8) -> Image.Image:
    """Originals with their reconstructions right below, in pairs of rows.

    Args:
        originals: uint8 (N, S, S, 3).
        reconstructions: likewise, in the same order.
        columns: images in a row.
    """
    rows, labels = [], []
    for start in range(0, len(originals), columns):
        for name, images in (("original", originals), ("reconstruction", reconstructions)):
            rows.append(images[start : start + columns])
            labels.append(name)
    return image_grid(rows, labels)


def lines_by_class(labels: np.ndarray, lines: int, images_per_line: int) -> list[tuple[int, np.ndarray]]:
    """The first images of each of the first classes that occur: (class, rows) of every line, classes ascending.

    Where there are more lines than classes, each class has as many as there is room for.
    """
    chosen = np.unique(labels)[:lines]
    drawn = lines // len(chosen) * images_per_line
    rows = {int(label): np.flatnonzero(labels == label)[:drawn] for label in chosen}
    return [
        (label, of_class[start : start + images_per_line])
        for label, of_class in rows.items()
        for start in range(0, len(of_class), images_per_line)
    ]


def spread(count: int, wanted: int) -> np.ndarray:
    """Up to `wanted` of `count` rows, evenly spread and ascending: files are often in class order."""
    return np.unique(np.linspace(0, count - 1, min(wanted, count)).round().astype(np.int64))


def save_png(image: Image.Image, path: str | Path) -> None:
    """Write a PNG whose bytes depend on the pixels alone."""
    image.save(path, format="PNG", optimize=False, compress_level=6)


def _fit(text: str, font: ImageFont.FreeTypeFont) -> str:
    if font.getlength(text) <= _MAX_LABEL:
        return text
    while text and font.getlength(text + "…") > _MAX_LABEL:
        text = text[:-1]
    return text + "…"
