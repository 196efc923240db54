"""For each invariant, a log that breaks it and no other; and what the harness makes of a log that breaks none."""

import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from app.jobs.states import State
from tests.faults import checker, report
from tests.faults.log import (
    AnyEvent,
    Change,
    EndDelivery,
    EndJob,
    EndPicture,
    Event,
    Hook,
    Injected,
    Log,
    Owner,
    Seen,
    Submitted,
    read,
)
from tests.faults.plan import planned
from tests.faults.recovery import percentile, recoveries
from tests.faults.story import Story

JOB, OTHER = "a" * 32, "b" * 32
SHA = "5" * 64


def state(seq: int, state: State, attempt: int, at: float | None = None, reason: str = "") -> Change:
    data = {"state": state, "attempt": attempt, "reason": reason}
    return Change(seq=seq, at=seq if at is None else at, kind="state", data=data)


def output(seq: int, index: int = 0) -> Change:
    return Change(seq=seq, at=seq, kind="output", data={"index": index, "output": {"index": index}})


@dataclass(frozen=True, kw_only=True)
class Tale:
    """A log in parts, so that one of them can be another in a test."""

    submitted: Submitted
    sights: tuple[Seen, ...]
    job: EndJob | None
    delivery: EndDelivery | None
    hooks: tuple[Hook, ...]
    picture: EndPicture | None
    again: Submitted | None = None
    more: tuple[AnyEvent, ...] = ()

    def violations(self) -> list[checker.Violation]:
        """What the checker finds in it."""
        return checker.check(Story.of(self.events))

    @property
    def events(self) -> Sequence[AnyEvent]:
        """The log."""
        maybe = (self.submitted, self.again, *self.sights, *self.hooks, self.job, self.delivery, self.picture)
        return [*(event for event in maybe if event is not None), *self.more]


def but(event: Any, **changes: Any) -> Any:
    """The same event with other values."""
    return event.model_copy(update=changes)


SUBMITTED = Submitted(number=0, owner="ada", seed=7, samples=1, status=202, job_id=JOB)
SIGHTS = (
    Seen(job_id=JOB, status=State.RUNNING, attempt=2),
    Seen(job_id=JOB, status=State.SUCCEEDED, attempt=2, pictures=(SHA,), result=True),
)
CHANGES = (
    state(1, State.QUEUED, 0),
    state(2, State.RUNNING, 1),
    state(3, State.QUEUED, 1, reason="lease_lost"),
    state(4, State.RUNNING, 2),
    output(5),
    state(6, State.SUCCEEDED, 2),
)
ENDED = EndJob(
    job_id=JOB,
    owner="ada",
    model="sd15",
    priority=0,
    state=State.SUCCEEDED,
    seed=7,
    attempt=2,
    deaths=1,
    error=None,
    webhook=True,
    result=True,
    changes=CHANGES,
)
DELIVERY = EndDelivery(webhook_id="msg_1", job_id=JOB, event="completed", state="delivered", attempts=2)
HOOKS = tuple(
    Hook(webhook_id="msg_1", job_id=JOB, event="completed", status="succeeded", answered=status, verified=True)
    for status in (500, 204)
)
PICTURE = EndPicture(job_id=JOB, index=0, recorded=SHA, found=SHA, decodes=True, difference=1)
# All went well after a death, and the receiver took the webhook the second time.
WELL = Tale(submitted=SUBMITTED, sights=SIGHTS, job=ENDED, delivery=DELIVERY, hooks=HOOKS, picture=PICTURE)
FAULT = Injected(at=2.5, until=2.5, kind="runner", target="process 1")


def ended(*ends: State, **changes: Any) -> EndJob:
    """The job, whose second attempt went another way, without a result."""
    moves = [state(5 + i, end, 2) for i, end in enumerate(ends)]
    return but(ENDED, state=ends[-1], changes=(*CHANGES[:4], *moves), **{"result": False} | changes)


def claimed(owner: str, number: int, from_s: float, at: float) -> tuple[AnyEvent, ...]:
    """A job of that owner which waited and was then served, and its submission."""
    id = f"{number:032x}"
    moves = (
        *(state(1, State.QUEUED, 0, from_s), state(2, State.RUNNING, 1, at)),
        *(state(3, State.CANCELLING, 1, at + 1), state(4, State.CANCELLED, 1, at + 1)),
    )
    values = {"job_id": id, "owner": owner, "seed": number, "attempt": 1, "deaths": 0, "webhook": False}
    job = but(ENDED, state=State.CANCELLED, result=False, changes=moves, **values)
    return Submitted(number=number, owner=owner, seed=number, samples=1, status=202, job_id=id), job


def turns(ada_waits_s: float) -> tuple[AnyEvent, ...]:
    """Bob is served once a second while ada waits so long."""
    bobs = [event for i in range(30) for event in claimed("bob", 100 + i, 50.0, 101.0 + i)]
    return (*claimed("ada", 99, 100.0, 100.0 + ada_waits_s), *bobs)


def expired() -> tuple[Change, ...]:
    return (*CHANGES[:4], state(5, State.EXPIRED, 2))


def later(seconds: float) -> tuple[Change, ...]:
    """The same, but that the second attempt began so much later."""
    return (*CHANGES[:3], *(but(change, at=change.at + seconds) for change in CHANGES[3:]))


# Failed as poisoned: well, where two faults met it.
FAILED = replace(WELL, job=ended(State.FAILED, error="poisoned"), sights=(), delivery=None, hooks=(), picture=None)
FAILED = replace(FAILED, job=but(FAILED.job, webhook=False))

BROKEN = {
    "I1: it is not there": ("I1", replace(WELL, job=None, delivery=None, hooks=(), picture=None, sights=())),
    "I1: it still runs": (
        "I1",
        replace(
            WELL,
            job=but(ENDED, state=State.RUNNING, result=False, changes=CHANGES[:4]),
            sights=SIGHTS[:1],
            delivery=None,
            hooks=(),
            picture=None,
        ),
    ),
    "I1: its owner is told there is none": ("I1", replace(WELL, more=(Seen(job_id=JOB, status="missing"),))),
    "I2: two ends": (
        "I2",
        replace(WELL, job=but(ENDED, changes=(*CHANGES, state(7, State.SUCCEEDED, 2)))),
    ),
    "I2: an event is missing": (
        "I2",
        replace(WELL, job=but(ENDED, changes=(*CHANGES[:4], but(CHANGES[5], seq=6)))),
    ),
    "I2: a way that there is none": (
        "I2",
        replace(WELL, job=but(ENDED, attempt=0, changes=(state(1, State.QUEUED, 0), state(2, State.SUCCEEDED, 0)))),
    ),
    "I2: seen at another end": ("I2", replace(WELL, sights=(Seen(job_id=JOB, status=State.FAILED, attempt=2),))),
    "I3: another result": ("I3", replace(WELL, sights=(*SIGHTS, but(SIGHTS[1], pictures=("6" * 64,))))),
    "I3: half a result": ("I3", replace(WELL, submitted=but(SUBMITTED, samples=2))),
    "I3: a result too early": (
        "I3",
        replace(WELL, sights=(but(SIGHTS[0], result=True, pictures=(SHA,)), SIGHTS[1])),
    ),
    "I4: another job for the same key": (
        "I4",
        replace(WELL, more=(ended(State.CANCELLING, State.CANCELLED, job_id=OTHER, webhook=False),)),
    ),
    "I4: a replay that is not marked": ("I4", replace(WELL, again=SUBMITTED)),
    "I4: nobody's job": ("I4", replace(WELL, more=claimed("ada", 5, 1.0, 2.0)[1:])),
    "I5: none was fetched": ("I5", replace(WELL, picture=None)),
    "I5: no picture": ("I5", replace(WELL, picture=but(PICTURE, found=None))),
    "I5: another picture": ("I5", replace(WELL, picture=but(PICTURE, found="6" * 64))),
    "I5: a broken picture": ("I5", replace(WELL, picture=but(PICTURE, decodes=False))),
    "I6: cancelled with a result": (
        "I6",
        replace(
            WELL,
            job=ended(State.CANCELLING, State.CANCELLED, result=True),
            sights=(Seen(job_id=JOB, status=State.CANCELLED, attempt=2),),
            hooks=tuple(but(hook, status="cancelled") for hook in HOOKS),
            picture=None,
        ),
    ),
    "I7: no webhook": ("I7", replace(WELL, delivery=None, hooks=())),
    "I7: two webhooks": (
        "I7",
        replace(WELL, more=(EndDelivery(webhook_id="msg_2", job_id=JOB, event="completed", state="dead", attempts=1),)),
    ),
    "I7: a webhook nobody sent": ("I7", replace(WELL, delivery=but(DELIVERY, state="pending"))),
    "I7: a webhook nobody took": ("I7", replace(WELL, hooks=HOOKS[:1])),
    "I7: another id": ("I7", replace(WELL, hooks=(*HOOKS, but(HOOKS[0], webhook_id="msg_2")))),
    "I7: a wrong signature": ("I7", replace(WELL, hooks=(*HOOKS, but(HOOKS[0], verified=False)))),
    "I7: a webhook that lies": ("I7", replace(WELL, hooks=(*HOOKS, but(HOOKS[0], status="failed")))),
    "I8: others are served again and again": ("I8", replace(WELL, more=turns(ada_waits_s=checker.TURNS + 1.5))),
    "I8: more at a time than allowed": (
        "I8",
        replace(WELL, more=(Owner(id="bob", at_once=2), *(e for n in (1, 2, 3) for e in claimed("bob", n, 1.0, 2.0)))),
    ),
    "I9: an attempt twice": (
        "I9",
        replace(WELL, job=but(ENDED, changes=(*CHANGES[:3], state(4, State.RUNNING, 1), *CHANGES[4:]))),
    ),
    "I9: a picture twice": (
        "I9",
        replace(WELL, job=but(ENDED, changes=(*CHANGES[:5], output(6), state(7, State.SUCCEEDED, 2)))),
    ),
    "I9: an old attempt ends it": (
        "I9",
        replace(WELL, job=but(ENDED, changes=(*CHANGES[:5], state(6, State.SUCCEEDED, 1)))),
    ),
    "I9: seen at an earlier attempt again": (
        "I9",
        replace(WELL, sights=(SIGHTS[0], but(SIGHTS[0], attempt=1), SIGHTS[1])),
    ),
    "I10: another picture than alone": ("I10", replace(WELL, picture=but(PICTURE, difference=2))),
    "I10: not compared": ("I10", replace(WELL, picture=but(PICTURE, difference=None))),
    "I11: a failure without faults": ("I11", replace(FAILED, more=(FAULT,))),
    "I11: a failure that is the server's": (
        "I11",
        replace(FAILED, job=but(FAILED.job, error="engine_fault"), more=(FAULT, FAULT)),
    ),
    "I11: expired without a deadline": (
        "I11",
        replace(FAILED, job=but(FAILED.job, state=State.EXPIRED, error=None, changes=expired())),
    ),
    "I12: too late": ("I12", replace(WELL, job=but(ENDED, changes=later(20.0)), more=(FAULT,))),
}


def test_a_log_in_which_all_went_well_has_no_violations():
    assert WELL.violations() == []


def test_a_poisoned_job_and_a_late_one_among_faults_are_well():
    assert replace(FAILED, more=(FAULT, FAULT)).violations() == []
    near = but(FAULT, kind="controller", at=3.0, until=3.0)
    assert replace(WELL, job=but(ENDED, changes=later(20.0)), more=(FAULT, near)).violations() == []


def test_a_replay_a_dead_letter_and_a_turn_that_is_late_are_well():
    again = but(SUBMITTED, replayed=True)
    dead = but(DELIVERY, state="dead")
    assert replace(WELL, again=again, delivery=dead, hooks=(), more=turns(checker.TURNS - 0.5)).violations() == []


@pytest.mark.parametrize("name", BROKEN)
def test_the_checker_finds(name: str):
    invariant, tale = BROKEN[name]
    assert {violation.invariant for violation in tale.violations()} == {invariant}, tale.violations()


def test_each_invariant_has_a_log_that_breaks_it():
    assert {invariant for invariant, _ in BROKEN.values()} == set(checker.INVARIANTS)


def test_a_log_is_read_as_it_was_written(tmp_path: Path):
    log = Log(tmp_path / "events.jsonl")
    events = [Owner(id="ada", at_once=None), *WELL.events, FAULT]
    for event in events:
        log.write(event)
    log.close()
    assert read(tmp_path / "events.jsonl") == events
    kinds = {kind.model_fields["type"].default for kind in Event.__subclasses__()}
    assert {event.type for event in read(tmp_path / "events.jsonl")} == kinds


def test_a_recovery_lasts_from_the_fault_to_the_next_attempt():
    gateway = but(FAULT, kind="gateway", at=2.8)  # no job depends on one
    assert recoveries(Story.of([*WELL.events, FAULT, gateway])) == {"runner": [1.5]}
    assert recoveries(Story.of([*WELL.events, but(FAULT, at=4.5)])) == {}


def test_percentiles_are_values_that_were_measured():
    assert [percentile([1.0, 2.0, 3.0, 4.0], share) for share in (0.25, 0.5, 0.95, 1.0)] == [1.0, 2.0, 4.0, 4.0]
    assert percentile([7.0], 0.5) == 7.0


def test_a_plan_follows_from_its_seed():
    arguments = {
        "jobs": 50,
        "faults": 20,
        "kinds": ("model", "database"),
        "every_s": 5.0,
        "outage_s": 9.0,
        "rest_s": 4.0,
    }
    plan = planned(1, **arguments)
    assert plan == planned(1, **arguments)
    assert plan != planned(2, **arguments)
    assert len({job.seed for job in plan.jobs}) == 50
    assert [fault.kind for fault in plan.faults].count("database") == 10
    outages = [(fault.at_s, fault.at_s + fault.lasts_s) for fault in plan.faults if fault.kind == "database"]
    assert all(end + 4.0 <= begin for (_, end), (begin, _) in pairwise(outages))


def test_the_report_tells_a_violation_with_the_whole_history_of_its_job():
    story = Story.of([*replace(WELL, hooks=HOOKS[:1]).events, FAULT])
    written = io.StringIO()
    report.show(Console(file=written, width=200), story, checker.check(story))
    told = written.getvalue()
    assert f"I7 job {JOB}: webhook msg_1 counts as delivered, and nobody took it" in told
    history = told[told.index("I7 job") :]
    words = ("submitted", "seen", "hook", "injected", "lease_lost", "'state': 'succeeded'", "end_delivery")
    assert all(word in history for word in words)
