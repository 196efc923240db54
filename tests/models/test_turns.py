"""Fair turns, in simulation: real turns over made-up pictures, a clock that forwards move on, no torch."""

import random
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import pytest

from models.batcher import Batcher
from models.pace import Pace
from models.turns import JOINING

SMALL, LARGE = (4, 16, 16), (4, 24, 24)
ROW_COUNTS = (1, 2, 4, 8, 16, 24)
CAP = 24
# Of the shape of the embedded sd15 on two cores: a forward of one picture, two rows, takes 32 ms, of twelve 127 ms.
PROCESSOR = {rows: 0.0234 + 0.0043 * rows for rows in ROW_COUNTS}
GPU = {rows: max(0.03, 0.03 * rows / 16) for rows in ROW_COUNTS}
STEPS = 20


def pace(seconds: dict[int, float]) -> Pace:
    known = Pace()
    area = SMALL[1] * SMALL[2]
    known.learn({rows * area: s for rows, s in seconds.items()}, usual=2 * area, full=CAP * area)
    return known


@dataclass(eq=False)
class Picture:
    key: str
    at: float = 0.0
    steps: int = STEPS
    rows: int = 2
    shape: tuple[int, int, int] = SMALL
    batch: bool = False
    begun: bool = False
    deep_cache: int = 1
    done: int = field(default=0, init=False)
    finished: float = field(default=0.0, init=False)

    @property
    def breadth(self) -> float:
        return self.rows * self.shape[1] * self.shape[2]

    @property
    def shallow(self) -> bool:
        return self.done % self.deep_cache > 0

    @property
    def urgency(self) -> tuple[bool, float]:
        return self.batch, self.at

    @property
    def took(self) -> float:
        return self.finished - self.at


@dataclass
class Device:
    """What comes is drawn as the batcher says; `given` are the seconds that each key had, `measured` is what a forward
    was thought to take."""

    seconds: dict[int, float]
    measured: dict[int, float] | None = None
    cap: int = CAP
    now: float = 0.0
    given: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    batches: list[list[Picture]] = field(default_factory=list)

    def draw(self, pictures: Iterable[Picture], until: float = 1e9) -> None:
        truly, known = pace(self.seconds), pace(self.measured or self.seconds)
        batcher = Batcher(known)
        batcher.set_cap(SMALL, self.cap)
        coming, alive = sorted(pictures, key=lambda picture: picture.at), []
        while (coming or alive) and self.now < until:
            if not alive:
                self.now = max(self.now, coming[0].at)
            while coming and coming[0].at <= self.now:
                alive.append(coming.pop(0))
            batch = batcher.next(alive)
            breadth = sum(picture.breadth for picture in batch)
            [shallow] = {picture.shallow for picture in batch}
            took = truly.forward_s(breadth, shallow)
            known.note(breadth, 0, took, shallow)
            known.follow(breadth, took, shallow)
            self.now += took
            self.batches.append(batch)
            for picture in batch:
                picture.steps, picture.done, picture.begun = picture.steps - 1, picture.done + 1, True
                self.given[picture.key] += took * picture.breadth / breadth
                if not picture.steps:
                    picture.finished = self.now
                    alive.remove(picture)

    def done(self, key: str) -> int:
        """Steps of its pictures."""
        return sum(picture.key == key for batch in self.batches for picture in batch)


def drawn(seconds: dict[int, float], pictures: Iterable[Picture], until: float = 1e9) -> Device:
    device = Device(seconds)
    device.draw(pictures, until)
    return device


def flood(key: str, count: int = 100, **options) -> list[Picture]:
    return [Picture(key, at=0.001 * number, **options) for number in range(count)]


def trickle(key: str, count: int = 40, **options) -> list[Picture]:
    return [Picture(key, at=0.5 + number, **options) for number in range(count)]


def p95(pictures: list[Picture]) -> float:
    return sorted(picture.took for picture in pictures)[round(0.95 * len(pictures)) - 1]


@pytest.mark.parametrize("key", ["a", "b"])
@pytest.mark.parametrize("older", [1, 10])
def test_who_skips_steps_is_not_kept_by_older_pictures_that_skip_none(older: int, key: str):
    """Of the same key or of another; and they hardly notice."""
    plain = [Picture("a", at=0.001 * n) for n in range(older)]
    alone = drawn(GPU, [replace(picture) for picture in plain]).now
    skips = Picture(key, at=0.02, deep_cache=3)
    drawn(GPU, [*plain, skips])
    assert skips.finished < 0.6 * alone
    assert max(picture.finished for picture in plain) < 1.1 * alone


def test_those_who_skip_the_same_steps_fall_into_step():
    pictures = [Picture("a", at=0.02 * n, deep_cache=3) for n in range(4)]
    device = drawn(GPU, pictures)
    last = device.batches[:-12][-6:]
    assert {len(batch) for batch in last} == {4}


@pytest.mark.parametrize("interval", [2, 3, 10])
def test_batch_work_that_skips_steps_goes_on_beside_interactive_work(interval: int):
    """Which is always there, and hardly notices."""
    interactive = [Picture("i", at=0.3 * n) for n in range(50)]
    drawn(GPU, [*interactive, *flood("b", 40, batch=True)])
    before = p95(interactive)
    interactive, work = [replace(each) for each in interactive], flood("b", 40, batch=True, deep_cache=interval)
    for each in interactive:
        each.steps, each.begun = STEPS, False
    drawn(GPU, [*interactive, *work])
    assert max(picture.finished for picture in work) < 6.0
    assert p95(interactive) < 1.15 * before


@pytest.mark.parametrize("interval", [1, 2, 3, 10])
def test_a_flood_that_skips_steps_is_not_begun_all_at_once(interval: int):
    """In forwards of another key that its older pictures cannot share."""
    device = Device(GPU)
    work = flood("a", 100, deep_cache=interval)
    device.draw([*work, *(Picture("b", at=0.4 * n) for n in range(20))])
    begun, most = set[int](), 0
    for batch in device.batches:
        begun |= {id(picture) for picture in batch if picture.key == "a"}
        left = [picture for picture in batch if picture.key == "a"]
        most = max(most, len(begun))
        begun -= {id(picture) for picture in left if _last(device, batch, picture)}
    assert most <= CAP // 2


def _last(device: Device, batch: list[Picture], picture: Picture) -> bool:
    return next(each for each in reversed(device.batches) if picture in each) is batch


def test_newcomers_without_end_do_not_keep_who_skips_steps():
    skips = Picture("a", deep_cache=3, steps=30)
    drawn(PROCESSOR, [skips, *(Picture("a", at=0.04 * n, steps=3) for n in range(1, 200))])
    assert 0 < skips.finished < 4.0


def test_light_keys_share_what_they_saved():
    alone, two = trickle("b", steps=8), [*trickle("b", steps=8), *trickle("c", steps=8)]
    drawn(PROCESSOR, alone)
    drawn(PROCESSOR, [*two, *flood("a", 700)], until=45.0)
    took = sorted(picture.took for picture in two)
    assert took[len(took) // 2] < 1.7 * alone[0].took  # together a forward takes 1.27 times as long
    assert took[round(0.95 * len(took))] < 2 * p95(alone)


@pytest.mark.parametrize("seconds", [PROCESSOR, GPU], ids=["processor", "gpu"])
def test_a_light_key_beside_a_flood_takes_less_than_twice_as_long(seconds: dict[int, float]):
    alone, beside = trickle("b"), trickle("b")
    drawn(seconds, alone)
    many = flood("a", 700)
    device = drawn(seconds, [*beside, *many], until=45.0)
    assert all(picture.finished for picture in [*alone, *beside])
    assert p95(beside) < 1.5 * p95(alone)
    flooded = drawn(seconds, flood("a", 700), until=45.0)
    assert device.given["a"] > 0.4 * flooded.given["a"]  # and the flood has what the other does not need


@pytest.mark.parametrize("seconds", [PROCESSOR, GPU], ids=["processor", "gpu"])
@pytest.mark.parametrize("steps", [3, 5])
def test_short_requests_do_not_wait_for_broad_forwards(seconds: dict[int, float], steps: int):
    """A forward of twelve pictures takes as long as four of one: who takes three steps would wait longer for it."""
    alone, beside = trickle("b", steps=steps), trickle("b", steps=steps)
    drawn(seconds, alone)
    device = drawn(seconds, [*beside, *flood("a", 700)], until=45.0)
    assert p95(beside) < 2 * p95(alone)
    assert device.done("a") > 0.7 * drawn(seconds, flood("a", 700), until=45.0).done("a")


def test_interactive_requests_do_not_wait_for_broad_forwards_of_batch_work():
    alone, beside = trickle("b", steps=3), trickle("b", steps=3)
    drawn(PROCESSOR, alone)
    drawn(PROCESSOR, [*beside, *flood("b", 700, batch=True)], until=45.0)
    assert p95(beside) < 2 * p95(alone)


@pytest.mark.parametrize(
    ("light", "rows"),
    [
        (trickle("b", 4, steps=2), CAP),
        (trickle("b", steps=20), CAP),
        ([Picture(f"b{n}", at=0.5 + n, steps=2) for n in range(40)], CAP),
        (trickle("b", steps=2), 12),
    ],
    ids=["has left for long", "stays for long", "comes once", "is expected back"],
)
def test_forwards_are_broad_but_where_a_light_key_is_expected_to_wait_for_them(light: list[Picture], rows: int):
    device = drawn(PROCESSOR, [*light, *flood("a", 700)], until=30.0)
    last = [batch for batch in device.batches if all(picture.key == "a" for picture in batch)][-40:]
    assert {sum(picture.rows for picture in batch) for batch in last} == {rows}


def test_a_curve_that_was_measured_wrongly_does_not_make_the_light_key_slow_for_long():
    """What is quick on an idle machine need not be so on a busy one: four seemed to take no longer than one."""
    alone, beside = trickle("b"), trickle("b")
    drawn(PROCESSOR, alone)
    Device(PROCESSOR, measured=PROCESSOR | {4: 0.033, 8: 0.034, 16: 0.04}).draw([*beside, *flood("a", 700)], until=45.0)
    assert p95(beside) < 1.7 * p95(alone)


@pytest.mark.parametrize(
    "others",
    [{}, {"rows": 5}, {"shape": LARGE}, {"steps": 3}],
    ids=["alike", "broader", "larger", "shorter"],
)
@pytest.mark.parametrize("keys", [2, 3])
def test_keys_that_are_always_busy_get_equal_shares(keys: int, others: dict):
    floods = [flood(f"b{n}", 700, **others) for n in range(1, keys)]
    device = drawn(PROCESSOR, [*flood("a", 200), *(one for many in floods for one in many)], until=20.0)
    equal = sum(device.given.values()) / keys
    assert all(0.9 * equal < given < 1.1 * equal for given in device.given.values()), device.given


@pytest.mark.parametrize(("keys", "each"), [(24, 1), (24, 4), (6, 4), (3, 8), (2, 24)])
def test_many_keys_cost_hardly_any_throughput(keys: int, each: int):
    shared = [Picture(f"k{n % keys}", at=0.001 * n) for n in range(keys * each)]
    of_one = [Picture("k", at=0.001 * n) for n in range(keys * each)]
    assert drawn(PROCESSOR, shared).now < 1.1 * drawn(PROCESSOR, of_one).now


@pytest.mark.parametrize(("every_s", "left"), [(0.02, 0), (0.01, 25)], ids=["busy", "overloaded"])
def test_short_requests_of_ever_new_keys_do_not_starve_a_long_one_of_another_shape(every_s: float, left: int):
    """Overloaded, there are ever more keys, whose parts become ever smaller, and yet not nothing."""
    long = Picture("a", shape=LARGE, steps=30)
    short = [Picture(f"k{n}", at=every_s * n, steps=1) for n in range(3000)]
    drawn(PROCESSOR, [long, *short], until=29.0)
    assert long.steps <= left


def test_what_waits_longest_within_a_key_goes_first_whatever_others_do():
    own = flood("a", 40)
    drawn(PROCESSOR, [*own, *flood("b", 40), *trickle("c", 10)])
    finished = [picture.finished for picture in own]
    assert finished == sorted(finished)


def test_a_light_key_goes_first_where_nobody_can_ride_along():
    """On a device that is full with one picture a neighbour would make a forward take twice as long. From the second
    time on a light key does not take turns with the flood: it waits for the forward under way and for its own."""
    full, coming = {rows: 0.016 * rows for rows in ROW_COUNTS}, trickle("b", steps=8)
    device = Device(full, cap=4)
    device.draw([*coming, *flood("a", 700)], until=45.0)
    assert max(picture.took for picture in coming[1:]) < 8 * full[2] + full[4] + 0.001
    assert device.given["a"] > 0.7 * 45.0


def test_a_newcomer_is_not_behind_because_a_light_key_has_been_there_for_long():
    full, new = {rows: 0.016 * rows for rows in ROW_COUNTS}, Picture("c", at=39.1, shape=LARGE, steps=1)
    Device(full, cap=4).draw([*trickle("b", steps=8), *flood("a", 700), new], until=45.0)
    assert new.took < 0.3


def test_what_is_saved_up_is_bounded():
    """A key that was content with little for long does not shut the others out when it wants much."""
    content = [Picture("b", at=0.3 * n) for n in range(100)]
    sudden = [Picture("b", at=30.0 + 0.001 * n) for n in range(300)]
    device = drawn(PROCESSOR, [*content, *flood("a", 700), *sudden], until=50.0)
    after = [batch for batch in device.batches[-80:] if any(picture.key == "a" for picture in batch)]  # 10 seconds
    assert len(after) > 60


@pytest.mark.parametrize("others", [("a",), ("b",), ("b", "c", "d", "e")])
@pytest.mark.parametrize("pictures", [1, 20])
@pytest.mark.parametrize("keys", ["a", "afg", "afghi"])
def test_interactive_work_hardly_notices_batch_work_of_any_key(others: tuple[str, ...], pictures: int, keys: str):
    own, alone = ([one for key in keys for one in flood(key, pictures)] for _ in range(2))
    device = drawn(PROCESSOR, [*own, *(one for key in others for one in flood(key, 50, batch=True))])
    busy = [batch for batch in device.batches if any(not picture.batch for picture in batch)]
    assert all(not batch[0].batch for batch in busy)
    last = max(picture.finished for picture in own)
    assert last < 1.15 * drawn(PROCESSOR, alone).now


def test_batch_work_has_the_room_that_costs_nothing():
    batcher = Batcher(pace(dict.fromkeys(ROW_COUNTS, 0.03)))
    batcher.set_cap(SMALL, CAP)
    waiting = [Picture("a"), *flood("a", 20, batch=True, begun=True)]
    assert sum(picture.rows for picture in batcher.next(waiting)) == CAP


def test_newcomers_that_are_too_many_for_one_forward_take_nobodys_place():
    batcher = Batcher(pace(dict.fromkeys(ROW_COUNTS, 0.03)))
    batcher.set_cap(SMALL, CAP)
    begun = [Picture(key, at=5.0, begun=True) for key in "aaaaaabb"]
    batch = batcher.next([*flood("a", 20), *begun])
    assert [picture.begun for picture in batch].count(False) == JOINING
    assert [sum(picture.key == key for picture in batch) for key in "ab"] == [10, 2]


def test_a_newcomer_of_its_own_is_in_the_next_forward():
    for shape in (SMALL, LARGE):
        device = drawn(PROCESSOR, [*flood("a", 100), Picture("b", at=1.0, shape=shape, steps=1)], until=1.5)
        joined = next(n for n, batch in enumerate(device.batches) if any(one.key == "b" for one in batch))
        before = drawn(PROCESSOR, flood("a", 100), until=1.0)
        assert joined == len(before.batches)


def reference(candidates: list[Picture], room: int) -> list[Picture]:
    """Who shares a forward where only one key is alive."""
    ordered = sorted(candidates, key=lambda candidate: candidate.urgency)
    batch: list[Picture] = []
    for candidate in ordered:
        if candidate.shape == ordered[0].shape and (candidate.rows <= room or not batch):
            batch.append(candidate)
            room -= candidate.rows
    return batch


@pytest.mark.parametrize("batch", [False, True])
def test_with_one_key_alive_the_most_urgent_go_first_and_nothing_else_counts(batch: bool):
    rng = random.Random(3)
    batcher = Batcher(pace(PROCESSOR))
    batcher.set_cap(SMALL, CAP)
    for _ in range(300):
        waiting = [
            Picture("a", at=rng.random(), rows=rng.choice((1, 2, 2, 5, 30)), shape=rng.choice((SMALL, SMALL, LARGE)))
            for _ in range(rng.randint(1, 40))
        ]
        for picture in waiting:
            picture.batch, picture.begun = batch, True
        lead = min(waiting, key=lambda picture: picture.urgency)
        assert batcher.next(waiting) == reference(waiting, batcher.cap(lead.shape))


def test_where_neighbours_cost_nothing_everybody_joins():
    batcher = Batcher(pace(dict.fromkeys(ROW_COUNTS, 0.03)))
    batcher.set_cap(SMALL, CAP)
    waiting = [Picture("b", at=5.0), *flood("a", 20, begun=True)]
    assert sum(picture.rows for picture in batcher.next(waiting)) == CAP


def test_a_rider_that_would_slow_the_leader_too_far_waits():
    batcher = Batcher(pace(PROCESSOR))
    batcher.set_cap(SMALL, CAP)
    batch = batcher.next([Picture("b", at=5.0), *flood("a", 20)])
    assert [picture.key for picture in batch] == ["b", "a"]  # with a third, a forward would take 1.54 times as long
