"""Experiments: those of the configuration, as one process runs them."""

import time
import uuid
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, replace

from app.drawing import GenerationResult, StreamEvent
from app.errors import BudgetSpent, NotRunning, code_of
from app.experiments.enrolment import Draws, Enrolment, Visit, enrol
from app.experiments.rails import Key, Rails, RailState
from app.experiments.recorder import Recorder
from app.experiments.settings import ExperimentSettings
from app.experiments.store import ExperimentStore, Exposure
from app.keys.caller import current
from models.errors import GenerationFailed, HeliographError, NotFound, Overloaded, Unavailable
from models.events import Timings
from models.parts import ArmUse
from models.request import EffectiveRequest, GenerationRequest

# What counts against an arm. What the caller did wrong, took back or has no budget for does not.
_FAILURES = (GenerationFailed, Overloaded, Unavailable)


@dataclass(frozen=True, kw_only=True)
class Offered:
    """An experiment that is configured, and how its arms' rails stand in this process."""

    name: str
    settings: ExperimentSettings
    rails: Mapping[str, RailState]


class Experiments:
    """The experiments that are on, and what is seen of them. Without a store nothing of it is written down."""

    def __init__(
        self,
        store: ExperimentStore | None = None,
        now: Callable[[], float] = time.monotonic,
        waits: bool = False,
        count: Callable[[Exposure], None] = lambda exposure: None,
    ):
        """`now` is the clock by which arms that were switched off recover. Who `waits` for a model that is busy or
        does not run, and asks again, has not failed by then. `count` hears of every exposure."""
        self._forgiven = (BudgetSpent, Overloaded, NotRunning) if waits else (BudgetSpent,)
        self._store = store
        self._recorder = None if store is None else Recorder(store.record)
        self._rails, self._count = Rails(now), count
        self._settings: dict[str, ExperimentSettings] = {}

    def offer(self, settings: Mapping[str, ExperimentSettings], default_model: str) -> None:
        """Replaces the experiments. What was seen of one that stays as it is stays known."""
        self._settings = {name: one.completed(default_model) for name, one in settings.items()}
        self._rails.keep({_key(name, arm, one) for name, one in self._settings.items() for arm in one.arms})

    @property
    def store(self) -> ExperimentStore:
        """What was seen. Raises NotFound where nothing is written down."""
        if self._store is None:
            raise NotFound("this server keeps no exposures")
        return self._store

    def all(self) -> list[Offered]:
        """Every experiment that is configured."""
        return [self.get(name) for name in self._settings]

    def get(self, name: str) -> Offered:
        """One of them. Raises NotFound listing those there are."""
        if name not in self._settings:
            raise NotFound(f"there is no experiment {name!r}; there are: {', '.join(self._settings) or 'none'}")
        settings = self._settings[name]
        return Offered(name=name, settings=settings, rails={arm: self._state(name, arm) for arm in settings.drawn})

    def enrol(self, request: GenerationRequest, visit: Visit, draws: Draws) -> Enrolment:
        """Puts a request into the experiments that it belongs to; `draws` says whether its model takes a request."""
        return enrol(request, visit, self._settings, draws, self._is_off)

    async def watched(
        self, wanted: EffectiveRequest, began: float, events: AsyncGenerator[StreamEvent, None]
    ) -> AsyncGenerator[StreamEvent, None]:
        """The events of a request; its end is noted for each arm that it was put in. `began` is by time.monotonic()."""
        try:
            async with aclosing(events):
                async for event in events:
                    if isinstance(event, GenerationResult) and wanted.experiments:
                        event = await self._drawn(event, time.monotonic() - began)
                    yield event
        except _FAILURES as error:
            if not isinstance(error, self._forgiven):
                await self._failed(wanted, error)
            raise

    async def _drawn(self, result: GenerationResult, seconds: float) -> GenerationResult:
        drawn = None if result.cached else seconds
        engine_s = 0.0 if result.cached else sum(_engine_s(image.timings) for image in result.images)
        seen = [
            replace(
                _exposure(use, result.id, result.request.model),
                receipt_id=result.receipt_id,
                total_s=drawn,
                engine_s=engine_s,
            )
            for use in result.request.experiments
        ]
        return replace(result, uncounted=not await self._note(seen))

    async def _failed(self, wanted: EffectiveRequest, error: HeliographError) -> None:
        id = uuid.uuid4().hex
        await self._note(
            [replace(_exposure(use, id, wanted.model), error=code_of(error)) for use in wanted.experiments]
        )

    async def _note(self, seen: list[Exposure]) -> bool:
        """Whether it is written down."""
        for one in seen:
            self._count(one)
            guard = self._settings[one.experiment].guard if one.experiment in self._settings else None
            if guard is not None and one.arm == one.assigned:
                key = (one.experiment, one.version, one.arm)
                self._rails.note(key, guard, one.error is not None, one.total_s)
        return self._recorder is None or not seen or await self._recorder.record(seen)

    def _is_off(self, name: str, arm: str) -> bool:
        return self._state(name, arm).state == "off"

    def _state(self, name: str, arm: str) -> RailState:
        settings = self._settings[name]
        if settings.guard is None or arm == settings.control:  # which the others fall back on
            return RailState()
        return self._rails.state(_key(name, arm, settings), settings.guard)


def _key(name: str, arm: str, settings: ExperimentSettings) -> Key:
    return name, settings.version, arm


def _exposure(use: ArmUse, id: str, model: str) -> Exposure:
    return Exposure(id=id, owner=current.get().id, model=model, **vars(use))


def _engine_s(timings: Timings) -> float:
    return timings.encode_s + timings.denoise_s + timings.decode_s + (timings.upscale_s or 0.0)
