"""What every store promises, on each of them."""

import asyncio
import hashlib
import os

import pytest

from app.stores.store import KeyTaken, Store
from app.stores.sweep import may_sweep, sweep
from models.errors import InvalidRequest, NotFound

PICTURE = os.urandom(300_000)
KEY = "2026/11-21/5f_0"


async def all_keys(store: Store, older_than_s: float = -60.0, folder: str = "") -> set[str]:
    """Every key; a minute in the future by default, because servers keep whole seconds and clocks of their own."""
    return {key async for key in store.list(older_than_s, folder)}


async def test_what_is_put_is_there_whole_and_described(store: Store):
    stored = await store.put(KEY, PICTURE, "image/png")
    assert (stored.key, stored.bytes, stored.content_type) == (KEY, len(PICTURE), "image/png")
    assert stored.sha256 == hashlib.sha256(PICTURE).hexdigest()
    assert stored.filename == "5f_0.png"
    assert await store.head(KEY) == stored
    assert await store.get(KEY) == PICTURE


async def test_what_is_put_is_there_in_parts(able_store: Store):
    await able_store.put(KEY, PICTURE, "image/png")
    for first, last in ((0, 1), (1000, 2000), (len(PICTURE) - 1, len(PICTURE)), (0, len(PICTURE))):
        assert await able_store.get(KEY, (first, last)) == PICTURE[first:last]


async def test_a_key_is_written_once(store: Store):
    stored = await store.put(KEY, PICTURE, "image/png")
    assert await store.put(KEY, PICTURE, "image/png") == stored
    with pytest.raises(KeyTaken):
        await store.put(KEY, PICTURE[1:], "image/png")
    with pytest.raises(KeyTaken):
        await store.put(KEY, PICTURE, "image/webp")
    assert await store.head(KEY) == stored
    assert await store.get(KEY) == PICTURE


async def test_the_same_put_many_times_at_once_is_one_object(able_store: Store):
    stored = await asyncio.gather(*(able_store.put(KEY, PICTURE, "image/png") for _ in range(8)))
    assert len(set(stored)) == 1
    assert await all_keys(able_store) == {KEY}


async def test_what_is_not_there_is_not_found_and_deleting_it_is_nothing(store: Store):
    await store.put("a/b", PICTURE, "image/png")
    for key in ("a/c", "c/b", "b"):
        for asked in (store.get(key), store.get(key, (0, 1)), store.head(key), store.url(key, 60)):
            with pytest.raises(NotFound):
                await asked
        await store.delete(key)
    assert await store.get("a/b") == PICTURE
    await store.delete("a/b")
    with pytest.raises(NotFound):
        await store.head("a/b")
    await store.delete("a/b")
    assert await store.put("a/b", PICTURE[1:], "image/webp") == await store.head("a/b")


async def test_an_address_is_signed_without_a_look(store: Store):
    assert "a/b" in await store.sign("a/b", 60)
    with pytest.raises(NotFound):
        await store.url("a/b", 60)


async def test_a_key_below_a_key_is_another_object(able_store: Store):
    await able_store.put("a", b"one", "image/png")
    await able_store.put("a/b", b"two", "image/png")
    assert (await able_store.get("a"), await able_store.get("a/b")) == (b"one", b"two")
    assert await all_keys(able_store) == {"a", "a/b"}
    await able_store.delete("a")
    assert await all_keys(able_store) == {"a/b"}


@pytest.mark.parametrize(
    "key",
    [
        "",
        "/",
        "/a",
        "a/",
        "a//b",
        "..",
        "a/../b",
        "a.png",
        "A",
        "a b",
        "a\n",
        "a\0",
        "ä",
        "%2e",
        "a" * 65,
        "a/" * 8 + "a",
    ],
)
async def test_what_is_no_key_is_refused_everywhere(store: Store, key: str):
    for asked in (
        *(store.put(key, b"x", "image/png"), store.get(key), store.head(key), store.delete(key)),
        *(store.url(key, 60), store.sign(key, 60)),
    ):
        with pytest.raises(InvalidRequest) as refused:
            await asked
        assert refused.value.field == "key"
    assert await all_keys(store) == set()


async def test_other_bad_input_is_refused_by_name(store: Store):
    await store.put(KEY, b"picture", "image/png")
    refusals = [
        (store.put("a", b"", "image/png"), "data"),
        (store.put("a", b"x", "text/html"), "content_type"),
        (store.put("a", b"x", "image/svg+xml"), "content_type"),
        *((store.get(KEY, span), "span") for span in ((0, 8), (7, 7), (3, 2), (-1, 3), (8, 9))),
        *((store.url(KEY, seconds), "expires_s") for seconds in (0, -1, 8 * 24 * 3600)),
        *((store.sign(KEY, seconds), "expires_s") for seconds in (0, -1, 8 * 24 * 3600)),
    ]
    for asked, field in refusals:
        with pytest.raises(InvalidRequest) as refused:
            await asked
        assert refused.value.field == field


async def test_a_list_has_all_keys_that_are_old_enough(store: Store):
    keys = {f"{day}/{n}" for day in ("a", "b") for n in range(30)}
    for key in keys:
        await store.put(key, key.encode(), "image/webp")
    assert await all_keys(store) == keys
    assert await all_keys(store, older_than_s=3600) == set()
    assert await all_keys(store, folder="a") == {key for key in keys if key.startswith("a/")}
    assert await all_keys(store, folder="c") == set()


async def test_a_sweep_takes_orphans_older_than_the_grace_and_nothing_else(store: Store):
    keys = [f"k{n}" for n in range(12)]
    for key in keys:
        await store.put(key, key.encode(), "image/png")
    owned = set(keys[::2])

    async def known(asked: list[str]) -> set[str]:
        return owned & set(asked)

    assert await sweep(store, known, grace_s=3600) == 0
    assert await all_keys(store) == set(keys)
    assert await sweep(store, known, grace_s=-60) == 6
    assert await all_keys(store) == owned
    assert await sweep(store, known, grace_s=-60) == 0


async def test_a_sweep_that_cannot_ask_deletes_nothing(store: Store):
    await store.put(KEY, b"picture", "image/png")

    async def known(asked: list[str]) -> set[str]:
        raise ConnectionError(asked)

    with pytest.raises(ConnectionError):
        await sweep(store, known, grace_s=-60)
    assert await all_keys(store) == {KEY}


async def test_a_database_sweeps_a_store_that_it_has_marked_for_long_enough(store: Store):
    assert not await may_sweep(store, "ours", knows=False)
    assert await all_keys(store) == {"heliograph/ours"}
    assert not await may_sweep(store, "ours", knows=False)
    assert await may_sweep(store, "ours", knows=False, grace_s=-60)


async def test_a_store_that_was_filled_before_is_adopted_by_a_database_that_knows_of_pictures_alone(store: Store):
    await store.put("results/x/0", PICTURE, "image/png")
    with pytest.raises(InvalidRequest, match="knows nothing of; nothing was swept"):
        await may_sweep(store, "new", knows=False, grace_s=-60)
    assert await all_keys(store) == {"results/x/0"}
    assert await may_sweep(store, "ours", knows=True, grace_s=-60)


async def test_a_store_of_two_databases_is_swept_by_neither(store: Store):
    assert await may_sweep(store, "ours", knows=True, grace_s=-60)
    with pytest.raises(InvalidRequest, match="knows nothing of"):
        await may_sweep(store, "empty", knows=False, grace_s=-60)
    with pytest.raises(InvalidRequest, match="heliograph/ours there; nothing was swept"):
        await may_sweep(store, "theirs", knows=True, grace_s=-60)
    with pytest.raises(InvalidRequest, match="heliograph/theirs there"):
        await may_sweep(store, "ours", knows=True, grace_s=-60)
    await store.delete("heliograph/theirs")
    assert await may_sweep(store, "ours", knows=True, grace_s=-60)
