"""Which replica a request goes to, by what is known of each: pure functions."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from ray.serve._private.common import DeploymentHandleSource, DeploymentID, ReplicaID, RequestMetadata
from ray.serve.request_router import PendingRequest

from app.hint import Hint, Party
from app.routing import COLD_LORA, COLD_SIZE, LAG_S, STALE_S, Sent, Standing, WorkRouter, ends
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


@pytest.mark.parametrize(("priority", "urgent"), [("interactive", True), ("batch", False)])
def test_batch_work_is_not_urgent_whenever_it_is_due(priority: str, urgent: bool):
    options: dict[str, Any] = {"deadline_s": 60.0, "priority": priority}
    request = GenerationRequest(model="sd15", prompt="x", **options).resolve(CARDS["sd15"])
    assert Hint.of(request).urgent == urgent


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


# The router, on replicas that always have a place. Real ones are in tests/acceptance/test_scaling.py

MODEL = DeploymentID("Model", "model-sd15")
ANN, BOB = Party("ann", batch=False), Party("bob", batch=False)


def replica(name: str, **told: Any) -> Any:
    async def get_queue_len(deadline_s: float) -> int:
        return 0

    id = ReplicaID(name, MODEL)
    return SimpleNamespace(
        replica_id=id, routing_stats=report(**told), max_ongoing_requests=1000, get_queue_len=get_queue_len
    )


def router(*replicas: Any, hold_s: float | None = None) -> WorkRouter:
    made = WorkRouter(MODEL, DeploymentHandleSource.REPLICA, use_replica_queue_len_cache=True)
    made.initialize_state(hold_s=hold_s)
    made.update_replicas(list(replicas))
    return made


def call(router: WorkRouter, hint: Hint = PLAIN, id: str = "one") -> "asyncio.Task[Any]":
    metadata = RequestMetadata(request_id=id, internal_request_id=id)
    pending = PendingRequest(args=[], kwargs={"hint": hint}, metadata=metadata)
    return asyncio.create_task(router._choose_replica_for_request(pending))


def by(party: Party, **options: Any) -> Hint:
    return Hint(work=5.0, size="128x128", party=party, **options)


async def settled(*calls: "asyncio.Task[Any]") -> list[str | None]:
    """Where each call goes by now; None for those that wait."""
    await asyncio.sleep(0.05)
    return [call.result().replica_id.unique_id if call.done() else None for call in calls]


async def test_calls_that_share_an_id_each_get_a_replica_and_spread():
    ours = router(replica("r1"), replica("r2"), replica("r3"))
    went = await settled(*(call(ours) for _ in range(12)))
    assert sorted(map(str, went)) == ["r1"] * 4 + ["r2"] * 4 + ["r3"] * 4


async def test_calls_without_a_hint_go_somewhere():
    ours = router(replica("r1"))
    metadata = RequestMetadata(request_id="x", internal_request_id="x")
    pending = PendingRequest(args=[], kwargs={}, metadata=metadata)
    assert (await ours._choose_replica_for_request(pending)).replica_id.unique_id == "r1"


async def test_without_replicas_calls_wait_for_one():
    ours = router()
    waiting = [call(ours), call(ours)]
    assert await settled(*waiting) == [None, None]
    ours.update_replicas([replica("r1")])
    assert await settled(*waiting) == ["r1", "r1"]


async def test_what_a_replica_cannot_soon_do_waits_for_one_that_comes_later():
    ours = router(replica("r1"), hold_s=10.0)
    calls = [call(ours, by(ANN), id=str(number)) for number in range(5)]
    assert await settled(*calls) == ["r1", "r1", None, None, None]
    ours.update_replicas([replica("r1"), replica("r2")])
    assert await settled(*calls) == ["r1", "r1", "r2", "r2", None]
    ours.on_request_completed(ReplicaID("r1", MODEL), "0")
    assert await settled(*calls) == ["r1", "r1", "r2", "r2", "r1"]


async def test_a_replica_with_room_is_sent_what_another_one_is_warm_for():
    ours = router(replica("full", work_left=10.0, loras=["moon"]), replica("empty"), hold_s=10.0)
    lora = Hint(work=11.0, size="128x128", loras=("moon",), party=ANN)
    assert await settled(call(ours, lora)) == ["empty"]


@pytest.mark.parametrize(("urgent", "chosen"), [(True, "fast"), (False, "slow")])
async def test_a_call_with_a_deadline_goes_where_it_ends_first_even_where_there_is_no_room(urgent: bool, chosen: str):
    ours = router(
        replica("fast", work_left=520.0, seconds_per_work=0.01), replica("slow", seconds_per_work=0.1), hold_s=5.0
    )
    assert await settled(call(ours, Hint(work=300.0, size="128x128", party=ANN, urgent=urgent))) == [chosen]


async def test_a_flood_that_waits_does_not_hold_others_up():
    ours = router(replica("r1"), hold_s=10.0)
    anns = [call(ours, by(ANN), id=str(number)) for number in range(5)]
    await settled(*anns)
    bobs = [call(ours, by(BOB), id=f"bob {number}") for number in range(2)]
    urgent = call(ours, by(ANN, urgent=True), id="urgent")
    assert await settled(*bobs, urgent) == ["r1", None, "r1"]
    ours.on_request_completed(ReplicaID("r1", MODEL), "bob 0")
    assert await settled(*bobs) == ["r1", "r1"]
    ours.on_request_completed(ReplicaID("r1", MODEL), "urgent")
    ours.on_request_completed(ReplicaID("r1", MODEL), "0")
    assert await settled(*anns) == ["r1", "r1", None, None, None]


async def test_a_call_that_is_cancelled_leaves_its_turn_to_the_next():
    ours = router(replica("r1"), hold_s=5.0)
    first, second, third = (call(ours, by(ANN), id=str(number)) for number in range(3))
    assert await settled(first, second, third) == ["r1", None, None]
    second.cancel()
    ours.on_request_completed(ReplicaID("r1", MODEL), "0")
    await asyncio.gather(second, return_exceptions=True)
    assert await settled(third) == ["r1"]


async def test_who_comes_to_have_nothing_under_way_waits_no_longer():
    """Also where replicas stay full of what others have sent them."""
    ours = router(replica("r1", work_left=99.0), hold_s=5.0)
    first, second = (call(ours, by(ANN), id=str(number)) for number in range(2))
    assert await settled(first, second) == ["r1", None]
    ours.on_request_completed(ReplicaID("r1", MODEL), "0")
    assert await settled(second) == ["r1"]


async def test_a_replica_that_has_not_told_its_pace_is_not_sent_all_that_waits():
    """Reports come a second after a replica: until then it is taken for one like the others."""
    ours = router(replica("r1"), hold_s=10.0)
    calls = [call(ours, by(ANN), id=str(number)) for number in range(9)]
    assert await settled(*calls) == ["r1", "r1", *7 * [None]]
    silent = replica("r2")
    silent.routing_stats = {}
    ours.update_replicas([replica("r1"), silent])
    assert await settled(*calls) == ["r1", "r1", "r2", "r2", *5 * [None]]


async def test_the_first_replica_of_all_is_sent_one_call_until_it_tells_its_pace():
    ours = router(hold_s=10.0)
    calls = [call(ours, by(ANN), id=str(number)) for number in range(4)]
    silent = replica("r1")
    silent.routing_stats = {}
    ours.update_replicas([silent])
    assert await settled(*calls) == ["r1", None, None, None]
    ours.update_replicas([replica("r1")])
    assert await settled(*calls) == ["r1", "r1", None, None]
    for one in calls:
        one.cancel()
    ours.update_replicas([])  # it sleeps, and wakes: how fast it is is known by now
    others = [call(ours, by(BOB), id=f"bob {number}") for number in range(4)]
    assert await settled(*others) == [None] * 4
    ours.update_replicas([silent])
    assert await settled(*others) == ["r1", "r1", None, None]


async def test_calls_that_wait_for_room_outlive_the_last_replica():
    ours = router(replica("r1"), hold_s=5.0)
    calls = [call(ours, by(ANN), id=str(number)) for number in range(3)]
    assert await settled(*calls) == ["r1", None, None]
    ours.on_request_completed(ReplicaID("r1", MODEL), "0")  # which calls the next one in
    ours.on_replica_actor_died(ReplicaID("r1", MODEL))
    assert await settled(*calls) == ["r1", None, None]
    ours.update_replicas([replica("r2")])
    assert (await settled(*calls))[1] == "r2"


async def test_a_replica_that_was_found_dead_has_no_room():
    ours = router(replica("r1"), replica("r2", work_left=99.0), hold_s=10.0)
    calls = [call(ours, by(ANN), id=str(number)) for number in range(3)]
    assert await settled(*calls) == ["r1", "r1", None]
    urgent = call(ours, by(ANN, urgent=True), id="urgent")
    assert await settled(urgent) == ["r1"]
    for id in ("0", "1", "urgent"):  # each call that was there has failed, and its callers send it again
        ours.on_request_completed(ReplicaID("r1", MODEL), id)
    ours.on_replica_actor_died(ReplicaID("r1", MODEL))
    again = [call(ours, by(ANN), id=f"again {number}") for number in range(3)]
    assert await settled(calls[2], *again) == ["r2", None, None, None]  # it has nothing else under way
