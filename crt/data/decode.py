"""Bytes of an image file to pixels: the one decoder of the package."""

from __future__ import annotations

import io
import re
import warnings

import numpy as np
from PIL import Image, UnidentifiedImageError
from pillow_heif import register_heif_opener

# Many processes decode at once, so each with one thread; only the picture itself is of use.
register_heif_opener(decode_threads=1, thumbnails=False, depth_images=False, aux_images=False)
# Pillow's PPM covers PGM and PBM; HEIF is what phones write as .heic.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "AVIF", "HEIF", "JPEG2000", "PPM")
MIN_SIDE = 2

# First bytes of the formats that store pixels without loss. A TIFF file may hold JPEG: rare, and it only costs space.
_LOSSLESS = (b"\x89PNG\r\n\x1a\n", b"BM", b"II*\0", b"MM\0*", b"GIF8", *(b"P%d" % kind for kind in range(1, 7)))
_ORIENTATION_TAG = 0x0112
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class Undecodable(Exception):
    """The bytes are no image that can be used; the message says why in a few words."""


def decode(data: bytes) -> np.ndarray:
    """Decode a file of one of `FORMATS`, told apart by content.

    Grayscale is repeated over the channels (16 bits scaled to 8), CMYK converted, transparency laid on
    white, an EXIF orientation applied, the first frame of an animation or page of a TIFF file taken.

    Args:
        data: the whole file.

    Returns:
        (H, W, 3) uint8 RGB.

    Raises:
        Undecodable: empty, cut short, corrupt, of another format or number type, absurdly large, or under
            2 pixels wide or high.
    """
    if not data:
        raise Undecodable("empty file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # Pillow only warns from 89 million pixels on; such a file is refused before its pixels take memory.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            picture = Image.open(io.BytesIO(data), formats=FORMATS)
            picture.load()
            pixels = _to_rgb(picture)
    except UnidentifiedImageError:
        raise Undecodable(f"not a {', '.join(FORMATS[:-1])} or {FORMATS[-1]} image") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        found = re.search(r"\((\d+) pixels\)", str(error))  # Pillow does not hand out the picture
        size = f"{found[1]} pixels: " if found else ""
        raise Undecodable(f"{size}more than {Image.MAX_IMAGE_PIXELS} pixels") from None
    except (MemoryError, Undecodable):
        raise
    except Exception as error:  # a decoder that meets corrupt data may raise anything
        raise Undecodable(f"corrupt: {_reason(error)}") from None
    if min(pixels.shape[:2]) < MIN_SIDE:
        raise Undecodable(f"{pixels.shape[1]}x{pixels.shape[0]} pixels: too small")
    return pixels


def is_lossless(data: bytes) -> bool:
    """Whether a file that `decode` accepts stores its pixels without loss (lossless WebP too)."""
    if data.startswith(_LOSSLESS):
        return True
    # Extended WebP files hold the coded image in a later chunk, behind at most some small ones.
    return data.startswith(b"RIFF") and data[8:12] == b"WEBP" and b"VP8L" in data[12:64]


def _reason(error: Exception) -> str:
    """An error's text on one line, the same in every process: without memory addresses."""
    return re.sub(r"<[^<>]* at 0x[0-9a-f]+>", "data", " ".join(str(error).split())) or type(error).__name__


def _to_rgb(picture: Image.Image) -> np.ndarray:
    """(H, W, 3) uint8 of a loaded picture of any mode, upright."""
    orientation = _orientation(picture)
    if picture.mode == "F" or (picture.mode == "I" and picture.format == "TIFF"):
        raise Undecodable("numbers of 32 bits, whose white is unknown: save it with 8 or 16 bits")
    if picture.mode.startswith("I"):
        picture = _from_16_bits(picture)
    elif picture.mode == "CMYK" and picture.format in ("JPEG", "MPO") and "adobe" not in picture.info:
        # Pillow takes every CMYK JPEG for an inverted one, as Adobe writes them; without Adobe's mark it is not.
        picture = Image.fromarray(255 - np.asarray(picture), "CMYK")
    if picture.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in picture.info:
        layer = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    picture = picture.convert("RGB")
    if orientation in _TRANSPOSE:
        picture = picture.transpose(_TRANSPOSE[orientation])
    return np.array(picture)


def _orientation(picture: Image.Image) -> int:
    try:
        return int(picture.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:  # broken metadata does not make the pixels unusable
        return 1


def _from_16_bits(picture: Image.Image) -> Image.Image:
    """Scale 16-bit grayscale to 8 bits (Pillow's own conversion clips); the transparent value becomes white."""
    values = np.asarray(picture).astype(np.int64)
    scaled = ((values * 255 + 32767) // 65535).clip(0, 255).astype(np.uint8)
    if isinstance(picture.info.get("transparency"), int):
        scaled[values == picture.info["transparency"]] = 255
    return Image.fromarray(scaled)
