"""Pictures in and out: what is sent back is exact and quick to make, what comes in is not trusted."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from models.errors import InvalidRequest
from models.images import MEDIA_TYPES, Picture, encode, encode_preview

NOISE = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)


def encoded(image: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("size", [(1, 1), (3, 2), (48, 64)])
def test_png_is_lossless(size):
    array = NOISE[: size[0], : size[1]]
    with Image.open(io.BytesIO(encode(array, "png"))) as image:
        image.verify()
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(encode(array, "png")))), array)


@pytest.mark.parametrize("format", MEDIA_TYPES)
def test_every_format_opens_as_itself(format):
    smooth = np.asarray(Image.fromarray(NOISE[:4, :4]).resize((64, 48), Image.BICUBIC))
    image = Image.open(io.BytesIO(encode(smooth, format)))
    assert image.format == format.upper()
    assert np.abs(np.asarray(image.convert("RGB")).astype(int) - smooth).mean() < 8


def test_a_preview_is_a_small_jpeg():
    assert Image.open(io.BytesIO(encode_preview(NOISE[:16, :16], 8))).size == (128, 128)


def test_decoding_keeps_pixels_and_lays_alpha_on_white():
    assert np.array_equal(Picture.from_bytes(encoded(Image.fromarray(NOISE), "PNG")).array(), NOISE)
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    assert (Picture.from_bytes(encoded(clear, "PNG")).array() == 255).all()


def test_orientation_is_applied_and_16_bit_grey_is_scaled():
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = Picture.from_bytes(encoded(Image.fromarray(NOISE), "JPEG", exif=exif))
    assert (turned.width, turned.height) == (48, 64)
    ramp = Image.fromarray(np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16))
    values = Picture.from_bytes(encoded(ramp, "PNG")).array()
    assert (values.min(), values.max()) == (0, 255)
    assert len(np.unique(values)) > 200


def test_cmyk_is_converted():
    assert Picture.from_bytes(encoded(Image.new("CMYK", (8, 8)), "JPEG")).array().shape == (8, 8, 3)


def header_of(width: int, height: int) -> bytes:
    """A PNG that promises more than it holds."""
    body = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + b"IHDR" + body + struct.pack(">I", zlib.crc32(b"IHDR" + body))
    return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        encode(NOISE, "png")[:200],
        header_of(20_000, 20_000),
        header_of(60_000, 60_000),
        header_of(9_000, 9_000),
        encoded(Image.fromarray(NOISE), "GIF"),
        encoded(Image.fromarray(NOISE), "WEBP", save_all=True, append_images=[Image.fromarray(NOISE[::-1].copy())]),
    ],
    ids=["empty", "svg", "truncated", "bomb-400M", "bomb-3600M", "bomb-81M", "gif", "animation"],
)
def test_what_is_no_single_sound_picture_is_refused(data):
    with pytest.raises(InvalidRequest) as refused:
        Picture.from_bytes(data, field="image")
    assert refused.value.field == "image"


def test_resizing_to_the_same_size_is_the_same_picture():
    picture = Picture.from_array(NOISE)
    assert picture.resized(64, 48) is picture
    assert (picture.resized(32, 24).width, picture.resized(32, 24).height) == (32, 24)
