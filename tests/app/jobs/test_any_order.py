"""Whatever happens to jobs, in any order: the store agrees with a few lines of Python that say what should be."""

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, multiple, rule, run_state_machine_as_test

from app.database import Database
from app.jobs.attempts import MAX_FAILURES
from app.jobs.job import Claim, Idempotency, Stale
from app.jobs.states import HELD, TERMINAL, State
from app.jobs.store import JobStore
from tests.app.jobs.making import ERROR, LEASE_S, new, pass_time

TICK_S = 20.0  # leases of 30 s and deadlines of 50 s are never within 10 s of a tick


@dataclass
class Expected:
    """One job as it should be; times are seconds from now."""

    owner: str
    priority: int
    deadline: float | None
    state: State = State.QUEUED
    attempt: int = 0
    deaths: int = 0
    failures: int = 0
    lease: float = 0.0
    company: frozenset[str] = frozenset()  # all that ever ran beside the present attempt


class Jobs(RuleBasedStateMachine):
    """Callers, runners, the reaper and the clock, one step at a time."""

    claims = Bundle("claims")

    def __init__(self, url: str):
        super().__init__()
        self.runner = asyncio.Runner()
        self.database = Database(url)
        self.store = JobStore(self.database)
        self.jobs: dict[str, Expected] = {}
        self.ends: dict[str, State] = {}
        self.keys: dict[tuple[str, str], str] = {}
        for job in self.do(self.store.list(None, states=set(State) - TERMINAL)).jobs:  # an earlier example's
            self.do(self._end(job.id))

    async def _end(self, id: str) -> None:
        if (await self.store.cancel(id, None)).state is State.CANCELLING:
            await pass_time(self.database, 100.0)
            await self.store.reap()

    def do(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self.runner.run(work)

    @rule(owner=st.sampled_from("abc"), priority=st.integers(0, 1), deadline=st.sampled_from([None, 50.0]))
    def submit(self, owner: str, priority: int, deadline: float | None) -> None:
        job = self.do(self.store.submit(new(owner, priority=priority, deadline_s=deadline))).job
        self.jobs[job.id] = Expected(owner, priority, deadline)

    @rule(owner=st.sampled_from("ab"), key=st.sampled_from("kl"))
    def submit_with_key(self, owner: str, key: str) -> None:
        key = f"{id(self)}{key}"
        submission = self.do(self.store.submit(new(owner), Idempotency(route="/", key=key, fingerprint="f")))
        assert submission.replayed == ((owner, key) in self.keys)
        known = self.keys.setdefault((owner, key), submission.job.id)
        assert known == submission.job.id
        if not submission.replayed:
            self.jobs[known] = Expected(owner, 0, None)

    @rule(target=claims, limit=st.integers(1, 3))
    def claim(self, limit: int) -> Any:
        claims = self.do(self.store.claim("runner", ["sd15"], limit, LEASE_S))
        for job in self.waiting():
            if job.deadline is not None and job.deadline < 1.0:
                job.state = State.EXPIRED
        for held in claims:
            job = self.jobs[held.id]
            assert job in self.waiting()
            assert job.priority == max(other.priority for other in self.waiting())
            job.state, job.attempt, job.lease = State.RUNNING, job.attempt + 1, LEASE_S
            assert held.attempt == job.attempt
            job.company = frozenset()
            together = frozenset(id for id, other in self.jobs.items() if other.state in HELD)
            for id in together:
                self.jobs[id].company |= together - {id}
            assert not any(self.jobs[id].company for id in together if self.jobs[id].deaths > 1)
        assert len(claims) == limit or not self.waiting() or self.kept_back()
        return multiple(*claims)

    def kept_back(self) -> bool:
        """Whether a job that has to be alone runs, or may be the next and waits until nothing runs."""
        running = [job for job in self.jobs.values() if job.state in HELD]
        first = max(job.priority for job in self.waiting())
        waits = any(job.deaths > 1 and job.priority == first for job in self.waiting())
        return any(job.deaths > 1 for job in running) or bool(running and waits)

    def waiting(self) -> list[Expected]:
        return [job for job in self.jobs.values() if job.state is State.QUEUED]

    def held(self, claim: Claim) -> Expected | None:
        job = self.jobs[claim.id]
        return job if job.attempt == claim.attempt and job.state in HELD else None

    @rule(claim=claims)
    def heartbeat(self, claim: Claim) -> None:
        heard = self.do(self.store.heartbeat([claim], LEASE_S))
        job = self.held(claim)
        assert (claim.id in heard.lost) == (job is None)
        assert (claim.id in heard.cancel) == (job is not None and job.state is State.CANCELLING)
        if job is not None:
            job.lease = LEASE_S

    def ask(self, claim: Claim, word: Coroutine[Any, Any, Any], repeated: State, after: Expected) -> None:
        """Says a word; `repeated` is the state in which it has been said before."""
        job = self.jobs[claim.id]
        if self.held(claim):
            self.do(word)
            self.jobs[claim.id] = after
        elif job.attempt == claim.attempt and job.state is repeated:
            self.do(word)
        else:
            with pytest.raises(Stale):
                self.do(word)

    @rule(claim=claims)
    def succeed(self, claim: Claim) -> None:
        after = replace(self.jobs[claim.id], state=State.SUCCEEDED)
        self.ask(claim, self.store.succeed(claim, {"attempt": claim.attempt}), State.SUCCEEDED, after)

    @rule(claim=claims, retry=st.booleans())
    def fail(self, claim: Claim, retry: bool) -> None:
        job = self.jobs[claim.id]
        again = retry and job.failures + 1 < MAX_FAILURES
        after = self.back(job) if again else replace(job, state=State.FAILED)
        after = replace(after, failures=job.failures + 1)
        self.ask(claim, self.store.fail(claim, ERROR, retry), State.QUEUED if retry else State.FAILED, after)

    @rule(claim=claims)
    def died(self, claim: Claim) -> None:
        self.ask(claim, self.store.died(claim, ERROR), State.QUEUED, self.buried(self.jobs[claim.id]))

    @rule(claim=claims)
    def release(self, claim: Claim) -> None:
        self.ask(claim, self.store.release(claim), State.QUEUED, self.back(self.jobs[claim.id]))

    @rule(claim=claims)
    def cancelled(self, claim: Claim) -> None:
        job = self.jobs[claim.id]
        if not (self.held(claim) and job.state is State.RUNNING):  # a runner says so only when it was told to stop
            self.ask(claim, self.store.cancelled(claim), State.CANCELLED, replace(job, state=State.CANCELLED))

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        if self.jobs:
            id = data.draw(st.sampled_from(sorted(self.jobs)))
            job = self.jobs[id]
            self.do(self.store.cancel(id, job.owner))
            job.state = {State.QUEUED: State.CANCELLED, State.RUNNING: State.CANCELLING}.get(job.state, job.state)

    @rule()
    def tick(self) -> None:
        self.do(pass_time(self.database, TICK_S))
        for job in self.jobs.values():
            job.lease -= TICK_S
            job.deadline = None if job.deadline is None else job.deadline - TICK_S

    @rule()
    def reap(self) -> None:
        self.do(self.store.reap())
        for id, job in self.jobs.items():
            overdue = job.deadline is not None and job.deadline < (1.0 if job.state is State.QUEUED else 0.0)
            if overdue and job.state in (State.QUEUED, State.RUNNING):
                job.state = State.EXPIRED
            elif job.state in HELD and job.lease < 0:
                self.jobs[id] = self.buried(job)

    def back(self, job: Expected) -> Expected:
        return replace(job, state=State.CANCELLED if job.state is State.CANCELLING else State.QUEUED)

    def buried(self, job: Expected) -> Expected:
        job = replace(job, deaths=job.deaths + 1)
        guilty = job.deaths > 1 and not job.company
        return replace(job, state=State.FAILED) if guilty and job.state is not State.CANCELLING else self.back(job)

    @invariant()
    def the_store_says_the_same(self) -> None:
        found = {job.id: job for job in self.do(self.store.list(None, limit=200)).jobs}
        for id, expected in self.jobs.items():
            job = found[id]
            said = (job.state, job.attempt, job.deaths, job.failures)
            assert said == (expected.state, expected.attempt, expected.deaths, expected.failures)
            assert (job.result is not None) == (job.state is State.SUCCEEDED)
            if job.finished:
                assert self.ends.setdefault(id, job.state) is job.state

    def teardown(self) -> None:
        """In the end the events tell the same: without gaps, and with one end at most."""
        for id, expected in self.jobs.items():
            events = self.do(self.store.events(id, None))
            assert [event.seq for event in events] == list(range(1, len(events) + 1))
            ends = [event.data["state"] for event in events if event.data["state"] in TERMINAL]
            assert ends == [expected.state] * (expected.state in TERMINAL)
            assert events[-1].data["state"] == expected.state
        self.do(self.database.close())
        self.runner.close()


def test_whatever_happens_in_whatever_order_the_store_says_what_should_be(url: str) -> None:
    chosen = settings(
        max_examples=10,
        stateful_step_count=20,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(lambda: Jobs(url), settings=chosen)
