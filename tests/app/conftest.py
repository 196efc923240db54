"""A small service in memory: a router that draws flat pictures, so that the whole gateway runs without Ray or torch."""

import asyncio
import struct
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import replace
from zlib import crc32

import httpx2
import numpy as np
import pytest

from app import ingress
from app.events import Admitted, Ending, ModelState, ReplicaEvent, Upscaled
from app.keys.caller import current
from app.origin import Needs, Origin
from app.service import AdapterDescription, Service
from app.settings import GatewaySettings
from models import png
from models.card import ModelCard
from models.errors import Cancelled, HeliographError
from models.events import Failed, Finished, Progress, Timings
from models.images import ImageFormat, Picture, encode
from models.parts import Upscale
from models.prompt import PromptReport
from models.request import EffectiveRequest
from models.upscaler_card import UpscalerCard

CARDS = {
    name: ModelCard(name=name, family="sd", width=128, height=128, max_pixels=1024 * 1024) for name in ("sd15", "sdxl")
}
ADAPTERS = (AdapterDescription(name="moon", kind="lora", models=("sd15",), base="sd15", sha256="ab" * 32, bytes=1234),)
UPSCALER = UpscalerCard(names=("lanczos", "2x"), default="2x", max_output_pixels=1024 * 1024)
ORIGIN = Origin(revision="abc", device="cpu", dtype="float32", versions={"torch": "2"}, adapters={})
TIMINGS = Timings(queued_s=0.1, encode_s=0.2, denoise_s=0.3, decode_s=0.4)


def claimed(width: int, height: int, colour: int = 6) -> bytes:
    """A PNG with a header, of colour type 6 RGBA, and not a pixel: what a header tells is told, decoding it fails."""
    header = struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", b""), (b"IEND", b""))
    packed = (struct.pack(">I", len(b)) + kind + b + struct.pack(">I", crc32(kind + b)) for kind, b in chunks)
    return png.SIGNATURE + b"".join(packed)


class MemoryRouter:
    """Draws the seed as a colour, enlarges by Lanczos.

    `refusal` comes first, `failure` after a step; `gate` holds the pictures back until somebody opens it, or ends a
    request: those that are `whole` by then are so, others have come to their first step. Encoded pictures go through
    `packed`.
    """

    def __init__(self):
        self.requests: list[EffectiveRequest] = []
        self.callers: list[str] = []
        self.upscales: list[Upscale] = []
        self.drawn_from = ORIGIN
        self.states: dict[str, ModelState] = dict.fromkeys(CARDS, "ready")
        self.refusal: HeliographError | None = None
        self.failure: HeliographError | None = None
        self.upscaler_fault: HeliographError | None = None
        self.gate = asyncio.Event()
        self.gate.set()
        self.left = 0
        self.whole = 0
        self.packed: Callable[[bytes], bytes] = bytes
        self.running: dict[str, str] = {}  # how each is to end, by id

    async def state(self, model: str) -> ModelState:
        return self.states[model]

    async def upscaler_state(self) -> ModelState:
        return self.states.get("upscaler", "ready")

    async def origin(self, model: str, needs: Needs) -> Origin | None:
        return self.drawn_from if self.states[model] == "ready" else None

    async def end(self, ending: Ending, id: str) -> bool:
        if id in self.running:
            self.running[id] = ending
            self.gate.set()
        return id in self.running

    async def generate(self, request: EffectiveRequest, progress: bool, id: str) -> AsyncGenerator[ReplicaEvent, None]:
        self.requests.append(request)
        self.callers.append(current.get().id)
        self.running[id] = "running"
        try:
            if self.refusal:
                yield Failed(error=self.refusal)
                return
            yield Admitted(waiting=2, origin=self.drawn_from)
            if progress:
                steps = request.steps
                yield Progress(index=0, step=steps, steps=steps, forward=1, rows=2, preview=b"jpeg")
            if self.failure:
                yield Failed(error=self.failure)
                return
            await self.gate.wait()
            if self.running[id] == "cancel":
                yield Failed(error=Cancelled("the request was cancelled by its id"))
                return
            accepted = self.running[id] == "accept"
            for index in range(request.samples):
                ended = 1 if accepted and index >= self.whole else None
                yield replace(self._picture(request, index), stop_at_step=ended)
        finally:
            del self.running[id]
            self.left += 1

    async def check_upscaler(self) -> None:
        if self.upscaler_fault:
            raise self.upscaler_fault

    async def upscale(self, picture: bytes, wanted: Upscale, format: ImageFormat) -> Upscaled:
        self.upscales.append(wanted)
        try:
            if self.refusal:
                raise self.refusal
            await self.gate.wait()
            small = Picture.from_bytes(picture)
            large = small.resized(round(small.width * wanted.scale), round(small.height * wanted.scale))
            data = self.packed(encode(large.array(), format))
            return Upscaled(data=data, format=format, width=large.width, height=large.height, model=str(wanted.model))
        finally:
            self.left += 1

    def _picture(self, request: EffectiveRequest, index: int) -> Finished:
        seed = request.seed + index
        array = np.full((request.height, request.width, 3), seed % 256, np.uint8)
        return Finished(
            index=index,
            seed=seed,
            data=self.packed(encode(array, request.output_format)),
            format=request.output_format,
            width=request.width,
            height=request.height,
            revision=self.drawn_from.revision,
            timings=replace(TIMINGS, upscale_s=0.5) if request.upscale else TIMINGS,
            prompts={"prompt": PromptReport(tokens=2, chunks=1, truncated="")},
            warnings=("prompt truncated",) if "truncate" in request.prompt else (),
        )


@pytest.fixture
def router() -> MemoryRouter:
    return MemoryRouter()


@pytest.fixture
def service(router: MemoryRouter) -> Service:
    service = Service(router)
    service.offer(CARDS, "sd15", lambda: ADAPTERS, UPSCALER)
    return service


@pytest.fixture
async def client(service: Service) -> AsyncIterator[httpx2.AsyncClient]:
    readiness = ingress.Readiness(service)
    readiness.warm_up()
    await asyncio.sleep(0)
    app = ingress.build(service, GatewaySettings(max_body_bytes=100_000), readiness.reason)
    transport = httpx2.ASGITransport(app, raise_app_exceptions=False)
    async with httpx2.AsyncClient(transport=transport, base_url="http://localhost") as client:
        assert readiness._warming is not None
        await readiness._warming  # its picture would count among a test's own
        yield client
