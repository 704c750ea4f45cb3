"""What a source of images is, whichever it is."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from crt.data.listing import PLACE, Container, Listing
from crt.files import replacing


@dataclass(frozen=True)
class Source:
    """What a source holds: its classes, and where the images of each split are.

    `splits` has "train" and "val" where the source states both, else "all".
    """

    class_ids: list[str]
    """By class index: the folder's name, such as a WordNet id."""
    class_names: list[str]
    """By class index: what people call it."""
    containers: list[Container]
    splits: dict[str, Listing]
    notes: list[str] = field(default_factory=list)
    """What a person should know of how the source was read, one line each."""


def raw_container(path: Path, parts: Iterable[np.ndarray]) -> tuple[Container, np.ndarray]:
    """Write pixels to a file that other processes can read single images from.

    Args:
        path: of the file.
        parts: one array at least, (n, H, W, 3) uint8, each of its own n.

    Returns:
        The container, and the images' places in it, one after another, as container 0.
    """
    shapes = []
    with replacing(path) as temporary, open(temporary, "wb") as file:
        for pixels in parts:
            file.write(np.ascontiguousarray(pixels).data)
            shapes.append(pixels.shape)
    (_, height, width, channels), count = shapes[0], sum(shape[0] for shape in shapes)
    places = np.zeros(count, PLACE)
    places["size"], places["crc"] = height * width * channels, -1
    places["offset"] = np.arange(count, dtype=np.int64) * places["size"]
    return Container(str(path), "raw", (height, width)), places
