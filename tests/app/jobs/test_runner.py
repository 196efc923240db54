"""Runners on real databases and a real folder: jobs are made, stopped, handed back, tried again and never lost."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from sqlalchemy import update

from app.database import Database
from app.errors import NotRunning, ReplicaDied
from app.job_runner import drawing
from app.jobs import canonical, inputs
from app.jobs.job import Claim, Job, NewJob, Webhook
from app.jobs.making import READINGS, Maker, Patience
from app.jobs.outbox import Outbox
from app.jobs.runner import Pace, Runner
from app.jobs.states import State
from app.jobs.store import JobStore
from app.jobs.tables import jobs
from app.service import Service
from app.stores.folder import Folder
from app.stores.links import Links
from app.stores.store import StorageFull
from models.errors import (
    DeadlineTooShort,
    GenerationFailed,
    HeliographError,
    InvalidRequest,
    Overloaded,
    Unavailable,
)
from models.images import Picture, encode
from models.parts import Upscale
from models.request import GenerationRequest
from tests.app.conftest import CARDS, MemoryRouter

PACE = Pace(lease_s=2.0, beat_s=0.05, look_s=0.02, reap_s=0.05, backoff_s=(0.05, 0.05))
PATIENCE = Patience(store_s=(0.05, 0.05, 0.05), busy_s=(0.05, 0.05))
DRAW = GenerationRequest(model="sd15", prompt="a red circle", seed=3, steps=2)


@pytest.fixture
def pictures(tmp_path: Path) -> Folder:
    return Folder(tmp_path / "pictures", Links(b"s" * 32))


@pytest.fixture
def make(store: JobStore, pictures: Folder, service: Service) -> Maker:
    return Maker(store, pictures, drawing(service), service.upscale, PATIENCE)


@asynccontextmanager
async def running(store: JobStore, make: Any, pace: Pace = PACE, name: str = "runner-1") -> AsyncIterator[Runner]:
    worker = Runner(name, store, make, pace)
    worker.offer(("sd15", "sdxl", "upscaler"))
    task = asyncio.create_task(worker.run())
    try:
        yield worker
    finally:
        worker.stop()
        done, _ = await asyncio.wait({task}, timeout=5)
        task.cancel()
        assert done, "the runner does not stop"
        task.result()


async def submit(
    store: JobStore, pictures: Folder, request: GenerationRequest = DRAW, owner: str = "ada", **options: Any
) -> Job:
    effective = request.resolve(CARDS[request.model])
    folder = inputs.new_folder()
    keys = await inputs.keep(pictures, folder, [p for p in (effective.image, effective.mask) if p])
    wanted = {"response": "url", "request": canonical.to_json(effective, keys)}
    options = {"deadline_s": request.deadline_s, "inputs": folder if keys else None} | options
    return (
        await store.submit(NewJob(owner=owner, model=request.model, kind="generate", request=wanted, **options))
    ).job


async def submit_upscale(store: JobStore, pictures: Folder) -> Job:
    [key] = await inputs.keep_packed(pictures, "ab" * 16, [inputs.repacked(_png(), "image")])
    wanted = canonical.UpscaleRequest(key=key, upscale=Upscale(scale=2.0, model="2x"), output_format="webp")
    request = {"response": "url", "request": canonical.upscale_to_json(wanted)}
    new = NewJob(owner="ada", model="upscaler", kind=canonical.UPSCALE, request=request)
    return (await store.submit(new)).job


async def ended(store: JobStore, job: Job, timeout_s: float = 30.0) -> Job:
    return await until(lambda: store.get(job.id, None), lambda found: found.finished, timeout_s)


async def until(look: Callable[[], Awaitable[Any]], fits: Callable[[Any], bool], timeout_s: float = 10.0) -> Any:
    deadline = time.monotonic() + timeout_s
    while not fits(found := await look()):
        assert time.monotonic() < deadline, found
        await asyncio.sleep(0.02)
    return found


async def states(store: JobStore, job: Job) -> list[str]:
    events = await store.events(job.id, None)
    return [f"{e.data['state']}: {e.data['reason']}" for e in events if e.kind == "state"]


async def test_a_job_is_drawn_and_its_pictures_are_kept(store: JobStore, pictures: Folder, make: Maker):
    hook = Webhook(url="https://example.com/hook", events=("start", "output", "completed"))
    async with running(store, make):
        job = await submit(store, pictures, replace(DRAW, samples=2), webhook=hook)
        done = await ended(store, job)
    assert (done.state, done.attempt, done.runner, done.lease_until) == (State.SUCCEEDED, 1, None, None)
    assert done.result is not None
    assert done.result["revision"] == "abc"
    assert [(output["index"], output["seed"]) for output in done.outputs] == [(0, 3), (1, 4)]
    for output in done.outputs:
        data = await pictures.get(output["key"])
        assert Picture.from_bytes(data).data[:3] == bytes([output["seed"]] * 3)
        assert (await pictures.head(output["key"])).sha256 == output["sha256"]
    assert await states(store, job) == ["queued: submitted", "running: claimed", "succeeded: finished"]


async def test_webhooks_of_a_job_wait_in_the_outbox(store: JobStore, pictures: Folder, make: Maker, outbox: Outbox):
    hook = Webhook(url="https://example.com/hook", events=("start", "completed"))
    async with running(store, make):
        await ended(store, await submit(store, pictures, webhook=hook))
    assert [delivery.event for delivery in await outbox.claim_due(10, 30.0)] == ["start", "completed"]


async def test_input_pictures_come_back_as_they_were(
    store: JobStore, pictures: Folder, make: Maker, router: MemoryRouter
):
    image = Picture.from_array(np.random.default_rng(1).integers(0, 256, (64, 64, 3), np.uint8))
    async with running(store, make):
        await ended(store, await submit(store, pictures, replace(DRAW, image=image)))
    assert router.requests[0].image == image
    assert router.requests[0].seed == 3


async def test_a_picture_is_enlarged_as_a_job(store: JobStore, pictures: Folder, make: Maker, router: MemoryRouter):
    async with running(store, make):
        done = await ended(store, await submit_upscale(store, pictures))
    assert done.state is State.SUCCEEDED, done.error
    assert (done.outputs[0]["width"], done.outputs[0]["format"]) == (128, "webp")
    assert router.upscales == [Upscale(scale=2.0, model="2x")]


async def test_the_heartbeat_keeps_the_lease_and_tells_the_progress(
    store: JobStore, pictures: Folder, make: Maker, router: MemoryRouter
):
    router.gate.clear()
    async with running(store, make):
        job = await submit(store, pictures)
        found = await until(lambda: store.get(job.id, None), lambda found: found.progress is not None)
        assert (found.progress.done, found.progress.total) == (2, 2)
        await asyncio.sleep(1.5 * PACE.lease_s)
        assert (await store.get(job.id, None)).attempt == 1
        router.gate.set()
        assert (await ended(store, job)).state is State.SUCCEEDED


async def test_a_running_job_that_is_cancelled_stops(
    store: JobStore, pictures: Folder, make: Maker, router: MemoryRouter
):
    router.gate.clear()
    async with running(store, make):
        job = await submit(store, pictures)
        await until(lambda: asyncio.sleep(0, router.running), bool)
        assert (await store.cancel(job.id, "ada")).state is State.CANCELLING
        done = await ended(store, job)
    assert (done.state, done.outputs, router.running) == (State.CANCELLED, (), {})


async def test_a_runner_that_stops_hands_its_jobs_back(
    store: JobStore, pictures: Folder, make: Maker, router: MemoryRouter
):
    router.gate.clear()
    async with running(store, make):
        jobs = [await submit(store, pictures) for _ in range(3)]
        await until(lambda: asyncio.sleep(0, router.running), lambda running: len(running) == 3)
    for job in jobs:
        found = await store.get(job.id, None)
        assert (found.state, found.deaths, found.failures) == (State.QUEUED, 0, 0)
    router.gate.set()
    async with running(store, make, name="runner-2"):
        assert [(await ended(store, job)).attempt for job in jobs] == [2, 2, 2]


async def test_a_job_of_a_runner_that_is_gone_runs_again_and_comes_out_the_same(
    store: JobStore, pictures: Folder, make: Maker, router: MemoryRouter
):
    """Cancelling the task is what SIGKILL does, as far as the database can tell: nobody says a word more."""
    router.gate.clear()
    doomed = Runner("doomed", store, make, PACE)
    doomed.offer(("sd15",))
    task = asyncio.create_task(doomed.run())
    job = await submit(store, pictures, replace(DRAW, seed=None))
    await until(lambda: asyncio.sleep(0, router.running), bool)
    task.cancel()
    await asyncio.wait({task})
    router.gate.set()
    gone = time.monotonic()
    async with running(store, make):
        done = await ended(store, job)
    assert (done.state, done.attempt, done.deaths) == (State.SUCCEEDED, 2, 1)
    assert time.monotonic() - gone < PACE.lease_s + 2.0
    assert len({request.seed for request in router.requests}) == 1


async def test_a_job_that_is_lost_is_stopped_and_nothing_is_written(
    store: JobStore, pictures: Folder, make: Maker, router: MemoryRouter, database: Database
):
    router.gate.clear()
    async with running(store, make, replace(PACE, reap_s=60.0)) as first:
        job = await submit(store, pictures)
        await until(lambda: asyncio.sleep(0, router.running), bool)
        first.offer(())
        other = JobStore(database)
        await store.cancel(job.id, "ada")  # another runner ends it meanwhile, as a reaper would
        claim = SimpleNamespace(id=job.id, attempt=1)
        await other.cancelled(claim)  # pyright: ignore[reportArgumentType]
        await until(lambda: asyncio.sleep(0, router.running), lambda running: not running)
    assert (await store.get(job.id, None)).state is State.CANCELLED


async def test_a_replica_that_dies_under_a_job_counts_as_its_death_and_the_second_is_final(
    store: JobStore, pictures: Folder, make: Maker, router: MemoryRouter
):
    router.failure = ReplicaDied("replica_lost", "the replica died")
    async with running(store, make):
        job = await submit(store, pictures)
        done = await ended(store, job)
    assert (done.state, done.deaths, done.failures, done.attempt) == (State.FAILED, 2, 0, 2)
    assert done.error is not None
    assert done.error.code == "poisoned"


async def test_a_picture_that_kills_the_upscaler_twice_is_poisoned(
    store: JobStore, pictures: Folder, make: Maker, router: MemoryRouter
):
    router.refusal = ReplicaDied("replica_lost", "the upscaler died")
    async with running(store, make):
        done = await ended(store, await submit_upscale(store, pictures))
    assert (done.state, done.deaths, len(router.upscales)) == (State.FAILED, 2, 2)


@pytest.mark.parametrize("away", [Overloaded(1.0), NotRunning("replica_lost", "model sd15 does not run at the moment")])
async def test_a_model_that_is_busy_or_does_not_run_is_waited_for(
    store: JobStore, pictures: Folder, make: Maker, router: MemoryRouter, away: HeliographError
):
    router.refusal = away
    async with running(store, make):
        job = await submit(store, pictures)
        await until(lambda: asyncio.sleep(0, router.left), lambda left: left >= 4)
        router.refusal = None
        done = await ended(store, job)
    assert (done.state, done.attempt, done.failures, done.deaths) == (State.SUCCEEDED, 1, 0, 0)


async def test_a_job_whose_model_stays_away_is_handed_back_and_keeps_its_place(
    store: JobStore, pictures: Folder, service: Service, router: MemoryRouter
):
    router.refusal = NotRunning("replica_lost", "model sd15 does not run at the moment")
    make = Maker(store, pictures, drawing(service), service.upscale, replace(PATIENCE, model_s=0.0))
    async with running(store, make):
        job = await submit(store, pictures)
        await until(lambda: store.get(job.id, None), lambda found: found.attempt > 4)
        router.refusal = None
        done = await ended(store, job)
    assert (done.state, done.failures, done.deaths) == (State.SUCCEEDED, 0, 0)
    assert "queued: released" in await states(store, job)


async def written(database: Database, job: Job, **values: Any) -> None:
    await database.write(lambda c: c.execute(update(jobs).where(jobs.c.id == job.id).values(values)))


@pytest.mark.parametrize("kind", ["generate", "upscale"])
async def test_a_request_of_another_version_is_handed_back_for_a_runner_that_can_read_it(
    store: JobStore, pictures: Folder, make: Maker, database: Database, kind: str
):
    job = await (submit if kind == "generate" else submit_upscale)(store, pictures)
    request = dict(job.request["request"]) | {"upscale": {"scale": 2.0, "depth": 1}}
    await written(database, job, request={**job.request, "request": request})
    async with running(store, make):
        await until(lambda: store.get(job.id, None), lambda found: found.attempt > 2)
        await written(database, job, request=job.request)  # the other runner would have read it like this
        done = await ended(store, job)
    assert (done.state, done.failures) == (State.SUCCEEDED, 0)


async def test_a_request_that_no_version_reads_fails_in_the_end(
    store: JobStore, pictures: Folder, make: Maker, database: Database
):
    job = await submit(store, pictures)
    strange = {**job.request, "request": {**job.request["request"], "aura": 1}}
    await written(database, job, attempt=READINGS - 2, request=strange)
    async with running(store, make):
        done = await ended(store, job)
    assert (done.state, done.attempt) == (State.FAILED, READINGS)
    assert done.error is not None
    assert "another version" in done.error.message


async def test_an_error_that_mends_itself_costs_an_attempt(
    store: JobStore, pictures: Folder, make: Maker, router: MemoryRouter
):
    router.failure = GenerationFailed("engine_fault", "the engine stumbled")
    async with running(store, make):
        job = await submit(store, pictures)
        await until(lambda: store.get(job.id, None), lambda found: found.failures > 0)
        router.failure = None
        done = await ended(store, job)
    assert done.state is State.SUCCEEDED
    assert done.attempt == done.failures + 1
    assert "queued: error" in await states(store, job)


@pytest.mark.parametrize(
    ("error", "code"),
    [(GenerationFailed("nan_latents"), "nan_latents"), (InvalidRequest("adapters", "no such"), "invalid_request")],
)
async def test_an_error_that_stays_fails_the_job_at_once(
    store: JobStore, pictures: Folder, make: Maker, router: MemoryRouter, error: Exception, code: str
):
    router.failure = error  # pyright: ignore[reportAttributeAccessIssue]
    async with running(store, make):
        done = await ended(store, await submit(store, pictures))
    assert (done.state, done.attempt) == (State.FAILED, 1)
    assert done.error is not None
    assert done.error.code == code


async def test_a_mistake_of_ours_fails_the_job_and_the_runner_lives(store: JobStore, pictures: Folder, make: Maker):
    async def mistaken(attempt: Any) -> dict[str, Any]:
        if attempt.job.request["request"]["seed"] == 13:
            raise KeyError("thirteen")
        return dict(await make(attempt))

    async with running(store, mistaken):
        unlucky = await submit(store, pictures, replace(DRAW, seed=13))
        assert (await ended(store, unlucky)).error.code == "internal_error"  # pyright: ignore[reportOptionalMemberAccess]
        assert (await ended(store, await submit(store, pictures))).state is State.SUCCEEDED


async def test_a_running_job_past_its_deadline_is_expired(
    store: JobStore, pictures: Folder, make: Maker, router: MemoryRouter
):
    router.failure = GenerationFailed("deadline", "the pictures were not finished in time")
    async with running(store, make):
        job = await submit(store, pictures, replace(DRAW, deadline_s=30.0))
        done = await ended(store, job)
    assert done.state is State.EXPIRED
    [request] = router.requests
    assert request.deadline_s is not None
    assert 29.0 < request.deadline_s <= 30.0


async def test_a_job_whose_deadline_no_engine_could_keep_any_more_is_expired(
    store: JobStore, pictures: Folder, make: Maker, router: MemoryRouter
):
    router.failure = DeadlineTooShort("deadline_s", "must be at least 70.0, not 30", 70.0)
    async with running(store, make):
        done = await ended(store, await submit(store, pictures, replace(DRAW, deadline_s=30.0)))
    assert done.state is State.EXPIRED


async def test_jobs_are_drawn_as_their_owners(store: JobStore, pictures: Folder, make: Maker, router: MemoryRouter):
    async with running(store, make):
        jobs = [await submit(store, pictures, owner=owner) for owner in ("ada", "bob")]
        for job in jobs:
            await ended(store, job)
    assert sorted(router.callers) == ["ada", "bob"]


async def test_without_a_deadline_of_its_own_a_job_that_takes_too_long_fails(
    store: JobStore, pictures: Folder, make: Maker, router: MemoryRouter
):
    router.failure = GenerationFailed("deadline", "the pictures were not finished in time")
    async with running(store, make):
        done = await ended(store, await submit(store, pictures))
    assert done.state is State.FAILED


async def test_no_more_jobs_run_at_once_than_may(store: JobStore, pictures: Folder, make: Maker, router: MemoryRouter):
    router.gate.clear()
    async with running(store, make, replace(PACE, at_once=2)):
        jobs = [await submit(store, pictures) for _ in range(5)]
        other = await submit(store, pictures, replace(DRAW, model="sdxl"))
        await until(lambda: asyncio.sleep(0, router.running), lambda running: len(running) == 3)
        await asyncio.sleep(0.2)
        assert [r.model for r in router.requests].count("sd15") == 2
        router.gate.set()
        assert {(await ended(store, job)).state for job in (*jobs, other)} == {State.SUCCEEDED}


async def test_two_runners_share_the_work_and_nothing_is_made_twice(
    store: JobStore, pictures: Folder, make: Maker, router: MemoryRouter
):
    async with running(store, make), running(store, make, name="runner-2"):
        jobs = [await submit(store, pictures, replace(DRAW, seed=seed)) for seed in range(20)]
        done = [await ended(store, job) for job in jobs]
    assert {(job.state, job.attempt) for job in done} == {(State.SUCCEEDED, 1)}
    assert sorted(request.seed for request in router.requests) == list(range(20))


async def test_a_picture_told_twice_is_one(store: JobStore, pictures: Folder):
    await submit(store, pictures)
    [claim] = await store.claim("runner-1", ["sd15"], 1, 30.0)
    for _ in range(2):
        await store.output(claim, {"index": 0, "key": "results/a/1-0"})
    assert len((await store.get(claim.id, None)).outputs) == 1


class Away(JobStore):
    """A database that goes away when it is told so."""

    away = False

    def __init__(self, database: Database):
        super().__init__(database)

        async def refuse(work: Any) -> Any:
            if self.away:
                raise Unavailable(1.0, "the database does not answer")
            return await database.write(work)

        self._database = SimpleNamespace(read=database.read, write=refuse)  # pyright: ignore[reportAttributeAccessIssue]


async def test_while_the_database_is_away_drawing_goes_on_and_the_result_is_written_later(
    database: Database, pictures: Folder, service: Service, router: MemoryRouter
):
    store = Away(database)
    router.gate.clear()
    async with running(store, Maker(store, pictures, drawing(service), service.upscale, PATIENCE)):
        job = await submit(store, pictures)
        await until(lambda: asyncio.sleep(0, router.running), bool)
        store.away = True
        router.gate.set()
        await asyncio.sleep(1.5 * PACE.lease_s)  # the lease runs out, and nobody can take the job
        store.away = False
        done = await ended(store, job)
    assert (done.state, done.attempt, done.deaths) == (State.SUCCEEDED, 1, 0)


class Deaf(JobStore):
    """The first claim that gets something happens, and its answer is lost."""

    lost: tuple[Claim, ...] = ()

    async def claim(self, *arguments: Any, **options: Any) -> tuple[Claim, ...]:
        claims = await super().claim(*arguments, **options)
        if claims and not self.lost:
            self.lost = claims
            raise Unavailable(1.0, "the database broke off during a commit")
        return claims


async def test_jobs_of_a_claim_whose_answer_was_lost_are_handed_back(database: Database, pictures: Folder, make: Maker):
    store = Deaf(database)
    queued = [await submit(store, pictures) for _ in range(3)]
    async with running(store, make):
        done = [await ended(store, job) for job in queued]
    assert store.lost
    assert {(job.state, job.deaths) for job in done} == {(State.SUCCEEDED, 0)}
    assert {"queued: released"} <= {*await states(store, done[0])}


async def test_a_full_store_is_asked_again_and_nothing_is_drawn_anew(
    store: JobStore, pictures: Folder, service: Service, router: MemoryRouter
):
    refusals = [StorageFull(), StorageFull()]

    class Full:
        async def put(self, key: str, data: bytes, content_type: str) -> Any:
            if refusals:
                raise refusals.pop()
            return await pictures.put(key, data, content_type)

        get, head, sign = pictures.get, pictures.head, pictures.sign

    make = Maker(store, Full(), drawing(service), service.upscale, PATIENCE)  # pyright: ignore[reportArgumentType]
    async with running(store, make):
        done = await ended(store, await submit(store, pictures))
    assert (done.state, done.attempt, len(router.requests)) == (State.SUCCEEDED, 1, 1)


async def test_what_a_job_owns_is_known_until_its_data_is_removed(store: JobStore, pictures: Folder, make: Maker):
    image = Picture(width=64, height=64, data=b"\7" * (3 * 64 * 64))
    async with running(store, make):
        done = await ended(store, await submit(store, pictures, replace(DRAW, image=image)))
    mine = {done.outputs[0]["key"], *canonical.keys_of(done.request["request"])}
    others = {"results/" + "0" * 32 + "/1-0", "inputs/" + "0" * 32 + "/0", f"results/{done.id}/9-0", "something/else"}
    assert await store.known(mine | others) == mine
    await store.prune(keep_s=-1.0, forget_s=1000.0)
    assert await store.known(mine) == frozenset()


def _png() -> bytes:
    return encode(np.full((64, 64, 3), 9, np.uint8), "png")
