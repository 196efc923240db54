"""API keys as text, `hk_<id>_<secret>`, and what is kept of them.

The id (80 bits) finds the row and may be shown; the secret has 160 random bits, which nobody guesses, so a fast keyed
hash protects it where a password would need a slow one. Without the pepper, which is not in the database, the hash is
of no use to who steals it.
"""

import base64
import hashlib
import hmac
import re
import secrets

PREFIX = "hk_"
_KEY = re.compile(PREFIX + r"([a-z2-7]{16})_[a-z2-7]{32}")


def new() -> tuple[str, str]:
    """The id and the whole text of a new key."""
    id = _base32(10)
    return id, f"{PREFIX}{id}_{_base32(20)}"


def id_of(text: str) -> str | None:
    """The id in what may be a key."""
    found = _KEY.fullmatch(text)
    return found and found[1]


def digest(pepper: bytes, key: str) -> str:
    """What is kept of a key: HMAC-SHA256, hexadecimal."""
    return hmac.new(pepper, key.encode(), hashlib.sha256).hexdigest()


def agrees(kept: str, pepper: bytes, key: str) -> bool:
    """Whether this is the key of which that is kept, in a time that does not depend on where they differ."""
    return hmac.compare_digest(kept, digest(pepper, key))


def _base32(size: int) -> str:
    return base64.b32encode(secrets.token_bytes(size)).decode().lower()
