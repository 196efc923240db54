"""Journal: the one place where a job changes. With the change it writes the job's event and whatever webhook wants it.

All three are in one transaction, so none is ever without the others: the outbox pattern.
"""

import secrets
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import orjson
from sqlalchemy import Row, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from app.database import clock
from app.jobs.job import EventKind, Job, JobError, JobProgress, Webhook, WebhookEvent
from app.jobs.states import HELD, TERMINAL, State, check_transition
from app.jobs.tables import deliveries, endpoints, events, jobs

Payload = Callable[[Job, WebhookEvent], Mapping[str, Any]]

TELL_EVERY_S = 0.5  # between two events or webhooks that may be left out, as Replicate has it
BODY_BYTES = 20_000  # of a webhook's body: Standard Webhooks' advice


@dataclass(frozen=True)
class Journal:
    """One transaction's view: its connection, the database's time at its beginning, and who writes webhooks' bodies."""

    connection: AsyncConnection
    now: float
    payload: Payload

    @classmethod
    async def open(cls, connection: AsyncConnection, payload: Payload) -> "Journal":
        return cls(connection, await clock(connection), payload)

    async def lock(self, id: str) -> Row[Any] | None:
        """A job's row, which nobody else changes until the transaction ends."""
        query = select(jobs).where(jobs.c.id == id).with_for_update()
        return (await self.connection.execute(query)).one_or_none()

    async def move(
        self, row: Row[Any], after: State, reason: str, error: JobError | None = None, **changes: Any
    ) -> Job:
        """Takes a locked job to another state. `error` is told in the event; a job that fails keeps it.

        Raises ValueError for a transition that is not in the table.
        """
        check_transition(State(row.state), after)
        if after not in HELD:
            changes |= {"lease_until": None, "lease_s": None, "runner": None}
        if after in TERMINAL:
            changes |= {"finished_at": self.now, "error": _plain(error)}
        data = {"state": after, "attempt": changes.get("attempt", row.attempt), "reason": reason}
        if error is not None:
            data["error"] = _plain(error)
        job = await self._write(row, "state", data, state=after, **changes)
        if after is State.RUNNING and row.started_at is None:
            await self._send(job, "start")
        if after in TERMINAL:
            await self._send(job, "completed")
        return job

    async def progress(self, row: Row[Any], progress: JobProgress) -> None:
        """Notes how far a locked job is; told as an event at most every TELL_EVERY_S seconds."""
        if not self._due(row):
            await self.connection.execute(update(jobs).where(jobs.c.id == row.id).values(progress=asdict(progress)))
            return
        job = await self._write(row, "progress", asdict(progress), progress=asdict(progress), told_at=self.now)
        await self._send(job, "logs")

    async def output(self, row: Row[Any], output: Any) -> Job:
        """Adds a finished picture to a locked job. Always an event, but a webhook only every TELL_EVERY_S seconds."""
        due = self._due(row)
        changes = {"outputs": [*row.outputs, output], "told_at": self.now if due else row.told_at}
        job = await self._write(row, "output", {"index": len(row.outputs), "output": output}, **changes)
        if due:
            await self._send(job, "output")
        return job

    def _due(self, row: Row[Any]) -> bool:
        """Also where the clock was set back, and the last telling lies in the future."""
        return abs(self.now - row.told_at) >= TELL_EVERY_S

    async def _write(self, row: Row[Any], kind: EventKind, data: Mapping[str, Any], **changes: Any) -> Job:
        statement = update(jobs).where(jobs.c.id == row.id).values(seq=row.seq + 1, **changes).returning(jobs)
        changed = (await self.connection.execute(statement)).one()
        await record(self.connection, changed, kind, data, self.now)
        return job_of(changed)

    async def _send(self, job: Job, event: WebhookEvent) -> None:
        """A row in the outbox, where the job's webhook wants the event; a dead one where the endpoint is disabled."""
        if job.webhook is None or event not in job.webhook.events:
            return
        place = (endpoints.c.owner == job.owner, endpoints.c.url == job.webhook.url)
        disabled = await self.connection.scalar(select(endpoints.c.disabled_at).where(*place)) is not None
        await self.connection.execute(
            insert(deliveries).values(
                id=f"msg_{new_id(self.now)}",
                job_id=job.id,
                owner=job.owner,
                url=job.webhook.url,
                event=event,
                body=_body(self.payload(job, event), job, event),
                state="dead" if disabled else "pending",
                attempts=0,
                next_at=self.now,
                error="the endpoint is disabled" if disabled else None,
                created_at=self.now,
                finished_at=self.now if disabled else None,
            )
        )


async def record(
    connection: AsyncConnection, row: Row[Any], kind: EventKind, data: Mapping[str, Any], now: float
) -> None:
    """Writes the event that belongs to a row's `seq`."""
    await connection.execute(insert(events).values(job_id=row.id, seq=row.seq, at=now, kind=kind, data=data))


def thin_payload(job: Job, event: WebhookEvent) -> Mapping[str, Any]:
    """A webhook's body where no API has one of its own: how the job stands, and the keys of what it made."""
    return {
        "type": f"job.{event}",
        "job_id": job.id,
        "status": job.state,
        "model": job.model,
        "kind": job.kind,
        "attempt": job.attempt,
        "created_at": job.created_at,
        "started_at": job.started_at,
        "finished_at": job.finished_at,
        "progress": None if job.progress is None else asdict(job.progress),
        "outputs": list(job.outputs),
        "result": job.result,
        "error": _plain(job.error),
    }


def _body(payload: Mapping[str, Any], job: Job, event: WebhookEvent) -> bytes:
    """Too large a payload is cut down to what lets the receiver ask for the rest."""
    body = orjson.dumps(payload)
    if len(body) <= BODY_BYTES:
        return body
    return orjson.dumps({"type": f"job.{event}", "job_id": job.id, "status": job.state, "truncated": ["data"]})


def new_id(now: float, after: str | None = None) -> str:
    """A UUID of version 7 in 32 hexadecimal digits, larger than `after`.

    60 bits of time, in 4096ths of a millisecond since 1970, and 62 random ones (RFC 9562, 5.7 and 6.2, method 3).
    """
    tick = int(now * 1000 * 4096)
    if after is not None:
        tick = max(tick, int(after[:12] + after[13:16], 16) + 1)
    return f"{tick >> 12 << 80 | 0x7 << 76 | (tick & 0xFFF) << 64 | 0b10 << 62 | secrets.randbits(62):032x}"


def job_of(row: Row[Any]) -> Job:
    """The job that a row of `jobs` describes."""
    values = {name: getattr(row, name) for name in Job.__dataclass_fields__}
    values["state"] = State(row.state)
    values["outputs"] = tuple(row.outputs)
    if row.progress is not None:
        values["progress"] = JobProgress(**row.progress)
    if row.error is not None:
        values["error"] = JobError(**row.error)
    if row.webhook is not None:
        values["webhook"] = Webhook(**row.webhook | {"events": tuple(row.webhook["events"])})
    return Job(**values)


def _plain(error: JobError | None) -> dict[str, Any] | None:
    return None if error is None else asdict(error)
