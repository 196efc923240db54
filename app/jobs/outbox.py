"""Outbox: the webhooks that are to be sent, written with the change they tell of."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Row, and_, func, select, true, update
from sqlalchemy.ext.asyncio import AsyncConnection

from app.database import Database, clock, one_at_a_time
from app.jobs import endpoints
from app.jobs.job import WebhookEvent
from app.jobs.tables import DEAD, PENDING, deliveries
from models.errors import InvalidRequest, NotFound

PER_ORIGIN = 4  # deliveries that one deliverer has under way to one host, lest a dead one take all the places
CONSIDERED = 500
PAGE_LIMIT = 200

_ORIGIN = re.compile(r"[^/]*//[^/?#]*")
_ID = re.compile(r"msg_[0-9a-f]{32}")


@dataclass(frozen=True, kw_only=True)
class Delivery:
    """One webhook to be sent. `id` is the same at every attempt; `attempts` counts this one; `secrets` sign it, the
    newest first."""

    id: str
    job_id: str
    owner: str
    url: str
    event: WebhookEvent
    body: bytes
    attempts: int
    secrets: tuple[str, ...]

    @property
    def origin(self) -> str:
        """Whom it goes to, by scheme and authority."""
        return origin(self.url)


@dataclass(frozen=True, kw_only=True)
class DeadLetter:
    """A webhook that nobody tries to send any more, and what the last attempt met."""

    id: str
    job_id: str
    owner: str
    url: str
    event: WebhookEvent
    attempts: int
    status: int | None
    error: str | None
    created_at: float
    finished_at: float


class Outbox:
    """Deliveries in a database: each is pending until it is delivered or dead. Every method raises Unavailable.

    Deliveries are signed with the secrets of their address, where `rotate` made some, and otherwise with their owner's,
    which are made when they are first needed.
    """

    def __init__(self, database: Database):
        self._database = database

    async def claim_due(
        self, limit: int, lease_s: float, under_way: Mapping[str, int] | None = None
    ) -> tuple[Delivery, ...]:
        """Up to `limit` deliveries that are due, the longest due first, of which none has to wait for another.

        `under_way` counts what the caller has not reported on yet, by origin: with these there are at most PER_ORIGIN
        to each. Nobody else gets them for `lease_s` seconds; what is not reported on by then is due again.
        """
        here = under_way or {}
        if not await self._database.read(lambda c: _due(c, limit, here)):  # most looks find nothing: they stay reads
            return ()
        return await self._database.write(lambda c: _claim(c, limit, lease_s, here))

    async def delivered(self, delivery: Delivery, status: int) -> None:
        """The receiver took it."""
        await self._database.write(lambda c: _settle(c, delivery.id, "delivered", status, None))

    async def failed(self, delivery: Delivery, status: int | None, error: str, retry_in_s: float | None) -> None:
        """The receiver did not take it (status None: no answer). None for `retry_in_s` makes it a dead letter.

        Of an attempt that outlived its lease while another began, nothing is noted: the other one will tell.
        """
        await self._database.write(lambda c: _failed(c, delivery, status, error, retry_in_s))

    async def disable(self, delivery: Delivery, status: int, error: str) -> None:
        """Makes a delivery and all others to its address dead letters, and those to come; `enable` ends that."""
        await self._database.write(lambda c: _disable(c, delivery, status, error))

    async def enable(self, owner: str, url: str) -> None:
        """Lets deliveries go to an address again; dead ones stay dead until they are replayed. Raises NotFound."""
        await self._database.write(lambda c: endpoints.enable(c, owner, url))

    async def dead(self, owner: str | None, after: str = "", limit: int = 50) -> tuple[DeadLetter, ...]:
        """Dead letters, the oldest first, from the one after `after` (an id) on; None for everybody's.

        Raises InvalidRequest (`cursor`, `limit`).
        """
        return await self._database.read(lambda c: _dead(c, owner, after, limit))

    async def replay(self, id: str, owner: str | None) -> None:
        """Makes a dead letter due at once, with its attempts counted anew.

        Raises NotFound, and InvalidRequest (`id`) where its address is disabled.
        """
        await self._database.write(lambda c: _replay(c, id, owner))

    async def secret(self, owner: str, url: str = "") -> str:
        """The newest secret (`whsec_...`) that signs what goes to a URL, or whatever has no secret of its own."""
        return (await self._database.write(lambda c: endpoints.secrets_for(c, owner, url)))[0]

    async def rotate(self, owner: str, url: str = "", overlap_s: float = endpoints.OVERLAP_S) -> str:
        """A new secret; the present ones sign beside it for `overlap_s` more seconds. Raises InvalidRequest."""
        return await self._database.write(lambda c: endpoints.rotate(c, owner, url, overlap_s))


def origin(url: str) -> str:
    """Scheme and authority in lower case; of what is no address, nothing: the attempt will say what is wrong."""
    found = _ORIGIN.match(url)
    return found[0].lower() if found else ""


async def _due(connection: AsyncConnection, limit: int, under_way: Mapping[str, int]) -> list[str]:
    """The ids of what can be sent now."""
    full = [origin for origin, count in under_way.items() if count >= PER_ORIGIN]
    due = select(deliveries.c.id, deliveries.c.url).where(PENDING, deliveries.c.next_at <= await clock(connection))
    due = due.where(*(_elsewhere(origin) for origin in full)).order_by(deliveries.c.next_at).limit(CONSIDERED)
    found, taken = [], Counter(under_way)
    for row in await connection.execute(due):
        place = origin(row.url)
        if len(found) < limit and taken[place] < PER_ORIGIN:
            taken[place] += 1
            found.append(row.id)
    return found


async def _claim(
    connection: AsyncConnection, limit: int, lease_s: float, under_way: Mapping[str, int]
) -> tuple[Delivery, ...]:
    """One deliverer after another, so that each finds what the one before left."""
    await one_at_a_time(connection, "deliveries")
    ids = await _due(connection, limit, under_way)
    places = await connection.execute(
        select(deliveries.c.owner, deliveries.c.url).where(deliveries.c.id.in_(ids)).distinct()
    )
    keys = {
        (owner, url): await endpoints.secrets_for(connection, owner, url)
        for owner, url in sorted((row.owner, row.url) for row in places)
    }
    now = await clock(connection)
    mine = and_(PENDING, deliveries.c.next_at <= now, deliveries.c.id.in_(ids))
    changes = {"next_at": now + lease_s, "attempts": deliveries.c.attempts + 1}
    rows = (await connection.execute(update(deliveries).where(mine).values(changes).returning(deliveries))).all()
    return tuple(_delivery(row, keys[row.owner, row.url]) for row in sorted(rows, key=lambda row: row.id))


def _elsewhere(origin: str) -> ColumnElement[bool]:
    """That a URL has another scheme and authority."""
    beginning = func.lower(func.substr(deliveries.c.url, 1, len(origin) + 1))
    return beginning.not_in([origin + end for end in ("", "/", "?", "#")])


def _delivery(row: Row[Any], keys: tuple[str, ...]) -> Delivery:
    names = Delivery.__dataclass_fields__.keys() - {"secrets"}
    return Delivery(**{name: getattr(row, name) for name in names}, secrets=keys)


async def _settle(connection: AsyncConnection, id: str, state: str, status: int | None, error: str | None) -> None:
    changes = {"state": state, "status": status, "error": error, "finished_at": await clock(connection)}
    await connection.execute(update(deliveries).where(PENDING, deliveries.c.id == id).values(changes))


async def _failed(
    connection: AsyncConnection, delivery: Delivery, status: int | None, error: str, retry_in_s: float | None
) -> None:
    now = await clock(connection)
    changes: dict[str, Any] = {"status": status, "error": error}
    if retry_in_s is None:
        changes |= {"state": "dead", "finished_at": now}
    else:
        changes |= {"next_at": now + retry_in_s}
    this = and_(PENDING, deliveries.c.id == delivery.id, deliveries.c.attempts == delivery.attempts)
    await connection.execute(update(deliveries).where(this).values(changes))


async def _disable(connection: AsyncConnection, delivery: Delivery, status: int, error: str) -> None:
    owner, url = delivery.owner, delivery.url
    await endpoints.disable(connection, owner, url)
    await _settle(connection, delivery.id, "dead", status, error)
    theirs = and_(PENDING, deliveries.c.owner == owner, deliveries.c.url == url)
    changes = {"state": "dead", "error": error, "finished_at": await clock(connection)}
    await connection.execute(update(deliveries).where(theirs).values(changes))


async def _dead(connection: AsyncConnection, owner: str | None, after: str, limit: int) -> tuple[DeadLetter, ...]:
    if not 1 <= limit <= PAGE_LIMIT:
        raise InvalidRequest("limit", f"must be from 1 to {PAGE_LIMIT}")
    if after and not _ID.fullmatch(after):
        raise InvalidRequest("cursor", "must be the `next` of an earlier page")
    names = DeadLetter.__dataclass_fields__
    query = select(*(deliveries.c[name] for name in names)).where(DEAD, deliveries.c.id > after)
    if owner is not None:
        query = query.where(deliveries.c.owner == owner)
    rows = await connection.execute(query.order_by(deliveries.c.id).limit(limit))
    return tuple(DeadLetter(**row._mapping) for row in rows)


async def _replay(connection: AsyncConnection, id: str, owner: str | None) -> None:
    letter = and_(DEAD, deliveries.c.id == id, true() if owner is None else deliveries.c.owner == owner)
    query = select(deliveries.c.owner, deliveries.c.url).where(letter).with_for_update()
    place = (await connection.execute(query)).one_or_none() if _ID.fullmatch(id) else None
    if place is None:
        raise NotFound(f"there is no dead letter {id[:64]!r}")
    if await endpoints.is_disabled(connection, place.owner, place.url):
        raise InvalidRequest("id", f"goes to {place.url}, which is disabled since it answered 410: enable it first")
    changes = {"state": "pending", "attempts": 0, "next_at": await clock(connection), "finished_at": None}
    await connection.execute(update(deliveries).where(letter).values(changes))
