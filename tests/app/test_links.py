"""Pictures by address, wherever the native API takes a picture, through the whole gateway and real HTTP."""

import base64
import json
import struct
import time
import zlib
from collections.abc import AsyncIterator

import httpx2
import numpy as np
import pytest
from starlette.types import Message

from app import ingress
from app.fetch import Fetcher
from app.service import Service
from app.settings import FetchSettings, GatewaySettings
from models.images import Picture, encode
from models.metadata import write
from models.request import GenerationRequest
from tests.app.conftest import ADAPTERS, CARDS, UPSCALER, MemoryRouter
from tests.app.loopback import Loopback, Request, never, response, serving, until

GREY = encode(np.full((64, 96, 3), 128, np.uint8), "png")
MASK = encode(np.where(np.arange(96)[None, :, None] < 48, 255, 0).astype(np.uint8).repeat(64, 0).repeat(3, 2), "png")
TOLD = encode(
    np.full((64, 64, 3), 9, np.uint8),
    "png",
    write(GenerationRequest(model="sd15", prompt="x", seed=5).resolve(CARDS["sd15"]), "0123456789ab", "full"),
)
HEADER = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
BOMB = b"\x89PNG\r\n\x1a\n" + b"".join(
    struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    for kind, data in ((b"IHDR", HEADER), (b"IDAT", zlib.compress(b"")), (b"IEND", b""))
)
FILES = {"/grey.png": GREY, "/mask.png": MASK, "/told.png": TOLD, "/bomb.png": BOMB, "/cut.png": GREY[:60]}


@pytest.fixture
async def files() -> AsyncIterator[Loopback]:
    async def answer(request: Request, writer) -> None:
        found = FILES.get(request.target)
        writer.write(response(404) if found is None else response(body=found))

    async with serving(answer) as server:
        yield server


@pytest.fixture
def service(router: MemoryRouter, files: Loopback) -> Service:
    settings = FetchSettings(ports=(files.port,), allowed=("127.0.0.1",))
    service = Service(router, Fetcher(settings))
    service.offer(CARDS, "sd15", lambda: ADAPTERS, UPSCALER)
    return service


async def test_generate_takes_addresses_in_every_place(
    client: httpx2.AsyncClient, router: MemoryRouter, files: Loopback
):
    grey, mask = files.url("/grey.png"), files.url("/mask.png")
    body = {
        "prompt": "x",
        "image": grey,
        "mask": mask,
        "controls": [{"name": "canny", "image": grey}, {"name": "canny", "image": base64.b64encode(MASK).decode()}],
    }
    answer = await client.post("/v1/generate", json=body)
    assert answer.status_code == 200, answer.text
    drawn = router.requests[-1]
    assert drawn.image == Picture.from_bytes(GREY)
    assert drawn.mask == Picture.from_bytes(MASK)
    assert [use.image for use in drawn.controls] == [Picture.from_bytes(GREY), Picture.from_bytes(MASK)]
    assert sorted(request.target for request in files.requests) == ["/grey.png", "/mask.png"]


@pytest.mark.parametrize("path", ["img2img", "outpaint", "variations"])
async def test_the_other_endpoints_take_addresses(
    client: httpx2.AsyncClient, router: MemoryRouter, files: Loopback, path: str
):
    borders = {"left": 32} if path == "outpaint" else {}
    answer = await client.post(f"/v1/{path}", json={"prompt": "x", "init_image": files.url("/grey.png"), **borders})
    assert answer.status_code == 200, answer.text
    assert router.requests[-1].image == Picture.from_bytes(GREY)


async def test_a_form_takes_addresses_as_text(client: httpx2.AsyncClient, router: MemoryRouter, files: Loopback):
    fields = {"prompt": "x", "mask": files.url("/mask.png").replace("http:", "HTTP:")}
    answer = await client.post("/v1/inpaint", data=fields, files={"image": ("a.png", GREY)})
    assert answer.status_code == 200, answer.text
    assert router.requests[-1].mask == Picture.from_bytes(MASK)


async def test_upscale_takes_an_address(client: httpx2.AsyncClient, files: Loopback):
    body = {"image": files.url("/grey.png"), "scale": 2}
    answer = await client.post("/v1/upscale", json=body, headers={"accept": "image/png"})
    assert (answer.status_code, answer.headers["x-size"]) == (200, "192x128")


@pytest.mark.parametrize("form", [False, True])
async def test_metadata_takes_an_address(client: httpx2.AsyncClient, files: Loopback, form: bool):
    text = {"image": files.url("/told.png")}
    sent = {"files": {"image": (None, text["image"])}} if form else {"json": text}
    answer = await client.post("/v1/metadata", **sent)
    assert answer.status_code == 200, answer.text
    assert answer.json()["parameters"]["seed"] == 5


# path, what goes there, the field that is named, a word of the message
REFUSED = [
    ("generate", {"prompt": "x", "image": "/missing.png"}, "image", "could not be fetched"),
    ("generate", {"prompt": "x", "init_image": "/missing.png"}, "init_image", "could not be fetched"),
    ("generate", {"prompt": "x", "image": "/grey.png", "mask": "/missing.png"}, "mask", "could not be fetched"),
    (
        "generate",
        {"prompt": "x", "controls": [{"name": "canny", "image": "/missing.png"}]},
        "controls.0.image",
        "could not be fetched",
    ),
    ("img2img", {"prompt": "x", "image": "/bomb.png"}, "image", "67108864 pixels"),
    ("img2img", {"prompt": "x", "image": "/cut.png"}, "image", "not a readable"),
    ("upscale", {"image": "/missing.png"}, "image", "could not be fetched"),
    ("metadata", {"image": "/missing.png"}, "image", "could not be fetched"),
]


@pytest.mark.parametrize(("path", "body", "field", "word"), REFUSED)
async def test_what_cannot_be_fetched_is_refused_by_the_fields_name(
    client: httpx2.AsyncClient, router: MemoryRouter, files: Loopback, path: str, body: dict, field: str, word: str
):
    def addressed(value):
        if isinstance(value, dict):
            return {name: addressed(part) for name, part in value.items()}
        if isinstance(value, list):
            return [addressed(part) for part in value]
        return files.url(value) if str(value).startswith("/") else value

    drawn = len(router.requests)
    answer = await client.post(f"/v1/{path}", json=addressed(body))
    assert (answer.status_code, answer.json()["error"]["field"]) == (422, field), answer.text
    assert word in answer.json()["error"]["message"]
    assert len(router.requests) == drawn


async def test_more_addresses_than_a_request_may_have_are_refused_and_none_is_fetched(
    client: httpx2.AsyncClient, files: Loopback
):
    controls = [{"name": "canny", "image": files.url(f"/{n}.png")} for n in range(200)]
    answer = await client.post("/v1/generate", json={"prompt": "x", "controls": controls})
    assert (answer.status_code, answer.json()["error"]["field"]) == (422, "controls.0.image")
    assert files.connections == 0


async def test_an_address_in_the_prompt_is_a_prompt(client: httpx2.AsyncClient, router: MemoryRouter, files: Loopback):
    prompt = files.url("/grey.png")
    assert (await client.post("/v1/generate", json={"prompt": prompt})).status_code == 200
    assert router.requests[-1].prompt == prompt
    assert files.connections == 0


async def test_a_client_that_leaves_ends_the_fetching(router: MemoryRouter):
    async with serving(never) as silent:
        service = Service(router, Fetcher(FetchSettings(ports=(silent.port,), allowed=("127.0.0.1",))))
        service.offer(CARDS, "sd15")
        app = ingress.build(service, GatewaySettings(), ingress.Readiness(service).reason)
        body = json.dumps({"prompt": "x", "image": silent.url()}).encode()
        said = [{"type": "http.request", "body": body}]

        async def receive() -> Message:
            if not said:
                await until(lambda: silent.requests)
            return said.pop() if said else {"type": "http.disconnect"}

        async def send(_: Message) -> None:
            pass

        scope = {"type": "http", "method": "POST", "path": "/v1/generate", "headers": [], "query_string": b""}
        started = time.monotonic()
        await app(scope, receive, send)
        assert time.monotonic() - started < 5
    assert (len(silent.requests), router.requests) == (1, [])


@pytest.mark.parametrize(("on", "word"), [(True, "could not be fetched"), (False, "fetches no pictures")])
async def test_the_configuration_switches_it_off(on: bool, word: str):
    gateway = ingress.Gateway(GatewaySettings(fetch=FetchSettings(pictures=on)))
    transport = httpx2.ASGITransport(gateway.__serve_build_asgi_app__())
    async with httpx2.AsyncClient(transport=transport, base_url="http://localhost") as client:
        answer = await client.post("/v1/generate", json={"prompt": "x", "image": "http://127.0.0.1/"})
    assert (answer.status_code, answer.json()["error"]["field"]) == (422, "image")
    assert word in answer.json()["error"]["message"]
