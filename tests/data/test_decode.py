"""Oracles: the pixels that were encoded; Pillow's own transposition; closed forms of compositing and CMYK."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from crt.data.decode import FORMATS, Undecodable, decode, is_lossless


def save(picture: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "kind, options",
    [
        ("PNG", {}),
        ("BMP", {}),
        ("WEBP", {"lossless": True}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("PPM", {}),
    ],
)
def test_lossless_files_give_the_pixels_that_were_saved(make, kind, options):
    pixels = make.noise(0)
    data = make.encode(pixels, kind, **options)
    assert np.array_equal(decode(data), pixels)
    assert decode(data).flags.writeable
    assert is_lossless(data)


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "AVIF", "HEIF", "JPEG2000"])
def test_lossy_files_give_what_pillow_decodes(make, kind):
    data = make.encode(make.noise(1), kind, quality=80)
    assert np.array_equal(decode(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
    assert not is_lossless(data)


def test_lossless_webp_with_metadata_is_lossless(make):
    exif = Image.Exif()
    exif[0x010E] = "described"
    assert is_lossless(make.encode(make.noise(1), "WEBP", lossless=True, exif=exif))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "JPEG2000", "PPM"])
def test_grayscale_is_repeated(make, kind):
    gray = make.noise(2)[..., 0]
    data = save(Image.fromarray(gray), kind, **({"quality": 100} if kind == "JPEG" else {}))
    rgb = decode(data)
    assert (rgb == rgb[..., :1]).all()
    assert np.abs(rgb[..., 0].astype(int) - gray).max() <= (2 if kind == "JPEG" else 0)


def test_black_and_white():
    bits = np.random.default_rng(0).random((9, 9)) < 0.5
    assert np.array_equal(decode(save(Image.fromarray(bits), "PNG"))[..., 0], bits * 255)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_16_bit_grayscale_is_scaled_not_clipped(kind):
    values = np.linspace(0, 65535, 400).round().astype(np.uint16).reshape(20, 20)
    rgb = decode(save(Image.fromarray(values), kind))
    assert np.array_equal(rgb[..., 1], np.rint(values / 65535 * 255))


def test_16_bit_grayscale_with_a_transparent_value():
    values = np.array([[0, 500], [500, 65535]], np.uint16)
    data = save(Image.fromarray(values), "PNG")
    chunk = b"tRNS" + struct.pack(">H", 500)
    chunk = struct.pack(">I", 2) + chunk + struct.pack(">I", zlib.crc32(chunk))
    start = data.index(b"IDAT") - 4
    assert decode(data[:start] + chunk + data[start:])[..., 0].tolist() == [[0, 255], [255, 255]]


def cmyk_to_rgb(cmyk: np.ndarray) -> np.ndarray:
    ink = cmyk.astype(float) / 255
    return 255 * (1 - ink[..., :3]) * (1 - ink[..., 3:])


def flat_cmyk() -> np.ndarray:
    return np.tile(np.array([200, 30, 90, 40], np.uint8), (16, 16, 1))


def test_cmyk_as_adobe_writes_it():
    data = save(Image.fromarray(flat_cmyk(), "CMYK"), "JPEG", quality=100)
    assert b"Adobe" in data  # stored inverted, and marked so
    assert np.abs(decode(data) - cmyk_to_rgb(flat_cmyk())).max() <= 3


def test_cmyk_without_adobes_mark_is_not_inverted():
    data = save(Image.fromarray(255 - flat_cmyk(), "CMYK"), "JPEG", quality=100)  # so the stored values are plain
    start = data.index(b"\xff\xee")
    data = data[:start] + data[start + 2 + int.from_bytes(data[start + 2 : start + 4], "big") :]
    assert b"Adobe" not in data
    assert np.abs(decode(data) - cmyk_to_rgb(flat_cmyk())).max() <= 3


def test_transparency_is_laid_on_white(make):
    rgba = np.random.default_rng(3).integers(0, 256, (20, 24, 4), np.uint8)
    alpha = rgba[..., 3:].astype(float) / 255
    expected = rgba[..., :3] * alpha + 255 * (1 - alpha)
    for kind in ("PNG", "WEBP"):
        options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
        assert np.abs(decode(save(Image.fromarray(rgba), kind, **options)) - expected).max() <= 1
    gray_alpha = np.ascontiguousarray(rgba[..., 2:])
    expected = gray_alpha[..., :1] * alpha + 255 * (1 - alpha)
    assert np.abs(decode(save(Image.fromarray(gray_alpha, "LA"), "PNG")) - expected).max() <= 1


def test_palettes_with_and_without_transparency():
    picture = Image.fromarray(np.arange(4, dtype=np.uint8).reshape(2, 2), "P")
    picture.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90, 100, 110, 120])
    plain = [[[10, 20, 30], [40, 50, 60]], [[70, 80, 90], [100, 110, 120]]]
    for kind in ("PNG", "TIFF", "GIF"):
        assert decode(save(picture, kind)).tolist() == plain
    plain[0][1] = [255, 255, 255]
    for kind in ("PNG", "GIF"):
        assert decode(save(picture, kind, transparency=1)).tolist() == plain
    assert decode(save(picture, "PNG", transparency=bytes([255, 0, 255, 255]))).tolist() == plain


def test_a_transparent_colour():
    pixels = np.array([[[1, 2, 3], [4, 5, 6]], [[7, 8, 9], [1, 2, 3]]], np.uint8)
    expected = np.where((pixels == [1, 2, 3]).all(-1, keepdims=True), 255, pixels)
    assert np.array_equal(decode(save(Image.fromarray(pixels), "PNG", transparency=(1, 2, 3))), expected)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_as_pillow_transposes_it(make, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    for kind in ("PNG", "JPEG", "TIFF", "AVIF", "HEIF"):
        data = make.encode(make.noise(4), kind, exif=exif)
        upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
        assert np.array_equal(decode(data), np.asarray(upright))


@pytest.mark.parametrize("kind", ["GIF", "TIFF"])
def test_of_several_pages_the_first_counts(make, kind):
    pages = [Image.fromarray(make.noise(seed)[..., 0]) for seed in (1, 2)]
    data = save(pages[0], kind, save_all=True, append_images=pages[1:])
    assert np.array_equal(decode(data)[..., 0], np.asarray(pages[0]))


def test_broken_exif_does_not_lose_the_image(make):
    pixels = make.noise(5)
    data = make.encode(pixels, "PNG", exif=b"Exif\x00\x00MM\x00\x2a\xff\xff\xff\xff")
    assert np.array_equal(decode(data), pixels)


def bomb() -> bytes:
    """A PNG of some bytes that claims 60,000 x 60,000 pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def test_unusable_files_say_why(make):
    jpeg, png = make.encode(make.noise(6), "JPEG"), make.encode(make.noise(6), "PNG")
    webp = make.encode(make.noise(6), "WEBP")
    for data, reason in [
        (b"", "empty file"),
        (b"just text", "not a JPEG, .* or PPM image"),
        (make.encode(make.noise(6), "ICO"), "not a JPEG, .* or PPM image"),
        (save(Image.fromarray(np.ones((8, 8), np.float32)), "TIFF"), "numbers of 32 bits"),
        (save(Image.fromarray(np.ones((8, 8), np.int32)), "TIFF"), "numbers of 32 bits"),
        (jpeg[: len(jpeg) // 2], "corrupt"),
        (png[: len(png) // 2], "corrupt"),
        (webp[: len(webp) // 2], None),
        (jpeg[:20], None),
        (bomb(), "pixels"),
        (make.encode(make.noise(6, 1, 9)), "9x1 pixels: too small"),
    ]:
        with pytest.raises(Undecodable, match=reason) as error:
            decode(data)
        assert "\n" not in str(error.value) and len(str(error.value)) < 200


def test_the_largest_refused_image_is_told_by_its_header_alone():
    # 108 million pixels: beyond the limit at which Pillow itself only warns.
    data = bytearray(bomb())
    data[16:24] = struct.pack(">II", 10_000, 10_800)
    data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    with pytest.raises(Undecodable, match=r"^108000000 pixels: more than 89478485 pixels$"):
        decode(bytes(data))


@pytest.mark.parametrize("kind", FORMATS)
def test_damage_anywhere_is_an_image_or_a_reason_never_another_error(make, kind):
    clean = make.encode(make.noise(7), kind)
    rng = np.random.default_rng(8)
    for _ in range(60):
        data = bytearray(clean)
        for place in rng.integers(0, len(data), 3):
            data[place] = rng.integers(256)
        try:
            pixels = decode(bytes(data[: rng.integers(1, len(data) + 1)]))
        except Undecodable:
            continue
        assert pixels.ndim == 3 and pixels.shape[2] == 3 and pixels.dtype == np.uint8
