"""Outbox: the webhooks that are to be sent, written with the change they tell of; and the secrets that sign them."""

import base64
import secrets
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Row, and_, func, insert, select, true, update
from sqlalchemy.ext.asyncio import AsyncConnection

from app.database import Database, clock, one_at_a_time
from app.jobs.job import WebhookEvent
from app.jobs.tables import DEAD, PENDING, deliveries, endpoints
from models.errors import InvalidRequest, NotFound

SECRET_BYTES = 32  # Standard Webhooks asks for 24 to 64
SECRETS = 10  # that may be valid at once
SHARE = 4  # deliveries to one URL in one claim, so that a dead receiver does not take all the places
CONSIDERED = 500
PAGE_LIMIT = 200


@dataclass(frozen=True, kw_only=True)
class Delivery:
    """One webhook to be sent. `id` is the same at every attempt; `secrets` sign it, the newest first."""

    id: str
    job_id: str
    owner: str
    url: str
    event: WebhookEvent
    body: bytes
    attempts: int
    secrets: tuple[str, ...]


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

    An endpoint is an owner's URL. Deliveries are signed with the endpoint's own secrets, where `rotate` made some, and
    otherwise with the owner's, which stand under the URL "" and are made when they are first needed.
    """

    def __init__(self, database: Database):
        self._database = database

    async def claim_due(self, limit: int, lease_s: float) -> tuple[Delivery, ...]:
        """Up to `limit` deliveries that are due, the longest due first, SHARE to one URL at most.

        Nobody else gets them for `lease_s` seconds; whoever does not settle them by then has them sent again.
        `attempts` counts this one.
        """
        return await self._database.write(lambda c: _claim_due(c, limit, lease_s))

    async def delivered(self, id: str, status: int) -> None:
        """The receiver took it."""
        await self._database.write(lambda c: _settle(c, id, "delivered", status, None))

    async def failed(self, id: str, status: int | None, error: str, retry_in_s: float | None) -> None:
        """The receiver did not take it (status None: no answer). None for `retry_in_s` makes it a dead letter."""
        await self._database.write(lambda c: _failed(c, id, status, error, retry_in_s))

    async def disable(self, id: str, error: str = "the receiver is gone") -> None:
        """Makes a delivery and all others to its endpoint dead letters, and those to come; `enable` ends that."""
        await self._database.write(lambda c: _disable(c, id, error))

    async def enable(self, owner: str, url: str) -> None:
        """Lets deliveries go to an endpoint again; dead ones stay dead until they are replayed. Raises NotFound."""
        await self._database.write(lambda c: _enable(c, owner, url))

    async def dead(self, owner: str | None, after: str = "", limit: int = 50) -> tuple[DeadLetter, ...]:
        """Dead letters, the oldest first, from the one after `after` on; None for everybody's."""
        return await self._database.read(lambda c: _dead(c, owner, after, limit))

    async def replay(self, id: str, owner: str | None) -> None:
        """Makes a dead letter due at once, with its attempts counted anew. Raises NotFound."""
        await self._database.write(lambda c: _replay(c, id, owner))

    async def secret(self, owner: str, url: str = "") -> str:
        """The newest secret (`whsec_...`) that signs what goes to a URL, or whatever has no secret of its own."""
        return (await self._database.write(lambda c: _secrets(c, owner, url)))[0]

    async def rotate(self, owner: str, url: str = "", overlap_s: float = 86_400.0) -> str:
        """A new secret; the present ones sign beside it for `overlap_s` more seconds. Raises InvalidRequest."""
        return await self._database.write(lambda c: _rotate(c, owner, url, overlap_s))


async def _claim_due(connection: AsyncConnection, limit: int, lease_s: float) -> tuple[Delivery, ...]:
    now = await clock(connection)
    due = select(deliveries.c.id, deliveries.c.url, deliveries.c.next_at).where(PENDING, deliveries.c.next_at <= now)
    due = due.order_by(deliveries.c.next_at).limit(CONSIDERED).subquery()
    place = func.row_number().over(partition_by=due.c.url, order_by=due.c.next_at).label("place")
    ranked = select(due.c.id, due.c.next_at, place).subquery()
    share = select(ranked.c.id).where(ranked.c.place <= SHARE).order_by(ranked.c.next_at).limit(limit)
    mine = and_(PENDING, deliveries.c.next_at <= now, deliveries.c.id.in_(share))
    ids = list(await connection.scalars(select(deliveries.c.id).where(mine).with_for_update(skip_locked=True)))
    changes = {"next_at": now + lease_s, "attempts": deliveries.c.attempts + 1}
    statement = update(deliveries).where(deliveries.c.id.in_(ids)).values(changes).returning(deliveries)
    rows = sorted((await connection.execute(statement)).all(), key=lambda row: row.id)
    places = sorted({(row.owner, row.url) for row in rows})
    keys = {(owner, url): await _secrets(connection, owner, url) for owner, url in places}
    return tuple(_delivery(row, keys[row.owner, row.url]) for row in rows)


def _delivery(row: Row[Any], keys: tuple[str, ...]) -> Delivery:
    names = Delivery.__dataclass_fields__.keys() - {"secrets"}
    return Delivery(**{name: getattr(row, name) for name in names}, secrets=keys)


async def _settle(connection: AsyncConnection, id: str, state: str, status: int | None, error: str | None) -> None:
    changes = {"state": state, "status": status, "error": error, "finished_at": await clock(connection)}
    await connection.execute(update(deliveries).where(PENDING, deliveries.c.id == id).values(changes))


async def _failed(
    connection: AsyncConnection, id: str, status: int | None, error: str, retry_in_s: float | None
) -> None:
    if retry_in_s is None:
        await _settle(connection, id, "dead", status, error)
    else:
        changes = {"next_at": await clock(connection) + retry_in_s, "status": status, "error": error}
        await connection.execute(update(deliveries).where(PENDING, deliveries.c.id == id).values(changes))


async def _disable(connection: AsyncConnection, id: str, error: str) -> None:
    now = await clock(connection)
    place = await connection.execute(select(deliveries.c.owner, deliveries.c.url).where(deliveries.c.id == id))
    owner, url = place.one()
    await _ensure(connection, owner, url, [])
    here = and_(endpoints.c.owner == owner, endpoints.c.url == url)
    await connection.execute(update(endpoints).where(here).values(disabled_at=now))
    theirs = and_(PENDING, deliveries.c.owner == owner, deliveries.c.url == url)
    changes = {"state": "dead", "error": error, "finished_at": now}
    await connection.execute(update(deliveries).where(theirs).values(changes))


async def _enable(connection: AsyncConnection, owner: str, url: str) -> None:
    here = and_(endpoints.c.owner == owner, endpoints.c.url == url, endpoints.c.disabled_at.is_not(None))
    if not (await connection.execute(update(endpoints).where(here).values(disabled_at=None))).rowcount:
        raise NotFound(f"no endpoint {url!r} is disabled")


async def _dead(connection: AsyncConnection, owner: str | None, after: str, limit: int) -> tuple[DeadLetter, ...]:
    if not 1 <= limit <= PAGE_LIMIT:
        raise InvalidRequest("limit", f"must be from 1 to {PAGE_LIMIT}")
    names = DeadLetter.__dataclass_fields__
    query = select(*(deliveries.c[name] for name in names)).where(DEAD, deliveries.c.id > after)
    if owner is not None:
        query = query.where(deliveries.c.owner == owner)
    rows = await connection.execute(query.order_by(deliveries.c.id).limit(limit))
    return tuple(DeadLetter(**row._mapping) for row in rows)


async def _replay(connection: AsyncConnection, id: str, owner: str | None) -> None:
    letter = and_(DEAD, deliveries.c.id == id, true() if owner is None else deliveries.c.owner == owner)
    changes = {"state": "pending", "attempts": 0, "next_at": await clock(connection), "finished_at": None}
    if not (await connection.execute(update(deliveries).where(letter).values(changes))).rowcount:
        raise NotFound(f"there is no dead letter {id!r}")


async def _secrets(connection: AsyncConnection, owner: str, url: str) -> tuple[str, ...]:
    """Those that are valid now: the URL's own, or the owner's, which are made where there are none."""
    now = await clock(connection)
    query = select(endpoints.c.url, endpoints.c.secrets).where(
        endpoints.c.owner == owner, endpoints.c.url.in_(sorted({url, ""}))
    )
    known = {row.url: _valid(row.secrets, now) for row in await connection.execute(query)}
    found = known.get(url) or known.get("") or await _ensure(connection, owner, "", [_fresh()])
    return tuple(entry["secret"] for entry in found)


async def _rotate(connection: AsyncConnection, owner: str, url: str, overlap_s: float) -> str:
    now, fresh = await clock(connection), _fresh()
    present = _valid(await _ensure(connection, owner, url, []), now)
    if len(present) >= SECRETS:
        raise InvalidRequest("overlap_s", f"{SECRETS} secrets are valid already; wait for some to end")
    ending = [entry | {"until": min(entry["until"] or now + overlap_s, now + overlap_s)} for entry in present]
    here = and_(endpoints.c.owner == owner, endpoints.c.url == url)
    await connection.execute(update(endpoints).where(here).values(secrets=[fresh, *ending]))
    return fresh["secret"]


async def _ensure(
    connection: AsyncConnection, owner: str, url: str, keys: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """The endpoint's secrets, whose row is made with these where there is none; locked until the transaction ends."""
    await one_at_a_time(connection, "endpoints")
    here = and_(endpoints.c.owner == owner, endpoints.c.url == url)
    row = (await connection.execute(select(endpoints.c.secrets).where(here).with_for_update())).one_or_none()
    if row is None:
        await connection.execute(insert(endpoints).values(owner=owner, url=url, secrets=keys))
    elif keys and not row.secrets:
        await connection.execute(update(endpoints).where(here).values(secrets=keys))
    return keys if row is None or (keys and not row.secrets) else row.secrets


def _fresh() -> dict[str, Any]:
    """A secret as Standard Webhooks writes it, without an end."""
    return {"secret": "whsec_" + base64.b64encode(secrets.token_bytes(SECRET_BYTES)).decode(), "until": None}


def _valid(keys: list[dict[str, Any]], now: float) -> list[dict[str, Any]]:
    return [entry for entry in keys if entry["until"] is None or entry["until"] > now]
