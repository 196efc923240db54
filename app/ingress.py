"""The gateway: a plain FastAPI application around the service, and the deployment class that hosts it in Serve.

`build` needs neither Ray nor a model, so tests call it with a small service of their own.
"""

import asyncio
import contextvars
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app import dialects, stores
from app.adapters import Shelf
from app.auth import PUBLIC, Guard, RateLimitHeaders, scope
from app.database import Database
from app.dialects.native import payload
from app.errors import BodyTooLarge, BodyTooSlow, envelope, headers_of, http_envelope, status_of
from app.experiments.experiments import Experiments
from app.experiments.store import ExperimentStore
from app.fetch import Fetcher
from app.jobs.outbox import Outbox
from app.jobs.service import Jobs
from app.jobs.store import Bounds, JobStore
from app.keys import registry
from app.keys.budgets import Budgets
from app.metered import Metered
from app.pictures import pictures
from app.results.results import Results
from app.service import Service
from app.settings import START_S, CatalogueSettings, GatewaySettings, QueueSettings
from app.stores.store import Store
from models.errors import HeliographError
from models.request import warm_up_request

WARM_UP_PAUSE_S = 1.0
BODY_S = 120.0  # for a request's body to arrive: what is allowed at most takes 2.3 Mbit/s

_log = logging.getLogger(__name__)

DESCRIPTION = """Stable Diffusion served on Ray Serve.

`POST /v1/generate` makes pictures, `GET /v1/models` tells what each model can do. Errors have one shape:
`{"error": {"code", "message", "field", "retryable"}}`; where `retryable` is true, send the same request again after
`Retry-After` seconds."""


class Gateway:
    """Hosts the application in a Serve replica. The models come by `reconfigure`, so they change without a restart."""

    def __init__(self, settings: GatewaySettings):
        from app.exposure_counter import ExposureCounter  # these two need Ray
        from app.router import Router

        self._settings, self._made_at = settings, time.monotonic()
        self._budgets = Budgets()
        self._database = Database(settings.database)
        self._migrated = False
        routing = Router(settings.request_timeout_s, max_wait_s=settings.max_wait_s)
        router, fetcher = Metered(routing, self._budgets), Fetcher(settings.fetch)
        jobs = outbox = None
        secret = stores.signing_secret(settings.secret_file)
        self._store = None if settings.store is None else stores.opened(settings.store, secret)
        if settings.jobs is not None and self._store is not None:
            kept, outbox = JobStore(self._database, bounds(settings.jobs), payload), Outbox(self._database)
            jobs = Jobs(kept, self._store, router.charge, fetcher.address)
        self._results = Results(self._database, self._store, settings.keep_results_s)
        fetching = fetcher if settings.fetch.pictures else None
        self._experiments = Experiments(ExperimentStore(self._database), count=ExposureCounter())
        patience_s = settings.request_timeout_s
        self._service = Service(router, fetching, self._results, jobs, outbox, patience_s, self._experiments)
        self._readiness = Readiness(self._service)

    def __serve_build_asgi_app__(self) -> FastAPI:
        wanted = self._settings.auth == "keys"
        keys = registry.opened(self._database, self._settings.secret_file) if wanted else None
        guard = Guard(self._settings.auth, keys, self._budgets)
        return build(self._service, self._settings, self._readiness.reason, guard, store=self._store)

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Takes over a new user_config: models, upscaler, experiments. Raises ValidationError, which fails the
        deployment."""
        if not self._migrated:
            await self._database.migrate()
            self._migrated = True
            await self._mark_store()
        catalogue = CatalogueSettings.model_validate(user_config)
        upscaler = catalogue.upscaler.card() if catalogue.upscaler else None
        self._service.offer(catalogue.cards(), catalogue.default_model, Shelf(catalogue.models), upscaler)
        self._experiments.offer(catalogue.experiments, catalogue.default_model)
        self._readiness.warm_up()

    def check_health(self) -> None:
        """Raises where no models have come for long, so that Serve replaces the replica: a controller that is started
        anew takes up replicas that had not started yet, and does not ask what became of that."""
        if not self._service.default_model and time.monotonic() - self._made_at > START_S:
            raise RuntimeError("the gateway was not told its models, or could not take them over; its log says why")

    async def _mark_store(self) -> None:
        try:
            await self._results.mark()
        except HeliographError as fault:  # pictures are drawn all the same, and the sweep tries again
            _log.warning("the store is not marked: %s", fault)


def bounds(jobs: QueueSettings) -> Bounds:
    """How many jobs may wait, as the store of jobs has it."""
    return Bounds(
        waiting=jobs.max_waiting,
        per_owner=jobs.max_waiting_per_caller,
        lines=jobs.max_waiting_lines,
        lines_per_owner=jobs.max_waiting_lines_per_caller,
        lines_at_once=jobs.max_batch_lines,
    )


class Readiness:
    """Ready once a real picture came out of the default model, and for as long as that model runs."""

    def __init__(self, service: Service):
        self._service = service
        self._warming: asyncio.Task[None] | None = None
        self._model = ""

    def warm_up(self) -> None:
        """Draws a picture in the background, once for each default model; one for an earlier default is dropped."""
        if self._model == self._service.default_model:
            return
        self._model = self._service.default_model
        if self._warming is not None:
            self._warming.cancel()
        # A task copies the context of its request, and Serve would cancel it with that request: hence a clean one.
        self._warming = asyncio.get_running_loop().create_task(self._draw(), context=contextvars.Context())

    async def reason(self) -> str | None:
        """Why the application is not ready, None when it is."""
        if self._warming is None or not self._warming.done():
            return f"model {self._service.default_model} has not drawn its first picture yet"
        if self._warming.cancelled() or self._warming.exception() is not None:
            return "the warm-up ended without a picture"
        model = await self._service.model(self._service.default_model)
        return None if model.state == "ready" else f"model {model.card.name} is {model.state}"

    async def _draw(self) -> None:
        while True:
            try:
                card = self._service.card(self._service.default_model)
                await self._service.generate(warm_up_request(card, steps=2), cache=False)
                return
            except HeliographError:  # the model still loads, or is full: there is nothing to do but ask again
                await asyncio.sleep(WARM_UP_PAUSE_S)


def build(
    service: Service,
    settings: GatewaySettings,
    unready_reason: Callable[[], Awaitable[str | None]],
    guard: Guard | None = None,
    body_s: float = BODY_S,
    store: Store | None = None,
) -> FastAPI:
    """The application: the configured dialects, health, errors, and the limits every request has to pass.

    `guard` may be left out where there are no keys, and `store`, that of the settings, where it is not open yet. A body
    has `body_s` seconds to arrive.
    """
    guarded = [Depends(guard or Guard(settings.auth))]
    app = FastAPI(title="Heliograph", description=DESCRIPTION, version="1", redoc_url=None, dependencies=guarded)
    for name in settings.dialects:
        app.include_router(dialects.load(name).routes(service))
    if settings.store is not None:
        secret = stores.signing_secret(settings.secret_file)
        app.include_router(pictures(store or stores.opened(settings.store, secret), secret))
    _add_health(app, unready_reason)
    app.add_exception_handler(HeliographError, answer_error)
    app.add_exception_handler(HTTPException, _answer_http_error)
    app.add_exception_handler(Exception, _answer_fault)
    app.add_middleware(RateLimitHeaders)
    app.add_middleware(BodyLimit, max_bytes=settings.max_body_bytes, max_s=body_s)
    return app


def _add_health(app: FastAPI, unready_reason: Callable[[], Awaitable[str | None]]) -> None:
    public = scope(PUBLIC)

    @app.get("/healthz", tags=["health"], summary="Whether the gateway lives", openapi_extra=public)
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/readyz", tags=["health"], summary="Whether the default model draws pictures", openapi_extra=public)
    async def readyz() -> JSONResponse:
        reason = await unready_reason()
        if reason is None:
            return JSONResponse({"status": "ready"})
        return JSONResponse({"status": "starting", "reason": reason}, 503, {"retry-after": "1"})


async def answer_error(_: Request, error: Exception) -> JSONResponse:
    """The handler of all errors of ours."""
    assert isinstance(error, HeliographError)
    return JSONResponse(envelope(error), status_of(error), headers_of(error))


async def _answer_http_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    return JSONResponse(http_envelope(error.status_code, error.detail), error.status_code, error.headers)


async def _answer_fault(_: Request, __: Exception) -> JSONResponse:
    return JSONResponse(http_envelope(500, "Heliograph made a mistake; its log has the details"), 500)


class BodyLimit:
    """Answers 413 to a body beyond the limit: by its declared length before anything is read, else while reading.

    And 408 to one that does not arrive in time: who sends a byte now and then would keep a place for ever.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, max_s: float):
        self._app = app
        self._max_bytes, self._max_s = max_bytes, max_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        error = BodyTooLarge("body", f"must have at most {self._max_bytes} bytes")
        declared = Headers(scope=scope).get("content-length", "")
        if declared.isdigit() and int(declared) > self._max_bytes:
            await JSONResponse(envelope(error), status_of(error))(scope, receive, send)
            return
        seen, deadline = 0, asyncio.get_running_loop().time() + self._max_s

        async def limited() -> Message:
            nonlocal seen, deadline
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                raise BodyTooSlow("body", f"must arrive within {self._max_s:.0f} s") from None
            seen += len(message.get("body", b""))
            if seen > self._max_bytes:
                raise error
            if not message.get("more_body"):  # what comes next tells that the client has gone
                deadline = None
            return message

        await self._app(scope, limited, send)
