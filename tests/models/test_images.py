"""Pictures in and out: what is sent back is exact and quick to make, what comes in is not trusted."""

import io
import random
import struct
import time
import warnings
import zipfile
import zlib
from collections.abc import Iterable
from contextlib import suppress

import numpy as np
import pytest
from PIL import Image, ImageCms

from models import png
from models.errors import InvalidRequest
from models.images import MEDIA_TYPES, Picture, alpha_mask, encode, encode_preview, inspect, mask_array

NOISE = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
SMOOTH = np.asarray(Image.fromarray(NOISE[:4, :4]).resize((64, 48), Image.Resampling.BICUBIC))
INPUT_FORMATS = ("PNG", "JPEG", "WEBP", "AVIF")


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def chunk(kind: bytes, body: bytes = b"") -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def raw_png(rows: np.ndarray, depth: int, colour: int, *before: bytes, after: Iterable[bytes] = ()) -> bytes:
    """A PNG of any depth and colour type: `rows` holds its packed samples, uint8 (height, bytes of a row)."""
    samples = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    width = rows.shape[1] * 8 // (depth * samples)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, len(rows), depth, colour, 0, 0, 0))
    pixels = zlib.compress(np.pad(rows, ((0, 0), (1, 0))).tobytes(), 1)
    return png.SIGNATURE + b"".join((header, *before, chunk(b"IDAT", pixels), *after, chunk(b"IEND")))


def big_endian(values: object) -> np.ndarray:
    """16-bit samples as the bytes of rows."""
    array = np.asarray(values, ">u2")
    return array.view(np.uint8).reshape(len(array), -1)


# What goes out


@pytest.mark.parametrize("size", [(1, 1), (3, 2), (48, 64)])
def test_png_is_lossless(size: tuple[int, int]):
    array = NOISE[: size[0], : size[1]]
    with Image.open(io.BytesIO(encode(array, "png"))) as image:
        image.verify()
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(encode(array, "png")))), array)


@pytest.mark.parametrize("format", MEDIA_TYPES)
def test_every_format_opens_as_itself(format: str):
    image = Image.open(io.BytesIO(encode(SMOOTH, format)))
    assert image.format == format.upper()
    assert np.abs(np.asarray(image.convert("RGB")).astype(int) - SMOOTH).mean() < 8


def test_a_preview_is_a_small_jpeg():
    assert Image.open(io.BytesIO(encode_preview(NOISE[:16, :16], 8))).size == (128, 128)


TEXTS = {
    "plain": {"parameters": "a cat\nSteps: 4", "heliograph": '{"a": 1}', "Software": "Heliograph"},
    "umlauts": {"parameters": "Käse, 猫, 🐈\nSteps: 4", "heliograph": '{"prompt": "Käse, 猫, 🐈"}'},
    "one": {"heliograph": "{}"},
    "odd": {"parameters": "abc", "heliograph": '{"a":1}', "Software": "H"},
    "long": {"parameters": "🐈" * 20_000, "heliograph": '{"p": "' + "🐈" * 20_000 + '"}', "Software": "Heliograph"},
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
@pytest.mark.parametrize("format", MEDIA_TYPES)
def test_texts_come_back_and_change_no_pixel(format: str, text: dict[str, str]):
    data = encode(SMOOTH, format, text)
    assert Picture.from_bytes(data) == Picture.from_bytes(encode(SMOOTH, format))
    found = inspect(data)
    assert (found.format, found.width, found.height, found.text) == (format, 64, 48, text)


def test_others_find_the_texts_where_a1111_puts_them():
    text = {"parameters": "Käse 猫\nSteps: 4", "heliograph": '{"a": "é"}', "Software": "Heliograph"}
    with Image.open(io.BytesIO(encode(NOISE, "png", text))) as image:
        assert image.text == text
        assert np.array_equal(np.asarray(image), NOISE)
    for format in ("jpeg", "webp"):
        with Image.open(io.BytesIO(encode(NOISE, format, text))) as image:
            comment = image.getexif().get_ifd(0x8769)[0x9286]
            assert comment == b"UNICODE\0" + text["parameters"].encode("utf-16-be")
            assert image.getexif()[0x0131] == "Heliograph"


@pytest.mark.parametrize(
    "comment",
    [
        b"UNICODE\0" + "Käse 猫: Steps: 4".encode("utf-16-le"),
        b"UNICODE\0" + "Käse 猫: Steps: 4".encode("utf-16-be"),
        b"UNICODE\0" + "\ufeffKäse 猫: Steps: 4".encode("utf-16-le"),
        bytes(8) + "Käse 猫: Steps: 4".encode(),
        "Käse 猫: Steps: 4".encode(),
    ],
    ids=["little", "big", "marked", "undefined", "bare"],
)
def test_user_comments_of_other_programs_are_read(comment: bytes):
    exif = Image.Exif()
    exif[0x0131] = "another program"  # Pillow takes a block without one for an empty one
    exif.get_ifd(0x8769)[0x9286] = comment
    for format in ("JPEG", "WEBP", "PNG"):
        data = encoded(Image.fromarray(NOISE), format, exif=exif)
        assert inspect(data).text["parameters"] == "Käse 猫: Steps: 4"


# What comes in


@pytest.mark.parametrize("format", INPUT_FORMATS)
def test_every_format_is_read(format: str):
    picture = Picture.from_bytes(encoded(Image.fromarray(SMOOTH), format))
    assert np.abs(picture.array().astype(int) - SMOOTH).mean() < 8
    assert inspect(encoded(Image.fromarray(SMOOTH), format)).format == format.lower()


def test_decoding_keeps_pixels_and_lays_alpha_on_the_background():
    assert np.array_equal(Picture.from_bytes(encoded(Image.fromarray(NOISE), "PNG")).array(), NOISE)
    clear = encoded(Image.new("RGBA", (8, 8), (255, 0, 0, 0)), "PNG")
    assert (Picture.from_bytes(clear).array() == 255).all()
    assert (Picture.from_bytes(clear, background="black").array() == 0).all()
    half = encoded(Image.new("RGBA", (8, 8), (255, 0, 0, 128)), "WEBP", lossless=True)
    assert Picture.from_bytes(half).array()[0, 0].tolist() == [255, 127, 127]


def test_16_bits_are_scaled_and_not_clipped():
    ramp = np.arange(65536).reshape(256, 256)
    grey = Picture.from_bytes(raw_png(big_endian(ramp), 16, 0)).array()
    assert np.array_equal(grey, np.repeat((ramp >> 8)[..., None], 3, axis=2))
    colours = np.random.default_rng(1).integers(0, 65536, (4, 5, 4))
    colours[..., 3] = 65535
    rgb = raw_png(big_endian(colours[..., :3].reshape(4, -1)), 16, 2)
    rgba = raw_png(big_endian(colours.reshape(4, -1)), 16, 6)
    grey_alpha = raw_png(big_endian(colours[..., 2:].reshape(4, -1)), 16, 4)
    assert np.array_equal(Picture.from_bytes(rgb).array(), colours[..., :3] >> 8)
    assert np.array_equal(Picture.from_bytes(rgba).array(), colours[..., :3] >> 8)
    assert np.array_equal(Picture.from_bytes(grey_alpha).array()[..., 0], colours[..., 2] >> 8)


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_one_transparent_grey_is_transparent_at_every_depth(depth: int):
    """Half of the picture is the brightest grey, and that is transparent; the other half is black."""
    rows = np.array([[255] * 8 + [0] * 8] * 2, np.uint8)
    data = raw_png(rows, depth, 0, chunk(b"tRNS", struct.pack(">H", 2**depth - 1)))
    assert (Picture.from_bytes(data, background="black").array() == 0).all()
    half = Picture.from_bytes(data).width // 2
    mask = alpha_mask(data)
    assert mask is not None
    assert (mask.array()[:, :half] == 255).all()
    assert (mask.array()[:, half:] == 0).all()


@pytest.mark.parametrize("depth", [8, 16])
def test_one_transparent_colour_is_transparent(depth: int):
    colours = np.array([[[1, 2, 3], [1, 2, 4]]]) * (257 if depth == 16 else 1)
    rows = big_endian(colours.reshape(1, -1)) if depth == 16 else colours.reshape(1, -1).astype(np.uint8)
    data = raw_png(rows, depth, 2, chunk(b"tRNS", struct.pack(">3H", *colours[0, 0])))
    assert Picture.from_bytes(data).array().tolist() == [[[255, 255, 255], [1, 2, 4]]]


def test_palettes_grey_with_alpha_and_single_bits():
    palette = chunk(b"PLTE", bytes([255, 0, 0, 0, 255, 0, 0, 0, 255]))
    data = raw_png(np.array([[0, 1, 2]], np.uint8), 8, 3, palette, chunk(b"tRNS", bytes([255, 0])))
    assert Picture.from_bytes(data).array().tolist() == [[[255, 0, 0], [255, 255, 255], [0, 0, 255]]]
    grey = encoded(
        Image.merge("LA", [Image.new("L", (2, 1), 50), Image.fromarray(np.array([[255, 0]], np.uint8))]), "PNG"
    )
    assert Picture.from_bytes(grey).array()[0, :, 0].tolist() == [50, 255]
    bits = encoded(Image.fromarray(np.array([[True, False]])), "PNG")
    assert Picture.from_bytes(bits).array()[0, :, 0].tolist() == [255, 0]


def test_cmyk_is_converted_in_adobes_way():
    for ink, colour in {(0, 255, 255, 0): (255, 0, 0), (0, 0, 0, 255): (0, 0, 0), (0, 0, 0, 0): (255,) * 3}.items():
        data = encoded(Image.new("CMYK", (8, 8), ink), "JPEG", quality=95)
        assert b"Adobe" in data
        assert np.abs(Picture.from_bytes(data).array().astype(int) - colour).max() <= 2


def icc(space: bytes, pcs: bytes, **tags: bytes) -> bytes:
    """An ICC profile of version 2 with these tags (ICC.1:2001-04)."""
    tags = {"desc": b"desc" + bytes(4) + struct.pack(">I", 5) + b"mine\0" + bytes(78), **tags}
    at, table, body = 132 + 12 * len(tags), struct.pack(">I", len(tags)), b""
    for name, value in tags.items():
        table += struct.pack(">4sII", name.encode(), at + len(body), len(value))
        body += value + bytes(-len(value) % 4)
    white = struct.pack(">3i", 63190, 65536, 54061)  # D50
    kind = b"prtr" if space == b"CMYK" else b"mntr"
    head = bytes(4) + struct.pack(">I", 0x02400000) + kind + space + pcs + bytes(12) + b"acsp" + bytes(28) + white
    head = head.ljust(124, b"\0")
    return struct.pack(">I", 4 + len(head) + len(table) + len(body)) + head + table + body


def swapped_rgb() -> bytes:
    """sRGB with its red and its green exchanged."""
    source = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    count = int.from_bytes(source[128:132])
    table = [struct.unpack_from(">4sII", source, 132 + 12 * i) for i in range(count)]
    tags = {name.decode(): source[at : at + size] for name, at, size in table if name[1:] in (b"XYZ", b"TRC")}
    tags["rXYZ"], tags["gXYZ"] = tags["gXYZ"], tags["rXYZ"]
    return icc(b"RGB ", b"XYZ ", **tags)


def only_magenta_is_black() -> bytes:
    """A CMYK profile by a table: full magenta makes black whatever the other inks, no magenta makes white."""
    identity = bytes(range(256))
    grid = b"".join(bytes([0 if (node >> 2) & 1 else 255, 128, 128]) for node in range(16))
    matrix = struct.pack(">9i", *(65536 if i % 4 == 0 else 0 for i in range(9)))
    table = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + matrix + identity * 4 + grid + identity * 3
    return icc(b"CMYK", b"Lab ", A2B0=table)


def test_an_embedded_profile_is_followed():
    red = Image.new("RGB", (8, 8), (255, 0, 0))
    for format, options in {
        "PNG": {},
        "JPEG": {"quality": 95},
        "WEBP": {"lossless": True},
        "AVIF": {"quality": 95},
    }.items():
        pixel = Picture.from_bytes(encoded(red, format, icc_profile=swapped_rgb(), **options)).array()[0, 0]
        assert np.abs(pixel.astype(int) - (0, 255, 0)).max() <= 4, format
    alpha = Image.new("RGBA", (8, 8), (255, 0, 0, 128))
    pixel = Picture.from_bytes(encoded(alpha, "PNG", icc_profile=swapped_rgb())).array()[0, 0]
    assert np.abs(pixel.astype(int) - (127, 255, 127)).max() <= 1
    for ink, grey in {(255, 0, 255, 255): 255, (0, 255, 0, 0): 0}.items():
        data = encoded(Image.new("CMYK", (8, 8), ink), "JPEG", quality=95, icc_profile=only_magenta_is_black())
        assert np.abs(Picture.from_bytes(data).array().astype(int) - grey).max() <= 4


def test_srgb_keeps_every_value_and_a_profile_that_does_not_fit_counts_as_none():
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for profile in (srgb, b"not a profile", only_magenta_is_black()):
        data = encoded(Image.fromarray(NOISE), "PNG", icc_profile=profile)
        assert np.array_equal(Picture.from_bytes(data).array(), NOISE)


def test_a_picture_and_its_mask_align_by_their_orientation():
    """Both lie on their side, as a phone stores them; the mask is white where the picture is."""
    stored = np.zeros((48, 64, 3), np.uint8)
    stored[:16, :32] = 255
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        image = Picture.from_bytes(encoded(Image.fromarray(stored), "JPEG", exif=exif, quality=95))
        mask = Picture.from_bytes(encoded(Image.fromarray(stored[..., 0]), "PNG", exif=exif))
        assert (image.width, image.height) == ((48, 64) if orientation > 4 else (64, 48))
        assert np.abs(mask_array(image).astype(int) - mask_array(mask)).max() < 8
        told = inspect(encoded(Image.fromarray(stored), "JPEG", exif=exif))
        assert (told.width, told.height) == (image.width, image.height)


def test_a_mask_is_luminance():
    picture = Picture.from_array(np.array([[[255, 255, 255], [0, 0, 0], [255, 0, 0], [0, 255, 0]]], np.uint8))
    assert mask_array(picture).tolist() == [[255, 0, 76, 150]]


def test_transparency_makes_a_mask():
    """As OpenAI's clients send it: what is transparent is to be edited."""
    rgba = np.dstack([NOISE, np.full((48, 64), 255, np.uint8)])
    assert alpha_mask(encoded(Image.fromarray(rgba), "PNG")) is None
    assert alpha_mask(encoded(Image.fromarray(NOISE), "JPEG")) is None
    rgba[:24, :, 3] = 0
    for format in ("PNG", "WEBP", "AVIF"):
        mask = alpha_mask(encoded(Image.fromarray(rgba), format))
        assert mask is not None
        assert (mask.array()[:20] == 255).all()
        assert (mask.array()[28:] == 0).all()


# The abuse matrix


def header_of(width: int, height: int) -> bytes:
    """A PNG that promises more than it holds."""
    return raw_png(np.zeros((1, 3), np.uint8), 8, 2).replace(
        chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 2, 0, 0, 0)),
        chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
    )


def webp_canvas(side: int) -> bytes:
    body = b"VP8X" + struct.pack("<I", 10) + bytes(4) + (side - 1).to_bytes(3, "little") * 2
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body


def bomb(kind: bytes) -> bytes:
    packed = chunk(kind, b"Comment\0\0" + zlib.compress(bytes(30_000_000), 1))
    return raw_png(np.zeros((8, 24), np.uint8), 8, 2, packed)


def many_scans() -> bytes:
    """A progressive JPEG whose last scan is there a thousand times."""
    data = encoded(Image.fromarray(SMOOTH), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * 1000 + data[-2:]


def animation(format: str) -> bytes:
    return encoded(Image.fromarray(NOISE), format, save_all=True, append_images=[Image.fromarray(NOISE[::-1].copy())])


def wrong_checksum(kind: bytes) -> bytes:
    data = bytearray(encode(NOISE, "png", {"Software": "x"}))
    at = data.index(kind)
    data[at + 4 + int.from_bytes(data[at - 4 : at])] ^= 1
    return bytes(data)


HOSTILE = {
    "empty": lambda: b"",
    "text": lambda: b"hello",
    "svg": lambda: b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "html": lambda: b"<!doctype html><script>alert(1)</script>",
    "pdf": lambda: encoded(Image.fromarray(NOISE), "PDF"),
    "eps": lambda: encoded(Image.fromarray(NOISE), "EPS"),
    "tiff": lambda: encoded(Image.fromarray(NOISE), "TIFF"),
    "gif": lambda: encoded(Image.fromarray(NOISE), "GIF"),
    "animated gif": lambda: animation("GIF"),
    "animated webp": lambda: animation("WEBP"),
    "animated avif": lambda: animation("AVIF"),
    "animated png": lambda: animation("PNG"),
    "400 megapixels promised": lambda: header_of(20_000, 20_000),
    "3600 megapixels promised": lambda: header_of(60_000, 60_000),
    "81 megapixels promised": lambda: header_of(9_000, 9_000),
    "81 megapixels held": lambda: raw_png(np.zeros((9_000, 1_125), np.uint8), 1, 0),
    "no pixels": lambda: header_of(0, 0),
    "268 megapixels of webp": lambda: webp_canvas(16_384),
    "zTXt bomb": lambda: bomb(b"zTXt"),
    "iCCP bomb": lambda: bomb(b"iCCP"),
    "scan bomb": many_scans,
    "wrong checksum of pixels": lambda: wrong_checksum(b"IDAT"),
    "wrong checksum of the header": lambda: wrong_checksum(b"IHDR"),
    "wrong checksum of a text": lambda: wrong_checksum(b"tEXt"),
    "stray bytes": lambda: b"\xff\xd8\xff" + bytes(20_000_000),
    "a million segments": lambda: b"\xff\xd8" + b"\xff\xe0\0\2" * 1_000_000,
    "no end": lambda: encode(NOISE, "png")[:-12],
    "a million chunks": lambda: png.SIGNATURE + chunk(b"teSt") * 1_000_000,
    **{
        f"half a {f}": lambda f=f: (data := encoded(Image.fromarray(NOISE), f))[: len(data) // 2] for f in INPUT_FORMATS
    },
    **{f"the magic of {f}": lambda f=f: encoded(Image.fromarray(NOISE), f)[:16] for f in INPUT_FORMATS},
}


@pytest.mark.parametrize("make", HOSTILE.values(), ids=HOSTILE)
def test_what_is_no_single_sound_picture_is_refused_at_once(make):
    data = make()
    started = time.process_time()
    for use in (Picture.from_bytes, alpha_mask):
        with pytest.raises(InvalidRequest) as refused:
            use(data, field="mask")
        assert refused.value.field == "mask"
        assert len(str(refused.value)) < 200
    assert time.process_time() - started < 1


@pytest.mark.parametrize(
    "name", [name for name in HOSTILE if not name.startswith("half") and "megapixels held" not in name]
)
def test_inspecting_refuses_it_too(name: str):
    with pytest.raises(InvalidRequest):
        inspect(HOSTILE[name]())


def test_texts_behind_the_pixels_are_no_way_around_the_limits():
    packed = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(30_000_000), 1))
    data = raw_png(np.zeros((8, 24), np.uint8), 8, 2, after=[packed])
    for use in (Picture.from_bytes, inspect):
        with pytest.raises(InvalidRequest):
            use(data)
    many = [chunk(b"zTXt", b"k%d\0\0" % i + zlib.compress(bytes(1_000_000), 1)) for i in range(200)]
    data = raw_png(np.zeros((8, 24), np.uint8), 8, 2, *many)
    for use in (Picture.from_bytes, inspect):
        with pytest.raises(InvalidRequest):
            use(data)


def test_a_picture_that_is_an_archive_too_is_only_a_picture():
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("payload.sh", "rm -rf /")
    picture = Picture.from_bytes(encode(NOISE, "png") + archive.getvalue())
    assert np.array_equal(picture.array(), NOISE)
    again = encode(picture.array(), "png")
    assert b"PK" not in again
    assert again == encode(NOISE, "png")


def test_a_wrong_name_changes_nothing():
    """There is no name and no content type to be wrong: the bytes alone decide."""
    for format in INPUT_FORMATS:
        assert inspect(encoded(Image.fromarray(NOISE), format)).format == format.lower()


@pytest.mark.parametrize("format", INPUT_FORMATS)
def test_damage_anywhere_gives_a_picture_or_a_refusal(format: str):
    rng = random.Random(0)
    exif = Image.Exif()
    exif[0x0112] = 6
    exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + "Steps: 4".encode("utf-16-be")
    image = Image.fromarray(np.dstack([NOISE, NOISE[..., 0]])[:16, :16])
    whole = encoded(image.convert("RGB") if format == "JPEG" else image, format, exif=exif, icc_profile=swapped_rgb())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(150):
            data = bytearray(whole)
            for _ in range(rng.choice((1, 1, 3, 20))):
                data[rng.randrange(len(data))] = rng.randrange(256)
            if format == "PNG":
                data = bytearray(with_right_checksums(bytes(data)))
            for use in (Picture.from_bytes, alpha_mask, inspect):
                with suppress(InvalidRequest):
                    use(bytes(data))


def with_right_checksums(data: bytes) -> bytes:
    """So that damage gets beyond the checksums."""
    out, at = bytearray(data), 8
    while at + 12 <= len(out):
        end = at + 8 + int.from_bytes(out[at : at + 4])
        out[end : end + 4] = (
            struct.pack(">I", zlib.crc32(out[at + 4 : end])) if end + 4 <= len(out) else out[end : end + 4]
        )
        at = end + 4
    return bytes(out)


def test_resizing_to_the_same_size_is_the_same_picture():
    picture = Picture.from_array(NOISE)
    assert picture.resized(64, 48) is picture
    assert (picture.resized(32, 24).width, picture.resized(32, 24).height) == (32, 24)
