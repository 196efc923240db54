"""Every state, and what every method does to a job in it."""

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from app.database import Database
from app.jobs.job import Claim, Stale
from app.jobs.states import TERMINAL, TRANSITIONS, State, check_transition
from app.jobs.store import JobStore
from tests.app.jobs.making import ERROR, LEASE_S, brought_to, claim_one, submit

Q, R, G, S, F, C, E = State

METHODS: dict[str, Callable[[JobStore, Claim], Awaitable[Any]]] = {
    "cancel": lambda store, held: store.cancel(held.id, "ada"),
    "output": lambda store, held: store.output(held, {"key": "a"}),
    "succeed": lambda store, held: store.succeed(held, {"images": []}),
    "fail": lambda store, held: store.fail(held, ERROR, retry=False),
    "fail and retry": lambda store, held: store.fail(held, ERROR, retry=True),
    "died": lambda store, held: store.died(held, ERROR),
    "release": lambda store, held: store.release(held),
    "cancelled": lambda store, held: store.cancelled(held),
}
# The state that follows; None where the method is refused. The claim is that of the attempt which led to the state.
OUTCOMES: dict[str, dict[State, State | None]] = {
    "cancel": {Q: C, R: G, G: G, S: S, F: F, C: C, E: E},
    "output": {Q: None, R: R, G: G, S: None, F: None, C: None, E: None},
    "succeed": {Q: None, R: S, G: S, S: S, F: None, C: None, E: None},
    "fail": {Q: None, R: F, G: F, S: None, F: F, C: None, E: None},
    "fail and retry": {Q: Q, R: Q, G: C, S: None, F: None, C: None, E: None},
    "died": {Q: Q, R: Q, G: C, S: None, F: None, C: None, E: None},
    "release": {Q: Q, R: Q, G: C, S: None, F: None, C: None, E: None},
    "cancelled": {Q: None, R: None, G: C, S: None, F: None, C: C, E: None},
}


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("method", METHODS)
async def test_each_method_does_to_each_state_what_the_table_says(
    method: str, state: State, store: JobStore, database: Database
) -> None:
    held = await brought_to(state, store, database)
    before = await store.events(held.id, "ada")
    expected = OUTCOMES[method][state]
    if expected is None:
        refusal = ValueError if (method, state) == ("cancelled", R) else Stale
        with pytest.raises(refusal):
            await METHODS[method](store, held)
    else:
        job = await METHODS[method](store, held)
        assert job.state is expected
        assert job == await store.get(held.id, "ada")
    after = await store.events(held.id, "ada")
    told = [event for event in after[len(before) :] if event.kind == "state"]
    assert [event.data["state"] for event in told] == ([] if expected in (None, state) else [expected])
    assert all((state, expected) in TRANSITIONS for _ in told)


@pytest.mark.parametrize("state", State)
async def test_a_heartbeat_tells_what_is_lost_and_what_is_to_stop(
    state: State, store: JobStore, database: Database
) -> None:
    held = await brought_to(state, store, database)
    heard = await store.heartbeat([held], LEASE_S)
    assert heard.lost == (frozenset() if state in (R, G) else {held.id})
    assert heard.cancel == ({held.id} if state is G else frozenset())


async def test_a_queued_job_is_cancelled_at_once(store: JobStore) -> None:
    job = await submit(store)
    assert (await store.cancel(job.id, "ada")).state is State.CANCELLED
    assert await store.claim("runner-1", ["sd15"], 1, LEASE_S) == ()


async def test_what_ended_has_no_runner_no_lease_and_an_end(store: JobStore) -> None:
    await submit(store)
    held = await claim_one(store)
    assert held.job.runner == "runner-1"
    assert held.job.lease_until is not None
    done = await store.succeed(held, {"images": ["a"]})
    assert done.runner is done.lease_until is done.error is None
    assert done.result == {"images": ["a"]}
    assert done.finished_at is not None
    assert done.created_at <= (done.started_at or 0) <= done.finished_at


async def test_a_failed_job_keeps_its_error(store: JobStore) -> None:
    await submit(store)
    failed = await store.fail(await claim_one(store), ERROR, retry=False)
    assert failed.error == ERROR
    assert failed.result is None


async def test_the_third_failure_is_the_last(store: JobStore) -> None:
    await submit(store)
    states = [(await store.fail(await claim_one(store), ERROR, retry=True)).state for _ in range(3)]
    assert states == [Q, Q, F]


def test_every_way_that_is_not_in_the_table_is_refused() -> None:
    for before in State:
        for after in State:
            if (before, after) not in TRANSITIONS:
                with pytest.raises(ValueError, match="cannot go"):
                    check_transition(before, after)


def test_nothing_follows_an_end_and_something_follows_all_else() -> None:
    assert {before for before, _ in TRANSITIONS} == set(State) - TERMINAL
    assert {after for _, after in TRANSITIONS} == set(State)
    assert all(sentence.endswith(".") for sentence in TRANSITIONS.values())


def test_the_page_about_jobs_tells_the_same_transitions() -> None:
    page = (Path(__file__).parents[3] / "docs" / "jobs.md").read_text()
    cells = [
        tuple(cell.strip() for cell in line.strip("|").split("|")) for line in page.splitlines() if line[:1] == "|"
    ]
    told = {(row[0], row[1]): row[2] for row in cells if len(row) == 3}
    assert {way: told.get(way) for way in TRANSITIONS} == dict(TRANSITIONS)
    assert len(told) == len(TRANSITIONS) + 2  # its heading
