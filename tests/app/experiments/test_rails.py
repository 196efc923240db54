"""Guard rails on a clock of the test's own."""

import pytest

from app.experiments.rails import Rails
from app.experiments.settings import GuardSettings

KEY = ("a", "version", "fast")


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def rails(clock: Clock) -> Rails:
    return Rails(clock)


ERRORS = GuardSettings(max_error_rate=0.2, window=50, least=10, recover_after_s=60)
SLOW = GuardSettings(max_p95_s=2.0, window=50, least=10, recover_after_s=60)


def note(rails: Rails, guard: GuardSettings, *failures: bool, seconds: float = 1.0) -> str:
    for failed in failures:
        rails.note(KEY, guard, failed, None if failed else seconds)
    return rails.state(KEY, guard).state


def test_an_arm_that_fails_too_often_is_off_and_recovers_on_probation(rails: Rails, clock: Clock):
    assert note(rails, ERRORS, *[True] * 2, *[False] * 18) == "on"
    assert note(rails, ERRORS, *[True] * 4) == "off"
    assert rails.state(KEY, ERRORS).reason == "5 of 23 failed, beyond a rate of 0.2"
    clock.now = 59.9
    assert rails.state(KEY, ERRORS).state == "off"
    clock.now = 60.0
    assert rails.state(KEY, ERRORS).state == "probation"
    assert note(rails, ERRORS, *[False] * 10) == "on"
    assert rails.state(KEY, ERRORS).trips == 1


def test_on_probation_the_first_errors_are_enough(rails: Rails, clock: Clock):
    note(rails, ERRORS, *[True] * 3)
    clock.now = 60.0
    assert note(rails, ERRORS, True, True) == "probation"
    assert note(rails, ERRORS, True) == "off"
    assert rails.state(KEY, ERRORS).trips == 2


def test_few_errors_are_no_reason(rails: Rails):
    assert note(rails, ERRORS, True, True) == "on"  # 2 of the least 10 are not above 20 %


def test_what_is_long_ago_does_not_count(rails: Rails):
    note(rails, ERRORS, *[False] * 40)
    assert note(rails, ERRORS, *[True] * 10) == "on"  # 10 of the last 50
    assert note(rails, ERRORS, True) == "off"


def test_an_arm_that_is_slow_is_off(rails: Rails, clock: Clock):
    assert note(rails, SLOW, *[False] * 9, seconds=9.0) == "on"  # fewer than the least
    assert note(rails, SLOW, False, seconds=9.0) == "off"
    assert "p95 of 9.00 s, beyond 2.0 s" in rails.state(KEY, SLOW).reason


def test_one_slow_drawing_among_many_is_no_reason(rails: Rails):
    assert note(rails, SLOW, *[False] * 30) == "on"
    assert note(rails, SLOW, False, seconds=9.0) == "on"


def test_errors_do_not_count_as_slow_and_slowness_not_as_errors(rails: Rails):
    assert note(rails, SLOW, *[True] * 20) == "on"
    rails.keep(set())
    assert note(rails, ERRORS, *[False] * 50, seconds=99.0) == "on"


def test_what_ends_while_an_arm_is_off_does_not_count(rails: Rails, clock: Clock):
    note(rails, ERRORS, *[True] * 3)
    note(rails, ERRORS, *[True] * 30)
    clock.now = 60.0
    assert note(rails, ERRORS, False) == "probation"


def test_arms_and_versions_have_rails_of_their_own(rails: Rails):
    note(rails, ERRORS, *[True] * 3)
    assert rails.state(("a", "version", "slow"), ERRORS).state == "on"
    assert rails.state(("a", "next", "fast"), ERRORS).state == "on"
    rails.keep({("a", "next", "fast")})
    assert rails.state(KEY, ERRORS).trips == 0
