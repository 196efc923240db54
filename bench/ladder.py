"""The ladder: one optimisation after the other, each with the gain that was predicted for it and the one it has."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from bench.built import STEPS, Built
from bench.contender import ROWS
from bench.inprocess import InProcess
from bench.load import Load, Say, drive
from bench.pages import Keep, Piece
from bench.report import NOTHING, Sheet, figure
from bench.turns import SERIAL, Saturated, saturated
from bench.workloads import RequestClass, requests_of, workloads_at
from models.errors import InvalidRequest

REPEATS = 3  # of a picture alone
LEGEND = (
    "Equal requests of 20 steps, all submitted at once. Each line has what the lines above it have, but for those that "
    "were not measured; FP8 and DeepCache, which do not go with what is compiled, each have what `graphs` has. Gain: "
    "pictures a second over the last line that was measured, of these two over `graphs` where that was; below 1 where "
    "it costs more than it gives. Predicted: what was expected before anything was measured, from published figures "
    "and a model of the GPU. Alone: seconds of one picture with nobody beside it."
)


@dataclass(frozen=True, kw_only=True)
class Rung:
    """One optimisation: its name, its predicted gain by model, and what it sets: `cap`, `remembering`, an option of
    models.weights.place, or `deep_cache` of the requests. Its gain is that over another rung, or over the last one."""

    name: str
    predicted: Mapping[str, str] = field(default_factory=dict)
    sets: Mapping[str, Any]
    over: str = ""


ALIKE = ("sd15", "sd21", "sdxl")
ALONE = {"sd15": "1.0 (alone 1.5–1.9)", "sdxl": "1.0 (alone 1.2–1.4)"}
FUSED = {"sd15": "1.2–1.5", "sdxl": "1.25–1.35"}
EIGHT = {"sdxl": "up to 1.3"}
SKIPPING = {"compiled": False, "fp8": False, "deep_cache": 3}
CACHED = {"sd15": "2.0–2.4", "sd21": "2.0–2.3", "sdxl": "2.2–2.8"}
RUNGS = (
    Rung(name="eager, channels-last, one at a time", sets={"cap": ROWS, "remembering": False}),
    Rung(name="keys and values made once", predicted=dict.fromkeys(ALIKE, "1.01–1.03"), sets={"remembering": True}),
    Rung(name="shared forwards, measured cap", predicted={"sd15": "2.7", "sdxl": "1.15–1.3"}, sets={"cap": None}),
    Rung(name="graphs", predicted=ALONE, sets={"graphs": True}),
    Rung(name="compiled", predicted=FUSED, sets={"compiled": True}),
    Rung(name="FP8, not compiled", predicted=EIGHT, sets={"compiled": False, "fp8": True}, over="graphs"),
    Rung(name="DeepCache 3, not compiled", predicted=CACHED, sets=SKIPPING, over="graphs"),
)


@dataclass(kw_only=True)
class Climbed:
    """A rung's findings; `missing` says why there are none."""

    name: str
    predicted: str
    missing: str = ""
    saturated: Saturated | None = None
    alone_s: float | None = None
    cap: int | None = None  # in rows
    gain: float | None = None


async def climb(built: Built, say: Say, keep: Keep) -> None:
    """All rungs in turn. One that fails is told, and what it sets is left out of those after it."""
    found: list[Climbed] = []
    settings: dict[str, Any] = {}
    measured: dict[str, Saturated] = {}
    for rung in RUNGS:
        one = Climbed(name=rung.name, predicted=rung.predicted.get(built.network.name, NOTHING))
        found.append(one)
        say(f"{rung.name}: starting", 0, 1)
        try:
            await _measure(built, one, say, **settings | rung.sets)
        except InvalidRequest as refusal:
            one.missing = str(refusal)
        except Exception as fault:  # whatever it is: the other rungs are worth having
            one.missing = f"failed: {fault!r}"
        if one.saturated is not None:
            last = next(reversed(measured.values()), None)
            before = measured.get(rung.over, last)
            one.gain = one.saturated.pictures_per_s / before.pictures_per_s if before is not None else None
            settings, measured[rung.name] = settings | rung.sets, one.saturated
        missing = [f"Not measured: {each.name} ({each.missing})." for each in found if each.missing]
        keep(Piece.of("ladder", built, [_sheet(built, found)], [LEGEND, *missing], found))


async def _measure(
    built: Built,
    one: Climbed,
    say: Say,
    *,
    cap: int | None,
    remembering: bool,
    compiled: bool = False,
    deep_cache: int = 1,
    **how: Any,
) -> None:
    """What the rung gives. Raises InvalidRequest for what this device or these options do not allow."""
    folder = built.options.compiled
    if compiled and folder is None:
        raise InvalidRequest("compiled", "no folder was given for what is compiled")
    placement = built.placed(compiled=folder if compiled else None, **how)
    name = built.network.name
    make = partial(built.engine, cap, placement=placement, remembering=remembering, deep_cache=deep_cache)
    async with InProcess(make, "E", one.name) as engine:
        if compiled and not engine.compiled_kinds:
            raise RuntimeError("none of its forwards could be compiled")
        one.cap = engine.cap(built.side)
        singles = [built.request_of(RequestClass(built.side, STEPS), seed) for seed in range(REPEATS)]
        alone = [await drive(engine, Load.saturating([replace(each, deep_cache=deep_cache)])) for each in singles]
        one.alone_s = statistics.median(run.latency_s(50) for run in alone)
        equal, *_ = workloads_at(built.side, built.side)
        count = built.options.pictures // (SERIAL if cap else 1)
        requests = requests_of(equal, max(2, count), built.options.seed, name)
        requests = [replace(request, deep_cache=deep_cache) for request in requests]
        one.saturated = await saturated(engine, built, equal, requests, say)


def _sheet(built: Built, found: Sequence[Climbed]) -> Sheet:
    name = built.network.name
    return Sheet(
        title=f"{name} at {built.side} px, one optimisation after the other",
        columns=(name, "pictures/s", "gain", "predicted", "alone", "cap", "rows", "padded"),
        rows=[_row(one) for one in found],
    )


def _row(one: Climbed) -> list[str]:
    if one.saturated is None:
        return [one.name, NOTHING, NOTHING, one.predicted, *[NOTHING] * 4]
    return [
        one.name,
        f"{one.saturated.pictures_per_s:.3g}",
        figure(one.gain),
        one.predicted,
        figure(one.alone_s, 3),
        str(one.cap),
        f"{one.saturated.rows_per_forward:.1f}",
        f"{one.saturated.padded_share:.0%}",
    ]
