"""What a bucket keeps through refusals, lost answers and servers that are slow or gone."""

import asyncio
import time
from collections.abc import AsyncIterator
from urllib.parse import parse_qs, urlsplit

import httpx2
import pytest
from botocore.auth import S3SigV4QueryAuth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

from app.stores.s3 import S3
from app.stores.store import KeyTaken, StoreUnavailable
from models.errors import NotFound
from tests.app.stores.conftest import CREDENTIALS, bucket
from tests.app.stores.proxy import Fault, Proxy, proxy_before

PICTURE = b"picture" * 10_000


@pytest.fixture
async def proxy(moto: str) -> AsyncIterator[Proxy]:
    async with proxy_before(moto) as proxy:
        yield proxy


async def test_a_server_that_checks_signatures_lets_the_right_ones_in_only(rclone: str):
    right = bucket(rclone, conditional_put=False)
    await right.put("a", PICTURE, "image/png")
    wrong = bucket(rclone, conditional_put=False, secret_access_key="x" * 40)
    for asked in (wrong.put("b", PICTURE, "image/png"), wrong.get("a"), wrong.head("a"), wrong.delete("a")):
        with pytest.raises(StoreUnavailable, match="credentials"):
            await asked


@pytest.mark.parametrize("faults", [["503", "503"], ["lost"], ["lost", "503"], ["lost", "lost", "lost", "lost"]])
async def test_a_put_arrives_once_whatever_happens_to_its_answers(proxy: Proxy, faults: list[Fault]):
    store = bucket(proxy.address, timeout_s=20)
    proxy.faults += faults
    stored = await store.put("a", PICTURE, "image/png")
    assert await store.head("a") == stored
    assert await store.get("a") == PICTURE
    assert {line.split("?")[0].split(" ")[1].rsplit("/", 1)[1] for line in proxy.passed} == {"a"}


async def test_a_lost_answer_does_not_hide_that_another_object_was_there(proxy: Proxy):
    store = bucket(proxy.address, timeout_s=20)
    await store.put("a", b"first", "image/png")
    proxy.faults.append("lost")
    with pytest.raises(KeyTaken):
        await store.put("a", PICTURE, "image/png")
    assert await store.get("a") == b"first"


async def test_a_server_that_fails_is_asked_a_few_times_and_then_unavailable(proxy: Proxy):
    store = bucket(proxy.address, timeout_s=20)
    proxy.always = "503"
    with pytest.raises(StoreUnavailable):
        await store.put("a", PICTURE, "image/png")
    tries = len(proxy.refused)
    assert 3 <= tries <= 12
    proxy.always = None
    with pytest.raises(NotFound):
        await store.head("a")


async def test_a_server_that_does_not_answer_is_given_up_in_time(proxy: Proxy):
    store = bucket(proxy.address, timeout_s=1.5)
    proxy.always = "mute"
    for asked in (store.put("a", PICTURE, "image/png"), store.get("a"), store.head("a"), anext(store.list(0))):
        started = time.monotonic()
        with pytest.raises(StoreUnavailable):
            await asked
        assert time.monotonic() - started < 5


async def test_a_server_that_is_gone_is_unavailable():
    store = bucket("http://127.0.0.1:9", timeout_s=3)
    with pytest.raises(StoreUnavailable):
        await store.get("a")


async def test_of_different_writers_of_a_key_one_wins(moto: str):
    prefix = "race"
    stores = [bucket(moto, prefix=prefix) for _ in range(2)]
    await stores[0].put("a", b"first", "image/png")
    with pytest.raises(KeyTaken):
        await stores[1].put("a", b"second", "image/png")
    assert await stores[1].get("a") == b"first"


async def test_what_others_keep_in_the_bucket_is_not_listed(moto: str):
    store = bucket(moto, prefix="ours")
    await store.put("a", PICTURE, "image/png")
    for name in ("ours/Their.File", "ours/b.txt", "theirs/a"):
        httpx2.put(f"{moto}/pictures/{name}", content=b"x").raise_for_status()
    assert [key async for key in store.list(-60)] == ["a"]


async def test_a_presigned_address_gives_the_picture_as_amazon_would_sign_it(moto: str):
    store = bucket(moto, prefix="signed")
    await store.put("a/b", PICTURE, "image/webp")
    url = await store.url("a/b", 600)
    async with httpx2.AsyncClient() as client:
        answer = await client.get(url)
    assert answer.content == PICTURE
    assert answer.headers["content-type"] == "image/webp"
    assert answer.headers["content-disposition"] == 'inline; filename="b.webp"'
    query = {name: values[0] for name, values in parse_qs(urlsplit(url).query).items()}
    assert query["X-Amz-Expires"] == "600"
    assert query["X-Amz-Signature"] == amazons_signature(url, query["X-Amz-Date"])


def amazons_signature(url: str, date: str) -> str:
    """The signature that botocore computes for the same address at the same moment."""
    auth = S3SigV4QueryAuth(Credentials(*CREDENTIALS.values()), "s3", "us-east-1", expires=600)
    request = AWSRequest("GET", url.split("?")[0])
    request.context["timestamp"] = date
    auth._modify_request_before_signing(request)
    scope = auth.string_to_sign(request, auth.canonical_request(request))
    return str(auth.signature(scope, request))


async def test_the_store_is_cancelled_with_its_caller(proxy: Proxy):
    store: S3 = bucket(proxy.address)
    proxy.faults.append("mute")
    getting = asyncio.create_task(store.get("a"))
    await asyncio.sleep(0.2)
    getting.cancel()
    started = time.monotonic()
    assert isinstance((await asyncio.gather(getting, return_exceptions=True))[0], asyncio.CancelledError)
    assert time.monotonic() - started < 1
