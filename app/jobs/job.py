"""What the store takes and gives: jobs, claims on them, their events. Frozen; times are seconds since 1970 of the
database's clock."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import orjson

from app.jobs.states import TERMINAL, State
from models.errors import HeliographError, InvalidRequest

WebhookEvent = Literal["start", "output", "logs", "completed"]  # Replicate's words
WEBHOOK_EVENTS: tuple[WebhookEvent, ...] = get_args(WebhookEvent)
EventKind = Literal["state", "progress", "output"]
KEY_LENGTH = 255  # characters of an idempotency key, as Stripe's


class Stale(HeliographError):
    """This attempt no longer holds the job. Stop the work; another attempt, or the job's end, has overtaken it."""


@dataclass(frozen=True, kw_only=True)
class Webhook:
    """Where a job's events are sent, and which: start, output (a picture is done), logs (progress), completed.

    `dialect` names the API whose form the body has.
    """

    url: str
    events: tuple[WebhookEvent, ...] = ("completed",)
    dialect: str = "native"

    def __post_init__(self) -> None:
        unknown = set(self.events) - set(WEBHOOK_EVENTS)
        if unknown or not self.events:
            raise InvalidRequest("webhook_events", f"must be some of {', '.join(WEBHOOK_EVENTS)}")


@dataclass(frozen=True, kw_only=True)
class JobError:
    """Why a job failed: the error's code and message as the API tells them."""

    code: str
    message: str
    field: str | None = None
    retryable: bool = False


@dataclass(frozen=True, kw_only=True)
class JobProgress:
    """How far an attempt is: `done` of `total` steps over all pictures, and the phase it is in."""

    done: int
    total: int
    phase: str = ""


@dataclass(frozen=True, kw_only=True)
class NewJob:
    """A job to be. `request` is the canonical request as JSON, in which pictures are keys of stored objects.

    `inputs` names the folder of the store with these pictures, None where there are none.
    A higher `priority` goes first. No more than `at_once` jobs of the owner run at a time. `deadline_s` counts from the
    submission. `work` is the estimate of the seconds that a device will spend on it.
    """

    owner: str
    model: str
    kind: str
    request: Mapping[str, Any]
    priority: int = 0
    deadline_s: float | None = None
    work: float = 1.0
    webhook: Webhook | None = None
    retry_of: str | None = None
    inputs: str | None = None
    at_once: int | None = None


@dataclass(frozen=True, kw_only=True)
class Job:
    """A durable promise to make something, as it stands.

    `attempt` counts the claims and fences their writes; `deaths` the workers that died with it, `failures` the attempts
    that ended with an error. `outputs` has what the present attempt has finished so far, `result` all of it, once the
    job has succeeded. After `data_removed`, request, outputs and result are empty.
    """

    id: str
    owner: str
    state: State
    model: str
    kind: str
    request: Mapping[str, Any]
    inputs: str | None
    at_once: int | None
    priority: int
    deadline_at: float | None
    work: float
    created_at: float
    started_at: float | None
    finished_at: float | None
    attempt: int
    deaths: int
    failures: int
    runner: str | None
    lease_until: float | None
    progress: JobProgress | None
    outputs: tuple[Any, ...]
    result: Mapping[str, Any] | None
    error: JobError | None
    webhook: Webhook | None
    retry_of: str | None
    data_removed: bool

    @property
    def finished(self) -> bool:
        return self.state in TERMINAL


@dataclass(frozen=True, kw_only=True)
class Idempotency:
    """A caller's promise that requests with this key on this route are one and the same request."""

    route: str
    key: str
    fingerprint: str

    def __post_init__(self) -> None:
        if not (0 < len(self.key) <= KEY_LENGTH and self.key.isprintable()):
            raise InvalidRequest("Idempotency-Key", f"must have 1 to {KEY_LENGTH} printable characters")


def fingerprint(body: Any) -> str:
    """The SHA-256 of a JSON body, whatever the order of its keys."""
    return hashlib.sha256(orjson.dumps(body, option=orjson.OPT_SORT_KEYS)).hexdigest()


@dataclass(frozen=True)
class Submission:
    """What came of a submission; `replayed` where an earlier one with the same idempotency key had made the job."""

    job: Job
    replayed: bool = False


@dataclass(frozen=True)
class Claim:
    """A runner's right to one attempt of a job: as good as its lease, and void once `attempt` is not the job's own."""

    job: Job

    @property
    def id(self) -> str:
        return self.job.id

    @property
    def attempt(self) -> int:
        return self.job.attempt


@dataclass(frozen=True)
class Heartbeat:
    """What a runner learns about the jobs it holds, by id: those that are no longer its own, those it is to stop."""

    lost: frozenset[str]
    cancel: frozenset[str]


@dataclass(frozen=True)
class Page:
    """Some jobs, the newest first, and the cursor that leads on to older ones."""

    jobs: tuple[Job, ...]
    next: str | None


@dataclass(frozen=True)
class Position:
    """What waits before a queued job: jobs, and seconds of work. Without `exact`, at least that much."""

    ahead: int
    work: float
    exact: bool = True


@dataclass(frozen=True)
class JobEvent:
    """Number `seq` of what happened to a job, from 1 without gaps.

    state: {state, attempt, reason}; progress: {done, total, phase}; output: {index, output}.
    """

    job_id: str
    seq: int
    at: float
    kind: EventKind
    data: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Reaped:
    """What the reaper found: jobs queued again, ended (by id), and how many leases begin anew: after the clock was set
    back, and after the database was away."""

    queued: tuple[str, ...]
    ended: tuple[str, ...]
    begun_anew: int
