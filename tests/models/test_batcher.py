"""The batcher, without torch."""

from dataclasses import dataclass

from models.batcher import Batcher
from models.measuring import knee

SMALL, LARGE = (4, 16, 16), (4, 32, 32)


@dataclass(eq=False)
class Candidate:
    shape: tuple[int, int, int]
    rows: int
    urgency: tuple[bool, float]
    key: str = ""
    begun: bool = True
    shallow: bool = False

    @property
    def breadth(self) -> float:
        return self.rows * self.shape[1] * self.shape[2]


def test_the_most_urgent_leads_and_only_its_shape_joins():
    waiting = [Candidate(SMALL, 2, (False, 5)), Candidate(LARGE, 2, (False, 1)), Candidate(LARGE, 1, (False, 9))]
    assert Batcher().next(waiting) == [waiting[1], waiting[2]]


def test_a_batch_stays_under_its_cap_and_fills_what_is_left():
    batcher = Batcher()
    batcher.set_cap(SMALL, 4)
    waiting = [Candidate(SMALL, rows, (False, due)) for due, rows in enumerate((2, 1, 2, 1))]
    assert batcher.next(waiting) == [waiting[0], waiting[1], waiting[3]]


def test_a_candidate_beyond_the_cap_still_goes_alone():
    batcher = Batcher()
    batcher.set_cap(SMALL, 1)
    waiting = [Candidate(SMALL, 2, (False, 0)), Candidate(SMALL, 1, (False, 1))]
    assert batcher.next(waiting) == [waiting[0]]


def test_interactive_goes_before_batch_whatever_is_due():
    waiting = [Candidate(SMALL, 16, (True, 0)), Candidate(SMALL, 16, (False, 99))]
    assert Batcher().next(waiting) == [waiting[1]]


def test_an_unmeasured_shape_is_judged_by_its_area():
    batcher = Batcher()
    batcher.set_cap(SMALL, 16)
    assert batcher.cap(LARGE) == 4
    assert batcher.cap((4, 128, 128)) == 2


def test_nobody_waiting_is_an_empty_batch():
    assert Batcher().next([]) == []


def test_the_knee_is_where_more_rows_stop_paying():
    assert knee({1: 1.0, 2: 1.0, 4: 1.3, 8: 2.55, 16: 5.2}) == 4
    assert knee({1: 1.0, 2: 2.0, 4: 4.0}) == 1
