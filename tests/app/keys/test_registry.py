"""API keys in the database: made, recognised, rotated, revoked, listed."""

import dataclasses
from typing import Any

import pytest
from sqlalchemy import select, update

from app.database import Database
from app.errors import Unauthenticated
from app.keys.caller import Limits
from app.keys.registry import Keys
from app.keys.table import api_keys
from models.errors import InvalidRequest, NotFound

PEPPER = b"p" * 32
LIMITS = Limits(requests_per_minute=60, concurrent_jobs=2)


@pytest.fixture
def keys(database: Database) -> Keys:
    return Keys(database, PEPPER)


async def later(database: Database, id: str, seconds: float) -> None:
    """Makes a key older by that much."""

    async def work(connection: Any) -> None:
        times = {name: api_keys.c[name] - seconds for name in ("created_at", "expires_at")}
        await connection.execute(update(api_keys).where(api_keys.c.id == id).values(times))

    await database.write(work)


async def test_a_key_stands_for_its_caller(keys: Keys):
    key, text = await keys.create("a painter", ("generate", "jobs", "jobs"), LIMITS)
    caller = await keys.caller(text)
    assert (caller.id, caller.name, caller.limits) == (key.id, "a painter", LIMITS)
    assert caller.scopes == {"generate", "jobs"}
    assert key.expires_at is None


async def test_nothing_that_is_kept_or_listed_gives_the_key_away(keys: Keys, database: Database):
    _, text = await keys.create("a", ("generate",), Limits())
    secret = text.rsplit("_", 1)[1]

    async def rows(connection: Any) -> str:
        return str((await connection.execute(select(api_keys))).all())

    assert secret not in await database.read(rows)
    _, listed = await keys.list()
    assert secret not in str(listed)
    assert "digest" not in {field.name for field in dataclasses.fields(listed[0])}
    other = Keys(database, b"q" * 32)
    with pytest.raises(Unauthenticated):
        await other.caller(text)


async def test_another_secret_or_id_is_refused_in_the_same_words(keys: Keys):
    _, text = await keys.create("a", ("generate",), Limits())
    _, other = await keys.create("b", ("generate",), Limits())
    mixed = "_".join([*text.split("_")[:2], other.split("_")[2]])
    unknown = "hk_" + "a" * 16 + "_" + "b" * 32
    words = set()
    for presented in (mixed, unknown, "hk_nonsense", text[:-1], text.upper(), f"{text} "):
        with pytest.raises(Unauthenticated) as refused:
            await keys.caller(presented)
        words.add(refused.value.message)
    assert len(words) == 1


async def test_a_key_ends_when_it_expires(keys: Keys, database: Database):
    key, text = await keys.create("a", ("generate",), Limits(), lasts_s=100)
    assert (await keys.caller(text)).id == key.id
    await later(database, key.id, 101)
    with pytest.raises(Unauthenticated, match="is expired"):
        await keys.caller(text)
    now, [listed] = await keys.list()
    assert listed.state(now) == "expired"


async def test_a_key_ends_when_it_is_revoked(keys: Keys):
    key, text = await keys.create("a", ("generate",), Limits())
    revoked = await keys.revoke(key.id)
    assert await keys.revoke(key.id) == revoked
    with pytest.raises(Unauthenticated, match="is revoked"):
        await keys.caller(text)
    now, [listed] = await keys.list()
    assert listed.state(now) == "revoked"


async def test_a_rotated_key_stays_valid_for_the_overlap_and_the_caller_stays_the_same(keys: Keys, database: Database):
    old, old_text = await keys.create("a", ("jobs",), LIMITS, lasts_s=10_000)
    await later(database, old.id, 4_000)
    new, new_text = await keys.rotate(old.id, overlap_s=600)
    assert await keys.caller(old_text) == await keys.caller(new_text)
    assert (await keys.caller(new_text)).id == old.id != new.id
    assert new.expires_at
    assert new.expires_at - new.created_at == pytest.approx(10_000)
    await later(database, old.id, 601)
    with pytest.raises(Unauthenticated, match="is expired"):
        await keys.caller(old_text)
    assert (await keys.caller(new_text)).id == old.id
    newest, _ = await keys.rotate(new.id, overlap_s=0)
    assert newest.caller == old.id
    with pytest.raises(Unauthenticated, match="is expired"):
        await keys.caller(new_text)


async def test_a_key_without_an_end_gets_one_by_being_rotated(keys: Keys, database: Database):
    old, text = await keys.create("a", ("jobs",), LIMITS)
    new, _ = await keys.rotate(old.id, overlap_s=600)
    assert new.expires_at is None
    assert (await keys.caller(text)).id == old.id
    await later(database, old.id, 601)
    with pytest.raises(Unauthenticated, match="is expired"):
        await keys.caller(text)


async def test_an_overlap_does_not_prolong_a_key(keys: Keys):
    old, _ = await keys.create("a", ("jobs",), LIMITS, lasts_s=100)
    await keys.rotate(old.id, overlap_s=10_000)
    _, listed = await keys.list()
    assert {key.expires_at for key in listed if key.id == old.id} == {old.expires_at}


async def test_a_key_that_has_ended_is_not_rotated(keys: Keys):
    key, _ = await keys.create("a", ("generate",), Limits())
    await keys.revoke(key.id)
    with pytest.raises(InvalidRequest, match="is revoked"):
        await keys.rotate(key.id, 60)
    for asked in (keys.rotate("none", 60), keys.revoke("none")):
        with pytest.raises(NotFound, match="keys list"):
            await asked


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"name": ""}, "name"),
        ({"name": "a\nb"}, "name"),
        ({"name": "a" * 101}, "name"),
        ({"scopes": ()}, "scopes"),
        ({"scopes": ("root",)}, "scopes"),
        ({"scopes": ("admin",)}, "scopes"),
        ({"scopes": ("admin", "generate")}, "scopes"),
        ({"lasts_s": 0}, "expires"),
        ({"lasts_s": float("nan")}, "expires"),
        ({"limits": Limits(requests_per_minute=0)}, "requests_per_minute"),
    ],
)
async def test_what_a_key_cannot_be_is_refused_by_name(keys: Keys, change: dict[str, Any], field: str):
    values = {"name": "a", "scopes": ("generate",), "limits": Limits(), "lasts_s": None} | change
    with pytest.raises(InvalidRequest) as refused:
        await keys.create(**values)
    assert refused.value.field == field
    assert (await keys.list())[1] == []
