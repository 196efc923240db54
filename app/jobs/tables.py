"""The tables of jobs, their events, the idempotency keys, batches, and the webhooks to be sent.

Whatever is asked of the queue is asked through a partial index over queued jobs alone, so that history costs nothing.
A condition on the state stands in a query as a literal: databases use a partial index only where they can see its
condition. Times are seconds since 1970.
"""

from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    ColumnElement,
    Double,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    String,
    Table,
    Text,
    and_,
    literal_column,
    true,
)

from app.database import metadata
from app.jobs.states import State

Json = JSON(none_as_null=True)

jobs = Table(
    "jobs",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("owner", Text, nullable=False),
    Column("state", String(16), nullable=False),
    Column("model", Text, nullable=False),
    Column("kind", Text, nullable=False),
    Column("request", Json, nullable=False),
    Column("inputs", String(32)),  # the folder of the store with the pictures of the request; a retry shares it
    Column("priority", Integer, nullable=False),
    Column("turn", BigInteger, nullable=False),  # the owner's place in the round of owners
    Column("at_once", BigInteger),  # jobs of the owner that may run at a time, this one among them
    Column("start_by", Double, nullable=False),  # a later start misses the deadline; infinite without one
    Column("deadline_at", Double),
    Column("work", Double, nullable=False),
    Column("created_at", Double, nullable=False),
    Column("started_at", Double),
    Column("finished_at", Double),
    Column("attempt", Integer, nullable=False),
    Column("deaths", Integer, nullable=False),
    # Whether others of the model run beside the attempt; of whoever has died before, the others' jobs may be guilty.
    Column("accompanied", Boolean, nullable=False, server_default=true()),
    Column("failures", Integer, nullable=False),
    Column("runner", Text),
    Column("lease_s", Double),
    Column("lease_until", Double),
    Column("progress", Json),
    Column("outputs", Json, nullable=False),
    Column("result", Json),
    Column("error", Json),
    Column("webhook", Json),
    Column("retry_of", String(32)),
    Column("batch", String(32)),  # whose line it is; the next two say which
    Column("line", Integer),
    Column("custom_id", Text),
    Column("data_removed", Boolean, nullable=False),
    Column("seq", Integer, nullable=False),  # of the last event
    Column("told_at", Double, nullable=False),  # when the last event that may be left out was written
)

events = Table(
    "job_events",
    metadata,
    Column("job_id", ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
    Column("seq", Integer, primary_key=True, autoincrement=False),
    Column("at", Double, nullable=False),
    Column("kind", String(16), nullable=False),
    Column("data", Json, nullable=False),
)

idempotency = Table(
    "idempotency",
    metadata,
    Column("owner", Text, primary_key=True),
    Column("route", Text, primary_key=True),
    Column("key", Text, primary_key=True),
    Column("fingerprint", String(64), nullable=False),
    # With the job goes its key: kept exactly as long as the result.
    Column("job_id", ForeignKey("jobs.id", ondelete="CASCADE"), nullable=False, index=True),
)

batches = Table(
    "batches",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("owner", Text, nullable=False),
    Column("total", Integer, nullable=False),  # lines
    Column("created_at", Double, nullable=False),
    Column("cancelling_at", Double),
)

endpoints = Table(
    "endpoints",
    metadata,
    Column("owner", Text, primary_key=True),
    Column("url", Text, primary_key=True),  # "" for the owner's own secrets, which sign what has no others
    Column("secrets", Json, nullable=False),  # [{secret, until}], the newest first
    Column("disabled_at", Double),
)

deliveries = Table(
    "deliveries",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("job_id", String(32), nullable=False),
    Column("owner", Text, nullable=False),
    Column("url", Text, nullable=False),
    Column("event", String(16), nullable=False),
    Column("body", LargeBinary, nullable=False),
    Column("state", String(16), nullable=False),  # pending, delivered, dead
    Column("attempts", Integer, nullable=False),
    Column("next_at", Double, nullable=False),  # when it is due; while somebody delivers it, when the lease ends
    Column("status", Integer),
    Column("error", Text),
    Column("created_at", Double, nullable=False),
    Column("finished_at", Double),
)

QUEUED = jobs.c.state == literal_column(f"'{State.QUEUED}'")
ALONE = jobs.c.batch.is_(None)  # what is bounded job by job; lines of batches have bounds of their own
LINE = jobs.c.batch.is_not(None)
LEASED = jobs.c.lease_until.is_not(None)  # the states of HELD
FINISHED = jobs.c.finished_at.is_not(None)
SERVED = and_(jobs.c.state != literal_column(f"'{State.QUEUED}'"), jobs.c.started_at.is_not(None))  # had their turns
PENDING = deliveries.c.state == literal_column("'pending'")
SETTLED = deliveries.c.finished_at.is_not(None)
DEAD = deliveries.c.state == literal_column("'dead'")


def _partial(name: str, condition: ColumnElement[bool], *columns: ColumnElement[Any]) -> Index:
    return Index(name, *columns, sqlite_where=condition, postgresql_where=condition)


Index("ix_batches_owner", batches.c.owner, batches.c.id)
Index("ix_jobs_owner", jobs.c.owner, jobs.c.id)
_partial("ix_jobs_turn", QUEUED, jobs.c.model, jobs.c.priority.desc(), jobs.c.turn, jobs.c.start_by, jobs.c.id)
_partial("ix_jobs_lane", QUEUED, jobs.c.model, jobs.c.priority, jobs.c.owner, jobs.c.start_by, jobs.c.id)
_partial("ix_jobs_ticket", QUEUED, jobs.c.model, jobs.c.priority, jobs.c.owner, jobs.c.turn)
_partial("ix_jobs_served", SERVED, jobs.c.model, jobs.c.priority, jobs.c.turn)
_partial("ix_jobs_start_by", QUEUED, jobs.c.start_by)
_partial("ix_jobs_waiting", and_(QUEUED, ALONE), jobs.c.owner, jobs.c.work)
_partial("ix_jobs_waiting_lines", and_(QUEUED, LINE), jobs.c.owner, jobs.c.work)
_partial("ix_jobs_batch", LINE, jobs.c.batch, jobs.c.line)
_partial("ix_jobs_leased", LEASED, jobs.c.lease_until)
_partial("ix_jobs_finished", FINISHED, jobs.c.data_removed, jobs.c.finished_at)
_partial("ix_jobs_inputs", jobs.c.inputs.is_not(None), jobs.c.inputs)
_partial("ix_deliveries_due", PENDING, deliveries.c.next_at)
_partial("ix_deliveries_dead", DEAD, deliveries.c.owner, deliveries.c.id)
_partial("ix_deliveries_finished", SETTLED, deliveries.c.finished_at)
