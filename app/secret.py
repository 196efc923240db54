"""The server's secret: a file of random bytes from which the keys of every purpose are derived.

All gateways need the same one. Whoever loses it invalidates every API key and every signed address.
"""

import hashlib
import hmac
import os
import secrets
import tempfile
from contextlib import suppress
from pathlib import Path

from models.errors import InvalidRequest

BYTES = 32


def read_or_make(path: Path) -> bytes:
    """The secret in the file; the file is made, for its owner's eyes only, where there is none.

    Raises InvalidRequest for a file with fewer than 32 bytes.
    """
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        _make(path)
    secret = path.read_bytes().strip()
    if len(secret) < BYTES:
        raise InvalidRequest("secret_file", f"must hold at least {BYTES} random bytes: {path}")
    return secret


def derive(secret: bytes, purpose: str) -> bytes:
    """The key for one purpose: what is learnt about it tells nothing about the others."""
    return hmac.new(secret, purpose.encode(), hashlib.sha256).digest()


def _make(path: Path) -> None:
    """Links a finished file to its name, so that of several processes one wins and none reads half of it."""
    handle, draft = tempfile.mkstemp(dir=path.parent)  # readable by its owner alone
    try:
        with os.fdopen(handle, "w") as file:
            file.write(secrets.token_hex(BYTES))
            file.flush()
            os.fsync(file.fileno())
        with suppress(FileExistsError):
            os.link(draft, path)
        _sync(path.parent)  # also where another process was first, and may not have come this far yet
    finally:
        os.unlink(draft)


def _sync(folder: Path) -> None:
    """Writes the entries of a folder to the disk: a secret that a crash takes back has signed what nobody can check."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
