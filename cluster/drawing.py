"""Drawer: from a block of rows of a batch job to pictures in their place, and to a record of each."""

import hashlib
import logging
import os
import queue
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import orjson

from app import wire
from app.dialects.native import GenerateBody, parameters, to_request
from app.errors import envelope
from app.stores.store import CONTENT_TYPES
from cluster.beginnings import ALONE, TOGETHER, Beginnings
from cluster.inputs import Pictures
from cluster.manifest import SCHEMA, Manifest, Record
from cluster.place import Place
from cluster.shared_lock import SharedLock
from cluster.table import Row
from models.errors import GenerationFailed, HeliographError
from models.events import Event, Failed, Finished
from models.images import MEDIA_TYPES, ImageFormat
from models.limits import SAMPLES
from models.request import EffectiveRequest, GenerationRequest

if TYPE_CHECKING:
    from models.engine import Engine

IMAGES = "images"
_SAMPLES = range(int(SAMPLES.low), int(SAMPLES.high) + 1)
BEGINNINGS = 2  # of a row whose failure may mend itself
KEEPERS = 8  # pictures that are stored at a time
LOOK_S = 5.0  # how often a silent engine is asked how it is

Heard = queue.SimpleQueue[tuple[int, Event]]  # events of rows, by number

_DEATHS = f"its process ended {TOGETHER} times with its block, and {ALONE} times while it drew this row alone"
_POISONED = {"code": "poisoned", "message": _DEATHS, "retryable": False}

_log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class _Drawing:
    """A row that the engine works on: how often it was begun, and the records of its pictures by index."""

    row: Row
    request: EffectiveRequest
    began: int = 0
    kept: dict[int, Future[Record]] = field(default_factory=dict)


class Drawer:
    """Draws blocks of rows with an engine, into a place. May be called by several threads."""

    def __init__(self, engine: "Engine", pictures: Pictures, place: Place):
        self._engine, self._pictures, self._place = engine, pictures, place
        self._manifest, self._beginnings = Manifest(place), Beginnings(place)
        self._lock = SharedLock()
        self._keepers = ThreadPoolExecutor(KEEPERS, thread_name_prefix="keeper")

    def draw(self, rows: Sequence[Row]) -> list[Record]:
        """Draws the rows and records them, as a part of the manifest. Gives the records.

        Of rows that stand in a part by now nothing is drawn and there are none: their actor died after it was written,
        or it is of an earlier run, which ended later than one thought and had other blocks. Raises StoreUnavailable.
        """
        first = rows[0].number
        while rows and (recorded := self._manifest.part(rows[0].number)):
            rows = [row for row in rows if row.number not in recorded]
        if not rows:
            return []
        with self._lock.shared():
            together = self._beginnings.together(first)
            records = self._recorded(rows, self._drawn(rows)) if together else []
        if not together:
            records = [record for row in rows for record in self._drawn_alone(row)]
        self._beginnings.over(first)
        return records

    def _drawn_alone(self, row: Row) -> Sequence[Record]:
        """Nothing else is drawn in this process meanwhile, by other threads either: what ends it is this row."""
        with self._lock.alone():
            records = self._drawn([row]) if self._beginnings.alone(row.number) else [self._given_up(row, _POISONED)]
            self._recorded([row], records)
            self._beginnings.over_alone(row.number)
        return records

    def _recorded(self, rows: Sequence[Row], records: list[Record]) -> list[Record]:
        self._manifest.add(rows[0].number, records)
        return records

    def _drawn(self, rows: Sequence[Row]) -> list[Record]:
        """The records of all rows, once their pictures are stored."""
        heard: Heard = queue.SimpleQueue()
        records: list[Record] = []
        drawings: dict[int, _Drawing] = {}
        for row in rows:
            if row.error is not None:
                records.append(_failed(row, row.error))
                continue
            try:
                drawings[row.number] = self._begun(_Drawing(row=row, request=self._request(row)), heard)
            except HeliographError as error:
                records.append(self._given_up(row, envelope(error)["error"]))
        while drawings:
            number, event = self._next(heard)
            if number in drawings and isinstance(event, Finished | Failed):
                records += self._heard(drawings, number, event, heard)
        return records

    def _heard(
        self, drawings: dict[int, _Drawing], number: int, event: Finished | Failed, heard: Heard
    ) -> Sequence[Record]:
        """The records of a row that has come to its end with this event."""
        drawing = drawings[number]
        if isinstance(event, Finished):
            drawing.kept[event.index] = self._keepers.submit(self._keep, drawing, event)
            if len(drawing.kept) < drawing.request.samples:
                return ()
            return [kept.result() for kept in drawings.pop(number).kept.values()]
        self._check_engine()
        error = event.error
        retryable = isinstance(error, GenerationFailed) and error.retryable
        if retryable and drawing.began < BEGINNINGS:
            try:
                self._begun(drawing, heard)
                return ()
            except HeliographError as refusal:
                error = refusal
        del drawings[number]
        wait(drawing.kept.values())
        return [self._given_up(drawing.row, envelope(error)["error"])]

    def _request(self, row: Row) -> EffectiveRequest:
        """What to draw. Raises what is wrong with it."""
        body = wire.validate(self._pictures.read(row.body) | {"priority": "batch"}, GenerateBody)
        request = to_request(self._pictures.fetched(body), self._engine.card.name)
        return _seeded(request, row).resolve(self._engine.card)

    def _begun(self, drawing: _Drawing, heard: Heard) -> _Drawing:
        drawing.began += 1
        wait(drawing.kept.values())  # a late one must not replace what the next beginning stores under its name
        drawing.kept.clear()
        self._engine.submit(drawing.request, partial(_tell, heard, drawing.row.number), progress=False)
        return drawing

    def _next(self, heard: Heard) -> tuple[int, Event]:
        while True:
            try:
                return heard.get(timeout=LOOK_S)
            except queue.Empty:
                self._check_engine()

    def _check_engine(self) -> None:
        """An engine that cannot go on takes its process with it: Ray starts another actor, and gives it the blocks."""
        reason = self._engine.healthy()
        if reason is not None:
            _log.error("the engine is not healthy: %s", reason)
            os._exit(1)

    def _keep(self, drawing: _Drawing, picture: Finished) -> Record:
        path = _path(drawing.row, picture.index, picture.format)
        self._place.put(path, picture.data, MEDIA_TYPES[picture.format])
        return _record(drawing, picture, path)

    def _given_up(self, row: Row, error: Mapping[str, Any]) -> Record:
        """The record of a row that failed; pictures of it that came are removed, those of earlier runs too."""
        samples = row.body.get("samples", 1)
        indices = range(samples) if samples in _SAMPLES else range(1)
        self._place.delete(*(_path(row, index, format) for index in indices for format in MEDIA_TYPES))
        return _failed(row, error)


def _path(row: Row, index: int, format: ImageFormat) -> str:
    """Where a picture of a row is kept."""
    return f"{IMAGES}/{row.id}-{index}.{CONTENT_TYPES[MEDIA_TYPES[format]]}"


def _tell(heard: Heard, number: int, event: Event) -> None:
    heard.put((number, event))


def _seeded(request: GenerationRequest, row: Row) -> GenerationRequest:
    """The request with the seeds that it leaves open made of the row: drawn again, it gives the same picture."""
    digest = row.digest()
    seed, variation = (int.from_bytes(digest[at : at + 4], "big") for at in (0, 4))
    if request.seed is None:
        request = replace(request, seed=seed)
    if request.variation_strength and request.variation_seed is None:
        request = replace(request, variation_seed=variation)
    return request


def _record(drawing: _Drawing, picture: Finished, path: str) -> Record:
    stages = {name.removesuffix("_s"): round(s, 4) for name, s in vars(picture.timings).items() if s is not None}
    return {
        "number": drawing.row.number,
        "id": drawing.row.id,
        "index": picture.index,
        "path": path,
        "seed": picture.seed,
        "sha256": hashlib.sha256(picture.data).hexdigest(),
        "format": picture.format,
        "width": picture.width,
        "height": picture.height,
        "model": drawing.request.model,
        "revision": picture.revision,
        "parameters": _json(parameters(drawing.request)),
        "timings": _json(stages),
        "warnings": _json(list(picture.warnings)),
        "error": None,
    }


def _failed(row: Row, error: Mapping[str, Any]) -> Record:
    return dict.fromkeys(SCHEMA.names) | {
        "number": row.number,
        "id": row.id,
        "index": 0,
        "parameters": _json(row.body),
        "error": _json(error),
    }


def _json(value: Any) -> str:
    return orjson.dumps(value).decode()
