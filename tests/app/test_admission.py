"""How much may wait for a model that sleeps, by the clock of a test: seconds are what an engine told last."""

import pytest

from app.admission import Admission
from models.errors import Overloaded


def awake(admission: Admission, model: str = "sd15", seconds_per_work: float = 1.0) -> None:
    """An engine of the model has told its pace."""
    with admission.place(model, 1.0, asleep=False) as place:
        place.leave(seconds_per_work)


def test_as_long_as_nobody_has_told_a_pace_nobody_is_refused():
    admission = Admission(max_cold_wait_s=1.0)
    with admission.place("sd15", 1e9, asleep=True), admission.place("sd15", 1e9, asleep=True):
        assert admission.retry_after_s("sd15", unknown_s=5.0) == 5.0


def test_beyond_the_bound_somebody_is_told_when_there_will_be_room():
    admission = Admission(max_cold_wait_s=10.0)
    awake(admission, seconds_per_work=2.0)
    with admission.place("sd15", 4.0, asleep=True):
        with pytest.raises(Overloaded) as refused, admission.place("sd15", 3.0, asleep=True):
            pass
        assert refused.value.retry_after_s == pytest.approx(4.0)
        with admission.place("sd15", 1.0, asleep=True):
            assert admission.retry_after_s("sd15", 5.0) == pytest.approx(10.0)
    with admission.place("sd15", 3.0, asleep=True):  # they have gone
        pass


def test_other_models_and_models_that_are_awake_are_not_concerned():
    admission = Admission(max_cold_wait_s=1.0)
    awake(admission)
    awake(admission, "sdxl")
    with (
        admission.place("sd15", 100.0, asleep=True),
        admission.place("sdxl", 100.0, asleep=True),
        admission.place("sd15", 100.0, asleep=False),
    ):
        pass


def test_what_an_engine_has_taken_on_waits_here_no_longer():
    admission = Admission(max_cold_wait_s=1.0)
    awake(admission)
    with admission.place("sd15", 100.0, asleep=True) as place:
        place.leave(1.0)
        place.leave(1.0)
        with admission.place("sd15", 100.0, asleep=True):
            assert admission.retry_after_s("sd15", 5.0) == pytest.approx(100.0, abs=0.1)


def test_a_place_is_left_where_its_request_fails():
    admission = Admission(max_cold_wait_s=1.0)
    awake(admission)
    with pytest.raises(ZeroDivisionError), admission.place("sd15", 100.0, asleep=True):
        raise ZeroDivisionError
    assert admission.retry_after_s("sd15", 5.0) == 1.0
