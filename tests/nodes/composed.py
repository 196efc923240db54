"""What compose.yaml deploys, started without containers: a real PostgreSQL, an S3 server, a head and a worker."""

from pathlib import Path
from typing import Any

import httpx2
import yaml

from app.database import Database
from app.keys import registry
from bench.serving import PROJECT, free_port
from tests.faults.databases import postgresql
from tests.faults.places import Place, s3
from tests.nodes.cluster import Cluster, folder_of_its_own
from tests.nodes.system import System

CONFIG = PROJECT / "cluster" / "serve_compose.yaml"
BODY = {"prompt": "a red circle", "seed": 7, "steps": 4, "response": "url"}
TIMEOUT_S = 120.0


async def draw_and_work() -> None:
    """A picture by address and one by a job, for a caller with a key. Raises AssertionError where one does not come."""
    folder = folder_of_its_own()
    async with postgresql(folder) as database, s3(folder) as place, Cluster(place.environment, folder) as cluster:
        await cluster.start_head()
        await cluster.start_worker("worker", "heliograph/role=drawing", gpus=0)
        port = free_port()
        config = in_their_places(yaml.safe_load(CONFIG.read_text()), database.url, place, folder, port)
        system = System(cluster, config, {"sd15": 1, "sdxl": 1})
        await system.deploy()
        headers = {"Authorization": f"Bearer {await _key(database.url, folder)}"}
        async with httpx2.AsyncClient(base_url=system.address, timeout=TIMEOUT_S) as client:
            assert (await client.post("/v1/generate", json=BODY)).status_code == 401
            drawn = await client.post("/v1/generate", json=BODY, headers=headers)
            assert drawn.status_code == 200, drawn.text
            await _check(client, drawn.json()["images"][0])
            submitted = await client.post("/v1/generate", json=BODY | {"async": True, "model": "sdxl"}, headers=headers)
            assert submitted.status_code == 202, submitted.text
            job = submitted.json()["job_id"]
            done = (await client.get(f"/v1/jobs/{job}", headers=headers | {"Prefer": "wait=60"})).json()
            assert done["status"] == "succeeded", done
            await _check(client, done["result"]["images"][0])


def in_their_places(raw: dict[str, Any], database: str, place: Place, folder: Path, port: int) -> dict[str, Any]:
    """The configuration with the addresses of what runs here."""
    kept = {"database": database, "secret_file": f"{folder}/secret", "store": dict(place.settings)}
    for application in raw["applications"]:
        if application["name"].startswith("model-"):
            application["args"] |= {"max_rows": 8, "threads": 1}
        elif application["name"] in ("jobs", "gateway"):
            application["args"] |= kept
    return raw | {"http_options": raw["http_options"] | {"host": "127.0.0.1", "port": port}}


async def _key(url: str, folder: Path) -> str:
    database = Database(url)
    try:
        _, text = await registry.opened(database, f"{folder}/secret").create("a test", ("generate", "jobs"))
        return text
    finally:
        await database.close()


async def _check(client: httpx2.AsyncClient, image: dict[str, Any]) -> None:
    """The picture's address needs no key, and leads to it."""
    answer = await client.get(image["url"])
    assert answer.status_code == 200, answer.text
    assert answer.content.startswith(b"\x89PNG")
