"""Turns: everyone in turn draws as much as it can, all that is asked for being there at once."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from bench.built import STEPS, Built
from bench.ceilings import Ceilings
from bench.contender import Contender
from bench.drift import nearest, recorded_latents
from bench.inprocess import InProcess
from bench.load import Load, Run, Say, driven
from bench.pages import Keep, Piece
from bench.report import NOTHING, Sheet, figure
from bench.workloads import RequestClass, Workload, requests_of
from models.request import GenerationRequest

SERIAL = 4  # who draws one at a time draws so many times fewer, which tells the same
REPEATS = 2  # of a request alone
# Submissions to MLPerf Inference: SDXL at 1024 px, 20 steps with guidance, on one H100, pictures a second.
RECORDS = {"2.044": "NVIDIA's, TensorRT in FP8, v4.1", "2.263": "TheStage's, FP8, v5.1"}
LEGEND = (
    "Random weights. Pictures a second when everything is submitted at once, equal requests of 20 steps and mixed ones "
    "of 20/30/50 at 50/30/20 %. rows: in a forward, those that were wanted; padded: the share of rows computed for "
    "nobody; of peak: arithmetic done under equal requests, as a share of the measured product; drift: relative L2 "
    "distance of the final latents from float32's; first: seconds to the first picture with the networks in memory, "
    "all warm-up and compiling included."
)
RECORDS_LEGEND = (
    "Of 2.044 and of 2.263: beside MLPerf's records for SDXL on one H100, which are "
    f"{', '.join(f'{record} ({holder})' for record, holder in RECORDS.items())}."
)


@dataclass(frozen=True, kw_only=True)
class Saturated:
    """Pictures a second, the rows in a forward that were wanted, and the share of those that were not."""

    pictures_per_s: float
    rows_per_forward: float
    padded_share: float

    @classmethod
    def of(cls, run: Run) -> "Saturated":
        assert run.work is not None, "its forwards are counted in this process"
        return cls(
            pictures_per_s=run.pictures_per_s,
            rows_per_forward=run.work.rows_per_forward,
            padded_share=run.work.padded_share,
        )


@dataclass(kw_only=True)
class Turn:
    """One contender's turn. The first picture's time counts from the networks in memory, warm-up and compiling
    included. `drift` is the larger of the distances alone and among neighbours."""

    contender: str
    title: str
    first_picture_s: float
    saturated: dict[str, Saturated] = field(default_factory=dict)  # by workload
    peak_share: float | None = None  # under equal requests
    memory_gib: float = 0.0
    drift: float = 0.0


class Turns:
    """Everyone's turn with one model. A contender that fails is told, and costs the others nothing."""

    def __init__(self, built: Built, ceilings: Ceilings, reference: torch.Tensor, say: Say, keep: Keep):
        self._built = built
        self._ceilings = ceilings
        self._reference = reference
        self._say = say
        self._keep = keep
        self._workloads = [workload for workload in built.workloads if workload.name != "sizes"]
        self._records = list(RECORDS) if built.network.name == "sdxl" and not built.options.tiny else []
        self._turns: list[Turn] = []
        self._failed: list[str] = []

    async def first(self) -> None:
        """B0's, before the weights are laid out for the others."""
        await self._take(self._built.eager(), serial=True)

    async def others(self) -> None:
        built = self._built
        if built.options.compile_mode is not None:
            await self._take(built.serial(), serial=True)
            await self._take(built.grouped(max(built.group_sizes)), serial=False)
        await self._take(built.alone(), serial=True)
        await self._take(built.shared(), serial=False)

    async def _take(self, contender: Contender, serial: bool) -> None:
        self._say(f"{contender.name}: starting", 0, 1)
        try:
            self._turns.append(await self._turn(contender, serial))
        except Exception as fault:  # whatever it is: the figures of the others are worth having
            self._failed.append(f"{contender.name} failed: {fault!r}.")
        legend = ", ".join(f"{turn.contender}: {turn.title}" for turn in self._turns) + "."
        told = [LEGEND, *([RECORDS_LEGEND] if self._records else []), legend, *self._failed]
        self._keep(Piece.of("saturated", self._built, [self._sheet()], told, self._turns))

    async def _turn(self, contender: Contender, serial: bool) -> Turn:
        built, vae = self._built, self._built.modules["vae"]
        before = torch.cuda.memory_allocated() if built.cuda else 0
        if built.cuda:
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        async with contender:
            with recorded_latents(vae) as alone:
                await contender.generate(built.request)
            turn = Turn(contender=contender.name, title=contender.title, first_picture_s=time.perf_counter() - start)
            if built.options.compiled and isinstance(contender, InProcess) and not contender.compiled_kinds:
                self._failed.append(f"{contender.name}: none of its forwards could be compiled.")
            turn.drift = nearest(self._reference, alone)
            for workload in self._workloads:
                with recorded_latents(vae) as together:
                    turn.saturated[workload.name] = await self._saturate(contender, workload, serial)
                turn.drift = max(turn.drift, nearest(self._reference, together))
        if "equal" in turn.saturated:
            flop_per_s = built.flops.picture(STEPS) * turn.saturated["equal"].pictures_per_s
            turn.peak_share = flop_per_s / self._ceilings.flop_per_s
        if built.cuda:
            turn.memory_gib = (torch.cuda.max_memory_allocated() - before + built.nbytes) / 2**30
        return turn

    async def _saturate(self, contender: Contender, workload: Workload, serial: bool) -> Saturated:
        """The reference's request is among them, the last. What is not measured has every size drawn once."""
        options, name = self._built.options, self._built.network.name
        count = max(2, options.pictures // (SERIAL if serial else 1))
        requests = [*requests_of(workload, count - 1, options.seed, name), self._built.request]
        return await saturated(contender, self._built, workload, requests, self._say)

    def _sheet(self) -> Sheet:
        built = self._built
        names = [workload.name for workload in self._workloads]
        return Sheet(
            title=f"{built.network.name} at {built.side} px, pictures a second",
            columns=(
                built.network.name,
                *(column for name in names for column in (name, "rows", "padded")),
                "of B0",
                "of peak",
                *(f"of {record}" for record in self._records),
                "GiB",
                "drift",
                "first",
            ),
            rows=[self._row(turn, names) for turn in self._turns],
        )

    def _row(self, turn: Turn, names: list[str]) -> list[str]:
        equal = _equal(turn)
        baseline = next((_equal(one) for one in self._turns if one.contender == "B0"), None)
        cells = [turn.contender]
        for name in names:
            found = turn.saturated[name]
            cells += [f"{found.pictures_per_s:.3g}", f"{found.rows_per_forward:.1f}", f"{found.padded_share:.0%}"]
        return [
            *cells,
            figure(equal / baseline if equal and baseline else None),
            NOTHING if turn.peak_share is None else f"{turn.peak_share:.0%}",
            *(figure(equal and equal / float(record)) for record in self._records),
            f"{turn.memory_gib:.1f}",
            f"{turn.drift:.1e}",
            f"{turn.first_picture_s:.1f}",
        ]


def _equal(turn: Turn) -> float | None:
    return turn.saturated["equal"].pictures_per_s if "equal" in turn.saturated else None


async def saturated(
    contender: Contender, built: Built, workload: Workload, requests: Sequence[GenerationRequest], say: Say
) -> Saturated:
    """Everything at once, after a picture of each size."""
    for side in sorted({kind.side for kind in workload.classes}):
        await contender.generate(built.request_of(RequestClass(side, 2), 0))
    run = await driven(contender, Load.saturating(requests), f"{workload.title}: saturated", say)
    return Saturated.of(run)


async def time_alone(built: Built, say: Say) -> None:
    """B0's time for a request of each class, from which everyone's deadlines follow."""
    kinds = sorted({kind for workload in built.workloads for kind in workload.classes})
    async with built.eager() as serial:
        for i, kind in enumerate(kinds):
            say("B0: requests alone", i, len(kinds))
            await serial.isolated_s(RequestClass(kind.side, 2), 1)  # the first of a shape is slow
            built.isolated_s[kind] = await serial.isolated_s(kind, REPEATS)
