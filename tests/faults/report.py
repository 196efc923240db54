"""What a run came to, as tables: faults by kind, jobs by end, recoveries, violations with the jobs' whole histories."""

from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime

from rich.console import Console, ConsoleRenderable
from rich.table import Table
from rich.text import Text

from tests.faults.checker import INVARIANTS, Violation
from tests.faults.log import AnyEvent
from tests.faults.recovery import percentile, recoveries
from tests.faults.story import Story


def show(console: Console, story: Story, violations: Sequence[Violation]) -> None:
    """Prints everything there is to say of a run."""
    for part in (_faults(story), _ends(story), _recoveries(story), _invariants(violations)):
        console.print(part)
    for violation in violations:
        for line in _told(story, violation):
            console.print(line, soft_wrap=True)


def _faults(story: Story) -> ConsoleRenderable:
    table = _table("Faults", "kind", "how often", "seconds in all")
    counts = Counter(fault.kind for fault in story.faults)
    for kind, count in sorted(counts.items()):
        seconds = sum(fault.until - fault.at for fault in story.faults if fault.kind == kind)
        table.add_row(kind, str(count), f"{seconds:.0f}")
    table.add_row("all", str(counts.total()), "")
    return table


def _ends(story: Story) -> ConsoleRenderable:
    table = _table("Jobs", "end", "how many", "attempts", "workers that died")
    ends = [(f"{job.state}: {job.error}" if job.error else str(job.state), job) for job in story.jobs.values()]
    for end in sorted({end for end, _ in ends}):
        jobs = [job for name, job in ends if name == end]
        table.add_row(end, str(len(jobs)), str(sum(j.attempt for j in jobs)), str(sum(j.deaths for j in jobs)))
    table.add_row("all", str(len(ends)), *(str(sum(getattr(j, n) for _, j in ends)) for n in ("attempt", "deaths")))
    return table


def _recoveries(story: Story) -> ConsoleRenderable:
    table = _table("Seconds until jobs ran again", "fault", "jobs", "p50", "p95", "most")
    for kind, seconds in recoveries(story).items():
        shares = (percentile(seconds, share) for share in (0.5, 0.95, 1.0))
        table.add_row(kind, str(len(seconds)), *(f"{value:.1f}" for value in shares))
    return table


def _invariants(violations: Sequence[Violation]) -> ConsoleRenderable:
    table = _table("Invariants", "", "", "violations")
    counts = Counter(violation.invariant for violation in violations)
    for name, invariant in INVARIANTS.items():
        table.add_row(name, invariant.__name__.replace("_", " "), str(counts[name]))
    return table


def _told(story: Story, violation: Violation) -> Iterator[Text]:
    """The violation, then everything about its job with the faults of that time, in order."""
    yield Text(f"\n{violation.invariant} job {violation.job_id}: {violation.what}", style="red")
    if violation.job_id is None:
        return
    events = story.history(violation.job_id)
    told = [(event.at, _line(event)) for event in events]
    if violation.job_id in story.jobs:
        told += [(change.at, f"  {change.kind} {change.data}") for change in story.jobs[violation.job_id].changes]
    first, last = min(at for at, _ in told), max(at for at, _ in told)
    told += [(fault.at, _line(fault)) for fault in story.faults if first <= fault.until and fault.at <= last]
    for at, line in sorted(told):
        yield Text(f"{datetime.fromtimestamp(at, UTC):%H:%M:%S.%f}"[:-3] + f" {line}")


def _line(event: AnyEvent) -> str:
    facts = event.model_dump(exclude={"at", "type", "job_id", "changes"}, exclude_defaults=True, mode="json")
    return f"{event.type} {facts}"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for place, column in enumerate(columns):
        table.add_column(column, justify="right" if place and column else "left")
    return table
