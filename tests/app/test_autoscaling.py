"""How many replicas the policy asks for; and what comes of it in a simulated fleet under Serve's own delays."""

import math
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest
from ray.serve._private.common import DeploymentID, ReplicaID, TimeStampedValue
from ray.serve.autoscaling_policy import _apply_delay_logic
from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy

from app.autoscaling import WorkPolicy
from app.hint import Hint
from app.vitals import KEPT, Vitals, busy
from models.load import Load
from models.pace import Pace

MODEL = DeploymentID("Model", "model-sd15")
POLICY = WorkPolicy(drain_s=10.0)


def context(
    *stats: dict[str, float] | None,
    target: int | None = None,
    requests: float = 0.0,
    queued: float = 0.0,
    config: AutoscalingConfig | None = None,
) -> AutoscalingContext:
    """What Serve's controller tells of running replicas; None is one that has not reported yet."""
    ids = [ReplicaID(str(number), MODEL) for number in range(len(stats))]
    told = [(id, one) for id, one in zip(ids, stats, strict=True) if one is not None]
    names = ("seconds_left", "requests", "request_s", "busy")
    raw = {n: {id: series(n, s[n]) for id, s in told} for n in names}
    return AutoscalingContext(
        deployment_id=MODEL, deployment_name=MODEL.name, app_name=MODEL.app_name,
        current_num_replicas=len(ids), target_num_replicas=len(ids) if target is None else target, running_replicas=ids,
        total_num_requests=requests, total_queued_requests=queued,
        aggregated_metrics={}, raw_metrics=raw if told else {},
        capacity_adjusted_min_replicas=0, capacity_adjusted_max_replicas=99, policy_state={},
        last_scale_up_time=None, last_scale_down_time=None, current_time=1.0, config=config,
    )  # fmt: skip


def series(name: str, value: float) -> list[TimeStampedValue]:
    """A window of reports: shares have the value as their mean, of all else it is the last one."""
    before = 0.5 * value if name == "busy" else -1.0
    return [TimeStampedValue(0, before), TimeStampedValue(1, 1.5 * value if name == "busy" else value)]


def replica(
    left: float = 0.0, busy: float = 0.0, request: float = 1.0, requests: float | None = None
) -> dict[str, float]:
    """One that has something to do has 10 requests, unless they are said."""
    count = 10.0 * (left > 0) if requests is None else requests
    return {"seconds_left": left, "requests": count, "request_s": request, "busy": busy}


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        pytest.param(context(replica()), 0, id="nothing to do"),
        pytest.param(context(replica(), requests=0.1), 1, id="a request a moment ago"),
        pytest.param(context(replica(left=0.5, busy=0.1), requests=1), 1, id="one request"),
        pytest.param(
            context(replica(left=99.0, busy=1.0, requests=1), requests=1), 1, id="one long request, of many pictures"
        ),
        pytest.param(context(replica(left=99.0, busy=1.0, requests=1), requests=3, queued=2), 3, id="and two more"),
        pytest.param(context(replica(left=100.0, busy=1.0), requests=50), 10, id="a burst"),
        pytest.param(context(replica(left=20.0, busy=1.0), requests=50, queued=40), 6, id="what waits at handles too"),
        pytest.param(
            context(replica(left=20.0, busy=1.0), *3 * [replica(request=0.0)], requests=50, queued=40),
            6,
            id="what waits is not small to replicas that have just started",
        ),
        pytest.param(
            context(replica(left=20.0, busy=1.0, requests=50), requests=50, queued=40),
            2,
            id="what has waited a moment ago and is in an engine now counts once",
        ),
        pytest.param(context(*4 * [replica(left=2.0, busy=0.75)], requests=8), 4, id="steady traffic holds them"),
        pytest.param(context(*4 * [replica(left=1.0, busy=0.35)], requests=8), 2, id="less traffic"),
        pytest.param(context(*4 * [replica(left=9.0, busy=0.9)], requests=8), 4, id="exactly enough"),
        pytest.param(context(replica(left=25.0, busy=1.0), None, requests=9), 3, id="one has not reported yet"),
        pytest.param(context(None, requests=9, target=3), 3, id="none has: it stays as it is"),
        pytest.param(context(None, target=1), 1, id="none has, and nothing is known to wait"),
        pytest.param(context(replica(left=25.0, busy=1.0), target=3), 3, id="two have vanished, one has their work"),
        pytest.param(context(requests=0.0, target=0), 0, id="asleep"),
        pytest.param(context(requests=3.0, queued=3.0, target=0), 1, id="asleep, and somebody waits"),
    ],
)
def test_the_policy_asks_for(given: AutoscalingContext, wanted: int):
    assert POLICY(given) == (wanted, {})


def test_the_freshest_report_counts_and_not_the_windows_mean():
    """Each replica above said -1 before: a mean would be below what it has now."""
    assert POLICY(context(replica(left=10.1), requests=1))[0] == 2


def test_more_patience_wants_fewer_replicas():
    burst = context(replica(left=100.0, busy=1.0, requests=50), requests=50)
    assert [WorkPolicy(drain_s=seconds)(burst)[0] for seconds in (5, 10, 20, 1000)] == [20, 10, 5, 2]


@pytest.mark.parametrize("drain_s", [0, -1, math.inf, math.nan])
def test_a_wrong_target_is_refused(drain_s: float):
    with pytest.raises(ValueError, match="drain_s"):
        WorkPolicy(drain_s=drain_s)


def test_serve_can_send_the_policy_to_its_controller():
    policy = AutoscalingPolicy(policy_function="app.autoscaling:WorkPolicy", policy_kwargs={"drain_s": 5})
    assert policy.get_policy()(**policy.policy_kwargs)(context())[0] == 0


# What replicas tell


def load(work_left: float = 0.0, seconds_per_work: float = 0.5, waiting: int = 0, running: int = 0) -> Load:
    return Load(
        waiting=waiting, running=running, rows=0, forwards=0, work_left=work_left, seconds_per_work=seconds_per_work
    )


def test_a_replica_tells_what_is_left_and_what_a_mean_request_takes():
    vitals = Vitals()
    assert set(vitals.autoscaling(load(), 0.5).values()) == {0.0}
    vitals.note(Hint(work=8.0))
    told = {"seconds_left": 3.0, "requests": 2.0, "request_s": 4.0, "busy": 1.0}
    with vitals.under_way(), vitals.under_way():
        assert vitals.autoscaling(load(6.0, waiting=2, running=1), 0.5) == told
    assert vitals.autoscaling(load(), 0.5)["requests"] == 0.0
    for _ in range(200):
        vitals.note(Hint(work=4.0))
    assert vitals.autoscaling(load(), 0.5)["request_s"] == pytest.approx(2.0, rel=0.01)


@pytest.mark.parametrize(
    ("fixed_s", "shares"), [(0.0, (1.0, 1.0, 1.0)), (0.16, (0.22, 0.67, 1.0)), (9.0, (0.13, 0.5, 1.0))]
)
def test_how_busy_an_engine_is_follows_from_how_its_pace_grows_with_its_forwards(
    fixed_s: float, shares: tuple[float, float, float]
):
    """Of 16 rows at most, with 10 ms for each and a fixed part: none as on a processor, or nearly all as on a GPU."""
    pace = Pace()
    pace.learn({rows: fixed_s + 0.01 * rows for rows in (1, 2, 4, 8, 16, 32)}, usual=2, full=16)
    full = pace.seconds_per_work(math.inf)
    told = [busy(load(work_left=1.0, seconds_per_work=pace.seconds_per_work(rows)), full) for rows in (2, 8, 99)]
    assert told == pytest.approx(shares, abs=0.01)
    assert busy(load(work_left=0.0, seconds_per_work=pace.seconds_per_work(0)), full) == 0.0


def test_a_replica_tells_routers_what_it_met_lately_and_forgets_what_is_long_ago():
    vitals = Vitals()
    for number in range(KEPT + 1):
        vitals.note(Hint(loras=(f"l{number}", "often"), size=f"{number}x8"))
    told = vitals.routing(load(4.0), 0.5)
    assert (told["work_left"], told["seconds_per_work"]) == (4.0, 0.5)
    assert len(told["loras"]) == len(told["sizes"]) == KEPT
    assert "often" in told["loras"]
    assert "l0" not in told["loras"]
    assert "0x8" not in told["sizes"]


# A fleet in simulated time


@dataclass
class Fleet:
    """Replicas that share work evenly, each as fast as a forward with a fixed part is at its batch; Serve's delays,
    its look-back window, and a model that takes `start_s` to load. Work is in seconds of one replica's full forwards;
    the fixed part is in times of what the rows of a full one take."""

    config: AutoscalingConfig
    fixed: float = 0.2
    start_s: float = 10.0
    cap: int = 16  # rows
    request_rows: int = 2
    request_s: float = 0.5
    queue: list[float] = field(default_factory=list)  # the work of each request that is left
    running: int = 1
    starting: list[float] = field(default_factory=list)
    target: int = 1
    state: dict[str, Any] = field(default_factory=dict)
    window: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)
    owed: float = 0.0

    def second(self, now: float, arriving: float) -> None:
        """One second in which so many replicas' worth of work arrives."""
        self.owed += arriving
        while self.owed >= self.request_s:
            self.owed -= self.request_s
            self.queue.append(self.request_s)
        filled = min(1.0, len(self.queue) * self.request_rows / max(self.running, 1) / self.cap)
        share = filled * (1 + self.fixed) / (filled + self.fixed)
        done = min(self.running * share, sum(self.queue))
        self.waits.append(sum(self.queue) / max(self.running, 1))
        for place in range(len(self.queue)):
            self.queue[place] -= done / len(self.queue)
        self.queue = [left for left in self.queue if left > 0]
        self.window = [*self.window, done / max(self.running, 1)][-int(self.config.look_back_period_s) :]
        self._scale(now)

    def _scale(self, now: float) -> None:
        self.running += sum(at <= now for at in self.starting)
        self.starting = [at for at in self.starting if at > now]
        each = sum(self.queue) / max(self.running, 1)
        share = sum(self.window) / len(self.window)
        stats = [replica(each, share, self.request_s, len(self.queue) / self.running) for _ in range(self.running)]
        given = context(*stats, target=self.target, requests=float(len(self.queue)), config=self.config)
        desired = POLICY(given)[0]
        target, self.state = _apply_delay_logic(desired, self.target, self.config, self.state, _now=now)
        self.target = max(self.config.min_replicas, min(target, self.config.max_replicas))
        while self.running + len(self.starting) < self.target:
            self.starting.append(now + self.start_s)
        self.running = min(self.running, self.target)
        self.starting = self.starting[: self.target - self.running]
        self.counts.append(self.target)


def configured(**options: Any) -> AutoscalingConfig:
    defaults = {"min_replicas": 1, "max_replicas": 16, "upscale_delay_s": 2, "downscale_delay_s": 60}
    given: Any = defaults | {"look_back_period_s": 15} | options
    return AutoscalingConfig(**given)


def changes(counts: list[int]) -> int:
    return sum(before != after for before, after in pairwise(counts))


@pytest.mark.parametrize("fixed", [0.05, 0.2, 2.0])
@pytest.mark.parametrize("arriving", [0.3, 0.9, 2.4, 3.2, 6.5])
def test_steady_traffic_is_held_without_swinging(arriving: float, fixed: float):
    """For an hour, after the first five minutes, in which the fleet finds its size."""
    fleet = Fleet(configured(), fixed)
    for now in range(3900):
        fleet.second(float(now), arriving)
    settled = fleet.counts[300:]
    assert changes(settled) <= 4, settled[::60]
    assert arriving <= min(settled)
    assert max(settled) <= arriving / 0.5 + 1
    assert max(fleet.waits[300:]) < 10.0


def test_a_load_that_rises_holds_and_stops_is_followed():
    fleet = Fleet(configured(min_replicas=0, downscale_to_zero_delay_s=120))
    trace = [0.2] * 60 + [4.0 * second / 60 for second in range(60)] + [4.0] * 300 + [0.0] * 400
    for now, arriving in enumerate(trace):
        fleet.second(float(now), arriving)
    assert fleet.counts[59] == 1
    assert fleet.counts[400] >= 5
    assert 0 not in fleet.counts[:420]
    assert fleet.counts[-1] == 0
    assert fleet.counts[560] == 1, "asleep at once"
    assert max(fleet.waits[300:420]) < 10.0


def test_a_burst_is_answered_within_seconds_and_then_forgotten():
    fleet = Fleet(configured(), queue=[1.0] * 100)
    for now in range(200):
        fleet.second(float(now), 0.0)
    assert max(fleet.counts[:5]) >= 10
    assert fleet.counts[-1] == 1
