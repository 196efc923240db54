"""`GET /v1/images/{key}` over each kind of store: signed addresses, validators and ranges of RFC 9110."""

import asyncio
import os
import time
from collections.abc import AsyncIterator
from itertools import pairwise
from urllib.parse import parse_qsl, urlencode, urlsplit

import httpx2
import pytest
from fastapi import FastAPI

from app import ingress, stores
from app.pictures import CHUNK, pictures
from app.secret import derive, read_or_make
from app.service import Service
from app.settings import FolderSettings, GatewaySettings
from app.stores.folder import Folder
from app.stores.links import Links
from app.stores.store import Store
from models.errors import HeliographError
from tests.app.stores.conftest import BASE, SECRET

PICTURE = os.urandom(2 * CHUNK + 12_345)
KEY = "11-21/5f_0"
SIZE = len(PICTURE)


def application(store: Store) -> FastAPI:
    app = FastAPI()
    app.include_router(pictures(store, SECRET))
    app.add_exception_handler(HeliographError, ingress.answer_error)
    return app


@pytest.fixture
async def client(able_store: Store) -> AsyncIterator[httpx2.AsyncClient]:
    await able_store.put(KEY, PICTURE, "image/png")
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(application(able_store)), base_url=BASE) as client:
        yield client


@pytest.fixture
def url() -> str:
    return Links(SECRET, BASE).url(KEY, 60)


async def test_whoever_has_the_address_gets_the_picture(client: httpx2.AsyncClient, url: str):
    answer = await client.get(url)
    assert answer.status_code == 200
    assert answer.content == PICTURE
    assert answer.headers["content-type"] == "image/png"
    assert answer.headers["content-length"] == str(SIZE)
    assert answer.headers["content-disposition"] == 'inline; filename="5f_0.png"'
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["accept-ranges"] == "bytes"
    assert answer.headers["cache-control"].startswith("private, immutable, max-age=")
    head = await client.head(url, headers={"range": "bytes=0-1"})
    assert (head.status_code, head.content) == (200, b"")
    times = ("cache-control",)  # counts seconds
    assert {k: v for k, v in head.headers.items() if k not in times} == {
        k: v for k, v in answer.headers.items() if k not in times
    }


RANGES = [
    ("bytes=0-0", 206, (0, 1)),
    ("bytes=0-", 206, (0, SIZE)),
    ("bytes=100-199", 206, (100, 200)),
    (f"bytes={CHUNK - 1}-{CHUNK + 1}", 206, (CHUNK - 1, CHUNK + 2)),
    ("bytes=-5", 206, (SIZE - 5, SIZE)),
    (f"bytes=-{SIZE * 2}", 206, (0, SIZE)),
    (f"bytes={SIZE - 1}-999999999999", 206, (SIZE - 1, SIZE)),
    ("Bytes=5-9", 206, (5, 10)),
    (f"bytes={SIZE}-", 416, None),
    (f"bytes={SIZE + 5}-{SIZE + 9}", 416, None),
    ("bytes=-0", 416, None),
    # What RFC 9110 lets a server pass over: several ranges, malformed ones, other units.
    ("bytes=0-1,3-4", 200, (0, SIZE)),
    ("bytes=" + ",".join(["0-1"] * 5_000), 200, (0, SIZE)),
    ("bytes=9-5", 200, (0, SIZE)),
    ("bytes=-", 200, (0, SIZE)),
    ("bytes=a-b", 200, (0, SIZE)),
    ("bytes=" + "9" * 5000 + "-", 200, (0, SIZE)),
    ("pixels=0-1", 200, (0, SIZE)),
    ("", 200, (0, SIZE)),
]


@pytest.mark.parametrize(("asked", "status", "span"), RANGES, ids=[case[0][:30] for case in RANGES])
async def test_a_range_is_answered_as_the_rfc_says(folder: Folder, url: str, asked: str, status: int, span):
    await folder.put(KEY, PICTURE, "image/png")
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(application(folder)), base_url=BASE) as client:
        answer = await client.get(url, headers={"range": asked})
    assert answer.status_code == status
    if span is None:
        assert answer.headers["content-range"] == f"bytes */{SIZE}"
        assert answer.json()["error"]["code"] == "range_not_satisfiable"
        return
    assert answer.content == PICTURE[slice(*span)]
    assert answer.headers["content-length"] == str(span[1] - span[0])
    told = f"bytes {span[0]}-{span[1] - 1}/{SIZE}" if status == 206 else None
    assert answer.headers.get("content-range") == told


async def test_parts_of_each_store_make_the_whole(client: httpx2.AsyncClient, url: str):
    edges = [0, 1, CHUNK, CHUNK + 7, SIZE]
    parts = [await client.get(url, headers={"range": f"bytes={first}-{last - 1}"}) for first, last in pairwise(edges)]
    assert {part.status_code for part in parts} == {206}
    assert b"".join(part.content for part in parts) == PICTURE


async def test_what_a_client_has_is_not_sent_again(client: httpx2.AsyncClient, url: str):
    etag = (await client.head(url)).headers["etag"]
    for known in (etag, f'"other", W/{etag}', "*"):
        answer = await client.get(url, headers={"if-none-match": known})
        assert (answer.status_code, answer.content, answer.headers["etag"]) == (304, b"", etag)
    assert (await client.get(url, headers={"if-none-match": '"other"'})).status_code == 200
    part = await client.get(url, headers={"range": "bytes=0-1", "if-range": etag})
    assert (part.status_code, part.content) == (206, PICTURE[:2])
    whole = await client.get(url, headers={"range": "bytes=0-1", "if-range": '"other"'})
    assert (whole.status_code, len(whole.content)) == (200, SIZE)


async def test_an_address_that_was_changed_or_is_over_opens_nothing(client: httpx2.AsyncClient, url: str):
    query = dict(parse_qsl(urlsplit(url).query))
    late = str(int(query["expires"]) + 1)
    changed = [
        {},
        {"expires": query["expires"]},
        query | {"expires": late},
        query | {"expires": "9" * 30},
        query | {"expires": ""},
        query | {"signature": query["signature"][:-1] + ("0" if query["signature"][-1] != "0" else "1")},
        query | {"signature": "é"},
        query | {"signature": query["signature"].upper()},
        dict(parse_qsl(urlsplit(Links(b"t" * 32).url(KEY, 60)).query)),
        dict(parse_qsl(urlsplit(Links(SECRET).url("11-21/5f_1", 60)).query)),
    ]
    for words in changed:
        answer = await client.get(f"/v1/images/{KEY}?{urlencode(words)}")
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "forbidden"), words
    for path in (f"{KEY}/", "../etc/passwd", "%2e%2e/a", f"{KEY}%00", "A"):
        assert (await client.get(f"/v1/images/{path}?{urlencode(query)}")).status_code in (403, 404)


async def test_an_address_ends_on_time(folder: Folder):
    await folder.put(KEY, b"picture", "image/png")
    url = await folder.url(KEY, 1)
    assert url.startswith(f"{BASE}/v1/images/{KEY}?")
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(application(folder)), base_url=BASE) as client:
        assert (await client.get(url)).content == b"picture"
        ends = int(dict(parse_qsl(urlsplit(url).query))["expires"])
        await asyncio.sleep(ends - time.time())
        assert (await client.get(url)).status_code == 403


async def test_what_was_deleted_is_not_found_by_its_address(client: httpx2.AsyncClient, able_store: Store, url: str):
    await able_store.delete(KEY)
    answer = await client.get(url)
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")


async def test_the_gateway_serves_the_folder_of_its_configuration(service: Service, tmp_path):
    settings = GatewaySettings(
        store=FolderSettings(path=str(tmp_path / "pictures")), secret_file=str(tmp_path / "secret")
    )
    app = ingress.build(service, settings, lambda: asyncio.sleep(0, None))
    assert settings.store
    store = stores.opened(settings.store, derive(read_or_make(tmp_path / "secret"), "pictures"))
    await store.put(KEY, b"picture", "image/png")
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url=BASE) as client:
        assert (await client.get(f"/v1/images/{KEY}")).status_code == 403
        assert (await client.get(await store.url(KEY, 60))).content == b"picture"
