"""Pictures as plain data: decoding what clients send, and encoding what they get, fast. No torch.

Whatever comes in is decoded and put together anew: no byte of an upload is ever passed on.
"""

import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from PIL import Image, ImageOps, features

from models import exif, png
from models.decoding import decoded, opened
from models.errors import InvalidRequest

ImageFormat = Literal["png", "jpeg", "webp", "avif"]
FORMATS: tuple[ImageFormat, ...] = tuple(f for f in get_args(ImageFormat) if f != "avif" or features.check("avif"))
MEDIA_TYPES: dict[ImageFormat, str] = {format: f"image/{format}" for format in get_args(ImageFormat)}


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
    def from_bytes(
        cls, encoded: bytes, field: str = "image", background: Literal["white", "black"] = "white"
    ) -> "Picture":
        """Decodes a PNG, JPEG, WebP or AVIF that nobody vouches for: upright, in sRGB, alpha laid on the background.

        Raises InvalidRequest naming `field` for anything else, for damaged files, for animations and for pictures of
        more than decoding.MAX_INPUT_PIXELS.
        """
        with decoded(encoded, field) as (colour, alpha):
            if alpha is None:
                return cls._from_image(colour)
            flat = Image.new("RGB", colour.size, background)
            flat.paste(colour, mask=alpha)
            return cls._from_image(flat)

    @classmethod
    def _from_image(cls, image: Image.Image) -> "Picture":
        return cls(width=image.width, height=image.height, data=image.tobytes())

    def array(self) -> np.ndarray:
        """uint8 (height, width, 3)."""
        return np.frombuffer(self.data, np.uint8).reshape(self.height, self.width, 3)

    def resized(self, width: int, height: int) -> "Picture":
        """The picture at another size, by Lanczos."""
        if (width, height) == (self.width, self.height):
            return self
        image = Image.fromarray(self.array()).resize((width, height), Image.Resampling.LANCZOS)
        return Picture.from_array(np.asarray(image))

    def continued(self, multiple: int, least: int) -> "Picture":
        """The picture with its last row and column repeated until its sides are multiples and have a least length."""
        bottom, right = (max(-side % multiple, least - side) for side in (self.height, self.width))
        return Picture.from_array(np.pad(self.array(), ((0, bottom), (0, right), (0, 0)), mode="edge"))


def mask_array(picture: Picture) -> np.ndarray:
    """A mask's values, uint8 (height, width): the luminance of ITU-R BT.601, so white is 255 and black is 0."""
    return np.asarray(Image.fromarray(picture.array()).convert("L"))


def alpha_mask(encoded: bytes, field: str = "image") -> Picture | None:
    """White where an encoded picture is transparent and black where it is opaque; None where all of it is opaque.

    Raises what Picture.from_bytes raises.
    """
    with decoded(encoded, field) as (_, alpha):
        if alpha is None or alpha.getextrema() == (255, 255):
            return None
        return Picture._from_image(ImageOps.invert(alpha).convert("RGB"))


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What an encoded picture says of itself: its format, its upright size, whether parts of it may be transparent, and
    the texts it carries by keyword."""

    format: str
    width: int
    height: int
    transparent: bool
    text: Mapping[str, str]


def inspect(encoded: bytes, field: str = "image") -> Inspection:
    """Reads a picture's header and texts, and decodes none of its pixels. Raises what Picture.from_bytes raises."""
    with opened(encoded, field) as image:
        # Pillow decodes a whole PNG to look for EXIF behind the pixels; only what stands before them counts here.
        block = Image.Exif() if image.format == "PNG" and "exif" not in image.info else image.getexif()
        turned = block.get(exif.ORIENTATION) in exif.SIDEWAYS
        width, height = (image.height, image.width) if turned else image.size
        text = exif.read(block, block.get_ifd(exif.PRIVATE_DIRECTORY))
        if image.format == "PNG":
            text |= png.read_text(encoded)
        format = "jpeg" if image.format == "MPO" else str(image.format).lower()
        transparent = image.has_transparency_data
        return Inspection(format=format, width=width, height=height, transparent=transparent, text=text)


def check_transparency(format: ImageFormat) -> None:
    """Raises InvalidRequest for a format that no transparent picture can be given in."""
    if format == "jpeg":
        raise InvalidRequest("output_format", "jpeg has no transparency and this picture has; ask for png or webp")


def encode(array: np.ndarray, format: ImageFormat, text: Mapping[str, str] | None = None) -> bytes:
    """Encodes uint8 (height, width, 3) with the texts of models/metadata.py. Qualities: JPEG 95, WebP 90, AVIF 80."""
    if format == "png":
        return png.write(array, text)
    buffer = io.BytesIO()
    block = exif.write(text) if text else b""
    if format == "webp":
        Image.fromarray(array).save(buffer, "WEBP", quality=90, method=0, exif=block)
        return buffer.getvalue()
    if format == "avif":
        Image.fromarray(array).save(buffer, "AVIF", quality=80, speed=9, max_threads=1, exif=block)
        return buffer.getvalue()
    Image.fromarray(array).save(buffer, "JPEG", quality=95)
    return exif.add_to_jpeg(buffer.getvalue(), block)


def encode_preview(array: np.ndarray, scale: int) -> bytes:
    """A small JPEG of uint8 (height, width, 3), enlarged `scale` times."""
    height, width, _ = array.shape
    buffer = io.BytesIO()
    Image.fromarray(array).resize((width * scale, height * scale), Image.Resampling.BILINEAR).save(
        buffer, "JPEG", quality=80
    )
    return buffer.getvalue()
