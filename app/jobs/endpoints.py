"""Where an owner's webhooks go: each address with the secrets that sign what is sent there, and whether it is disabled.

The owner's own secrets stand under the address "" and sign whatever goes to an address without secrets of its own.
"""

import base64
import secrets
from typing import Any

from sqlalchemy import ColumnElement, Text, and_, cast, delete, func, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from app.database import clock, one_at_a_time
from app.jobs.tables import endpoints
from models.errors import InvalidRequest, NotFound

SECRET_BYTES = 32  # Standard Webhooks asks for 24 to 64
SECRETS = 10  # that may be valid at once
OVERLAP_S = 86_400.0
LONGEST_OVERLAP_S = 30 * 86_400.0
URL_CHARACTERS = 2048
PER_OWNER = 1000  # addresses with secrets of their own

Entries = list[dict[str, Any]]  # [{secret, until}], the newest first

_BARE = cast(endpoints.c.secrets, Text) == "[]"


async def secrets_for(connection: AsyncConnection, owner: str, url: str) -> tuple[str, ...]:
    """Those that sign now: the address's own, or the owner's, which are made where there are none."""
    check_url(url)
    now = await clock(connection)
    query = select(endpoints.c.url, endpoints.c.secrets).where(
        endpoints.c.owner == owner, endpoints.c.url.in_(sorted({url, ""}))
    )
    known = {row.url: _valid(row.secrets, now) for row in await connection.execute(query)}
    found = known.get(url) or known.get("") or await _ensure(connection, owner, "", [_fresh()])
    return tuple(entry["secret"] for entry in found)


async def rotate(connection: AsyncConnection, owner: str, url: str, overlap_s: float) -> str:
    """A new secret; those that sign now sign beside it until the overlap is over, or their own time."""
    check_url(url)
    if not 0 <= overlap_s <= LONGEST_OVERLAP_S:
        raise InvalidRequest("overlap_s", f"must be from 0 to {LONGEST_OVERLAP_S:.0f} seconds, not {overlap_s}")
    now, fresh = await clock(connection), _fresh()
    own = await _ensure(connection, owner, url, [])
    if await _with_secrets(connection, owner) > PER_OWNER:
        raise InvalidRequest("url", f"is one of more than {PER_OWNER}; leave it out to rotate the secret of all others")
    present = _valid(own, now) or _valid(await _ensure(connection, owner, "", []), now)
    if len(present) >= SECRETS:
        raise InvalidRequest("overlap_s", f"{SECRETS} secrets are valid already; wait for some to end")
    ending = [entry | {"until": min(entry["until"] or now + overlap_s, now + overlap_s)} for entry in present]
    await connection.execute(update(endpoints).where(_at(owner, url)).values(secrets=[fresh, *ending]))
    return fresh["secret"]


async def disable(connection: AsyncConnection, owner: str, url: str) -> None:
    """From here on what is written for the address is dead."""
    await _ensure(connection, owner, url, [])
    await connection.execute(update(endpoints).where(_at(owner, url)).values(disabled_at=await clock(connection)))


async def enable(connection: AsyncConnection, owner: str, url: str) -> None:
    """Ends that. Raises NotFound for an address that is not disabled."""
    check_url(url)
    here = and_(_at(owner, url), endpoints.c.disabled_at.is_not(None))
    if not (await connection.execute(update(endpoints).where(here).values(disabled_at=None))).rowcount:
        raise NotFound(f"no address {url!r} is disabled")
    await connection.execute(delete(endpoints).where(_at(owner, url), _BARE))  # such a row says nothing any more


async def forget(connection: AsyncConnection, before: float) -> None:
    """Addresses that were disabled before that time; those with secrets of their own are their owners' to change."""
    await connection.execute(delete(endpoints).where(_BARE, func.coalesce(endpoints.c.disabled_at, 0.0) < before))


async def is_disabled(connection: AsyncConnection, owner: str, url: str) -> bool:
    return await connection.scalar(select(endpoints.c.disabled_at).where(_at(owner, url))) is not None


def check_url(url: str) -> None:
    """Raises InvalidRequest for what cannot be an address in the tables: too long, or with characters of none."""
    if not (len(url) <= URL_CHARACTERS and url.isprintable()):
        raise InvalidRequest("url", f"must have at most {URL_CHARACTERS} printable characters")


async def _with_secrets(connection: AsyncConnection, owner: str) -> int:
    """How many addresses of an owner were rotated: the others in the table are disabled."""
    theirs = (endpoints.c.owner == owner, endpoints.c.url != "", endpoints.c.disabled_at.is_(None))
    return await connection.scalar(select(func.count()).where(*theirs)) or 0


def _at(owner: str, url: str) -> ColumnElement[bool]:
    return and_(endpoints.c.owner == owner, endpoints.c.url == url)


async def _ensure(connection: AsyncConnection, owner: str, url: str, keys: Entries) -> Entries:
    """The address's secrets, whose row is made with these where there is none; locked until the transaction ends."""
    await one_at_a_time(connection, "endpoints")
    here = _at(owner, url)
    row = (await connection.execute(select(endpoints.c.secrets).where(here).with_for_update())).one_or_none()
    if row is None:
        await connection.execute(insert(endpoints).values(owner=owner, url=url, secrets=keys))
    elif keys and not row.secrets:
        await connection.execute(update(endpoints).where(here).values(secrets=keys))
    return keys if row is None or (keys and not row.secrets) else row.secrets


def _fresh() -> dict[str, Any]:
    """A secret as Standard Webhooks writes it, without an end."""
    return {"secret": "whsec_" + base64.b64encode(secrets.token_bytes(SECRET_BYTES)).decode(), "until": None}


def _valid(keys: Entries, now: float) -> Entries:
    return [entry for entry in keys if entry["until"] is None or entry["until"] > now]
