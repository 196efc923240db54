"""Signatures by which a receiver knows that a webhook is ours, fresh and whole (Standard Webhooks 1.0.0, `v1`)."""

import base64
import binascii
import hashlib
import hmac
from collections.abc import Sequence

from models.errors import InvalidRequest

PREFIX = "whsec_"
KEY_BYTES = (24, 64)  # the fewest and the most of a key


def headers(id: str, timestamp: int, body: bytes, secrets: Sequence[str]) -> dict[str, str]:
    """The headers of one attempt at `timestamp`, in seconds since 1970.

    There is a signature for each secret, so that a receiver may go over from one to the other in its own time. Raises
    InvalidRequest where there is no secret, or one that is malformed.
    """
    if not secrets:
        raise InvalidRequest("secrets", "must have one at least: a webhook is never sent unsigned")
    return {
        "webhook-id": id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": " ".join(_signature(secret, id, timestamp, body) for secret in secrets),
    }


def _signature(secret: str, id: str, timestamp: int, body: bytes) -> str:
    signed = hmac.digest(_key(secret), b".".join((id.encode(), str(timestamp).encode(), body)), hashlib.sha256)
    return f"v1,{base64.b64encode(signed).decode()}"


def _key(secret: str) -> bytes:
    """The key in a secret. Raises InvalidRequest for what is no secret; the message does not repeat it."""
    fewest, most = KEY_BYTES
    try:
        found = base64.b64decode(secret.removeprefix(PREFIX), validate=True)
    except (binascii.Error, ValueError):
        found = b""
    if not secret.startswith(PREFIX) or not fewest <= len(found) <= most:
        raise InvalidRequest("secret", f"must be {PREFIX} and {fewest} to {most} bytes in base64")
    return found
