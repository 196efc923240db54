"""Pictures as plain data: decoding what clients send, and encoding what they get, fast. No torch.

The PNG writer is our own because Pillow's default spends about a second on a 1024x1024 picture: rows are filtered with
SUB and packed with zlib's HUFFMAN_ONLY, which is as small and many times as fast (PNG specification, W3C 2003, 9.2).
"""

import io
import struct
import zlib
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from PIL import Image, ImageOps

from models.errors import InvalidRequest

ImageFormat = Literal["png", "jpeg", "webp"]
FORMATS: tuple[ImageFormat, ...] = get_args(ImageFormat)
MEDIA_TYPES: dict[ImageFormat, str] = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
MAX_INPUT_PIXELS = 64 * 1024 * 1024  # checked in the header, before any pixel is decoded
_READABLE = ("PNG", "JPEG", "WEBP")


@dataclass(frozen=True, kw_only=True)
class Picture:
    """An RGB picture: `data` holds height x width x 3 bytes, rows from the top."""

    width: int
    height: int
    data: bytes

    @classmethod
    def from_array(cls, array: np.ndarray) -> "Picture":
        """From uint8 (height, width, 3)."""
        height, width, _ = array.shape
        return cls(width=width, height=height, data=np.ascontiguousarray(array).tobytes())

    @classmethod
    def from_bytes(cls, encoded: bytes, field: str = "image") -> "Picture":
        """Decodes a PNG, JPEG or WebP that nobody vouches for; alpha is laid on white.

        Raises InvalidRequest naming `field` for anything else, for damaged files, for animations and for pictures of
        more than MAX_INPUT_PIXELS.
        """
        try:
            with Image.open(io.BytesIO(encoded), formats=_READABLE) as image:
                _check_header(image, field)
                image.load()
                return cls.from_array(np.asarray(_to_rgb(ImageOps.exif_transpose(image))))
        except InvalidRequest:
            raise
        except Image.DecompressionBombError as bomb:
            raise InvalidRequest(field, f"must have at most {MAX_INPUT_PIXELS} pixels") from bomb
        except (OSError, ValueError, SyntaxError) as damaged:
            raise InvalidRequest(field, "is not a readable PNG, JPEG or WebP picture") from damaged

    def array(self) -> np.ndarray:
        """uint8 (height, width, 3)."""
        return np.frombuffer(self.data, np.uint8).reshape(self.height, self.width, 3)

    def resized(self, width: int, height: int) -> "Picture":
        """The picture at another size, by Lanczos."""
        if (width, height) == (self.width, self.height):
            return self
        image = Image.fromarray(self.array()).resize((width, height), Image.Resampling.LANCZOS)
        return Picture.from_array(np.asarray(image))


def encode(array: np.ndarray, format: ImageFormat) -> bytes:
    """Encodes uint8 (height, width, 3). JPEG at quality 95, WebP at quality 90."""
    if format == "png":
        return _png(array)
    buffer = io.BytesIO()
    options = {"jpeg": {"quality": 95}, "webp": {"quality": 90, "method": 0}}[format]
    Image.fromarray(array).save(buffer, format.upper(), **options)
    return buffer.getvalue()


def encode_preview(array: np.ndarray, scale: int) -> bytes:
    """A small JPEG of uint8 (height, width, 3), enlarged `scale` times."""
    height, width, _ = array.shape
    buffer = io.BytesIO()
    Image.fromarray(array).resize((width * scale, height * scale), Image.Resampling.BILINEAR).save(
        buffer, "JPEG", quality=80
    )
    return buffer.getvalue()


def _check_header(image: Image.Image, field: str) -> None:
    if image.width * image.height > MAX_INPUT_PIXELS:
        raise InvalidRequest(field, f"must have at most {MAX_INPUT_PIXELS} pixels, not {image.width}x{image.height}")
    if getattr(image, "n_frames", 1) > 1:
        raise InvalidRequest(field, "must be a single picture, not an animation")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey: convert() would clip instead of scaling
        return Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def _png(array: np.ndarray) -> bytes:
    height, width, channels = array.shape
    filtered = np.empty((height, 1 + width * channels), np.uint8)
    filtered[:, 0] = 1  # SUB: each byte less the same channel of the pixel to its left
    rows = array.reshape(height, width * channels)
    filtered[:, 1 : 1 + channels] = rows[:, :channels]
    np.subtract(rows[:, channels:], rows[:, :-channels], out=filtered[:, 1 + channels :])
    packer = zlib.compressobj(1, zlib.DEFLATED, 15, 9, zlib.Z_HUFFMAN_ONLY)
    packed = packer.compress(filtered.data) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", packed) + _chunk(b"IEND", b"")


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(body, zlib.crc32(kind)))
