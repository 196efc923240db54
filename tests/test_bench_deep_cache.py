"""What skipping steps costs: every table has its figures, and the page has marks for them."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from bench import deep_cache
from bench.deep_cache import INTERVALS, PAGE, SCENES, Scored


def test_distances_grow_with_the_interval_and_every_scene_is_scored(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(deep_cache, "STEPS", (8,))
    found = deep_cache._measured("sd15", 1, 2, Console(file=io.StringIO()))
    distances = [pictures[0][0] for pictures in found.drifts[8].values()]
    decibels = [pictures[0][1] for pictures in found.drifts[8].values()]
    assert 0 < distances[0] < distances[-1]
    assert decibels[0] > decibels[-1]
    for kind in SCENES:
        assert list(found.scenes[kind]) == list(INTERVALS)
        assert all(0 <= one.right <= 2 and one.seconds > 0 for one in found.scenes[kind].values())


def test_tables_say_what_was_found():
    drifts = {20: {2: [(0.1, 40.0), (0.05, 44.0)], 3: [(0.2, 30.0)], 5: [(1.1, 20.0)]}}
    scenes = {"one object": {1: Scored(9, 8.0), 2: Scored(8, 4.0), 3: Scored(7, 2.0), 5: Scored(6, 1.0)}}
    found = {"sd15": deep_cache.Found(drifts, scenes)}
    [drift], [scene] = deep_cache._drifts(found).rows, deep_cache._scenes(found, 10).rows
    assert list(drift)[:3] == ["sd15, 20 steps", "0.05 to 0.10", "0.20 to 0.20"]
    assert list(drift)[4] == "40 to 44"
    assert list(scene) == ["sd15, one object", "9", "8", "7", "6", "2.0", "4.0", "8.0"]


def test_the_page_has_marks_for_them(tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text(PAGE.read_text())
    deep_cache.readme.publish("measured", "told", page)
    assert "-->\ntold\n<!--" in page.read_text()
