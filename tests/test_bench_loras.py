"""The LoRA benchmark's own honesty: taken in turns, the median counts, and the table says whose share of whom."""

from bench.loras import Measured, measure, sheet_of


def found(**seconds: float) -> list[Measured]:
    return [Measured(name=name, title=name, wall_s=wall, cpu_s=wall) for name, wall in seconds.items()]


def test_shares_are_of_none_and_of_one_by_one():
    figures = {"none": 4.0, "mixed": 5.0}
    sheet = sheet_of([*found(**figures), Measured(name="one by one", title="one by one", wall_s=10.0, cpu_s=8.0)])
    assert sheet.rows == [
        ["none", "2.00", "1.00", "2.50", "0.50"],
        ["mixed", "1.60", "0.80", "2.00", "0.62"],
        ["one by one", "0.80", "0.40", "1.00", "1.00"],
    ]


def test_ways_are_measured_in_turns_and_the_first_round_does_not_count():
    calls: list[str] = []
    measured = measure({name: (name, lambda name=name: calls.append(name)) for name in "ab"}, rounds=3)
    assert calls == ["a", "b"] * 4
    assert [one.name for one in measured] == ["a", "b"]
