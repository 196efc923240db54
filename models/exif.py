"""The EXIF block in which a JPEG, WebP or AVIF carries its texts. No torch.

A1111's infotext goes where A1111 puts it, into UserComment; our own JSON into MakerNote, which the standard leaves to
the maker and which holds any bytes (CIPA DC-008, Exif 2.32, 4.6.5 and 4.6.6).
"""

import struct
from collections.abc import Mapping
from typing import Any

ORIENTATION, SIDEWAYS = 0x0112, (5, 6, 7, 8)  # the values that swap width and height
PRIVATE_DIRECTORY = 0x8769
_EXIF = b"Exif\0\0"
_TIFF = b"MM\0*"  # big-endian, so that UTF-16 is what A1111 takes for granted and what the standard asks for
_ASCII, _LONG, _UNDEFINED = 2, 4, 7
_SOFTWARE, _MAKER_NOTE, _USER_COMMENT = 0x0131, 0x927C, 0x9286
_UNICODE = b"UNICODE\0"
_SEGMENT_BYTES = 65_533 - len(_EXIF)

_Directory = dict[int, tuple[int, bytes]]  # tag: type, value


def write(text: Mapping[str, str]) -> bytes:
    """The block for the texts `parameters`, `heliograph` and `Software`, each where there is one."""
    main: _Directory = {}
    private: _Directory = {}
    for keyword, value in text.items():
        match keyword:
            case "Software":
                main[_SOFTWARE] = (_ASCII, value.encode("ascii") + b"\0")
            case "heliograph":
                private[_MAKER_NOTE] = (_UNDEFINED, value.encode())
            case "parameters":
                private[_USER_COMMENT] = (_UNDEFINED, _UNICODE + value.encode("utf-16-be"))
            case _:
                raise ValueError(f"EXIF has no place for {keyword!r}")
    at = len(_TIFF) + 4
    main[PRIVATE_DIRECTORY] = (_LONG, bytes(4))
    main[PRIVATE_DIRECTORY] = (_LONG, struct.pack(">I", at + len(_directory(main, at))))
    first = _directory(main, at)
    return _EXIF + _TIFF + struct.pack(">I", at) + first + _directory(private, at + len(first))


def add_to_jpeg(encoded: bytes, block: bytes) -> bytes:
    """A JPEG with the block behind its JFIF header, in several segments where one does not hold it.

    That is how readers expect long EXIF, Pillow among them: what the segments hold is one block in parts.
    """
    at = 2  # behind the start of the image
    if encoded[2:4] == b"\xff\xe0":
        at += 2 + int.from_bytes(encoded[4:6])
    body = block.removeprefix(_EXIF)
    parts = (_EXIF + body[i : i + _SEGMENT_BYTES] for i in range(0, len(body), _SEGMENT_BYTES))
    segments = (b"\xff\xe1" + struct.pack(">H", 2 + len(part)) + part for part in parts)
    return b"".join((encoded[:at], *segments, encoded[at:]))


def read(main: Mapping[int, Any], private: Mapping[int, Any]) -> dict[str, str]:
    """The texts of a block's main and private directories, whoever wrote them."""
    found: dict[str, str] = {}
    software, note, comment = main.get(_SOFTWARE), private.get(_MAKER_NOTE), private.get(_USER_COMMENT)
    if isinstance(software, str):
        found["Software"] = software.rstrip("\0")
    if isinstance(note, bytes) and note.startswith(b"{"):
        found["heliograph"] = note.decode("utf-8", "replace")
    if isinstance(comment, bytes | str) and comment:
        found["parameters"] = comment if isinstance(comment, str) else _comment(comment)
    return found


def _directory(entries: _Directory, at: int) -> bytes:
    """A TIFF directory at this offset, and behind it the values that do not fit into its entries."""
    values_at = at + 2 + 12 * len(entries) + 4
    table, values = struct.pack(">H", len(entries)), b""
    for tag, (kind, value) in sorted(entries.items()):
        field = value.ljust(4, b"\0")
        if len(value) > 4:
            field = struct.pack(">I", values_at + len(values))
            values += value + bytes(len(value) % 2)
        table += struct.pack(">HHI4s", tag, kind, 1 if kind == _LONG else len(value), field)
    return table + bytes(4) + values


def _comment(value: bytes) -> str:
    """UserComment by its first eight bytes; some programs write UTF-16 little-endian whatever the block's order."""
    kind, body = value[:8], value[8:]
    if kind == _UNICODE:
        little = body[1::2].count(0) > body[0::2].count(0)  # the zeros of ASCII letters, and there always are some
        return body.decode("utf-16-le" if little else "utf-16-be", "replace").strip("\0\ufeff")
    if kind in (b"ASCII\0\0\0", bytes(8)):
        return body.decode("utf-8", "replace").strip("\0")
    return value.decode("utf-8", "replace").strip("\0")
