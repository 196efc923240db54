"""An application that makes many calls of a model within one request, as a test deploys it beside the gateway."""

import asyncio
import uuid
from typing import Any

from ray import serve
from starlette.requests import Request

from app.hint import Hint
from app.settings import MODEL_APPLICATION, MODEL_DEPLOYMENT, PROJECT, ModelSettings
from models.events import Finished
from models.request import GenerationRequest

MODEL = "sd15"


@serve.deployment(ray_actor_options={"num_cpus": 0.1})
class FanOut:
    async def __call__(self, http: Request) -> list[int]:
        """The seeds of as many pictures as `?calls=` says, in the order of the calls."""
        card = ModelSettings(name=MODEL, source=str(PROJECT / "models" / "embedded" / MODEL)).card()
        name = MODEL_APPLICATION.format(name=MODEL)
        handle: Any = serve.get_deployment_handle(MODEL_DEPLOYMENT, app_name=name).options(stream=True)

        async def draw(seed: int) -> int:
            request = GenerationRequest(model=MODEL, prompt="a red circle", steps=1, seed=seed).resolve(card)
            calls = handle.generate.remote(request, False, uuid.uuid4().hex, hint=Hint.of(request))
            seeds = [event.seed async for event in calls if isinstance(event, Finished)]  # to the end of the stream
            return seeds.pop()

        return list(await asyncio.gather(*map(draw, range(int(http.query_params["calls"])))))


app = FanOut.bind()
