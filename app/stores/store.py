"""Where pictures are kept: what every store offers, and what none of them takes."""

import hashlib
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Protocol

from models.errors import HeliographError, InvalidRequest, NotFound, Unavailable

KEY = re.compile(r"[a-z0-9_-]{1,64}(/[a-z0-9_-]{1,64}){0,7}")

# What may be stored, and the ending of its file's name. Nothing here runs in a browser.
CONTENT_TYPES = {
    "image/png": "png",
    "image/jpeg": "jpg",
    "image/webp": "webp",
    "image/avif": "avif",
    "application/json": "json",
}

RETRY_AFTER_S = 5.0
FULL_RETRY_AFTER_S = 60.0

LONGEST_EXPIRY_S = 7 * 24 * 3600  # what S3's own signature allows

Span = tuple[int, int]  # bytes from the first to before the last


class StorageFull(Unavailable):
    """There is no room left for pictures. Try again when the operator has made some."""

    def __init__(self, retry_after_s: float = FULL_RETRY_AFTER_S, message: str = ""):
        super().__init__(retry_after_s, message)


class StoreUnavailable(Unavailable):
    """The store for pictures does not answer. Try again in a moment."""

    def __init__(self, retry_after_s: float = RETRY_AFTER_S, message: str = ""):
        super().__init__(retry_after_s, message)


class KeyTaken(HeliographError):
    """Another object has that key already: keys are written once."""


@dataclass(frozen=True, kw_only=True)
class StoredObject:
    """What is known of a stored object. `bytes` is its size, `sha256` the hexadecimal hash of its content."""

    key: str
    bytes: int
    sha256: str
    content_type: str

    @property
    def filename(self) -> str:
        """What a client may call the object when it saves it."""
        return f"{self.key.rsplit('/', 1)[-1]}.{CONTENT_TYPES[self.content_type]}"


class Store(Protocol):
    """A place for objects that are written once and read by their keys.

    Keys are ours, never a caller's. Every method raises StoreUnavailable where the place does not answer in time, and
    InvalidRequest for a key that is none; `get`, `head` and `url` raise NotFound where there is no such object.
    """

    async def put(self, key: str, data: bytes, content_type: str) -> StoredObject:
        """Keeps the object; when this returns, it survives a crash. Putting the same again changes nothing.

        Raises KeyTaken where the key holds something else, StorageFull where there is no room. Until it returns, and
        wherever it is interrupted, the key holds nothing or the whole object.
        """
        ...

    async def get(self, key: str, span: Span | None = None) -> bytes:
        """The object, or a part of it. Raises InvalidRequest for a span that is not inside the object."""
        ...

    async def head(self, key: str) -> StoredObject:
        """What is known of the object."""
        ...

    async def delete(self, key: str) -> None:
        """Removes the object; where there is none, nothing happens."""
        ...

    def list(self, older_than_s: float, folder: str = "") -> AsyncIterator[str]:
        """The keys of all objects that were written longer ago than that; those that begin with `folder/`, if said."""
        ...

    async def url(self, key: str, expires_s: int) -> str:
        """An address that gives the object to whoever has it, for that many seconds.

        Raises InvalidRequest for less than a second or more than a week.
        """
        ...

    async def sign(self, key: str, expires_s: int) -> str:
        """The same without a look at the place: for an object that is known to have been put, and may be gone."""
        ...


def describe(key: str, data: bytes, content_type: str) -> StoredObject:
    """What there will be to know of an object. Raises InvalidRequest for what no store takes."""
    check_key(key)
    if content_type not in CONTENT_TYPES:
        raise InvalidRequest("content_type", f"must be one of {', '.join(CONTENT_TYPES)}, not {content_type!r}")
    if not data:
        raise InvalidRequest("data", "must not be empty")
    return StoredObject(key=key, bytes=len(data), sha256=hashlib.sha256(data).hexdigest(), content_type=content_type)


def check_key(key: str) -> None:
    """Raises InvalidRequest for what is not a key."""
    if not KEY.fullmatch(key):
        raise InvalidRequest("key", "must be up to 8 words of a-z, 0-9, _ and -, joined by /")


def check_expiry(expires_s: int) -> None:
    """Raises InvalidRequest for an address that would last no time or longer than S3 allows."""
    if not 1 <= expires_s <= LONGEST_EXPIRY_S:
        raise InvalidRequest("expires_s", f"must be between 1 and {LONGEST_EXPIRY_S}, not {expires_s}")


def check_span(span: Span, size: int) -> None:
    """Raises InvalidRequest for a span that is not inside an object of that size."""
    if not 0 <= span[0] < span[1] <= size:
        raise InvalidRequest("span", f"must lie within the {size} bytes of the object, not {span[0]} to {span[1]}")


def check_same(found: StoredObject, wanted: StoredObject) -> None:
    """Raises KeyTaken unless what is there is what was to be put there."""
    if found != wanted:
        raise KeyTaken(f"{wanted.key} holds another object already: keys are written once")


def missing(key: str) -> NotFound:
    """The error for a key that holds nothing."""
    return NotFound(f"there is no object {key}; it may have been deleted")
