"""What can become of a job, written once: every state, and every way from one to another with its reason."""

from collections.abc import Mapping
from enum import StrEnum


class State(StrEnum):
    """Where a job stands. The last four are terminal: nothing follows them."""

    QUEUED = "queued"  # accepted, and waiting for a runner
    RUNNING = "running"  # a runner has claimed it and holds its lease
    CANCELLING = "cancelling"  # a runner holds it and is to stop
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"


TERMINAL = frozenset({State.SUCCEEDED, State.FAILED, State.CANCELLED, State.EXPIRED})
HELD = frozenset({State.RUNNING, State.CANCELLING})  # those a runner holds a lease of

TRANSITIONS: Mapping[tuple[State, State], str] = {
    (State.QUEUED, State.RUNNING): "A runner claimed it: one attempt more.",
    (State.QUEUED, State.CANCELLED): "Its owner cancelled it before it cost a step.",
    (State.QUEUED, State.EXPIRED): "It could no longer be finished by its deadline, so it never cost a step.",
    (State.RUNNING, State.SUCCEEDED): "Its runner brought the result.",
    (State.RUNNING, State.FAILED): "It met an error that another attempt would not mend, or one too many.",
    (State.RUNNING, State.QUEUED): "Its runner handed it back, wants another attempt, or let the lease run out.",
    (State.RUNNING, State.CANCELLING): "Its owner cancelled it; the runner hears of it at its next heartbeat.",
    (State.RUNNING, State.EXPIRED): "Its deadline passed before the result came.",
    (State.CANCELLING, State.CANCELLED): "Its runner stopped it, handed it back, or is gone.",
    (State.CANCELLING, State.SUCCEEDED): "It was finished before the runner heard that it should stop.",
    (State.CANCELLING, State.FAILED): "It failed before the runner heard that it should stop.",
}


def check_transition(before: State, after: State) -> None:
    """Raises ValueError for a way that is not in the table: a mistake of the program, never of a caller."""
    if (before, after) not in TRANSITIONS:
        raise ValueError(f"a job cannot go from {before} to {after}")
