"""How everything stands at the end: the rows of the database, the pictures, and each beside its undisturbed twin."""

import asyncio
import hashlib
import io
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
from PIL import Image
from sqlalchemy import Row, exists, select

from app.database import Database
from app.jobs.states import TERMINAL, State
from app.jobs.tables import PENDING, deliveries, events, jobs
from models.errors import Unavailable
from tests.faults.client import Clients
from tests.faults.log import Change, EndDelivery, EndJob, EndPicture, Log
from tests.faults.plan import PlannedJob
from tests.faults.twins import Twins

POLL_S = 1.0


async def settled(database: Database) -> None:
    """Waits until every job has come to its end and every webhook is delivered or dead."""
    unsettled = select(exists().where(jobs.c.state.not_in(sorted(TERMINAL))) | exists().where(PENDING))
    while True:
        with suppress(Unavailable):  # it has only just come back
            if not await database.read(lambda c: c.scalar(unsettled)):
                return
        await asyncio.sleep(POLL_S)


async def write_rows(database: Database, log: Log) -> list[EndJob]:
    """Tells the log every job and every webhook there is; gives the jobs."""
    told = await database.read(lambda c: c.execute(select(events).order_by(events.c.job_id, events.c.seq)))
    changes: dict[str, list[Change]] = {}
    for row in told:
        change = Change(seq=row.seq, at=row.at, kind=row.kind, data=row.data)
        changes.setdefault(row.job_id, []).append(change)
    rows = await database.read(lambda c: c.execute(select(jobs).order_by(jobs.c.id)))
    ended = [_end_of(row, changes.get(row.id, [])) for row in rows]
    for job in ended:
        log.write(job)
    for row in await database.read(lambda c: c.execute(select(deliveries).order_by(deliveries.c.id))):
        delivery = EndDelivery(
            webhook_id=row.id, job_id=row.job_id, event=row.event, state=row.state, attempts=row.attempts
        )
        log.write(delivery)
    return ended


def _end_of(row: Row[Any], changes: Sequence[Change]) -> EndJob:
    return EndJob(
        job_id=row.id,
        owner=row.owner,
        model=row.model,
        priority=row.priority,
        state=State(row.state),
        seed=row.request["request"]["seed"],
        attempt=row.attempt,
        deaths=row.deaths,
        error=None if row.error is None else row.error["code"],
        webhook=row.webhook is not None,
        result=row.result is not None,
        changes=tuple(changes),
    )


async def write_pictures(
    ended: Sequence[EndJob], planned: Sequence[PlannedJob], clients: Clients, twins: Twins, log: Log
) -> None:
    """Fetches every picture of the jobs that succeeded, and compares it with its twin."""
    by_seed = {job.seed: job for job in planned}
    for job in ended:
        if job.state is not State.SUCCEEDED or job.seed not in by_seed:
            continue
        plan = by_seed[job.seed]
        alone = [decoded(data) for data in await twins.of(plan)]
        for image in (await clients.look(plan, job.job_id)).get("images", []):
            data = None if image["url"] is None else await clients.picture(image["url"])
            log.write(_beside(job.job_id, image, data, alone[image["index"]]))


def _beside(job_id: str, image: Mapping[str, Any], data: bytes | None, twin: np.ndarray | None) -> EndPicture:
    """A picture, as the job tells of it and as it came, beside what it should be."""
    pixels = None if data is None else decoded(data)
    return EndPicture(
        job_id=job_id,
        index=image["index"],
        recorded=image["sha256"],
        found=None if data is None else hashlib.sha256(data).hexdigest(),
        decodes=pixels is not None,
        difference=None if pixels is None or twin is None else difference(pixels, twin),
    )


def decoded(data: bytes) -> np.ndarray | None:
    """The pixels, (height, width, 3); None for what is no whole picture."""
    try:
        with Image.open(io.BytesIO(data)) as picture:
            return np.asarray(picture.convert("RGB"))
    except OSError:
        return None


def difference(one: np.ndarray, other: np.ndarray) -> int | None:
    """The largest of any pixel's channels; None for pictures of different sizes."""
    if one.shape != other.shape:
        return None
    return int(np.abs(one.astype(int) - other.astype(int)).max())
