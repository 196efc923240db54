"""Addresses of stored objects that carry their own permission: the key, when it ends, and an HMAC over both."""

import hashlib
import hmac
import time
from dataclasses import dataclass, field
from urllib.parse import urlencode

PATH = "/v1/images"


@dataclass(frozen=True)
class Links:
    """Makes and checks such addresses. `base` is what clients call this server, such as https://pictures.example."""

    secret: bytes = field(repr=False)
    base: str = ""

    def url(self, key: str, expires_s: int) -> str:
        """An address that is good for so many seconds from now; without a base, it begins with the path."""
        expires = int(time.time()) + expires_s
        query = urlencode({"expires": expires, "signature": self._signature(key, str(expires))})
        return f"{self.base}{PATH}/{key}?{query}"

    def allows(self, key: str, expires: str, signature: str) -> bool:
        """Whether these are the words of an address of ours that has not expired."""
        genuine = hmac.compare_digest(self._signature(key, expires).encode(), signature.encode())
        return genuine and time.time() < int(expires)

    def _signature(self, key: str, expires: str) -> str:
        return hmac.new(self.secret, f"{key}\n{expires}".encode(), hashlib.sha256).hexdigest()
