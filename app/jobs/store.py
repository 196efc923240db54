"""JobStore: everything that can be done with jobs. Each method is one transaction of the database.

Callers submit, look, cancel and retry; runners claim, send heartbeats and bring results; one loop somewhere reaps and
prunes. Any number of each may run, in any process: what they may do is decided in the database. Every method raises
Unavailable where the database does not answer.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from app.database import Database
from app.jobs import attempts, batches, claiming, reading, reaping, submission
from app.jobs.batches import Batch, BatchSubmission, Line, NewLine
from app.jobs.job import (
    Claim,
    Heartbeat,
    Idempotency,
    Job,
    JobError,
    JobEvent,
    JobProgress,
    NewJob,
    Page,
    Position,
    Reaped,
    Submission,
)
from app.jobs.journal import Payload, thin_payload
from app.jobs.states import State
from app.jobs.submission import Bounds


class JobStore:
    """Jobs in a database.

    `bounds` says how many may wait. `payload` makes the body of a webhook from a job as it stands after the change; it
    is called inside transactions, so it must be quick and must not fail, and it leaves out what makes it large.
    """

    def __init__(self, database: Database, bounds: Bounds | None = None, payload: Payload = thin_payload):
        self._database = database
        self.bounds = bounds or Bounds()
        self._payload = payload

    # For callers. `owner` None is an administrator, who sees everybody's; others' jobs are NotFound.

    async def submit(self, new: NewJob, idempotency: Idempotency | None = None) -> Submission:
        """Accepts a job: once this returns, it is on disk.

        With a known idempotency key of the same owner and route, the job of the first submission comes back and
        nothing is written; with another fingerprint, InvalidRequest (`Idempotency-Key`). Raises Overloaded where as
        many jobs wait as may, in all or of this owner; a replay is never refused for that.
        """
        return await self._database.write(lambda c: submission.submit(c, new, idempotency, self.bounds))

    async def earlier(self, owner: str, idempotency: Idempotency) -> Submission | None:
        """What an earlier submission with this key made, None where there was none.

        Raises InvalidRequest (`Idempotency-Key`) where it was for another body.
        """
        return await self._database.read(lambda c: submission.earlier(c, owner, idempotency))

    async def check_room(self, owner: str) -> None:
        """Raises Overloaded where `submit` would, as things stand: before anything is stored for a job."""
        await self._database.read(lambda c: submission.check_room(c, owner, self.bounds))

    async def get(self, id: str, owner: str | None) -> Job:
        """One job. Raises NotFound."""
        return await self._database.read(lambda c: reading.get(c, id, owner))

    async def list(
        self,
        owner: str | None,
        *,
        states: Collection[State] = (),
        model: str | None = None,
        kind: str | None = None,
        cursor: str | None = None,
        limit: int = 50,
    ) -> Page:
        """Jobs that fit every filter, the newest first; `cursor` is a page's `next`. Raises InvalidRequest."""
        wanted = reading.Filter(owner=owner, states=frozenset(states), model=model, kind=kind)
        return await self._database.read(lambda c: reading.page(c, wanted, cursor, limit))

    async def position(self, id: str, owner: str | None) -> Position:
        """What waits before a queued job, counted as far as `reading.POSITION_LIMIT`; nothing for one not queued.

        The order may still change: by priorities, other owners' turns, deadlines. Raises NotFound.
        """
        return await self._database.read(lambda c: reading.position(c, id, owner))

    async def events(self, id: str, owner: str | None, after_seq: int = 0, limit: int = 100) -> tuple[JobEvent, ...]:
        """What happened to a job after event `after_seq`, in order. Raises NotFound.

        A terminal `state` event is the last there is. Of a job whose data was removed there are none.
        """
        return await self._database.read(lambda c: reading.events_of(c, id, owner, after_seq, limit))

    async def cancel(self, id: str, owner: str | None) -> Job:
        """Ends a queued job at once, tells the runner of a running one to stop; a finished one stays as it is.

        Raises NotFound.
        """
        return await self._database.write(lambda c: attempts.cancel(c, id, owner, self._payload))

    async def retry(self, id: str, owner: str | None, idempotency: Idempotency | None = None) -> Submission:
        """Submits a failed, cancelled or expired job anew: another job, whose `retry_of` names the first.

        It is another one because an end is final: the first keeps its events, and its webhooks stay true. Raises
        NotFound, InvalidRequest (`id`) for a job in another state or without its data, Overloaded.
        """
        return await self._database.write(lambda c: submission.retry(c, id, owner, idempotency, self.bounds))

    async def submit_batch(
        self, owner: str, lines: Sequence[NewLine], idempotency: Idempotency | None = None
    ) -> BatchSubmission:
        """Accepts a job for each line, all or none. A known idempotency key is as in `submit`.

        Raises Overloaded where more lines would wait than may, in all or of this owner.
        """
        return await self._database.write(lambda c: batches.submit(c, owner, lines, idempotency, self.bounds))

    async def earlier_batch(self, owner: str, idempotency: Idempotency) -> BatchSubmission | None:
        """As `earlier`, of batches."""
        return await self._database.read(lambda c: batches.submitted(c, owner, idempotency))

    async def check_room_for_lines(self, owner: str, lines: int) -> None:
        """Raises Overloaded where `submit_batch` would, as things stand."""
        await self._database.read(lambda c: submission.check_room_for_lines(c, owner, lines, self.bounds))

    async def batch(self, id: str, owner: str | None) -> Batch:
        """One batch. Raises NotFound."""
        return await self._database.read(lambda c: batches.get(c, id, owner))

    async def batches(self, owner: str | None, after: str | None, limit: int) -> Sequence[Batch]:
        """The newest first, older ones than `after`, `limit` and one more where there are more. Raises NotFound."""
        return await self._database.read(lambda c: batches.page(c, owner, after, limit))

    async def cancel_lines(self, id: str, owner: str | None) -> bool:
        """Cancels some lines of a batch, and says whether there are more to cancel. Raises NotFound."""
        return await self._database.write(lambda c: batches.cancel(c, id, owner, self._payload))

    async def finished_lines(self, id: str, owner: str | None, after: int, limit: int) -> Sequence[Line]:
        """The lines of a batch after that one whose jobs have ended. Raises NotFound."""
        return await self._database.read(lambda c: batches.finished_lines(c, id, owner, after, limit))

    async def measured(self, model: str, limit: int = 20) -> tuple[Job, ...]:
        """The jobs of a model that succeeded last, at their first attempt: how long things take at the moment."""
        return await self._database.read(lambda c: reading.measured(c, model, limit))

    async def known(self, keys: Collection[str]) -> frozenset[str]:
        """Which of these keys of the store belong to a job that has its data still. For the sweep of orphans."""
        return await self._database.read(lambda c: reading.known(c, keys))

    # For runners.

    async def claim(self, runner: str, models: Sequence[str], limit: int, lease_s: float) -> tuple[Claim, ...]:
        """Up to `limit` queued jobs of these models, each now running under `runner` for `lease_s` seconds.

        The highest priority first; within it owners take turns; of one owner's jobs the one that must start first.
        Those that can no longer be finished in time become expired instead, EXPIRED_AT_ONCE in one call. A job that two
        workers have died with is given out while no other job of its model runs (poison.py).
        """
        return await self._database.write(lambda c: claiming.claim(c, runner, models, limit, lease_s, self._payload))

    async def heartbeat(
        self, claims: Sequence[Claim], lease_s: float, progress: Mapping[str, JobProgress] | None = None
    ) -> Heartbeat:
        """Prolongs the leases to `lease_s` seconds from now and notes the progress, by job id.

        Says which jobs are lost (stop at once, write nothing) and which are to be cancelled (stop, then `cancelled`).
        """
        return await self._database.write(
            lambda c: attempts.heartbeat(c, claims, lease_s, progress or {}, self._payload)
        )

    async def output(self, claim: Claim, output: Any) -> Job:
        """Adds one finished picture (JSON: keys of stored objects, no bytes) to the outputs; said twice, it is one.

        Raises Stale.
        """
        return await self._database.write(lambda c: attempts.output(c, claim, output, self._payload))

    async def succeed(self, claim: Claim, result: Mapping[str, Any]) -> Job:
        """The job is done, and this is its result. Raises Stale; the same word said twice is one."""
        return await self._database.write(lambda c: attempts.succeed(c, claim, result, self._payload))

    async def fail(self, claim: Claim, error: JobError, retry: bool) -> Job:
        """The attempt ended with an error. With `retry` the job is queued again, up to `attempts.MAX_FAILURES` times.

        Raises Stale.
        """
        return await self._database.write(lambda c: attempts.fail(c, claim, error, retry, self._payload))

    async def died(self, claim: Claim, error: JobError) -> Job:
        """The worker died under this job: it is queued again, or failed as `poisoned` (docs/jobs.md). Raises Stale.

        For runners that see a replica die; the death of a runner itself is found by `reap`.
        """
        return await self._database.write(lambda c: attempts.died(c, claim, error, self._payload))

    async def release(self, claim: Claim) -> Job:
        """Hands the job back, as a runner does that stops: queued again, in its old place. Raises Stale."""
        return await self._database.write(lambda c: attempts.release(c, claim, self._payload))

    async def hand_back(self, runner: str, but: Collection[str]) -> Sequence[Job]:
        """Releases what this runner holds except these (ids): of a claim that happened, though its answer was lost."""
        return await self._database.write(lambda c: attempts.hand_back(c, runner, but, self._payload))

    async def expire(self, claim: Claim) -> Job:
        """The deadline passed while the runner worked on the job. Raises Stale."""
        return await self._database.write(lambda c: attempts.expire(c, claim, self._payload))

    async def cancelled(self, claim: Claim) -> Job:
        """The runner has stopped, as `heartbeat` said it should. Raises Stale."""
        return await self._database.write(lambda c: attempts.cancelled(c, claim, self._payload))

    # For the loop that keeps house. Several may run at once.

    async def reap(self, limit: int = 100, since: float | None = None) -> Reaped:
        """Finds what nobody else can tell of: leases that ran out, deadlines that passed.

        A job whose lease ran out is queued again with one death more, or failed as `poisoned`. Run it
        every few seconds, and again at once while it finds `limit` jobs. `since` is when the caller's last reaping was
        done (time.monotonic()): where that is long ago, nobody could renew a lease, and those that ran out begin anew.
        """
        return await self._database.write(lambda c: reaping.reap(c, limit, since, self._payload))

    async def prune(self, keep_s: float, forget_s: float, limit: int = 500) -> int:
        """Removes data of jobs that ended more than `keep_s` seconds ago, and all trace of them after `forget_s`.

        Request, outputs, result and events go first, and the job says `data_removed`; then the job itself, with its
        idempotency key; settled deliveries, and addresses that were disabled so long ago. Gives how many of the kind of
        which there were most, `limit` at most: run it again while it is `limit`.
        """
        return await self._database.write(lambda c: reaping.prune(c, keep_s, forget_s, limit))
