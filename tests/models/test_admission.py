"""Who is let in: bounds in pictures and in seconds, parts of keys, deadlines."""

import pickle
from dataclasses import replace

import pytest

from models.admission import Bounds, Claim, check
from models.errors import DeadlineTooShort, InvalidRequest, Overloaded
from models.pace import Pace

SECOND = 1000.0  # work that takes a second


def pace() -> Pace:
    known = Pace()
    known.learn({1.0: 1 / SECOND, 2.0: 2 / SECOND}, usual=1.0, full=100.0)
    return known


def claim(key: str = "a", seconds: float = 1.0, **options) -> Claim:
    values = {"batch": False, "due": 60.0, "deadline_s": None, "breadth": 1.0, "waiting": 1} | options
    return Claim(key=key, work=seconds * SECOND, **values)


BOUNDS = Bounds(max_waiting=10, max_wait_s=20.0)


def refused(newcomer: Claim, held: list[Claim], bounds: Bounds = BOUNDS) -> Overloaded:
    with pytest.raises(Overloaded) as told:
        check(newcomer, held, bounds, pace())
    return told.value


def test_an_empty_engine_takes_any_request():
    check(claim(seconds=1e6, waiting=10), [], BOUNDS, pace())


def test_beyond_the_bound_in_seconds_it_says_when_there_will_be_room():
    held = [claim(seconds=25.0)]
    assert refused(claim(), held).retry_after_s == pytest.approx(5.0)
    check(claim(seconds=100.0), [claim(seconds=19.0)], BOUNDS, pace())  # its own length does not count


def test_a_key_with_less_than_its_part_finds_room_in_a_queue_that_another_has_filled():
    held = [claim("flood", seconds=30.0)]
    check(claim("b"), held, BOUNDS, pace())
    check(claim("b"), [*held, claim("b", 9.0)], BOUNDS, pace())
    assert refused(claim("b"), [*held, claim("b", 11.0)]).retry_after_s == pytest.approx(2.0)
    refused(claim("flood"), held)


def test_places_are_shared_like_seconds():
    held = [claim("flood", seconds=0.1, waiting=10)]
    assert refused(claim("flood"), held).retry_after_s >= 1
    check(claim("b"), held, BOUNDS, pace())
    check(claim("b"), [*held, claim("b", 0.1, waiting=4)], BOUNDS, pace())
    refused(claim("b"), [*held, claim("b", 0.1, waiting=5)])


def test_batch_work_is_not_in_an_interactive_requests_way_but_the_other_way_round():
    check(claim(), [claim(seconds=100.0, batch=True)], BOUNDS, pace())
    refused(claim(batch=True), [claim(seconds=100.0)])


def test_a_deadline_that_no_engine_keeps_is_refused_with_the_least_that_could_be_kept():
    with pytest.raises(DeadlineTooShort) as told:
        check(claim(seconds=10.0, deadline_s=4.0), [], BOUNDS, pace())
    assert told.value.field == "deadline_s"
    assert told.value.least_s == pytest.approx(10.0)
    assert "10.0" in told.value.message
    again = pickle.loads(pickle.dumps(told.value))
    assert isinstance(again, InvalidRequest)
    assert (again.least_s, again.field, again.message) == (told.value.least_s, "deadline_s", told.value.message)
    check(claim(seconds=10.0, deadline_s=6.0), [], BOUNDS, pace())  # the estimate is rough


def test_a_deadline_that_what_waits_does_not_allow_is_a_matter_of_time():
    late = claim(deadline_s=4.0, due=4.0)
    assert refused(late, [claim(seconds=15.0, due=3.0)]).retry_after_s == pytest.approx(4.0)
    check(late, [claim(seconds=15.0, due=9.0)], BOUNDS, pace())  # which is due later, and so done later
    check(late, [claim(seconds=15.0, due=3.0, batch=True)], BOUNDS, pace())
    refused(replace(late, batch=True), [claim(seconds=15.0, due=9.0)])


def test_a_deadline_beside_a_flood_of_another_key_reckons_with_half_of_the_device():
    check(claim("b", deadline_s=4.0), [claim("flood", seconds=19.0, due=1.0)], BOUNDS, pace())
    refused(claim("b", 5.0, deadline_s=4.0), [claim("flood", seconds=19.0, due=1.0)])


def test_where_nothing_is_known_of_the_pace_only_places_count():
    check(claim(seconds=1e6, deadline_s=0.1), [claim(seconds=1e9)], BOUNDS, Pace())
