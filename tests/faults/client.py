"""The callers of a run. Each does what a careful client does: it repeats what was not answered, with the same key."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import httpx2

from app.jobs.states import TERMINAL, State
from tests.faults.log import Log, Seen, Submitted
from tests.faults.plan import PlannedJob

TIMEOUT_S = 30.0  # of one request
PAUSE_S, LONGEST_PAUSE_S = 0.5, 5.0  # before a request is repeated
POLL_S = 1.0
EVENTS = ("start", "output", "completed")  # of a webhook


class Clients:
    """Callers with a key each, of one server; `owners` are (key, id) by the plan's number of an owner."""

    def __init__(self, address: str, hooks: str, owners: Sequence[tuple[str, str]], log: Log):
        limits = httpx2.Limits(max_connections=None)
        self._http = httpx2.AsyncClient(base_url=address, timeout=TIMEOUT_S, limits=limits)
        self._hooks, self._owners, self._log = hooks, owners, log

    async def close(self) -> None:
        await self._http.aclose()

    async def run(self, jobs: Sequence[PlannedJob], began: float, told: Callable[[State], object]) -> None:
        """Every job from its submission to its end. `began` is the loop's time; `told` hears of each end."""
        async with asyncio.TaskGroup() as tasks:
            for job in jobs:
                tasks.create_task(self._live(job, began, told))

    async def picture(self, url: str) -> bytes | None:
        """A picture by its signed address; None where it cannot be had."""
        answer = await self._asked("GET", url)
        return answer.content if answer.status_code == 200 else None

    async def look(self, job: PlannedJob, job_id: str) -> dict[str, Any]:
        """The job as its owner is shown it; nothing where there is said to be none."""
        return self._saw(job_id, await self._asked("GET", f"/v1/jobs/{job_id}", job.owner))

    async def _live(self, job: PlannedJob, began: float, told: Callable[[State], object]) -> None:
        await asyncio.sleep(began + job.at_s - asyncio.get_running_loop().time())
        job_id = await self._submit(job)
        if job.again:
            await self._submit(job)
        if job.cancel_after_s is not None:
            await asyncio.sleep(job.cancel_after_s)
            self._saw(job_id, await self._asked("POST", f"/v1/jobs/{job_id}/cancel", job.owner))
        while True:
            status = (await self.look(job, job_id)).get("status")
            if status in TERMINAL:
                told(State(status))
                return
            await asyncio.sleep(POLL_S)

    async def _submit(self, job: PlannedJob) -> str:
        """The job's id. Raises ValueError where the server refuses it for good."""
        body = job.body | {"async": True}
        if job.webhook:
            body |= {"webhook_url": f"{self._hooks}{job.number}", "webhook_events": list(EVENTS)}
        while True:
            answer = await self._try("POST", "/v1/generate", job.owner, json=body, key=job.key)
            told = answer.json() if answer is not None and answer.is_success else {}
            submitted = Submitted(
                number=job.number,
                owner=self._owners[job.owner][1],
                seed=job.seed,
                samples=job.samples,
                deadline="deadline_s" in job.body,
                status=None if answer is None else answer.status_code,
                job_id=told.get("job_id"),
                replayed=answer is not None and answer.headers.get("idempotency-replayed") == "true",
            )
            self._log.write(submitted)
            if submitted.job_id is not None:
                return submitted.job_id
            if answer is not None and not _asks_to_come_back(answer):
                raise ValueError(f"job {job.number} was refused: {answer.status_code} {answer.text}")
            await asyncio.sleep(_pause_s(answer))

    def _saw(self, job_id: str, answer: httpx2.Response) -> dict[str, Any]:
        """Notes what was shown of a job."""
        if answer.status_code == 404:
            self._log.write(Seen(job_id=job_id, status="missing"))
            return {}
        told = answer.raise_for_status().json()
        result = told["result"] is not None
        images = sorted(told["images"], key=lambda image: image["index"]) if result else []
        pictures = tuple(image["sha256"] for image in images)
        seen = Seen(job_id=job_id, status=told["status"], attempt=told["attempt"], pictures=pictures, result=result)
        self._log.write(seen)
        return told

    async def _asked(self, method: str, path: str, owner: int | None = None, **options: Any) -> httpx2.Response:
        """The first answer that does not ask to come back."""
        while True:
            answer = await self._try(method, path, owner, **options)
            if answer is not None and not _asks_to_come_back(answer):
                return answer
            await asyncio.sleep(_pause_s(answer))

    async def _try(
        self, method: str, path: str, owner: int | None, key: str | None = None, **options: Any
    ) -> httpx2.Response | None:
        """The answer; None where none came."""
        headers = {} if owner is None else {"Authorization": f"Bearer {self._owners[owner][0]}"}
        headers |= {} if key is None else {"Idempotency-Key": key}
        try:
            return await self._http.request(method, path, headers=headers, **options)
        except httpx2.HTTPError:
            return None


def _asks_to_come_back(answer: httpx2.Response) -> bool:
    """Also a 404 that is not ours: a proxy that has just started knows no routes yet, and says so in plain text."""
    unrouted = answer.status_code == 404 and "json" not in answer.headers.get("content-type", "")
    return answer.status_code >= 500 or answer.status_code in (409, 429) or unrouted


def _pause_s(answer: httpx2.Response | None) -> float:
    wanted = "" if answer is None else answer.headers.get("retry-after", "")
    return min(float(wanted), LONGEST_PAUSE_S) if wanted.isdigit() else PAUSE_S
