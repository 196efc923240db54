"""A log, put in order: everything about a job in one place."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from tests.faults.log import AnyEvent, EndDelivery, EndJob, EndPicture, Hook, Injected, Owner, Seen, Submitted

T = TypeVar("T", bound=AnyEvent)


@dataclass(frozen=True, kw_only=True)
class Story:
    """What a log tells. Events stand in the order in which they were written."""

    events: Sequence[AnyEvent]
    submitted: Mapping[int, Sequence[Submitted]]  # by the planned job's number
    seen: Mapping[str, Sequence[Seen]]
    hooks: Mapping[str, Sequence[Hook]]
    jobs: Mapping[str, EndJob]
    deliveries: Mapping[str, Sequence[EndDelivery]]
    pictures: Mapping[str, Sequence[EndPicture]]
    faults: Sequence[Injected]
    at_once: Mapping[str, int]  # how many jobs may run at a time, by the owners that have such a limit

    @classmethod
    def of(cls, events: Sequence[AnyEvent]) -> "Story":
        submitted = defaultdict(list)
        for event in events:
            if isinstance(event, Submitted):
                submitted[event.number].append(event)
        return cls(
            events=events,
            submitted=submitted,
            seen=_by_job(events, Seen),
            hooks=_by_job(events, Hook),
            jobs={event.job_id: event for event in events if isinstance(event, EndJob)},
            deliveries=_by_job(events, EndDelivery),
            pictures=_by_job(events, EndPicture),
            faults=[event for event in events if isinstance(event, Injected)],
            at_once={event.id: event.at_once for event in events if isinstance(event, Owner) and event.at_once},
        )

    def history(self, job_id: str) -> list[AnyEvent]:
        """Every event about a job."""
        return [event for event in self.events if getattr(event, "job_id", None) == job_id]

    def samples(self, job: EndJob) -> int | None:
        """How many pictures were asked for; None for a job that nobody submitted."""
        return None if (asked := self._asked(job)) is None else asked.samples

    def has_deadline(self, job: EndJob) -> bool:
        """Whether its caller set a time for it."""
        return (asked := self._asked(job)) is not None and asked.deadline

    def _asked(self, job: EndJob) -> Submitted | None:
        return next((tries[0] for tries in self.submitted.values() if tries[0].seed == job.seed), None)


def _by_job(events: Sequence[AnyEvent], kind: type[T]) -> Mapping[str, list[T]]:
    """Those of one kind; a job without any has an empty list."""
    found: defaultdict[str, list[T]] = defaultdict(list)
    for event in events:
        if isinstance(event, kind):
            found[getattr(event, "job_id")].append(event)  # noqa: B009
    return found
