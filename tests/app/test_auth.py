"""Who may do what: every route of the application, every way to send a key, budgets, and other callers' things."""

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
import pytest
from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.routing import APIRoute, RouteContext, iter_route_contexts

from app import ingress
from app.auth import Guard, scope, scope_of
from app.database import Database
from app.dialects import names
from app.drawing import Accepted
from app.keys.budgets import Budgets
from app.keys.caller import ANONYMOUS, SCOPES, Caller, Limits, current
from app.keys.registry import Keys
from app.metered import Metered
from app.service import Service
from app.settings import AuthMode, FolderSettings, GatewaySettings
from models.errors import Cancelled, HeliographError, NotFound, Unavailable
from models.request import GenerationRequest
from tests.app.conftest import ADAPTERS, CARDS, UPSCALER, MemoryRouter
from tests.app.loopback import until

# What FastAPI adds by itself, which tells nothing but how the API is called.
DOCUMENTATION = {"/docs", "/docs/oauth2-redirect", "/openapi.json"}
PUBLIC = {"/healthz", "/readyz", "/v1/images/{key:path}"}
DRAW = {"prompt": "x", "steps": 2}


@pytest.fixture
async def keys(tmp_path: Path) -> AsyncIterator[Keys]:
    database = Database(f"sqlite:///{tmp_path / 'keys.db'}")
    await database.migrate()
    yield Keys(database, b"p" * 32)
    await database.close()


@pytest.fixture
def app(router: MemoryRouter, keys: Keys, tmp_path: Path) -> FastAPI:
    return application(router, tmp_path, "keys", keys)


def application(router: MemoryRouter, folder: Path, mode: AuthMode, keys: Keys | None = None) -> FastAPI:
    """The gateway as it is configured in full, over a router in memory."""
    budgets = Budgets()
    service = Service(Metered(router, budgets))
    service.offer(CARDS, "sd15", lambda: ADAPTERS, UPSCALER)
    store = FolderSettings(path=str(folder / "pictures"))
    settings = GatewaySettings(auth=mode, dialects=tuple(names()), store=store, secret_file=str(folder / "secret"))
    return ingress.build(service, settings, lambda: asyncio.sleep(0, None), Guard(mode, keys, budgets))


def client(app: FastAPI, key: str = "", peer: str = "127.0.0.1") -> httpx2.AsyncClient:
    transport = httpx2.ASGITransport(app, raise_app_exceptions=False, client=(peer, 1234))
    headers = {"authorization": f"Bearer {key}"} if key else {}
    return httpx2.AsyncClient(transport=transport, base_url="http://localhost", headers=headers)


def routes(app: FastAPI) -> Iterator[RouteContext]:
    """Every route; what is no route of FastAPI's would not be guarded, and is refused."""
    for route in iter_route_contexts(app.routes):
        if route.path not in DOCUMENTATION:
            original = route.original_route
            assert isinstance(original, APIRoute), (
                f"{original} is not behind the guard: make it a route, or name it here"
            )
            yield route


async def test_every_route_but_the_public_ones_wants_a_key_and_its_scope(app: FastAPI, keys: Keys):
    holding = (("generate",), ("jobs",), ("jobs", "admin"))
    by_scope = {scopes: (await keys.create("a", scopes, Limits()))[1] for scopes in holding}
    found = [
        (method, str(route.path), scope_of(route.original_route))
        for route in routes(app)
        for method in route.methods or ()
    ]
    assert len(found) > 15
    assert {path for _, path, wanted in found if wanted == "public"} == PUBLIC
    async with client(app) as anybody:
        for method, template, wanted in found:
            path = template.replace(":path", "").format_map({"id": "0" * 32, "name": "sd15", "key": "a/b"})
            answer = await anybody.request(method, path)
            if template in PUBLIC:
                assert answer.status_code != 401, f"{method} {template}"
                continue
            assert answer.status_code == 401, f"{method} {template} lets anybody in"
            assert answer.headers["www-authenticate"].startswith("Bearer")
            for scopes, key in by_scope.items():
                answer = await anybody.request(method, path, headers={"x-api-key": key})
                assert answer.status_code != 401
                assert (answer.status_code == 403) == (wanted not in scopes), f"{method} {template} with {scopes}"


async def test_a_route_says_which_scope_it_wants(keys: Keys):
    app = FastAPI(dependencies=[Depends(Guard("keys", keys))])
    app.add_exception_handler(HeliographError, ingress.answer_error)
    inner, outer = APIRouter(), APIRouter(prefix="/v1")
    for wanted in ("public", *SCOPES):

        @inner.get(f"/{wanted}", openapi_extra=scope(wanted))
        async def who(request: Request) -> str:
            return request.state.caller.name

    outer.include_router(inner)
    app.include_router(outer)
    _, text = await keys.create("a", ("jobs",), Limits())
    async with client(app, text) as caller, client(app) as nobody:
        for wanted in ("public", *SCOPES):
            allowed = {"public": (200, "anonymous"), "jobs": (200, "a")}.get(wanted)
            answer = await caller.get(f"/v1/{wanted}")
            assert (answer.status_code, answer.json()) == allowed if allowed else answer.status_code == 403
            assert (await nobody.get(f"/v1/{wanted}")).status_code == (200 if wanted == "public" else 401)


async def test_what_is_no_route_says_nothing(app: FastAPI):
    async with client(app) as anybody:
        assert (await anybody.get("/v1/nothing")).status_code == 404
        assert (await anybody.get("/v1/generate")).status_code == 405


async def test_a_key_comes_in_every_way_that_clients_send_it(app: FastAPI, keys: Keys):
    _, key = await keys.create("a", ("generate",), Limits())

    def basic(name: str, password: str) -> str:
        return base64.b64encode(f"{name}:{password}".encode()).decode()

    junk = {"authorization": "Basic "}
    ways = [
        *({"authorization": f"{scheme} {key}"} for scheme in ("Bearer", "bearer", "BEARER", "Token", "Key")),
        {"authorization": key},
        {"authorization": f"Bearer   {key} "},
        {"authorization": f"Basic {basic(key, '')}"},
        {"authorization": f"Basic {basic('me', key)}"},
        {"authorization": f"basic {basic(key, 'x')}"},
        {"x-api-key": key},
        {"api-key": key},
        {"x-api-key": key} | junk,
        {"x-api-key": key, "authorization": "Bearer sk-something-else"},
        {"x-api-key": key, "authorization": f"Bearer {key}"},
    ]
    async with client(app) as anybody:
        for headers in ways:
            assert (await anybody.get("/v1/models", headers=headers)).status_code == 200, headers


async def test_what_is_no_key_opens_nothing(app: FastAPI, keys: Keys):
    _, key = await keys.create("a", ("generate",), Limits())
    _, other = await keys.create("b", ("generate",), Limits())
    ways = [
        {},
        {"authorization": ""},
        {"authorization": "Bearer"},
        {"authorization": "Basic "},
        {"authorization": "Basic ####"},
        {"authorization": f"Basic {base64.b64encode(bytes([255, 254])).decode()}"},
        {"authorization": f"Bearer {key[:-1]}"},
        {"authorization": f"Bearer {key}x"},
        {"authorization": f"Bearer {key.upper()}"},
        {"cookie": f"key={key}"},
        {"authorization": f"Bearer {key}", "x-api-key": other},
    ]
    async with client(app) as anybody:
        for headers in ways:
            answer = await anybody.get("/v1/models", headers=headers)
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "unauthenticated"), headers
        assert (await anybody.get(f"/v1/models?key={key}")).status_code == 401


async def test_a_revoked_key_ends_at_once(app: FastAPI, keys: Keys):
    key, text = await keys.create("a", ("generate",), Limits())
    async with client(app, text) as caller:
        assert (await caller.get("/v1/models")).status_code == 200
        await keys.revoke(key.id)
        assert (await caller.get("/v1/models")).status_code == 401


async def test_without_its_database_the_gateway_says_to_come_back(router: MemoryRouter, tmp_path: Path):
    async def away(text: str) -> None:
        raise Unavailable(5, "the database does not answer")

    app = application(router, tmp_path, "keys", SimpleNamespace(caller=away))  # pyright: ignore[reportArgumentType]
    async with client(app, "hk_anything") as caller:
        answer = await caller.get("/v1/models")
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
        assert (await caller.get("/healthz")).status_code == 200


@pytest.mark.parametrize(
    ("peer", "status"),
    [("127.0.0.1", 200), ("127.9.9.9", 200), ("::1", 200), ("::ffff:127.0.0.1", 200)]
    + [(peer, 403) for peer in ("10.0.0.1", "203.0.113.9", "::ffff:10.0.0.1", "2001:db8::1", "testclient", "")],
)
async def test_without_keys_the_server_answers_its_own_machine(
    router: MemoryRouter, tmp_path: Path, peer: str, status: int
):
    async with client(application(router, tmp_path, "loopback"), peer=peer) as caller:
        assert (await caller.get("/v1/models", headers={"authorization": "Basic "})).status_code == status
        assert (await caller.get("/healthz")).status_code == 200
    async with client(application(router, tmp_path, "open"), peer=peer) as caller:
        assert (await caller.get("/v1/models")).status_code == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        *(({"host": host}, 200) for host in ("localhost", "LOCALHOST:8000", "127.0.0.1:8000", "127.9.9.9", "[::1]:1")),
        *(({"origin": origin}, 200) for origin in ("http://localhost:5173", "https://127.0.0.1", "http://[::1]")),
        *(
            ({"host": host}, 403)
            for host in ("evil.example", "localhost.evil.example", "10.0.0.1", "127.1", "", "[::1")
        ),
        *(({"host": host}, 403) for host in ("evil.example:8000", "0.0.0.0", "localhost@evil.example", "[::2]")),
        *(({"origin": origin}, 403) for origin in ("https://evil.example", "null", "file://", "localhost", "")),
        ({"origin": "http://evil.example:8000", "host": "127.0.0.1:8000", "content-type": "text/plain"}, 403),
    ],
    ids=str,
)
async def test_without_keys_the_server_answers_by_its_own_names_and_no_other_sites_pages(
    router: MemoryRouter, tmp_path: Path, headers: dict[str, str], status: int
):
    async with client(application(router, tmp_path, "loopback")) as caller:
        answer = await caller.post("/v1/generate", json=DRAW, headers=headers)
        assert answer.status_code == status, answer.text
        assert len(router.requests) == (status == 200)
        assert (await caller.get("/healthz", headers=headers)).status_code == 200
    async with client(application(router, tmp_path, "open")) as caller:
        assert (await caller.get("/v1/models", headers=headers)).status_code == 200


async def test_a_client_without_a_host_is_no_browser(router: MemoryRouter, tmp_path: Path):
    """HTTP/1.0 has none, and no page can leave it out."""
    app, sent = application(router, tmp_path, "loopback"), []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    asked = {"type": "http", "http_version": "1.0", "method": "GET", "path": "/v1/models", "query_string": b""}
    scope = asked | {"headers": [], "client": ("127.0.0.1", 1234), "server": ("127.0.0.1", 8000), "scheme": "http"}
    messages = iter([{"type": "http.request", "body": b"", "more_body": False}])
    await app(scope, lambda: asyncio.sleep(0, next(messages)), send)  # pyright: ignore[reportArgumentType]
    assert sent[0]["status"] == 200


async def test_requests_are_counted_and_told(app: FastAPI, keys: Keys):
    _, text = await keys.create("a", ("generate",), Limits(requests_per_minute=2))
    async with client(app, text) as caller:
        for left in (1, 0):
            answer = await caller.get("/v1/models")
            assert answer.headers["ratelimit-limit"] == "2"
            assert answer.headers["ratelimit-remaining"] == str(left)
            assert 50 < int(answer.headers["ratelimit-reset"]) <= 60
        answer = await caller.post("/v1/generate", json=DRAW)
        assert answer.status_code == 429
        error = answer.json()["error"]
        assert (error["code"], error["field"], error["retryable"]) == ("budget_spent", "requests_per_minute", True)
        assert answer.headers["ratelimit-remaining"] == "0"
        assert 50 < int(answer.headers["retry-after"]) <= 60
        assert "ratelimit-limit" not in (await caller.get("/healthz")).headers
    _, other = await keys.create("b", ("generate",), Limits())
    async with client(app, other) as caller:
        assert "ratelimit-limit" not in (await caller.get("/v1/models")).headers


async def test_pixel_steps_are_counted_before_the_work(app: FastAPI, keys: Keys, router: MemoryRouter):
    _, text = await keys.create("a", ("generate",), Limits(pixel_steps_per_minute=128 * 128 * 10))
    async with client(app, text) as caller:
        assert (await caller.post("/v1/generate", json=DRAW | {"samples": 4})).status_code == 200
        for stream in (False, True):
            answer = await caller.post("/v1/generate", json=DRAW | {"samples": 2, "stream": stream})
            assert answer.status_code == 429
            assert answer.json()["error"]["field"] == "pixel_steps_per_minute"
            assert answer.headers["ratelimit-remaining"] == str(128 * 128 * 2)
        never = await caller.post("/v1/generate", json=DRAW | {"samples": 6})
        assert (never.status_code, never.json()["error"]["field"]) == (422, "pixel_steps_per_minute")
        hires = await caller.post("/v1/generate", json=DRAW | {"hires": {"scale": 2.0, "steps": 2}})
        assert (hires.status_code, len(router.requests)) == (429, 1)
        assert (await caller.post("/v1/generate", json=DRAW)).status_code == 200


async def test_jobs_at_a_time_are_counted_and_come_free(app: FastAPI, keys: Keys, router: MemoryRouter):
    _, text = await keys.create("a", ("generate",), Limits(concurrent_jobs=1))
    router.gate.clear()
    async with client(app, text) as caller:
        first = asyncio.create_task(caller.post("/v1/generate", json=DRAW))
        await until(lambda: router.running)
        refused = await caller.post("/v1/generate", json=DRAW)
        assert (refused.status_code, refused.json()["error"]["field"]) == (429, "concurrent_jobs")
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        router.gate.set()
        await until(lambda: not router.running)
        assert (await caller.post("/v1/generate", json=DRAW)).status_code == 200


async def test_another_callers_request_is_like_one_that_never_was(app: FastAPI, keys: Keys, router: MemoryRouter):
    texts = [(await keys.create(name, SCOPES, Limits()))[1] for name in "ab"]
    router.gate.clear()
    async with client(app, texts[0]) as owner, client(app, texts[1]) as other:
        streaming = asyncio.create_task(owner.post("/v1/generate", json=DRAW | {"stream": True}))
        await until(lambda: router.running)
        [inner] = router.running
        ids = [inner, "0" * 32]
        answers = [await other.post(f"/v1/requests/{id}/cancel") for id in ids]
        assert {answer.status_code for answer in answers} == {404}
        assert answers[0].json() == answers[1].json()
        router.gate.set()
        queued = (await streaming).text.split("\n\n")[0]
        assert json.loads(queued.split("data: ")[1])["id"] != inner


async def test_the_owner_ends_a_request_and_nobody_else(router: MemoryRouter):
    owner, other = (Caller(id=id, name=id, scopes=frozenset(SCOPES), limits=Limits()) for id in "ab")
    service = Service(Metered(router, Budgets()))
    service.offer(CARDS, "sd15")
    router.gate.clear()
    current.set(owner)
    events = service.stream(GenerationRequest(model="sd15", prompt="x", steps=2))
    accepted = await anext(events)
    assert isinstance(accepted, Accepted)
    for stranger in (other, ANONYMOUS):
        current.set(stranger)
        for end in (service.cancel, service.accept):
            with pytest.raises(NotFound):
                await end(accepted.id)
    current.set(owner)
    await service.cancel(accepted.id)
    with pytest.raises(Cancelled):
        [event async for event in events]
