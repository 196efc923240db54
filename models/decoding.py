"""From the bytes of a picture that nobody vouches for to upright sRGB and alpha, by Pillow. No torch.

The format is told by the first bytes, never by a name or a content type; sizes are checked before pixels are decoded.
"""

import io
import struct
import threading
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext

import numpy as np
from PIL import Image, ImageCms, ImageOps

from models import png
from models.errors import InvalidRequest

READABLE = ("PNG", "JPEG", "WEBP", "AVIF")
MAX_INPUT_PIXELS = 64 * 1024 * 1024
MAX_REQUEST_PIXELS = 2 * MAX_INPUT_PIXELS  # of all pictures of a request: the largest one and its mask
_LARGE_PIXELS = 4 * 1024 * 1024
_AVIF_BRANDS = (b"avif", b"avis", b"mif1", b"msf1")
_MAX_SCANS = 64  # of a progressive JPEG; ten are usual, and each costs a pass over the whole picture
_BARE_MARKERS = (0x00, 0x01, *range(0xD0, 0xDA))  # JPEG's markers without a length
_MAX_SEGMENTS, _MAX_STRAY_BYTES = 4096, 256  # of a JPEG, and between two of them, where Pillow reads byte by byte
# What Pillow's parsers raise when a file is not what it says.
_DAMAGE = (
    *(OSError, ValueError, SyntaxError, EOFError, LookupError, TypeError, ArithmeticError, RuntimeError),
    *(struct.error, zlib.error),
)

_one_large_picture = threading.Lock()


def is_picture(encoded: bytes) -> bool:
    """Whether the first bytes are those of a format that is read; nothing else of it is looked at."""
    if encoded.startswith((png.SIGNATURE, b"\xff\xd8\xff")):
        return True
    webp = encoded.startswith(b"RIFF") and encoded[8:12] == b"WEBP"
    return webp or (encoded[4:8] == b"ftyp" and encoded[8:12] in _AVIF_BRANDS)


@contextmanager
def opened(encoded: bytes, field: str) -> Iterator[Image.Image]:
    """The picture with its header read and found right, and no pixel decoded.

    Raises InvalidRequest naming `field`, also for what is found wrong with the file while it is in use.
    """
    try:
        _check_container(encoded, field)
        with Image.open(io.BytesIO(encoded), formats=READABLE) as image:
            _check_pixels(image.width, image.height, field)
            if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":  # an MPO's first picture is the photograph
                raise InvalidRequest(field, "must be a single picture, not an animation")
            yield image
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as bomb:
        raise InvalidRequest(field, f"must have at most {MAX_INPUT_PIXELS} pixels") from bomb
    except _DAMAGE as damage:
        raise InvalidRequest(field, "is not a readable PNG, JPEG, WebP or AVIF picture") from damage


def check_together(pictures: Mapping[str, bytes]) -> None:
    """Raises InvalidRequest, naming the first that is too many, where the encoded pictures by field are more than
    MAX_REQUEST_PIXELS together: each alone may be decoded, all of them would take gigabytes. No pixel is decoded here.
    """
    pixels = 0
    for field, encoded in pictures.items():
        with opened(encoded, field) as image:
            pixels += image.width * image.height
        if pixels > MAX_REQUEST_PIXELS:
            allowed = f"at most {MAX_REQUEST_PIXELS} pixels"
            raise InvalidRequest(field, f"is too much: all pictures of a request together must have {allowed}")


@contextmanager
def decoded(encoded: bytes, field: str) -> Iterator[tuple[Image.Image, Image.Image | None]]:
    """The upright picture in sRGB (mode RGB) and its alpha (mode L), None where it has none. Raises what `opened` does.

    Large pictures take turns for as long as they are in use: one of MAX_INPUT_PIXELS takes about 1 GB.
    """
    with (
        opened(encoded, field) as image,
        _one_large_picture if image.width * image.height > _LARGE_PIXELS else nullcontext(),
    ):
        profile = image.info.get("icc_profile")
        _correct_transparency(image, encoded)
        ImageOps.exif_transpose(image, in_place=True)
        colour, alpha = _separated(image)
        yield _to_srgb(colour, profile), alpha


def _check_container(encoded: bytes, field: str) -> None:
    """What Pillow would find out too late, or not at all."""
    if encoded.startswith(png.SIGNATURE):
        for _ in png.chunks(encoded):
            pass
    elif encoded.startswith(b"\xff\xd8"):
        _check_jpeg(encoded, field)
    elif encoded[8:12] == b"WEBP":  # its decoder takes memory for the whole picture as soon as it is opened
        _check_pixels(*_webp_size(encoded), field)


def _check_jpeg(encoded: bytes, field: str) -> None:
    """Raises ValueError where no scan begins within reach (ITU-T T.81, annex B)."""
    if encoded.count(b"\xff\xda") > _MAX_SCANS:
        raise InvalidRequest(field, f"must have at most {_MAX_SCANS} scans")
    at = 2
    for _ in range(_MAX_SEGMENTS):
        at = encoded.find(b"\xff", at, at + _MAX_STRAY_BYTES)
        if at < 0 or at + 4 > len(encoded):
            break
        code = encoded[at + 1]
        if code == 0xDA:
            return
        if code == 0xFF:
            at += 1
        elif code in _BARE_MARKERS:
            at += 2
        else:
            at += 2 + max(2, int.from_bytes(encoded[at + 2 : at + 4]))
    raise ValueError("no scan within reach")


def _webp_size(encoded: bytes) -> tuple[int, int]:
    """RFC 9649, 2.5 to 2.7."""
    match encoded[12:16]:
        case b"VP8X":
            width, height = (int.from_bytes(encoded[at : at + 3], "little") + 1 for at in (24, 27))
        case b"VP8L":
            bits = int.from_bytes(encoded[21:25], "little")
            width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
        case _:
            width, height = (int.from_bytes(encoded[at : at + 2], "little") & 0x3FFF for at in (26, 28))
    return width, height


def _check_pixels(width: int, height: int, field: str) -> None:
    if width * height > MAX_INPUT_PIXELS:
        raise InvalidRequest(field, f"must have at most {MAX_INPUT_PIXELS} pixels, not {width}x{height}")


def _correct_transparency(image: Image.Image, encoded: bytes) -> None:
    """Makes a PNG's transparent grey or colour 8 bits deep, as Pillow makes the samples but not this."""
    key = image.info.get("transparency")
    if image.format != "PNG" or key is None or isinstance(key, bytes):
        return
    depth = encoded[24]
    if image.mode == "L":
        image.info["transparency"] = key * 255 // (2**depth - 1)
    elif image.mode == "RGB" and depth == 16:
        image.info["transparency"] = tuple(value >> 8 for value in key)


def _separated(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Colour (mode L, RGB or CMYK) and alpha."""
    if image.mode.startswith("I;16"):  # convert() would clip to 8 bits instead of scaling
        values = np.asarray(image)
        key = image.info.get("transparency")
        alpha = None if key is None else Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8))
        return Image.fromarray((values >> 8).astype(np.uint8)), alpha
    if image.mode == "LA":
        return image.getchannel("L"), image.getchannel("A")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return rgba.convert("RGB"), rgba.getchannel("A")
    if image.mode in ("L", "RGB", "CMYK"):
        return image, None
    return image.convert("L" if image.mode == "1" else "RGB"), None


def _to_srgb(colour: Image.Image, profile: bytes | None) -> Image.Image:
    """By the picture's own ICC profile; one that is damaged, or for other colours, counts as none, as in browsers."""
    if profile:
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            if "sRGB" not in ImageCms.getProfileDescription(source):
                target = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
                return ImageCms.ImageCmsTransform(source, target, colour.mode, "RGB").apply(colour)
        except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
            pass
    return colour if colour.mode == "RGB" else colour.convert("RGB")
