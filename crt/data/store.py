"""What is stored of one image: the work that prepare_data spreads over processes.

Every image is made twice, first to check it and to know its digest and size, then to write it. That costs
a second decoding (none where files are stored as they are), and buys that the whole data set is known
before a shard is begun: bad input stops the stage early, splits are disjoint, and any number of
processes write a shard to the same bytes.
"""

from __future__ import annotations

import io
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

import numpy as np
from PIL import Image

from crt.data.decode import Undecodable, decode, is_lossless
from crt.data.listing import Container, printable, read_entry
from crt.data.packed import pixel_digest
from crt.errors import UserError

_FILTERS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX,
}
# Shorter side that images of storage "encoded" are taken to be resized to at least: what crops of 256 pixels with
# min_crop 0.5 need. No image under 1:341 is refused for it, and no photograph or panorama is as thin as that.
_CROPPED_SIDE = 512


@dataclass(frozen=True)
class Form:
    """How images are stored: the params of prepare_data that bear on a single image."""

    storage: str
    image_size: int | None
    resize_filter: str


@dataclass(frozen=True)
class Chunk:
    """Consecutive images of a source, with all that a process needs to read them."""

    containers: Sequence[Container]
    ids: Sequence[str]
    places: np.ndarray
    form: Form


@dataclass(frozen=True)
class Checked:
    """What the first pass learns of n images."""

    digests: np.ndarray
    """(n, 32) uint8, zero where rejected."""
    payload_bytes: np.ndarray
    """(n,) int64, zero where rejected."""
    checksums: np.ndarray
    """(n,) uint32 CRC-32 of what is stored: whether the second pass makes the same."""
    reasons: dict[int, str]
    """Why an image was rejected, by its place among the n."""


def check_images(chunk: Chunk) -> Checked:
    """First pass over a chunk: make each image's stored form, keep digest and size only.

    Raises:
        UserError: a file cannot be read at all.
    """
    digests = np.zeros((len(chunk.ids), 32), np.uint8)
    payload_bytes = np.zeros(len(chunk.ids), np.int64)
    checksums = np.zeros(len(chunk.ids), np.uint32)
    reasons = {}
    for row, (name, place) in enumerate(zip(chunk.ids, chunk.places, strict=True)):
        try:
            pixels, payload = stored_form(read_entry(chunk.containers, name, place), chunk.form)
        except Undecodable as error:
            reasons[row] = str(error)
            continue
        digests[row] = np.frombuffer(pixel_digest(pixels), np.uint8)
        payload_bytes[row], checksums[row] = len(payload), zlib.crc32(payload)
    return Checked(digests, payload_bytes, checksums, reasons)


def write_images(task: tuple[Chunk, np.ndarray, np.ndarray, Path]) -> int:
    """Second pass over a chunk: write each image to its place in a shard.

    Args:
        task: the chunk, its images' (n,) checksums and (n,) byte offsets in the shard, and the shard's path.

    Returns:
        The number of images.

    Raises:
        UserError: an image is no longer the one that was checked, or a file cannot be read.
    """
    chunk, checksums, offsets, path = task
    shard = os.open(path, os.O_WRONLY)
    try:
        for name, place, checksum, offset in zip(chunk.ids, chunk.places, checksums, offsets, strict=True):
            try:
                source = read_entry(chunk.containers, name, place)
                payload = source if _is_kept_whole(source, chunk.form) else stored_form(source, chunk.form)[1]
            except Undecodable:
                raise changed(name) from None
            if zlib.crc32(payload) != checksum:
                raise changed(name)
            _write_all(shard, payload, int(offset))
    finally:
        os.close(shard)
    return len(chunk.ids)


class SourceChanged(UserError):
    """The source's files changed while they were packed."""


def changed(name: str) -> SourceChanged:
    """The error for an image that differs between the two passes."""
    shown = printable(name)
    return SourceChanged(f"{shown}: changed while the data set was packed: run the same command again to start over")


def stored_form(source: bytes | np.ndarray, form: Form) -> tuple[np.ndarray, bytes]:
    """An image as it is stored.

    Storage "pixels": resized so that the shorter side is `image_size`, centre-cropped to a square.
    Storage "encoded": the file as it is, unless its shorter side exceeds `image_size`; then shrunk to
    that and encoded anew, as JPEG of quality 95 without chroma subsampling, or as PNG where the source
    was lossless.

    Args:
        source: an image file's bytes, or (H, W, 3) uint8 pixels.

    Returns:
        (h, w, 3) uint8 pixels as a reader gets them, and the bytes to store.

    Raises:
        Undecodable: see `crt.data.decode.decode`; or too elongated.
    """
    pixels = source if isinstance(source, np.ndarray) else decode(source)
    size = form.image_size
    _refuse_elongated(pixels, form)
    if form.storage == "pixels":
        assert size is not None
        pixels = _central_square(_resized(pixels, size, form.resize_filter), size)
        return pixels, pixels.tobytes()
    if size is None or min(pixels.shape[:2]) <= size:
        return pixels, _encode(pixels, lossless=True) if isinstance(source, np.ndarray) else source
    lossless = isinstance(source, np.ndarray) or is_lossless(source)
    payload = _encode(_resized(pixels, size, form.resize_filter), lossless)
    return decode(payload), payload


def _refuse_elongated(pixels: np.ndarray, form: Form) -> None:
    """Refuse an image that takes absurdly much memory once its shorter side has the size that crops need.

    Raises:
        Undecodable: as said.
    """
    # Of storage "encoded" crops are cut later, by readers that choose their size.
    side = form.image_size if form.storage == "pixels" else max(form.image_size or 0, _CROPPED_SIDE)
    assert side is not None and Image.MAX_IMAGE_PIXELS is not None
    short, long = sorted(pixels.shape[:2])
    if side * round(long * side / short) > Image.MAX_IMAGE_PIXELS:
        height, width = pixels.shape[:2]
        most = Image.MAX_IMAGE_PIXELS
        raise Undecodable(
            f"{width}x{height} pixels: too elongated: more than {most} pixels at a shorter side of {side}"
        )


def _is_kept_whole(source: bytes | np.ndarray, form: Form) -> TypeGuard[bytes]:
    """Whether an image is a file that is stored as it is, whatever its size."""
    return form.storage == "encoded" and form.image_size is None and isinstance(source, bytes)


def _resized(pixels: np.ndarray, side: int, resize_filter: str) -> np.ndarray:
    """Resize so that the shorter side has `side` pixels."""
    height, width = pixels.shape[:2]
    if min(height, width) == side:
        return pixels
    scale = side / min(height, width)
    size = (max(round(width * scale), side), max(round(height * scale), side))
    return np.asarray(Image.fromarray(pixels).resize(size, _FILTERS[resize_filter]))


def _central_square(pixels: np.ndarray, size: int) -> np.ndarray:
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return np.ascontiguousarray(pixels[top : top + size, left : left + size])


def _encode(pixels: np.ndarray, lossless: bool) -> bytes:
    buffer = io.BytesIO()
    picture = Image.fromarray(pixels)
    if lossless:
        picture.save(buffer, "PNG")
    else:
        picture.save(buffer, "JPEG", quality=95, subsampling="4:4:4")
    return buffer.getvalue()


def _write_all(file: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(file, view, offset)
        view, offset = view[written:], offset + written
