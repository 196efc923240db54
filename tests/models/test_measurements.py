"""What a warm-up measures is kept, for machines and models like those on which it was measured."""

import json
import logging
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from app.settings import ModelSettings
from models import likeness, measuring
from models.errors import InvalidRequest
from models.measurements import Measurements, Seconds
from tests.models.conftest import loaded_family, new_engine

SHAPE, LARGER = (4, 16, 16), (4, 24, 32)
CURVE = {1: 1.0, 2: 1.1, 4: 1.2, 8: 2.4}


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Which sizes are measured, without measuring them."""
    sizes: list[tuple[int, int]] = []

    def forward_s(preparation: Any, denoiser: Any, plain: Any, rows: int) -> float:
        if rows == 1:
            sizes.append((plain.width, plain.height))
        return CURVE.get(rows, 0.3 * rows)

    monkeypatch.setattr(measuring, "forward_s", forward_s)
    return sizes


def test_the_next_start_measures_nothing(tmp_path: Path, measured: list[tuple[int, int]]):
    folder = tmp_path / "of" / "machine"
    for _ in range(2):
        engine = new_engine("sd15")
        engine.warm_up(sizes=[(256, 192)], kept=folder)
        assert engine.batcher.cap(SHAPE) == engine.batcher.cap(LARGER) == 4
        assert engine.pace.plain_s == pytest.approx(CURVE[2])
    assert measured == [(128, 128), (256, 192)]
    [file] = folder.iterdir()
    assert json.loads(file.read_text())["4x16x16"]["4"] == CURVE[4]

    new_engine("sd15").warm_up(sizes=[(256, 192), (64, 64)], kept=folder)
    assert measured[2:] == [(64, 64)]  # what is new
    new_engine("sd21").warm_up(kept=folder)
    assert measured[3:] == [(128, 128)]  # another architecture
    new_engine("sd15").warm_up(cap=2, kept=folder)
    assert measured[4:] == [(128, 128)]  # broader ones would be missing next time
    new_engine("sd15").warm_up()
    assert measured[5:] == [(128, 128)]


def test_other_sizes_have_caps_of_their_own():
    """Measured in earnest: the curve of a size is not that of another."""
    engine = new_engine("sd15")
    engine.warm_up(sizes=[(64, 64)])
    assert engine.batcher.cap((4, 8, 8)) in measuring._ROW_COUNTS
    assert set(engine.batcher._caps) == {SHAPE, (4, 8, 8)}


NO_MEASUREMENTS = ("", "{", "[]", '{"4x16x16": {}}', '{"4x16x16": {"1": "x"}}', '{"4x16x16": {"1": -1}}')


@pytest.mark.parametrize("told", NO_MEASUREMENTS)
def test_what_cannot_be_read_is_measured_anew(
    tmp_path: Path, measured: list[tuple[int, int]], told: str, caplog: pytest.LogCaptureFixture
):
    new_engine("sd15").warm_up(kept=tmp_path)
    [file] = tmp_path.iterdir()
    file.write_text(told)
    with caplog.at_level(logging.WARNING):
        new_engine("sd15").warm_up(kept=tmp_path)
    assert file.name in caplog.text
    new_engine("sd15").warm_up(kept=tmp_path)
    assert len(measured) == 2


def test_a_folder_that_cannot_be_written_costs_nothing_but_the_keeping(
    tmp_path: Path, measured: list[tuple[int, int]], caplog: pytest.LogCaptureFixture
):
    (tmp_path / "file").write_text("")
    engine = new_engine("sd15")
    with caplog.at_level(logging.WARNING):
        engine.warm_up(kept=tmp_path / "file")
    assert engine.batcher.cap(SHAPE) == 4
    assert "not kept" in caplog.text


def test_what_makes_forwards_faster_or_slower_makes_another_measurement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    family: Any = SimpleNamespace(**vars(loaded_family("sd15")))

    def measure(most: int | None) -> Seconds:
        return {1: 1.0}

    kinds: list[dict[str, Any]] = [{}, {"fp8": True}, {"graphs": True}, {"compiled": tmp_path}, {"offload": True}]
    for change in kinds:
        family.placement = replace(loaded_family("sd15").placement, **change)
        Measurements(family, None, tmp_path).of(SHAPE, measure)
    Measurements(family, 8, tmp_path).of(SHAPE, measure)
    monkeypatch.setattr(likeness, "_processor", lambda device: "another")
    Measurements(family, 8, tmp_path).of(SHAPE, measure)
    assert len(list(tmp_path.iterdir())) == len(kinds) + 2


def test_a_size_that_the_model_does_not_draw_is_refused_before_anything_is_measured(measured: list[tuple[int, int]]):
    with pytest.raises(InvalidRequest, match="must be a multiple of 8") as refused:
        new_engine("sd15").warm_up(sizes=[(64, 64), (100, 64)])
    assert refused.value.field == "sizes.1"
    assert not measured


def test_a_size_of_which_not_one_row_fits_is_told():
    def forward_s(rows: int) -> float:
        raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        measuring.seconds_by_rows(forward_s)


@pytest.mark.parametrize("more", [{"max_rows": 8}, {"family": "sd_x4"}])
def test_sizes_that_would_not_be_measured_are_refused(more: dict[str, Any]):
    with pytest.raises(ValidationError, match="sizes are measured"):
        ModelSettings(**{"name": "a", "source": "b", "sizes": ((64, 64),)} | more)
