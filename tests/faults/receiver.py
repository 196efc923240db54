"""Who takes the webhooks of a run: a real HTTP server that verifies each by the standard's own code."""

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

from standardwebhooks.webhooks import Webhook, WebhookVerificationError

from tests.app.loopback import Loopback, Request, response, serving
from tests.faults.log import Hook, Log

PATH = "/hooks/"
GONE = -1


class Receiver:
    """Refuses a webhook as often as its job's plan says (`deaf`), says 410 where that is GONE, and takes the rest.

    `secrets` are those that sign, by the number of the job whose webhook it is; they are known once the server runs.
    """

    def __init__(self, log: Log, deaf: Mapping[int, int]):
        self.secrets: Mapping[int, str] = {}
        self._log, self._deaf = log, deaf
        self._heard: Counter[str] = Counter()

    async def answer(self, request: Request, writer: asyncio.StreamWriter) -> None:
        number = int(request.target.removeprefix(PATH))
        id, body = request.headers["webhook-id"], json.loads(request.body)
        self._heard[id] += 1
        deaf = self._deaf[number]
        status = 410 if deaf == GONE else 500 if self._heard[id] <= deaf else 204
        hook = Hook(
            webhook_id=id,
            job_id=body["job_id"],
            event=body["type"].removeprefix("job."),
            status=body["status"],
            answered=status,
            verified=self._is_ours(number, request),
        )
        self._log.write(hook)
        writer.write(response(status))

    def _is_ours(self, number: int, request: Request) -> bool:
        try:
            Webhook(self.secrets[number]).verify(request.body, request.headers)
        except WebhookVerificationError:
            return False
        return True


@asynccontextmanager
async def receiving(receiver: Receiver) -> AsyncIterator[Loopback]:
    """The server, on a port of its own."""
    async with serving(receiver.answer) as loopback:
        yield loopback
