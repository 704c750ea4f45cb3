"""What a source of images is, whichever it is."""

from __future__ import annotations

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


def raw_container(path: Path, pixels: np.ndarray) -> tuple[Container, np.ndarray]:
    """Write (n, H, W, 3) uint8 pixels to a file that other processes can read single images from.

    Returns:
        The container, and the images' (n,) places in it, as container 0.
    """
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(np.ascontiguousarray(pixels).data)
    places = np.zeros(len(pixels), PLACE)
    places["size"], places["crc"] = pixels[0].size, -1
    places["offset"] = np.arange(len(pixels), dtype=np.int64) * pixels[0].size
    return Container(str(path), "raw", (pixels.shape[1], pixels.shape[2])), places
