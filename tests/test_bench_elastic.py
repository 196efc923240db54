"""The pure parts of the scaling benchmark: its trace, what it counts, how it is told and drawn."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from app.deployment import Deployment
from bench import chart
from bench.chart import COLOURS, Panel, draw
from bench.elastic import DELAYS, MOST, Result, configuration, contenders, sheet_of
from bench.replicas import Count, replica_seconds
from bench.simulation import real
from bench.trace import LONG, SHORT, Answer, Arrival, Shape, trace


def counts(*numbers: int) -> list[Count]:
    return [Count(at_s=float(second), running=number, held=number + 1) for second, number in enumerate(numbers)]


def test_a_trace_is_its_seeds_and_follows_its_shape():
    shape = Shape()
    arrivals = trace(shape, seed=3)
    assert arrivals == trace(shape, seed=3) != trace(shape, seed=4)
    assert (arrivals[0].at_s, arrivals[0].steps) == (0.0, LONG)
    seconds = [arrival.at_s for arrival in arrivals]
    assert seconds == sorted(seconds)
    held = sum(second >= shape.few_s + shape.rise_s for second in seconds)
    assert held == pytest.approx(shape.peak * shape.hold_s, rel=0.15)
    assert sum(second < shape.few_s for second in seconds) < 20
    kinds = Counter(arrival.steps for arrival in arrivals)
    assert kinds[SHORT] == pytest.approx(kinds[LONG], rel=0.2)


def test_replica_seconds_count_all_that_hold_a_place():
    assert replica_seconds(counts(0, 2, 2, 0)) == 1 + 3 + 3
    assert replica_seconds([]) == 0


def test_both_contenders_have_the_same_bounds_and_configurations_that_the_server_accepts(tmp_path: Path):
    scalings = []
    for contender in contenders(drain_s=3.0, hold_s=5.0, target=8.0):
        config = configuration(tmp_path, contender)
        assert len(Deployment.model_validate(real(config)).models) == 1
        model = config["applications"][0]
        assert model["args"]["routing"] == contender.args["routing"]
        scalings.append(model["deployments"][0]["autoscaling_config"])
    assert all(scaling | DELAYS == scaling and scaling["max_replicas"] == MOST for scaling in scalings)
    assert ["policy" in scaling for scaling in scalings] == [True, False]


def test_a_contenders_line_tells_what_became_of_its_requests():
    answers = [
        Answer(arrival=Arrival(at_s=0.0, steps=LONG, seed=0), latency_s=9.0, wait_s=7.0),
        Answer(arrival=Arrival(at_s=1.0, steps=SHORT, seed=1), latency_s=1.0, wait_s=0.5),
        Answer(arrival=Arrival(at_s=2.0, steps=SHORT, seed=2), latency_s=2.0, wait_s=2.0, error="503"),
    ]
    result = Result(contender="by work", answers=answers, counts=counts(0, 1, 2, 4, 4, 3, 1, 0))
    [row] = sheet_of([result]).rows
    assert row[0] == "by work"
    assert row[-3:] == ["0, 1, 4, 1, 0", "22", "1"]
    assert row[1:3] == ["2.00", "7.00"]
    assert row[-4] == "9.00"


def test_a_chart_shows_each_series_where_its_values_are(tmp_path: Path):
    panels = [
        Panel(title="high", series={"a": [(0.0, 4.0), (10.0, 4.0)]}),
        Panel(
            title="steps",
            series={"a": [(0.0, 0.0), (5.0, 8.0), (10.0, 8.0)], "b": [(0.0, 2.0), (10.0, 2.0)]},
            steps=True,
        ),
    ]
    draw(panels, tmp_path / "chart.png")
    pixels = np.asarray(Image.open(tmp_path / "chart.png"))
    assert pixels.shape == (2 * chart.HEIGHT, chart.WIDTH, 3)
    middle = (chart.LEFT + chart.WIDTH - chart.RIGHT) // 2
    first = [np.argwhere((pixels[:, x] == COLOURS[0]).all(-1)).ravel() for x in (middle - 60, middle + 60)]
    upper, lower = ([row[row < chart.HEIGHT], row[row >= chart.HEIGHT]] for row in first)
    assert abs(upper[0].mean() - chart.TOP) < 3, "4 is the top of its axis"
    assert upper[1].mean() > 2 * chart.HEIGHT - chart.BOTTOM - 3, "0 until the step"
    assert abs(lower[1].mean() - chart.HEIGHT - chart.TOP) < 3, "8 after it"


@pytest.mark.parametrize(("value", "top"), [(0.0, 0.4), (0.5, 0.8), (1.0, 2.0), (3.0, 4.0), (5.0, 8.0), (9.0, 20.0)])
def test_an_axis_ends_at_a_round_number(value: float, top: float):
    assert chart._round_up(value) == pytest.approx(top)
