"""What webhooks say: the job's own form, never its pictures, never 20 KB."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import orjson
import pytest

from app.jobs.job import Job, JobError, Webhook
from app.jobs.journal import BODY_BYTES
from app.jobs.outbox import Outbox
from app.jobs.states import State
from app.jobs.store import JobStore
from app.webhooks.payload import payload_of
from tests.app.jobs.making import claim_one, submit

JOB = Job(
    inputs=None,
    at_once=None,
    id="0199f3a0c1d27e6f8a4b5c6d7e8f9a0b",
    owner="ada",
    state=State.SUCCEEDED,
    model="sd15",
    kind="generate",
    request={},
    priority=0,
    deadline_at=None,
    work=1.0,
    created_at=1795255100.0,
    started_at=1795255150.5,
    finished_at=1795255200.25,
    attempt=1,
    deaths=0,
    failures=0,
    runner=None,
    lease_until=None,
    progress=None,
    outputs=({"index": 0, "seed": 7, "url": "/v1/images/a?expires=1"},),
    result={"images": [{"index": 0, "base64": "x" * 10_000, "b64_json": "x" * 10_000}], "warnings": []},
    error=None,
    webhook=None,
    retry_of=None,
    data_removed=False,
)
URLS = {"self": f"/v1/jobs/{JOB.id}", "events": f"/v1/jobs/{JOB.id}/events", "cancel": f"/v1/jobs/{JOB.id}/cancel"}


def form(job: Job) -> Mapping[str, Any]:
    """As the API tells a job."""
    told = {"job_id": job.id, "status": job.state, "images": [*job.outputs], "result": job.result, "urls": URLS}
    return told | {"error": None if job.error is None else asdict(job.error)}


def body(job: Job = JOB) -> dict[str, Any]:
    written = orjson.dumps(payload_of(form)(job, "completed"))
    assert len(written) < BODY_BYTES <= 20_000
    return orjson.loads(written)


def test_a_body_is_the_job_without_its_pictures() -> None:
    told = body()
    assert told == {
        "type": "job.completed",
        "timestamp": "2026-11-21T10:00:00.250Z",
        "job_id": JOB.id,
        "status": "succeeded",
        "images": [{"index": 0, "seed": 7, "url": "/v1/images/a?expires=1"}],
        "data": form(JOB) | {"images": list(JOB.outputs), "result": {"images": [{"index": 0}], "warnings": []}},
    }
    assert "truncated" not in told


def test_a_start_is_told_with_its_time_and_progress_with_the_present() -> None:
    write = payload_of(form)
    started = write(JOB, "start")
    assert (started["type"], started["timestamp"]) == ("job.start", "2026-11-21T09:59:10.500Z")
    assert write(JOB, "logs")["timestamp"] != started["timestamp"]


def images(count: int, characters: int) -> tuple[dict[str, Any], ...]:
    return tuple({"index": index, "url": "u" * characters} for index in range(count))


@pytest.mark.parametrize(
    ("changes", "truncated", "left"),
    [
        ({"result": {"prompts": "x" * 30_000}}, ["data.result"], 1),
        ({"outputs": images(16, 900)}, ["data.result", "data.images"], 16),
        ({"outputs": images(16, 3000)}, ["data.result", "data.images", "images"], 0),
        ({"error": JobError(code="x", message="x" * 30_000)}, ["data", "images"], 0),
    ],
    ids=["a long result", "many pictures", "pictures with endless addresses", "an endless error"],
)
def test_what_is_too_long_is_left_out_and_that_is_said(
    changes: dict[str, Any], truncated: list[str], left: int
) -> None:
    told = body(replace(JOB, **changes))
    assert told["truncated"] == truncated
    assert (told["job_id"], told["status"], told["data"]["urls"]) == (JOB.id, "succeeded", URLS)
    assert len(told["images"]) == left


async def test_the_store_sends_it(database: Any, outbox: Outbox) -> None:
    store = JobStore(database, payload=payload_of(form))
    job = await submit(store, webhook=Webhook(url="https://example.com/hook"))
    await store.succeed(await claim_one(store), {"images": [{"base64": "x" * 50_000}]})
    (delivery,) = await outbox.claim_due(10, 60.0)
    told = orjson.loads(delivery.body)
    assert (told["job_id"], told["data"]["result"]) == (job.id, {"images": [{}]})
