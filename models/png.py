"""PNG by its chunks: a fast writer, a strict walk, and the text that a file carries. No torch.

The writer is our own because Pillow's default spends about a second on a 1024x1024 picture: rows are filtered with
SUB and packed with zlib's HUFFMAN_ONLY, which is as small and many times as fast. The walk is our own because Pillow
leaves the checksums of the pixels unread (PNG specification, third edition, W3C 2025, 5.3, 9.2 and 11.3.3).
"""

import struct
import zlib
from collections.abc import Iterator, Mapping

import numpy as np

SIGNATURE = b"\x89PNG\r\n\x1a\n"
MAX_TEXT_BYTES = 4 * 1024 * 1024  # of all texts together, unpacked
_MAX_CHUNKS = 100_000  # a picture of 64 megapixels in chunks of 8 KiB has a quarter of that


def write(array: np.ndarray, text: Mapping[str, str] | None = None) -> bytes:
    """A PNG of uint8 (height, width, 3), or 4 with alpha, with each text under its keyword."""
    height, width, channels = array.shape
    header = struct.pack(">IIBBBBB", width, height, 8, {3: 2, 4: 6}[channels], 0, 0, 0)
    texts = [_text_chunk(keyword, value) for keyword, value in (text or {}).items()]
    return b"".join((SIGNATURE, _chunk(b"IHDR", header), *texts, _chunk(b"IDAT", _packed(array)), _chunk(b"IEND", b"")))


def chunks(encoded: bytes) -> Iterator[tuple[bytes, memoryview]]:
    """The type and body of every chunk up to IEND, which must be there; what follows it is not looked at.

    Raises ValueError where the file is no PNG, ends early, has a wrong checksum or an absurd number of chunks.
    """
    if not encoded.startswith(SIGNATURE):
        raise ValueError("no PNG signature")
    view, at = memoryview(encoded), len(SIGNATURE)
    for _ in range(_MAX_CHUNKS):
        if at + 12 > len(encoded):
            break
        length, kind = struct.unpack_from(">I4s", encoded, at)
        body, end = view[at + 8 : at + 8 + length], at + 8 + length
        if end + 4 > len(encoded):
            break
        if zlib.crc32(body, zlib.crc32(kind)) != int.from_bytes(view[end : end + 4]):
            raise ValueError(f"wrong checksum in {kind!r}")
        yield kind, body
        if kind == b"IEND":
            return
        at = end + 4
    raise ValueError("no end within reach")


def read_text(encoded: bytes) -> dict[str, str]:
    """Every text of a PNG by its keyword, the first of equals; what is no text by the specification is left out.

    Raises ValueError where the file is damaged or the texts are longer than MAX_TEXT_BYTES.
    """
    found: dict[str, str] = {}
    room = MAX_TEXT_BYTES
    for kind, body in chunks(encoded):
        if kind in _READERS:
            keyword, _, rest = bytes(body).partition(b"\0")
            value = _READERS[kind](rest, room)
            if value is not None:
                room -= len(value)
                found.setdefault(keyword.decode("latin-1"), value)
    return found


def _packed(array: np.ndarray) -> bytes:
    height, width, channels = array.shape
    filtered = np.empty((height, 1 + width * channels), np.uint8)
    filtered[:, 0] = 1  # SUB: each byte less the same channel of the pixel to its left
    rows = array.reshape(height, width * channels)
    filtered[:, 1 : 1 + channels] = rows[:, :channels]
    np.subtract(rows[:, channels:], rows[:, :-channels], out=filtered[:, 1 + channels :])
    packer = zlib.compressobj(1, zlib.DEFLATED, 15, 9, zlib.Z_HUFFMAN_ONLY)
    return packer.compress(filtered.data) + packer.flush()


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(body, zlib.crc32(kind)))


def _text_chunk(keyword: str, value: str) -> bytes:
    """tEXt for ASCII, which every reader knows; iTXt otherwise, since readers disagree about Latin-1 in tEXt."""
    name = keyword.encode("latin-1") + b"\0"
    if value.isascii():
        return _chunk(b"tEXt", name + value.encode())
    return _chunk(b"iTXt", name + b"\0\0\0\0" + value.encode())


def _plain(rest: bytes, room: int) -> str:
    return _limited(rest, room).decode("latin-1")


def _compressed(rest: bytes, room: int) -> str | None:
    return _unpacked(rest[1:], room).decode("latin-1") if rest[:1] == b"\0" else None


def _international(rest: bytes, room: int) -> str | None:
    packed, method, strings = rest[:1], rest[1:2], rest[2:].split(b"\0", 2)  # language, translated keyword, text
    if len(strings) < 3 or (packed == b"\1" and method != b"\0"):
        return None
    value = _unpacked(strings[2], room) if packed == b"\1" else _limited(strings[2], room)
    return value.decode("utf-8", "replace")


_READERS = {b"tEXt": _plain, b"zTXt": _compressed, b"iTXt": _international}


def _limited(value: bytes, room: int) -> bytes:
    if len(value) > room:
        raise ValueError(f"texts of more than {MAX_TEXT_BYTES} bytes")
    return value


def _unpacked(packed: bytes, room: int) -> bytes:
    """Never more than there is room for, however small it came (a bomb)."""
    try:
        return _limited(zlib.decompressobj().decompress(packed, room + 1), room)
    except zlib.error as damaged:
        raise ValueError("a damaged text") from damaged
