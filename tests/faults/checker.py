"""The invariants, each a pure function from a log's story to what breaks it.

The manner is Jepsen's: nobody looks on while faults are injected; the record of what clients saw, and how everything
stood at the end, is judged afterwards.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise

from app.jobs.states import HELD, TERMINAL, TRANSITIONS, State
from tests.faults.log import Change, EndJob
from tests.faults.recovery import recoveries_of
from tests.faults.story import Story

RUNS_AGAIN_S = 15.0
CALM_S = 30.0  # without another fault before one whose recovery is timed
TURNS = 16  # of another owner while one waits: a dead runner's jobs go before what waits, and there may be as many
DIFFERENCE = 1  # of 255: what a picture's neighbours may do to it in float32 on a CPU

Fault = tuple[str | None, str]  # the job, and what is wrong with it
Invariant = Callable[[Story], Iterator[Fault]]


@dataclass(frozen=True, kw_only=True)
class Violation:
    """An invariant that does not hold, and the job that shows it."""

    invariant: str
    job_id: str | None
    what: str


def check(story: Story) -> list[Violation]:
    """Every violation; none where all went well."""
    return [
        Violation(invariant=name, job_id=job_id, what=what)
        for name, invariant in INVARIANTS.items()
        for job_id, what in invariant(story)
    ]


def none_is_lost(story: Story) -> Iterator[Fault]:
    """I1: a job whose submission was answered with its id has come to an end."""
    for tries in story.submitted.values():
        for job_id in sorted({attempt.job_id for attempt in tries if attempt.job_id}):
            job = story.jobs.get(job_id)
            if job is None:
                yield job_id, "was accepted and is not in the database"
            elif job.state not in TERMINAL:
                yield job_id, f"was accepted and is still {job.state}"
    for job_id, seen in story.seen.items():
        if any(sight.status == "missing" for sight in seen):
            yield job_id, "was accepted, and its owner was told that there is no such job"


def ends_are_final(story: Story) -> Iterator[Fault]:
    """I2: one end, nothing after it, for the database as for whoever looks."""
    for job_id, job in story.jobs.items():
        if [change.seq for change in job.changes] != list(range(1, len(job.changes) + 1)):
            yield job_id, f"its events are numbered {[change.seq for change in job.changes]}"
        yield from ((job_id, what) for what in _wrong_ways(job))
        ends = [change for change in job.changes if change.state in TERMINAL]
        if job.state in TERMINAL and [end.state for end in ends] != [job.state]:
            yield job_id, f"is {job.state}, and its events tell of the ends {[str(end.state) for end in ends]}"
        if ends and job.changes[-1] != ends[0]:
            yield job_id, f"something happened after it was {ends[0].state}"
    for job_id, seen in story.seen.items():
        statuses = [sight.status for sight in seen if sight.status != "missing"]
        first = next((i for i, status in enumerate(statuses) if status in TERMINAL), len(statuses))
        if len(set(statuses[first:])) > 1:
            yield job_id, f"was seen {', then '.join(dict.fromkeys(statuses[first:]))}"
        elif statuses[first:] and job_id in story.jobs and story.jobs[job_id].state != statuses[first]:
            yield job_id, f"was seen {statuses[first]} and ended {story.jobs[job_id].state}"


def _wrong_ways(job: EndJob) -> Iterator[str]:
    states = [change.state for change in job.changes if change.state is not None]
    if states[:1] != [State.QUEUED]:
        yield "its first event does not tell that it was queued"
    for before, after in pairwise(states):
        if (before, after) not in TRANSITIONS:
            yield f"went from {before} to {after}"


def results_are_whole_and_one(story: Story) -> Iterator[Fault]:
    """I3: whoever sees a result sees all of it, and always the same."""
    for job_id, job in story.jobs.items():
        sights = [sight for sight in story.seen.get(job_id, ()) if sight.result]
        results = {sight.pictures for sight in sights}
        if pictures := sorted(story.pictures.get(job_id, ()), key=lambda picture: picture.index):
            results.add(tuple(picture.recorded for picture in pictures))
        if len(results) > 1:
            yield job_id, f"has had {len(results)} different results"
        samples = story.samples(job)
        if samples is not None and any(len(result) != samples for result in results):
            yield job_id, f"has a result of {sorted(map(len, results))} pictures; {samples} were asked for"
        if any(sight.status != State.SUCCEEDED for sight in sights):
            yield job_id, "showed a result before it had succeeded"


def a_key_makes_one_job(story: Story) -> Iterator[Fault]:
    """I4: the same submission twice is one job, and says so; and every job is somebody's submission."""
    made = defaultdict(list)
    for job in story.jobs.values():
        made[job.seed].append(job.job_id)
    for number, tries in story.submitted.items():
        answered = [attempt for attempt in tries if attempt.job_id]
        jobs = {attempt.job_id for attempt in answered} | set(made.pop(tries[0].seed, []))
        if len(jobs) > 1:
            yield min(map(str, jobs)), f"submission {number} made {len(jobs)} jobs: {', '.join(sorted(map(str, jobs)))}"
        if any(not attempt.replayed for attempt in answered[1:]):
            yield answered[0].job_id, f"submission {number} was answered again without being marked as a replay"
    for jobs in made.values():
        for job_id in jobs:
            yield job_id, "nobody submitted it"


def pictures_are_there(story: Story) -> Iterator[Fault]:
    """I5: every picture of a job that succeeded comes, decodes, and has the hash that was told."""
    for job_id, job in story.jobs.items():
        pictures = story.pictures.get(job_id, ())
        if job.state is State.SUCCEEDED and not pictures:
            yield job_id, "succeeded without a picture"
        for picture in pictures:
            if picture.found is None:
                yield job_id, f"picture {picture.index} cannot be had"
            elif picture.found != picture.recorded:
                yield job_id, f"picture {picture.index} is another one than was told"
            elif not picture.decodes:
                yield job_id, f"picture {picture.index} is broken"


def the_cancelled_stay_without_result(story: Story) -> Iterator[Fault]:
    """I6: once `cancelled` was said, no result comes."""
    for job_id, job in story.jobs.items():
        seen = story.seen.get(job_id, ())
        said = next((i for i, sight in enumerate(seen) if sight.status == State.CANCELLED), None)
        if said is not None and any(sight.result for sight in seen[said:]):
            yield job_id, "was said to be cancelled, and then had a result"
        if (said is not None or job.state is State.CANCELLED) and job.result:
            yield job_id, "was cancelled and has a result"


def every_end_is_told_once(story: Story) -> Iterator[Fault]:
    """I7: each end has one webhook, delivered or a dead letter, with one id however often it was sent."""
    for job_id, job in story.jobs.items():
        rows = [row for row in story.deliveries.get(job_id, ()) if row.event == "completed"]
        wanted = int(job.webhook and job.state in TERMINAL)
        if len(rows) != wanted:
            yield job_id, f"has {len(rows)} webhooks that tell of its end; it should have {wanted}"
        for row in story.deliveries.get(job_id, ()):
            heard = [hook for hook in story.hooks.get(job_id, ()) if hook.webhook_id == row.webhook_id]
            if row.state == "pending":
                yield job_id, f"webhook {row.webhook_id} is neither delivered nor a dead letter"
            elif row.state == "delivered" and not any(200 <= hook.answered < 300 for hook in heard):
                yield job_id, f"webhook {row.webhook_id} counts as delivered, and nobody took it"
        yield from ((job_id, what) for what in _false_hooks(story, job))


def _false_hooks(story: Story, job: EndJob) -> Iterator[str]:
    written = {row.webhook_id: row.event for row in story.deliveries.get(job.job_id, ())}
    for hook in story.hooks.get(job.job_id, ()):
        if not hook.verified:
            yield f"webhook {hook.webhook_id} has a wrong signature"
        if written.get(hook.webhook_id) != hook.event:
            yield f"webhook {hook.webhook_id} ({hook.event}) is not in the outbox"
        if hook.event == "completed" and hook.status != job.state:
            yield f"webhook {hook.webhook_id} tells that it {hook.status}; it {job.state}"


def owners_take_turns(story: Story) -> Iterator[Fault]:
    """I8: while a job of one owner waits, no other owner is served more than TURNS times before one of its own is.

    Within a model and a priority. A job that a worker has died with may have to wait for another such one, and counts
    as nobody's; and an owner with a limit may wait for their own jobs.
    """
    yield from _too_many_at_once(story)
    lanes: defaultdict[tuple[str, int], list[EndJob]] = defaultdict(list)
    for job in story.jobs.values():
        if not job.deaths:
            lanes[job.model, job.priority].append(job)
    for jobs in lanes.values():
        for owner in sorted({job.owner for job in jobs} - story.at_once.keys()):
            yield from _starved(owner, jobs)


def _too_many_at_once(story: Story) -> Iterator[Fault]:
    for owner, limit in story.at_once.items():
        mine = [(c.at, c.state in HELD, c.seq, job) for job in story.jobs.values() if job.owner == owner
                for c in job.changes if c.state is not None]  # fmt: skip
        running: set[str] = set()
        for _, held, _, job in sorted(mine, key=lambda move: move[:3]):
            (running.add if held else running.discard)(job.job_id)
            if len(running) > limit:
                yield job.job_id, f"ran as the {len(running)}th of an owner who may have {limit} at a time"


def _starved(owner: str, jobs: list[EndJob]) -> Iterator[Fault]:
    """Of what happens in the same transaction, the owner's own counts first."""
    moves = [(move.at, job.owner != owner, move.seq, job, move) for job in jobs for move in job.changes if move.state]
    waiting: set[str] = set()
    served: Counter[str] = Counter()
    for *_, job, move in sorted(moves, key=lambda entry: entry[:3]):
        if job.owner != owner:
            if waiting and move.state is State.RUNNING:
                served[job.owner] += 1
                if served[job.owner] == TURNS + 1:
                    yield min(waiting), f"waited while another owner was served more than {TURNS} times"
            continue
        if move.state is State.RUNNING or not waiting:
            served.clear()
        (waiting.add if move.state is State.QUEUED else waiting.discard)(job.job_id)


def work_counts_once(story: Story) -> Iterator[Fault]:
    """I9: each attempt is claimed once, each of its pictures told once, and the last attempt is the one that counts."""
    for job_id, job in story.jobs.items():
        claimed = [change.data["attempt"] for change in job.changes if change.state is State.RUNNING]
        if claimed != list(range(1, len(claimed) + 1)):
            yield job_id, f"its attempts are numbered {claimed}"
        if job.changes and (told := job.changes[-1].data.get("attempt", job.attempt)) != len(claimed):
            yield job_id, f"attempt {told} ended it after {len(claimed)} claims"
        for attempt, outputs in _outputs(job).items():
            if len(set(outputs)) < len(outputs):
                yield job_id, f"attempt {attempt} told of a picture twice: {outputs}"
    for job_id, seen in story.seen.items():
        attempts = [sight.attempt for sight in seen if sight.status != "missing"]
        if attempts != sorted(attempts):
            yield job_id, f"its attempts were seen as {attempts}"


def _outputs(job: EndJob) -> Mapping[int, list[int]]:
    """The indexes of the pictures that each attempt told of."""
    attempt, outputs = 0, defaultdict(list)
    for change in job.changes:
        attempt += change.state is State.RUNNING
        if change.kind == "output":
            outputs[attempt].append(_index(change))
    return outputs


def _index(change: Change) -> int:
    """The picture's own index where the output says it, else its place among those that were told."""
    output = change.data.get("output")
    return output.get("index", change.data["index"]) if isinstance(output, dict) else change.data["index"]


def pictures_do_not_feel_the_faults(story: Story) -> Iterator[Fault]:
    """I10: what a seed draws among faults and neighbours, it draws alone."""
    for job_id in story.jobs:
        for picture in story.pictures.get(job_id, ()):
            if picture.difference is None:
                yield job_id, f"picture {picture.index} could not be compared"
            elif picture.difference > DIFFERENCE:
                yield job_id, f"picture {picture.index} is {picture.difference}/255 from the undisturbed one"


def only_faults_make_failures(story: Story) -> Iterator[Fault]:
    """I11: a job fails only as poisoned, after two faults in its life, and expires only where it had a deadline."""
    for job_id, job in story.jobs.items():
        if job.state is State.EXPIRED and not story.has_deadline(job):
            yield job_id, "expired without a deadline"
        if job.state is not State.FAILED:
            continue
        begun, over = job.changes[0].at, job.changes[-1].at
        met = [fault for fault in story.faults if fault.at <= over and begun <= fault.until]
        if job.error != "poisoned" or len(met) < 2:
            yield job_id, f"failed as {job.error}; {len(met)} faults met it"


def jobs_run_again_soon(story: Story) -> Iterator[Fault]:
    """I12: a job whose runner or replica is killed runs again within RUNS_AGAIN_S, where no other fault is near."""
    for job in story.jobs.values():
        for fault, seconds in recoveries_of(job, story.faults):
            others = [other for other in story.faults if other is not fault]
            near = [o for o in others if o.at <= fault.at + seconds and fault.at - CALM_S <= o.until]
            if fault.kind in ("model", "runner") and not near and seconds > RUNS_AGAIN_S:
                yield job.job_id, f"ran again {seconds:.1f} s after its {fault.kind} was killed"


INVARIANTS: Mapping[str, Invariant] = {
    "I1": none_is_lost,
    "I2": ends_are_final,
    "I3": results_are_whole_and_one,
    "I4": a_key_makes_one_job,
    "I5": pictures_are_there,
    "I6": the_cancelled_stay_without_result,
    "I7": every_end_is_told_once,
    "I8": owners_take_turns,
    "I9": work_counts_once,
    "I10": pictures_do_not_feel_the_faults,
    "I11": only_faults_make_failures,
    "I12": jobs_run_again_soon,
}
