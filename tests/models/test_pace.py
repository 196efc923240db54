"""How long a device takes: a curve, corrected by what turns took."""

import pytest

from models.pace import Pace
from models.work import SHALLOW

CURVE = {256: 0.020, 512: 0.020, 1024: 0.030, 4096: 0.120}


def learnt() -> Pace:
    pace = Pace()
    pace.learn(CURVE, usual=512, full=4096)
    return pace


def test_the_curve_is_followed_between_and_beyond_what_was_measured():
    pace = learnt()
    assert pace.forward_s(100) == 0.020  # nothing is known of less
    assert pace.forward_s(768) == pytest.approx(0.025)
    assert pace.forward_s(8192) == pytest.approx(0.240)


def test_a_broader_forward_is_never_taken_to_be_faster():
    pace = Pace()
    pace.learn({256: 0.03, 512: 0.02, 1024: 0.05}, usual=512, full=1024)
    assert pace.forward_s(512) == 0.03


def test_it_is_known_before_the_first_turn_and_depends_on_the_company():
    pace = learnt()
    assert pace.seconds_per_work(0) == pytest.approx(0.020 / 512)
    assert pace.seconds_per_work(2048) == pytest.approx(pace.forward_s(2048) / 2048)
    assert pace.seconds_per_work(1e9) == pytest.approx(0.120 / 4096)  # never broader than a full forward


def test_turns_that_take_longer_than_measured_correct_it():
    pace = learnt()
    for _ in range(100):
        pace.note(512, 512, 0.080)  # a forward and as much decoding: 0.040 were to be expected
    assert pace.seconds_per_work(512) == pytest.approx(2 * 0.020 / 512, rel=0.05)


def test_the_curve_follows_the_forwards_where_it_was_measured_wrongly():
    pace = learnt()
    for _ in range(100):
        pace.follow(4096, 0.060)
        pace.follow(640, 0.050)
    assert pace.forward_s(4096) == pytest.approx(0.060, rel=0.1)
    assert pace.forward_s(640) == pytest.approx(0.050, rel=0.1)
    assert pace.forward_s(256) == 0.020  # of which nothing new is known


def test_a_shallow_forward_takes_a_part_of_as_broad_a_whole_one():
    """However narrow: what is known of whole ones says nothing of short times."""
    pace = learnt()
    assert pace.forward_s(100, shallow=True) == pytest.approx(SHALLOW * 0.020)
    assert pace.forward_s(4096, shallow=True) == pytest.approx(SHALLOW * 0.120)
    for _ in range(100):
        pace.note(512, 512, (SHALLOW + 1) * 0.020, shallow=True)  # as is to be expected, and decoding beside it
    assert pace.seconds_per_work(512) == pytest.approx(0.020 / 512)


def test_what_part_a_shallow_forward_takes_is_learnt_and_says_nothing_of_whole_ones():
    pace = learnt()
    for _ in range(100):
        pace.follow(4096, 0.25 * 0.120, shallow=True)
    assert pace.forward_s(512, shallow=True) == pytest.approx(0.25 * 0.020, rel=0.1)
    assert pace.forward_s(512) == 0.020
    for _ in range(100):
        pace.follow(512, 9.0, shallow=True)
    assert pace.forward_s(512, shallow=True) == 0.020  # never more than a whole one


def test_a_single_slow_forward_and_work_beside_one_leave_the_curve_alone():
    pace = learnt()
    for _ in range(30):
        pace.follow(512, 0.020)
        pace.note(512, 512, 0.040)
    pace.follow(512, 10.0)
    assert pace.forward_s(512) == pytest.approx(0.020, rel=0.06)


def test_without_a_measurement_the_turns_alone_tell():
    pace = Pace()
    assert pace.seconds_per_work(512) == 0.0
    pace.note(0, 0, 5.0)  # nothing was done
    assert pace.seconds_per_work(512) == 0.0
    pace.note(512, 0, 0.02)
    pace.note(0, 256, 0.01)
    assert pace.seconds_per_work(1024) == pytest.approx(0.02 / 512)
