"""A Heliograph server over HTTP, and an engine in this process, as the command line sees them: the same two events."""

import base64
import json
import queue
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import quote

import httpx2

from app.settings import ModelSettings, UpscalerSettings, api_key
from models.errors import HeliographError, InvalidRequest
from models.events import Event, Failed, Finished, Progress, Timings
from models.images import MEDIA_TYPES, ImageFormat
from models.parts import Upscale

REQUEST_TIMEOUT_S = 900.0  # a model that sleeps has to wake first
ANSWER_TIMEOUT_S = 90.0  # of what draws nothing; a job may be waited for, for a minute


class ServerSaid(HeliographError):
    """The server refused."""


class Unreachable(HeliographError):
    """No server answers there."""


class Client:
    """Speaks the native API, with the key of the environment where there is one."""

    def __init__(self, address: str):
        self._address = address.rstrip("/")
        key = api_key()
        self._headers = {"authorization": f"Bearer {key}"} if key else {}

    def models(self) -> list[dict[str, Any]]:
        """Every model the server offers."""
        return self._get("/v1/models")["data"]

    def model(self, name: str) -> dict[str, Any]:
        """One model."""
        return self._get(f"/v1/models/{name}")

    def adapters(self) -> list[dict[str, Any]]:
        """What a request may name beside a model."""
        return self._get("/v1/adapters")["data"]

    def samplers(self) -> list[dict[str, Any]]:
        """Every sampler and its schedules."""
        return self._get("/v1/samplers")["data"]

    def generate(self, body: dict[str, Any]) -> Iterator[Progress | Finished]:
        """Makes pictures and tells how it goes. Raises ServerSaid or Unreachable."""
        request = {"json": body | {"stream": True, "preview_every": 0}, "timeout": REQUEST_TIMEOUT_S}
        try:
            with httpx2.stream("POST", f"{self._address}/v1/generate", headers=self._headers, **request) as answer:
                if answer.status_code != 200:
                    answer.read()
                    raise _refusal(answer)
                yield from _parse(answer.iter_lines())
        except httpx2.HTTPError as gone:
            raise self._unreachable(gone) from gone

    def upscale(self, picture: bytes, scale: float | None, model: str | None, format: ImageFormat) -> bytes:
        """The encoded picture, enlarged, in that format. Raises ServerSaid or Unreachable."""
        wanted = {"image": base64.b64encode(picture).decode(), "scale": scale, "model": model}
        body = {name: value for name, value in wanted.items() if value is not None}
        headers = self._headers | {"accept": MEDIA_TYPES[format]}
        try:
            answer = httpx2.post(f"{self._address}/v1/upscale", json=body, headers=headers, timeout=REQUEST_TIMEOUT_S)
        except httpx2.HTTPError as gone:
            raise self._unreachable(gone) from gone
        if answer.status_code != 200:
            raise _refusal(answer)
        return answer.content

    def submit(self, body: dict[str, Any]) -> dict[str, Any]:
        """Has a job made of a request to draw. Raises ServerSaid or Unreachable."""
        return self._ask("POST", "/v1/generate", json=body | {"async": True})

    def jobs(self, filters: dict[str, Any]) -> list[dict[str, Any]]:
        """The newest jobs that fit."""
        return self._ask("GET", "/v1/jobs", params=filters)["jobs"]

    def job(self, id: str, wait_s: int | None = None) -> dict[str, Any]:
        """One job, once it has finished or so many seconds are over."""
        prefer = {} if wait_s is None else {"prefer": f"wait={wait_s}"}
        return self._ask("GET", f"/v1/jobs/{quote(id, safe='')}", headers=self._headers | prefer)

    def cancel_job(self, id: str) -> dict[str, Any]:
        """Ends a job."""
        return self._ask("POST", f"/v1/jobs/{quote(id, safe='')}/cancel")

    def retry_job(self, id: str) -> dict[str, Any]:
        """The job that tries another one again."""
        return self._ask("POST", f"/v1/jobs/{quote(id, safe='')}/retry")

    def experiments(self) -> list[dict[str, Any]]:
        """Every experiment of the server."""
        return self._get("/v1/experiments")["data"]

    def experiment(self, name: str) -> dict[str, Any]:
        """The report of one."""
        return self._get(f"/v1/experiments/{quote(name, safe='')}")

    def _get(self, path: str) -> dict[str, Any]:
        return self._ask("GET", path)

    def _ask(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        options = {"headers": self._headers, "timeout": ANSWER_TIMEOUT_S} | options
        try:
            answer = httpx2.request(method, self._address + path, **options)
        except httpx2.HTTPError as gone:
            raise self._unreachable(gone) from gone
        if answer.status_code not in (200, 202):
            raise _refusal(answer)
        return answer.json()

    def _unreachable(self, gone: Exception) -> Unreachable:
        hint = "start one with `heliograph serve`, or add --local to do without"
        return Unreachable(f"no server answers at {self._address} ({gone}); {hint}")


def generate_locally(settings: ModelSettings, body: dict[str, Any]) -> Iterator[Progress | Finished]:
    """Makes pictures with an engine in this process. Raises the errors of models/errors.py."""
    from app import wire
    from app.dialects.native import GenerateBody, to_request
    from app.replica import start_engine

    request = to_request(wire.validate(body, GenerateBody), settings.name).resolve(settings.card())
    if request.upscale is not None:
        raise InvalidRequest("upscale", "needs a server; `heliograph upscale --local` enlarges a file")
    engine, _ = start_engine(settings, warm_up=False)
    events: queue.Queue[Event] = queue.Queue()
    try:
        engine.submit(request, events.put)
        unfinished = request.samples
        while unfinished:
            event = events.get()
            if isinstance(event, Failed):
                raise event.error
            yield event
            unfinished -= isinstance(event, Finished)
    finally:
        engine.close()


def upscale_locally(
    settings: UpscalerSettings,
    picture: bytes,
    wanted: Upscale,
    format: ImageFormat,
    on_tile: Callable[[int, int], None],
) -> bytes:
    """Enlarges in this process. Raises the errors of models/errors.py."""
    from app.upscaler import start_networks

    settings.card().check(picture, wanted.scale, format)
    return start_networks(settings).upscale(picture, wanted, on_tile=on_tile).encode(format)


def _refusal(answer: httpx2.Response) -> ServerSaid:
    try:
        error = answer.json()["error"]
    except (ValueError, KeyError, TypeError):  # Serve's own answers are plain text
        return ServerSaid(f"{answer.status_code}: {answer.text.strip()[:500]}")
    return ServerSaid(f"{error['field']}: {error['message']}" if "field" in error else error["message"])


def _parse(lines: Iterator[str]) -> Iterator[Progress | Finished]:
    name = ""
    for line in lines:
        if line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("data: "):
            make = _EVENTS.get(name)
            if make is not None:
                yield make(json.loads(line.removeprefix("data: ")))


def _progress(values: dict[str, Any]) -> Progress:
    return Progress(**{key: values[key] for key in ("index", "step", "steps", "forward", "rows")})


def _finished(values: dict[str, Any]) -> Finished:
    data = base64.b64decode(values.pop("base64"))
    unknown = Timings(queued_s=0, encode_s=0, denoise_s=0, decode_s=0)
    return Finished(**values, data=data, revision="", timings=unknown)


def _fail(values: dict[str, Any]) -> Any:
    raise ServerSaid(values["error"]["message"])


_EVENTS: dict[str, Callable[[dict[str, Any]], Any]] = {"progress": _progress, "image": _finished, "error": _fail}
