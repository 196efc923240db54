"""Experiments through the whole gateway: a real database, a real folder, and a router in memory."""

import asyncio
import base64
import json
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from app import ingress, stores
from app.auth import Guard
from app.database import Database
from app.experiments.experiments import Experiments
from app.experiments.store import ExperimentStore
from app.job_runner import drawing
from app.jobs.making import Maker
from app.jobs.runner import Pace, Runner
from app.jobs.service import Jobs
from app.jobs.store import JobStore
from app.keys.budgets import Budgets
from app.keys.caller import Limits
from app.keys.registry import Keys
from app.metered import Metered
from app.results import results as kept
from app.secret import derive, read_or_make
from app.service import Service
from app.settings import CatalogueSettings, FolderSettings, GatewaySettings, QueueSettings
from models.errors import GenerationFailed, InvalidRequest, Unavailable
from tests.app.conftest import ADAPTERS, CARDS, UPSCALER, MemoryRouter
from tests.app.loopback import until

LARGE = {"max_pixels": 1024 * 1024}
MODELS: list[dict[str, Any]] = [
    {"name": "sd15", "source": "models/embedded/sd15", "defaults": LARGE},
    {"name": "sdxl", "family": "sdxl", "source": "models/embedded/sdxl", "defaults": LARGE},
]
BIGGER: dict[str, Any] = {"unit": "user", "arms": {"control": {}, "bigger": {"model": "sdxl", "steps": 9}}}
FEWER: dict[str, Any] = {"unit": "user", "arms": {"control": {}, "fewer": {"guidance_scale": 2.0}}}
BODY: dict[str, Any] = {"prompt": "a red circle"}


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class House:
    """A gateway with keys on a database of its own."""

    def __init__(self, folder: Path, router: MemoryRouter, file: Path):
        self.database = Database(f"sqlite:///{shutil.copy(file, folder / 'heliograph.db')}")
        self.router, self.clock, self.keys = router, Clock(), Keys(self.database, b"p" * 32)
        store = FolderSettings(path=str(folder / "pictures"))
        self.settings = GatewaySettings(
            store=store, secret_file=str(folder / "secret"), auth="keys", jobs=QueueSettings()
        )
        self.experiments = Experiments(ExperimentStore(self.database), self.clock)
        budgets = Budgets()
        results = kept.opened(self.settings, self.database)
        metered = Metered(router, budgets)
        jobs, pictures = (
            JobStore(self.database),
            stores.opened(store, derive(read_or_make(folder / "secret"), "pictures")),
        )
        behind = Jobs(jobs, pictures, metered.charge, lambda url, field: None)
        self.service = Service(metered, None, results, behind, experiments=self.experiments)
        runners = Service(router, None, results, experiments=Experiments(ExperimentStore(self.database)))
        runners.offer(CARDS, "sd15")
        maker = Maker(jobs, pictures, drawing(runners), runners.upscale)
        self.runner = Runner("runner-1", jobs, maker, Pace(beat_s=0.05, look_s=0.01, backoff_s=(0.01, 0.01)))
        self.service.offer(CARDS, "sd15", lambda: ADAPTERS, UPSCALER)
        guard = Guard("keys", self.keys, budgets)
        self.app = ingress.build(self.service, self.settings, lambda: asyncio.sleep(0, None), guard)

    def offer(self, **experiments: Any) -> None:
        values = {"models": MODELS, "default_model": "sd15", "experiments": experiments}
        catalogue = CatalogueSettings.model_validate(values)
        self.experiments.offer(catalogue.experiments, catalogue.default_model)

    async def client(self, *scopes: str, limits: Limits | None = None) -> httpx2.AsyncClient:
        _, key = await self.keys.create("a", scopes or ("generate",), limits or Limits())
        transport = httpx2.ASGITransport(self.app, raise_app_exceptions=False)
        return httpx2.AsyncClient(
            transport=transport, base_url="http://localhost", headers={"x-api-key": key}, timeout=20
        )

    async def report(self, name: str) -> dict[str, Any]:
        async with await self.client("jobs", "admin") as admin:
            answer = await admin.get(f"/v1/experiments/{name}")
        assert answer.status_code == 200, answer.text
        return answer.json()


@pytest.fixture
async def house(tmp_path: Path, router: MemoryRouter, blank_file: Path) -> AsyncIterator[House]:
    house = House(tmp_path, router, blank_file)
    yield house
    await house.database.close()


@pytest.fixture
async def client(house: House) -> AsyncIterator[httpx2.AsyncClient]:
    async with await house.client() as client:
        yield client


async def draw(client: httpx2.AsyncClient, user: str | None, **body: Any) -> httpx2.Response:
    headers = {} if user is None else {"X-User-Id": user}
    answer = await client.post("/v1/generate", json=BODY | body, headers=headers)
    assert answer.status_code == 200, answer.text
    return answer


async def user_of(client: httpx2.AsyncClient, arm: str) -> str:
    """Somebody who has that arm."""
    for n in range(50):
        if arms(await draw(client, f"user-{n}")) == [arm]:
            return f"user-{n}"
    raise AssertionError(f"nobody has the arm {arm}")


def arms(answer: httpx2.Response) -> list[str]:
    return [use["arm"] for use in answer.json().get("experiments", [])]


async def test_an_arm_decides_what_a_request_leaves_open(house: House, client: httpx2.AsyncClient):
    house.offer(bigger=BIGGER)
    answers = {user: (await draw(client, user)).json() for user in (f"user-{n}" for n in range(30))}
    found = {user: answer["experiments"] for user, answer in answers.items()}
    assert {json.dumps(told) for told in found.values()} == {
        json.dumps([{"name": "bigger", "arm": arm}]) for arm in ("control", "bigger")
    }
    for user, answer in answers.items():
        drawn = (answer["model"], answer["parameters"]["steps"])
        assert drawn == (("sdxl", 9) if found[user][0]["arm"] == "bigger" else ("sd15", 25))
        again = await draw(client, user)
        assert again.json()["experiments"] == found[user]
        assert again.headers["x-experiment"] == f"bigger={found[user][0]['arm']}"


async def test_what_a_request_states_itself_wins_and_it_is_not_in(house: House, client: httpx2.AsyncClient):
    house.offer(bigger=BIGGER)
    user = await user_of(client, "bigger")
    for stated in ({"steps": 25}, {"model": "sd15"}):
        answer = await draw(client, user, **stated)
        assert (arms(answer), answer.json()["model"], answer.json()["parameters"]["steps"]) == ([], "sd15", 25)
        assert "x-experiment" not in answer.headers
    assert arms(await draw(client, user, steps=None, guidance_scale=3.0)) == ["bigger"]  # null states nothing


async def test_force_has_the_arms_decide_all_the_same(house: House, client: httpx2.AsyncClient):
    house.offer(bigger=BIGGER | {"force": True})
    for arm, model, steps in (("bigger", "sdxl", 9), ("control", "sd15", 25)):
        answer = await draw(client, await user_of(client, arm), steps=30, model="sdxl")
        assert (answer.json()["model"], answer.json()["parameters"]["steps"]) == (model, steps)


async def test_who_is_in(house: House, client: httpx2.AsyncClient):
    house.offer(bigger=BIGGER)
    assert arms(await draw(client, None)) == []  # no unit to stick to
    house.offer(bigger=BIGGER | {"unit": "session"})
    assert arms(await draw(client, "ada")) == []
    answer = await client.post("/v1/generate", json=BODY, headers={"X-Session-Id": "1"})
    assert len(arms(answer)) == 1
    house.offer(bigger=BIGGER | {"unit": "key"})
    assert len({tuple(arms(await draw(client, user))) for user in (None, "ada", "bob")}) == 1
    house.offer(bigger=BIGGER | {"keys": ["nobody"]})
    assert arms(await draw(client, "ada")) == []
    house.offer(bigger=BIGGER | {"header": "X-Plan=paid"})
    assert arms(await draw(client, "ada")) == []
    answer = await client.post("/v1/generate", json=BODY, headers={"X-User-Id": "ada", "x-plan": "paid"})
    assert len(arms(answer)) == 1
    house.offer(bigger=BIGGER | {"share": 0.3})
    inside = sum([bool(arms(await draw(client, f"user-{n}"))) for n in range(60)])
    assert 6 <= inside <= 32
    house.offer(bigger=BIGGER | {"enabled": False})
    assert arms(await draw(client, "ada")) == []


async def test_the_same_user_of_another_key_is_another_user(house: House, client: httpx2.AsyncClient):
    house.offer(bigger=BIGGER)
    async with await house.client() as other:
        for one in (client, other):
            await draw(one, "ada")
    assert len({request.experiments[0].unit for request in house.router.requests}) == 2


async def test_experiments_of_different_layers_are_drawn_independently(house: House, client: httpx2.AsyncClient):
    house.offer(bigger=BIGGER, fewer=FEWER | {"layer": "guidance"})
    found = {tuple(arms(await draw(client, f"user-{n}"))) for n in range(40)}
    assert len(found) == 4


async def test_a_request_that_one_arm_could_not_draw_is_in_none(house: House, client: httpx2.AsyncClient):
    house.offer(wide={"unit": "user", "arms": {"control": {}, "wide": {"hires": {"scale": 4.0}}}})
    assert len(arms(await draw(client, "ada"))) == 1
    assert arms(await draw(client, "ada", width=512, height=512)) == []  # 2048x2048 is beyond what the model allows


@pytest.mark.parametrize("named", [{"prompt": "x <lora:moon:0.8>"}, {"adapters": [{"name": "moon"}]}])
async def test_what_fits_one_model_is_in_no_experiment_between_models(
    house: House, client: httpx2.AsyncClient, named: dict[str, Any]
):
    house.offer(bigger=BIGGER)
    assert arms(await draw(client, "ada", **named)) == []
    house.offer(fewer=FEWER)
    assert len(arms(await draw(client, "ada", **named))) == 1


async def test_every_form_of_answer_tells_the_arm(house: House, client: httpx2.AsyncClient):
    house.offer(bigger=BIGGER)
    user = await user_of(client, "bigger")
    headers = {"X-User-Id": user}
    picture = await client.post("/v1/generate", json=BODY, headers=headers | {"accept": "image/png"})
    assert (picture.headers["x-experiment"], picture.headers["x-model"]) == ("bigger=bigger", "sdxl")
    stream = await client.post("/v1/generate", json=BODY | {"stream": True}, headers=headers)
    events = [block.split("\ndata: ") for block in stream.text.strip().split("\n\n")]
    told = {name.removeprefix("event: "): json.loads(data) for name, data in events}
    assert stream.headers["x-experiment"] == "bigger=bigger"
    for name in ("queued", "done"):
        assert told[name]["experiments"] == [{"name": "bigger", "arm": "bigger"}]
    assert "experiments" not in told["done"]["parameters"]


async def test_receipts_tell_the_arm_and_a_replay_is_in_no_experiment(house: House, client: httpx2.AsyncClient):
    house.offer(bigger=BIGGER)
    first = (await draw(client, await user_of(client, "bigger"))).json()
    receipt = (await client.get(f"/v1/receipts/{first['receipt_id']}")).json()
    [use] = receipt["request"]["experiments"]
    assert (use["experiment"], use["arm"]) == ("bigger", "bigger")
    before = await house.report("bigger")
    house.offer(bigger=BIGGER | {"arms": {"control": {}, "bigger": {"steps": 2}}})
    replayed = await client.post("/v1/replay", json={"receipt_id": first["receipt_id"]})
    assert replayed.json()["identical"], replayed.text
    assert (house.router.requests[-1].model, house.router.requests[-1].experiments) == ("sdxl", ())
    house.offer(bigger=BIGGER)
    assert await house.report("bigger") == before


async def test_arms_do_not_keep_the_cache_from_finding(house: House, client: httpx2.AsyncClient):
    house.offer(bigger=BIGGER)
    await draw(client, None, seed=7)
    found = await draw(client, await user_of(client, "control"), seed=7)
    assert (found.json()["cached"], arms(found)) == (True, ["control"])
    report = await house.report("bigger")
    control = next(arm for arm in report["arms"] if arm["name"] == "control")
    assert (
        control["exposures"]
        == sum(bool(r.experiments and r.experiments[0].arm == "control") for r in house.router.requests) + 1
    )


async def test_feedback_is_counted_by_unit_and_reported(house: House, client: httpx2.AsyncClient):
    house.offer(bigger=BIGGER)
    answers = [(await draw(client, f"user-{n}")).json() for n in range(40)]
    for answer in answers:
        arm = answer["experiments"][0]["arm"]
        about = {"id": answer["id" if arm == "control" else "receipt_id"]}
        if arm == "bigger":
            said = await client.post("/v1/feedback", json=about | {"outcome": "kept"})
            assert said.json() == about | {"outcome": "kept", "value": None, "experiments": answer["experiments"]}
        for value in (1, 4):
            said = await client.post("/v1/feedback", json=about | {"outcome": "rating", "value": value})
            assert said.status_code == 200, said.text
    report = await house.report("bigger")
    control, bigger = report["arms"]
    assert (report["control"], report["earlier"], report["assignment"]["mismatched"]) == ("control", 0, False)
    assert control["units"] + bigger["units"] == 40 == control["assigned"] + bigger["assigned"]
    assert (control["outcomes"]["kept"]["mean"], bigger["outcomes"]["kept"]["mean"]) == (0.0, 1.0)
    kept = bigger["outcomes"]["kept"]["difference"]
    assert kept["estimate"] == 1.0
    assert 0 < kept["always"]["low"] < kept["always"]["high"] == pytest.approx(1.0)
    assert kept["p_value"] < 0.001
    assert bigger["outcomes"]["rating"]["mean"] == 4.0
    assert bigger["outcomes"]["rating"]["difference"]["estimate"] == 0.0
    assert control["outcomes"]["kept"]["difference"] is None
    assert control["p50_s"] > 0
    assert control["engine_s"] == pytest.approx(0.9)  # what the router in memory says that encoding and so on took


async def test_feedback_is_refused_for_what_is_not_ones_own(house: House, client: httpx2.AsyncClient):
    house.offer(bigger=BIGGER)
    mine, outside = (await draw(client, "ada")).json(), (await draw(client, None)).json()
    async with await house.client() as other:
        answers = [
            await one.post("/v1/feedback", json={"id": id, "outcome": "kept"})
            for one, id in (
                (other, mine["id"]),
                (other, mine["receipt_id"]),
                (client, "0" * 32),
                (client, outside["id"]),
                (client, "\0"),
            )
        ]
    assert [answer.status_code for answer in answers] == [404] * 5
    for body, field in (
        ({"outcome": "kept"}, "id"),
        ({"id": mine["id"], "outcome": "liked"}, "outcome"),
        ({"id": mine["id"], "outcome": "rating"}, "value"),
        ({"id": mine["id"], "outcome": "rating", "value": 6}, "value"),
        ({"id": mine["id"], "outcome": "kept", "value": 1}, "value"),
        ({"id": mine["id"], "outcome": "kept", "note": "x"}, "note"),
    ):
        refused = await client.post("/v1/feedback", json=body)
        assert (refused.status_code, refused.json()["error"]["field"]) == (422, field), refused.text


async def test_experiments_are_for_administrators(house: House, client: httpx2.AsyncClient):
    house.offer(bigger=BIGGER | {"guard": {"max_error_rate": 0.5}})
    assert (await client.get("/v1/experiments")).status_code == 403
    assert (await client.get("/v1/experiments/bigger")).status_code == 403
    async with await house.client("jobs", "admin") as admin:
        [listed] = (await admin.get("/v1/experiments")).json()["data"]
        missing = await admin.get("/v1/experiments/smaller")
    assert (listed["name"], listed["unit"], listed["share"]) == ("bigger", "user", 1.0)
    assert listed["arms"]["bigger"]["parameters"] == {"model": "sdxl", "steps": 9}
    assert listed["arms"]["bigger"]["rail"]["state"] == "on"
    assert (missing.status_code, "there are: bigger" in missing.text) == (404, True)


async def test_a_failing_arm_is_switched_off_its_units_get_the_control_and_it_recovers(
    house: House, client: httpx2.AsyncClient
):
    guard = {"max_error_rate": 0.2, "window": 20, "least": 5, "recover_after_s": 60}
    house.offer(bigger=BIGGER | {"guard": guard})
    user = await user_of(client, "bigger")
    house.router.failure = GenerationFailed("engine_fault", "broken")
    for _ in range(6):
        failed = await client.post("/v1/generate", json=BODY, headers={"X-User-Id": user})
    house.router.failure = None
    assert failed.status_code == 503
    off = await draw(client, user)
    assert (arms(off), off.json()["model"]) == (["control"], "sd15")
    report = await house.report("bigger")
    control, bigger = report["arms"]
    assert (bigger["rail"]["state"], bigger["rail"]["trips"]) == ("off", 1)
    assert control["units"] == control["assigned"]  # who came over is not compared
    house.clock.now = 60.0
    assert arms(await draw(client, user)) == ["bigger"]
    assert (await house.report("bigger"))["arms"][1]["rail"]["state"] == "probation"
    for _ in range(5):
        await draw(client, user)
    assert (await house.report("bigger"))["arms"][1]["rail"]["state"] == "on"


async def test_what_the_caller_did_wrong_does_not_count_against_an_arm(house: House):
    guard = {"max_error_rate": 0.0, "least": 1, "window": 10}
    house.offer(bigger=BIGGER | {"guard": guard})
    limits = Limits(pixel_steps_per_minute=128 * 128 * 25)
    async with await house.client("generate", limits=limits) as poor:
        statuses = [
            (await poor.post("/v1/generate", json=BODY, headers={"X-User-Id": f"user-{n}"})).status_code
            for n in range(12)
        ]
        assert statuses.count(429) >= 10  # the budget is spent
    async with await house.client() as client:
        house.router.refusal = InvalidRequest("adapters", "no such thing")
        refused = await client.post("/v1/generate", json=BODY, headers={"X-User-Id": "ada"})
        assert refused.status_code == 422
    assert all(arm["rail"]["state"] == "on" for arm in (await house.report("bigger"))["arms"])


SHADOWED: dict[str, Any] = {
    "unit": "user",
    "arms": {"control": {}, "beside": {"shadow": True, "model": "sdxl", "steps": 3}},
}


async def test_a_shadow_is_drawn_with_the_same_seed_and_shown_to_nobody(house: House, client: httpx2.AsyncClient):
    house.offer(shadowed=SHADOWED)
    answer = (await draw(client, "ada", samples=2)).json()
    assert (answer["model"], answer["experiments"]) == ("sd15", [{"name": "shadowed", "arm": "control"}])
    await until(lambda: len(house.router.requests) == 2)
    shown, shadow = house.router.requests
    assert (shadow.model, shadow.steps, shadow.seed, shadow.samples) == ("sdxl", 3, shown.seed, 2)
    assert (shadow.priority, shadow.prompt) == ("batch", shown.prompt)
    await until(lambda: house.router.left == 2)
    while not (told := (await house.report("shadowed"))["arms"])[1]["exposures"]:  # noqa: ASYNC110
        await asyncio.sleep(0.05)
    control, beside = told
    assert (beside["shadow"], beside["exposures"], beside["assigned"]) == (True, 1, 0)
    assert (control["exposures"], control["assigned"]) == (1, 1)
    async with await house.client("jobs", "admin") as admin:
        assert (await admin.get("/v1/experiments")).json()["shadows_left_out"] == 0


async def test_a_shadow_costs_the_caller_nothing_and_its_failure_is_not_told(house: House):
    house.offer(shadowed=SHADOWED)
    async with await house.client("generate", limits=Limits(pixel_steps_per_minute=128 * 128 * 25)) as poor:
        await draw(poor, "ada")
        await until(lambda: len(house.router.requests) == 2)
    house.router.failure = GenerationFailed("engine_fault", "broken")
    async with await house.client() as client:
        failed = await client.post("/v1/generate", json=BODY, headers={"X-User-Id": "bob"})
        assert failed.status_code == 503
    await asyncio.sleep(0.05)
    assert len(house.router.requests) == 3  # beside what failed nothing is drawn


async def test_beside_what_is_found_nothing_is_drawn(house: House, client: httpx2.AsyncClient):
    house.offer(shadowed=SHADOWED)
    for cached in (False, True):
        assert (await draw(client, "ada", seed=7)).json()["cached"] is cached
        await until(lambda: house.router.left == len(house.router.requests) == 2)
        await asyncio.sleep(0.05)
    assert len(house.router.requests) == 2  # one is the first answer's shadow


async def test_shadows_are_bounded(house: House, client: httpx2.AsyncClient):
    house.offer(shadowed=SHADOWED)
    drawing = [asyncio.create_task(draw(client, f"user-{n}")) for n in range(12)]
    await asyncio.gather(*drawing)
    await asyncio.sleep(0.2)
    await until(lambda: house.router.left == len(house.router.requests))
    shadows = [request for request in house.router.requests if request.experiments[0].shadow]
    assert len(shadows) + house.service.shadows.left_out == 12
    assert shadows


async def test_a_database_that_is_away_costs_no_picture(house: House, client: httpx2.AsyncClient):
    house.offer(bigger=BIGGER)

    class Away(ExperimentStore):
        async def record(self, seen: Any) -> None:
            raise Unavailable(1.0, "the database does not answer")

    house.service.experiments = Experiments(Away(house.database))
    house.service.experiments.offer(house.experiments._settings, "sd15")
    answer = await draw(client, "ada")
    assert "the exposure is not counted yet: the database does not answer" in answer.json()["warnings"]
    assert len(base64.b64decode(answer.json()["images"][0]["base64"])) > 50


async def test_a_job_has_the_arm_of_its_submission(house: House):
    house.offer(bigger=BIGGER)
    async with await house.client("generate", "jobs") as client:
        user = await user_of(client, "bigger")
        before = len(house.router.requests)
        headers = {"X-User-Id": user}
        submitted = await client.post("/v1/generate", json=BODY | {"async": True, "seed": 7}, headers=headers)
        assert (submitted.status_code, submitted.headers["x-experiment"]) == (202, "bigger=bigger")
        assert submitted.json()["experiments"] == [{"name": "bigger", "arm": "bigger"}]
        house.offer()  # the experiment ends before the job is drawn
        refused = await client.post("/v1/feedback", json={"id": submitted.json()["job_id"], "outcome": "kept"})
        assert (refused.status_code, "it is queued" in refused.text) == (404, True)
        working = asyncio.create_task(house.runner.run())
        house.runner.offer(("sd15", "sdxl"))
        try:
            address = f"/v1/jobs/{submitted.json()['job_id']}"
            job = (await client.get(address, headers={"prefer": "wait=10"})).json()
        finally:
            house.runner.stop()
            await asyncio.wait({working}, timeout=5)
            working.cancel()
        assert job["status"] == "succeeded", job
        assert job["experiments"] == job["result"]["experiments"] == [{"name": "bigger", "arm": "bigger"}]
        [drawn] = house.router.requests[before:]
        assert (drawn.model, drawn.steps) == ("sdxl", 9)
        said = await client.post("/v1/feedback", json={"id": job["job_id"], "outcome": "favourite"})
        assert said.json()["experiments"] == [{"name": "bigger", "arm": "bigger"}]
    house.offer(bigger=BIGGER)
    assert (await house.report("bigger"))["arms"][1]["outcomes"]["favourite"]["mean"] > 0
