"""How long a job that lost its runner or its model's replica took until it ran again."""

from collections.abc import Mapping, Sequence

from app.jobs.states import State
from tests.faults.log import EndJob, FaultKind, Injected
from tests.faults.story import Story

# What may have put a job back into the queue, by the reason that its event gives. One handed back had no fault.
CAUSES: Mapping[str, tuple[FaultKind, ...]] = {
    "worker_died": ("model",),
    "lease_lost": ("runner", "database", "disk"),
    "error": ("model", "controller", "store", "database", "disk"),
}


def recoveries(story: Story) -> Mapping[FaultKind, Sequence[float]]:
    """Seconds from a fault to the job's next attempt, by the fault's kind, the shortest first.

    A job that goes back to the queue is put down to the last fault that can have done that and began while the attempt
    ran; without one it is not counted.
    """
    found: dict[FaultKind, list[float]] = {}
    for job in story.jobs.values():
        for fault, seconds in recoveries_of(job, story.faults):
            found.setdefault(fault.kind, []).append(seconds)
    return {kind: sorted(seconds) for kind, seconds in sorted(found.items())}


def recoveries_of(job: EndJob, faults: Sequence[Injected]) -> list[tuple[Injected, float]]:
    """The faults that put this job back into the queue, and the seconds until its next attempt began."""
    moves = [change for change in job.changes if change.state is not None]
    found = []
    for ran, back, again in zip(moves, moves[1:], moves[2:], strict=False):
        if [ran.state, back.state, again.state] != [State.RUNNING, State.QUEUED, State.RUNNING]:
            continue
        causes = CAUSES.get(back.data["reason"], ())
        during = [fault for fault in faults if fault.kind in causes and ran.at <= fault.at <= back.at]
        if during:
            fault = max(during, key=lambda fault: fault.at)
            found.append((fault, again.at - fault.at))
    return found


def percentile(sorted_values: Sequence[float], share: float) -> float:
    """The smallest value that at least that share of all do not exceed."""
    return sorted_values[max(0, -int(-len(sorted_values) * share // 1) - 1)]
