"""How much may wait in a gateway for a model, by the clock of a test: seconds are what an engine told last."""

from contextlib import ExitStack

import pytest

from app.admission import Admission
from models.errors import Overloaded


def awake(admission: Admission, model: str = "sd15", seconds_per_work: float = 1.0) -> None:
    """An engine of the model has told its pace."""
    with admission.place(model, "ada", 1.0, replicas=1) as place:
        place.leave(seconds_per_work)


def test_as_long_as_nobody_has_told_a_pace_nobody_is_refused():
    admission = Admission(max_wait_s=1.0)
    with admission.place("sd15", "ada", 1e9, replicas=0), admission.place("sd15", "ada", 1e9, replicas=0):
        assert admission.retry_after_s("sd15", unknown_s=5.0) == 5.0


def test_beyond_the_bound_somebody_is_told_when_there_will_be_room():
    admission = Admission(max_wait_s=10.0)
    awake(admission, seconds_per_work=2.0)
    with admission.place("sd15", "ada", 4.0, replicas=0):
        with pytest.raises(Overloaded) as refused, admission.place("sd15", "ada", 3.0, replicas=0):
            pass
        assert refused.value.retry_after_s == pytest.approx(4.0)
        with admission.place("sd15", "ada", 1.0, replicas=0):
            assert admission.retry_after_s("sd15", 5.0) == pytest.approx(10.0)
    with admission.place("sd15", "ada", 3.0, replicas=0):  # they have gone
        pass


def test_other_models_are_not_concerned():
    admission = Admission(max_wait_s=1.0)
    awake(admission)
    awake(admission, "sdxl")
    with admission.place("sd15", "ada", 100.0, replicas=0), admission.place("sdxl", "ada", 100.0, replicas=0):
        pass


def test_replicas_share_what_waits_for_room():
    admission = Admission(max_wait_s=10.0)
    awake(admission)
    with admission.place("sd15", "ada", 30.0, replicas=4):
        with admission.place("sd15", "ada", 10.0, replicas=4):
            assert admission.retry_after_s("sd15", 5.0) == pytest.approx(10.0)
            with pytest.raises(Overloaded, match="no room") as refused, admission.place("sd15", "ada", 8.0, replicas=4):
                pass
            assert refused.value.retry_after_s == pytest.approx(2.0)
        with pytest.raises(Overloaded), admission.place("sd15", "ada", 1.0, replicas=2):  # two have gone
            pass


def test_a_flood_takes_nobodys_place():
    admission = Admission(max_wait_s=10.0)
    awake(admission)
    with ExitStack() as stack:
        for _ in range(10):
            stack.enter_context(admission.place("sd15", "ada", 1.0, replicas=1))
        with pytest.raises(Overloaded):
            stack.enter_context(admission.place("sd15", "ada", 1.0, replicas=1))
        for _ in range(5):  # half of it
            stack.enter_context(admission.place("sd15", "eve", 1.0, replicas=1))
        with pytest.raises(Overloaded):
            stack.enter_context(admission.place("sd15", "eve", 1.0, replicas=1))


def test_what_an_engine_has_taken_on_waits_here_no_longer():
    admission = Admission(max_wait_s=1.0)
    awake(admission)
    with admission.place("sd15", "ada", 100.0, replicas=0) as place:
        place.leave(1.0)
        place.leave(1.0)
        with admission.place("sd15", "ada", 100.0, replicas=0):
            assert admission.retry_after_s("sd15", 5.0) == pytest.approx(100.0, abs=0.1)


def test_a_place_is_left_where_its_request_fails():
    admission = Admission(max_wait_s=1.0)
    awake(admission)
    with pytest.raises(ZeroDivisionError), admission.place("sd15", "ada", 100.0, replicas=0):
        raise ZeroDivisionError
    assert admission.retry_after_s("sd15", 5.0) == 1.0


def test_a_request_just_after_a_model_woke_does_not_begin_another_waking():
    """The count of replicas may be a second old: the next time would seem to take no time at all."""
    admission = Admission(max_wait_s=10.0)
    with admission.place("sd15", "ada", 1.0, replicas=0) as place:
        admission._waking["sd15"] -= 30.0
        place.leave(1.0)
    with admission.place("sd15", "ada", 1.0, replicas=0) as place:
        place.leave(1.0)
    assert admission._wake_s["sd15"] == pytest.approx(30.0, abs=1.0)
