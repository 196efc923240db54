"""Turns: one full-size model, built once, drawn with by every contender in turn."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch

from bench import assembled
from bench.ceilings import Ceilings
from bench.contender import Contender
from bench.drift import exact_float32, nearest, recorded_latents
from bench.fullsize import Flops, Network, build
from bench.inprocess import ROWS, InProcess
from bench.load import Load, Run, drive
from bench.pipeline import Pipeline
from bench.serial import Serial
from bench.static import Static
from bench.workloads import RequestClass, Workload, request_of, requests_of, steps_mixed
from models.engine import Engine
from models.weights import place

STEPS = 20
TINY_SIDE = 64


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a run is made. `group` is B1c's batch; `compile_mode` is torch.compile's, None leaves B0c and B1c out."""

    device: str
    dtype: str
    tiny: bool
    pictures: int
    group: int
    compile_mode: str | None
    seed: int

    def side(self, network: Network) -> int:
        return TINY_SIDE if self.tiny else network.side


@dataclass(frozen=True, kw_only=True)
class Saturated:
    """Pictures a second when everything is submitted at once, and the rows in a forward."""

    pictures_per_s: float
    rows_per_forward: float


@dataclass(kw_only=True)
class Turn:
    """One contender's turn.

    The first picture's time counts from the networks in memory, warm-up and compiling included. `drift` is the larger
    of the distances alone and among neighbours.
    """

    contender: str
    title: str
    first_picture_s: float
    saturated: dict[str, Saturated] = field(default_factory=dict)  # by workload
    peak_share: float = 0.0  # under equal requests
    memory_gib: float = 0.0
    drift: float = 0.0


class Turns:
    """The networks are float32 until the reference is drawn, and then in the contenders' precision."""

    def __init__(self, network: Network, options: Options, ceilings: Ceilings):
        self._network = network
        self._options = options
        self._ceilings = ceilings
        self._side = options.side(network)
        self._placement = place(options.device, options.dtype)
        self._model = build(network, self._placement.device, options.tiny, options.seed)
        self._flops = Flops.count(self._model.modules, self._side)
        self._request = request_of(RequestClass(self._side, STEPS), options.seed, network.name)

    async def run(self, report: Callable[[Turn], None]) -> None:
        with exact_float32():
            pipeline = self._pipeline()
            reference = pipeline.latents(self._request).float().cpu()
            pipeline.close()
        for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
            if name in self._model.modules:
                self._model.modules[name].to(self._placement.vae_dtype if name == "vae" else self._placement.dtype)
        report(await self._take(Serial(self._pipeline, "B0", "diffusers, one at a time, eager"), reference))
        for name in ("unet", "vae"):
            self._model.modules[name].to(memory_format=torch.channels_last)
        for contender in self._channels_last():
            report(await self._take(contender, reference))

    def _channels_last(self) -> list[Contender]:
        size = self._options.group
        contenders: list[Contender] = [
            InProcess(partial(self._engine, ROWS), "E1", "Heliograph, one picture at a time"),
            InProcess(partial(self._engine, None), "E", "Heliograph, measured cap"),
        ]
        if self._options.compile_mode is None:
            return contenders
        grouped = f"diffusers, compiled, groups of {size} with equal parameters"
        return [
            Serial(self._compiled, "B0c", "diffusers, one at a time, compiled"),
            Static(self._compiled, size, "B1c", grouped),
            *contenders,
        ]

    async def _take(self, contender: Contender, reference: torch.Tensor) -> Turn:
        cuda = self._placement.device.type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        async with contender:
            with recorded_latents(self._model.modules["vae"]) as alone:
                await contender.generate(self._request)
            first_s = time.perf_counter() - start
            turn = Turn(contender=contender.name, title=contender.title, first_picture_s=first_s)
            drift = nearest(reference, alone)
            for workload in workloads(self._side):
                with recorded_latents(self._model.modules["vae"]) as together:
                    run = await self._saturate(contender, workload)
                drift = max(drift, nearest(reference, together))
                turn.saturated[workload.name] = Saturated(
                    pictures_per_s=run.pictures_per_s, rows_per_forward=run.rows_per_forward or 0.0
                )
        flop_per_s = self._flops.picture(STEPS) * turn.saturated["equal"].pictures_per_s
        turn.peak_share = flop_per_s / self._ceilings.flop_per_s
        turn.memory_gib = torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0
        turn.drift = drift
        return turn

    async def _saturate(self, contender: Contender, workload: Workload) -> Run:
        """The reference's request is among them, the last. A first round, not counted, warms every class up."""
        requests = requests_of(workload, self._options.pictures - 1, self._options.seed, self._network.name)
        warm_up = [request_of(kind, seed, self._network.name) for kind in workload.classes for seed in (1, 2)]
        await drive(contender, Load.saturating(warm_up))
        return await drive(contender, Load.saturating([*requests, self._request]))

    def _pipeline(self, unet: torch.nn.Module | None = None) -> Pipeline:
        return assembled.pipeline(self._network, self._model.modules, unet)

    def _compiled(self) -> Pipeline:
        return self._pipeline(torch.compile(self._model.modules["unet"], mode=self._options.compile_mode))

    def _engine(self, cap: int | None) -> Engine:
        """The cap is measured in the warm-up unless it is given."""
        return assembled.engine(self._network, self._model, self._placement, self._side, cap)


def workloads(side: int) -> tuple[Workload, ...]:
    """At the model's own size: mixed sizes belong to the other benchmark."""
    return (
        Workload(name="equal", title="equal requests", shares={RequestClass(side, STEPS): 100}),
        Workload(name="steps", title="mixed steps", shares=steps_mixed(side, 100)),
    )
