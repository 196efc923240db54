"""Which replica a request goes to, by what is known of each: pure functions."""

from typing import Any

import pytest

from app.hint import Hint
from app.routing import COLD_LORA, COLD_SIZE, LAG_S, STALE_S, Sent, Standing, ends
from models.parts import AdapterUse
from models.request import GenerationRequest
from models.work import work
from tests.app.conftest import CARDS

NOW = 1000.0
PLAIN = Hint(work=10.0, size="128x128")
MOON = Hint(work=10.0, size="128x128", loras=("moon",))


def report(work_left: float = 0.0, pace: float = 1.0, **met: Any) -> dict[str, Any]:
    return {"work_left": work_left, "seconds_per_work": pace, "loras": [], "sizes": ["128x128"]} | met


def heard(report: dict[str, Any], *sent: Sent, ago: float = 0.5) -> Standing:
    standing = Standing(sent=list(sent))
    standing.hear(report, NOW - ago)
    return standing


def sent(hint: Hint = PLAIN, ago: float = 0.0, id: str = "a") -> Sent:
    return Sent(id=id, hint=hint, at=NOW - ago)


def best(hint: Hint, *standings: Standing) -> int:
    order = ends(standings, hint, NOW)
    return order.index(min(order))


def test_a_hint_tells_of_a_request_what_a_replica_can_be_warm_for():
    uses = (AdapterUse(name="moon", weight=0.5), AdapterUse(name="ink"))
    request = GenerationRequest(model="sd15", prompt="x", adapters=uses, width=256, height=128).resolve(CARDS["sd15"])
    assert Hint.of(request) == Hint(work=work(request), loras=("ink", "moon"), size="256x128")


def test_the_least_loaded_is_first_and_work_counts_not_requests():
    many_small = heard(report(), *(sent(Hint(work=1.0, size="128x128"), id=str(i)) for i in range(5)))
    one_large = heard(report(), sent(Hint(work=50.0, size="128x128")))
    assert best(PLAIN, one_large, many_small) == 1


def test_what_others_have_sent_is_known_from_reports():
    assert best(PLAIN, heard(report(work_left=30.0)), heard(report(work_left=20.0))) == 1


def test_the_faster_replica_may_have_more_to_do():
    assert best(PLAIN, heard(report(work_left=20.0, pace=1.0)), heard(report(work_left=50.0, pace=0.4))) == 1


def test_a_replica_that_has_not_told_its_pace_counts_as_an_ordinary_one():
    assert ends([heard(report(pace=4.0)), Standing()], Hint(work=1.0), NOW) == [1.25 * 4.0, 1.25 * 4.0]


@pytest.mark.parametrize(
    ("age", "counted"),
    [(0.0, True), (0.5 + LAG_S - 0.01, True), (0.5 + LAG_S + 0.01, False)],
)
def test_what_was_sent_since_a_report_was_made_is_added_to_it(age: float, counted: bool):
    standing = heard(report(work_left=5.0), sent(ago=age))
    assert standing.left(NOW) == (15.0 if counted else 5.0)


def test_without_a_fresh_report_all_that_is_under_way_counts():
    assert Standing(sent=[sent(ago=500.0)]).left(NOW) == 10.0
    assert heard(report(work_left=99.0), sent(ago=500.0), ago=STALE_S + 1).left(NOW) == 10.0


def test_a_repeated_report_is_not_a_fresh_one():
    standing = heard(report(work_left=99.0), ago=STALE_S + 1)
    standing.hear(report(work_left=99.0), NOW)
    assert standing.left(NOW) == 0.0
    standing.hear({}, NOW)
    assert standing.pace == 1.0


def test_of_calls_that_share_an_id_each_is_taken_off_once():
    standing = Standing(sent=[sent(id="a"), sent(id="b"), sent(id="a")])
    for id, left in (("a", 20.0), ("a", 10.0), ("a", 10.0), ("b", 0.0)):
        standing.done(id)
        assert standing.left(NOW) == left


def test_a_lora_that_is_loaded_is_worth_waiting_for_but_not_for_ever():
    cold = heard(report())
    for behind, chosen in ((COLD_LORA * MOON.work - 1, 1), (COLD_LORA * MOON.work + 1, 0)):
        assert best(MOON, cold, heard(report(work_left=behind, loras=["moon", "sun"]))) == chosen


def test_a_size_that_was_met_is_worth_waiting_for_a_little():
    other = heard(report(sizes=["512x512"]))
    for behind, chosen in ((COLD_SIZE * PLAIN.work - 1, 1), (COLD_SIZE * PLAIN.work + 1, 0)):
        assert best(PLAIN, other, heard(report(work_left=behind))) == chosen


def test_a_replica_is_warm_for_what_it_has_just_been_sent():
    assert heard(report(), sent(MOON, id="a")).coldness(MOON) == 0.0
    assert heard(report(), sent(MOON, id="a"), ago=-10.0).coldness(MOON) == COLD_LORA  # a report has come since


def test_one_lora_out_of_two_is_not_enough():
    both = Hint(work=10.0, size="128x128", loras=("moon", "sun"))
    assert heard(report(loras=["moon"])).coldness(both) == COLD_LORA
    assert heard(report(loras=["moon", "sun"])).coldness(both) == 0.0


def test_calls_at_the_same_time_spread():
    standings = [Standing() for _ in range(4)]
    for number in range(40):
        chosen = standings[best(PLAIN, *standings)]
        chosen.sent.append(sent(id=str(number)))
    assert [len(standing.sent) for standing in standings] == [10] * 4

