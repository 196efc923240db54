"""What a webhook says: that something happened to a job, and how the job stands, in at most 20 KB.

The outer form is Standard Webhooks' (`type`, `timestamp`, `data`); the job's id, status and images stand beside it.
"""

from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

import orjson

from app.jobs.job import Job, WebhookEvent
from app.jobs.journal import BODY_BYTES, Payload

JobForm = Callable[[Job], Mapping[str, Any]]

_BASE64 = ("base64", "b64_json")


def payload_of(form: JobForm) -> Payload:
    """The writer of the bodies. `form` gives a job as its API tells it, with `status`, `images`, `result` and `urls`.

    It is called inside transactions: it must be quick, and must not fail. `truncated` names what a body that would be
    too large leaves out; `urls` lead to the whole.
    """

    def payload(job: Job, event: WebhookEvent) -> Mapping[str, Any]:
        data = _without_pictures(form(job))
        body = {
            "type": f"job.{event}",
            "timestamp": _timestamp(job, event),
            "job_id": job.id,
            "status": job.state,
            "images": data.get("images", []),
            "data": data,
        }
        return next(shorter for shorter in _shortened(body) if len(orjson.dumps(shorter)) < BODY_BYTES)

    return payload


def _without_pictures(value: Any) -> Any:
    """The same without the pictures themselves."""
    if isinstance(value, Mapping):
        return {key: _without_pictures(part) for key, part in value.items() if key not in _BASE64}
    return [_without_pictures(part) for part in value] if isinstance(value, list | tuple) else value


def _timestamp(job: Job, event: WebhookEvent) -> str:
    """When it happened: by the database's clock where the job tells, else now."""
    at = {"completed": job.finished_at, "start": job.started_at}.get(event)
    moment = datetime.now(UTC) if at is None else datetime.fromtimestamp(at, UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _shortened(body: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The body, then with less and less in it; the last is short whatever a job holds."""
    yield body
    data = dict(body["data"])
    cut: list[str] = []
    for name, nothing in (("result", None), ("images", [])):
        data[name] = nothing
        cut = [*cut, f"data.{name}"]
        yield {**body, "data": data, "truncated": cut}
    yield {**body, "data": data, "images": [], "truncated": [*cut, "images"]}
    yield {**body, "data": {"urls": data.get("urls", {})}, "images": [], "truncated": ["data", "images"]}
