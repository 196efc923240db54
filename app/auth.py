"""The guard of every route: who asks, whether they may, and how much they have left.

A route wants the scope `generate` unless its `openapi_extra` has `scope(...)` with another one. A key comes as
`Authorization: Bearer <key>` in any case, as either half of `Basic`, alone in `Authorization`, or as `x-api-key`:
whatever the clients of the APIs we speak send.
"""

import base64
import binascii
import ipaddress
import re
from collections.abc import Iterator
from typing import Any, Literal

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.errors import Forbidden, Unauthenticated, ratelimit
from app.keys import caller as callers
from app.keys import secrets
from app.keys.budgets import Budgets
from app.keys.caller import ANONYMOUS, Caller
from app.keys.registry import Keys
from app.settings import AuthMode

PUBLIC = "public"  # stands where a scope may stand, on a route that needs no key
_EXTRA = "x-scope"
_NETLOC = re.compile(r"([a-z0-9.-]+|\[[0-9a-f:.]+\])(?::\d{1,5})?")


class Guard:
    """A FastAPI dependency of the whole application: `connection.state.caller` is who asks, once it returns."""

    def __init__(self, mode: AuthMode, keys: Keys | None = None, budgets: Budgets | None = None):
        """`keys` are needed where the mode is `keys`."""
        assert (mode == "keys") == (keys is not None)
        self._mode, self._keys, self._budgets = mode, keys, budgets or Budgets()

    async def __call__(self, connection: HTTPConnection) -> None:
        """Raises Unauthenticated, Forbidden, BudgetSpent, or Unavailable where the keys cannot be read."""
        wanted = scope_of(connection.scope["route"])
        caller = ANONYMOUS if wanted == PUBLIC else await self._caller(connection)
        if wanted not in (PUBLIC, *caller.scopes):
            raise Forbidden(f"this key has no scope {wanted!r}, only {', '.join(sorted(caller.scopes))}")
        connection.state.caller = caller
        callers.current.set(caller)
        connection.state.allowance = await self._budgets.charge(caller, "requests_per_minute")

    async def _caller(self, connection: HTTPConnection) -> Caller:
        if self._keys is None:
            if self._mode == "loopback":
                _check_local(connection)
            return ANONYMOUS
        found = set(_presented(connection.headers))
        if not found:
            raise Unauthenticated()
        if len(found) > 1:
            raise Unauthenticated("this request has two different API keys; send one")
        return await self._keys.caller(found.pop())


class RateLimitHeaders:
    """Says in every answer how many requests the caller has left this minute, where that is limited."""

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def told(message: Message) -> None:
            allowance = scope.get("state", {}).get("allowance")
            if message["type"] == "http.response.start" and allowance is not None:
                headers = MutableHeaders(scope=message)
                for name, value in ratelimit(allowance.limit, allowance.remaining, allowance.reset_s).items():
                    headers.setdefault(name, value)  # an error says more of the limit that it is about
            await send(message)

        await self._app(scope, receive, told)


def scope(wanted: Literal["public", "generate", "jobs", "admin"]) -> dict[str, Any]:
    """What a route's `openapi_extra` has to hold where it wants another scope than `generate`."""
    return {_EXTRA: wanted}


def scope_of(route: Any) -> str:
    """The scope that a route wants, or PUBLIC."""
    return (route.openapi_extra or {}).get(_EXTRA, "generate")


def _presented(headers: Headers) -> Iterator[str]:
    """What looks like a key of ours. Other people's keys, which clients send without being asked, are no keys here."""
    values = [*headers.getlist("x-api-key"), *headers.getlist("api-key")]
    for value in headers.getlist("authorization"):
        scheme, _, rest = value.partition(" ")
        values += [scheme, *(_halves(rest.strip()) if scheme.lower() == "basic" else [rest.strip()])]
    return (value for value in values if value.startswith(secrets.PREFIX))


def _halves(encoded: str) -> list[str]:
    """The name and the password of HTTP Basic (RFC 7617), nothing where it is not that."""
    try:
        return base64.b64decode(encoded, validate=True).decode().split(":", 1)
    except (binascii.Error, UnicodeDecodeError):
        return []


def _check_local(connection: HTTPConnection) -> None:
    """Raises Forbidden unless this machine asks, and not for somebody else's page.

    A page from anywhere can have a browser on this machine send requests here: under a name of its own that leads to
    the loopback (DNS rebinding), which `Host` tells, or across sites, which `Origin` tells. A client without `Host` is
    no browser, nor is one without `Origin` that changes anything.
    """
    if connection.client is not None and not _is_loopback(connection.client.host):
        raise Forbidden(
            "this server has no API keys and answers its own machine only; its operator can give it `auth: keys`, or "
            "`auth: open` to let everybody in"
        )
    for header, host_of in (("host", _host), ("origin", _host_of_origin)):
        for value in connection.headers.getlist(header):
            host = host_of(value)
            if host != "localhost" and not _is_loopback(host):
                raise Forbidden(
                    "this server has no API keys and answers its own machine only, by its own names: "
                    f"`{header.title()}` must be localhost or a loopback address; its operator can give it `auth: keys`"
                )


def _host(netloc: str) -> str:
    """The host in `host:port`."""
    found = _NETLOC.fullmatch(netloc.strip().lower())
    return found[1].strip("[]") if found else ""


def _host_of_origin(origin: str) -> str:
    scheme, _, netloc = origin.partition("://")
    return _host(netloc) if scheme in ("http", "https") else ""


def _is_loopback(host: str) -> bool:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback
