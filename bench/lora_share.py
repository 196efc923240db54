"""What mixed LoRAs cost on one model: the same traffic with none, with one for all, and with eight different ones."""

import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from bench.built import STEPS, Built
from bench.load import Load, Say, driven
from bench.loras import ATTENTION, BATCH, write_random_loras
from bench.pages import Keep, Piece
from bench.report import Sheet, figure
from bench.turns import Saturated
from bench.workloads import RequestClass
from models.parts import AdapterUse

RANK = 16
ROUNDS = 2  # after one that is not counted
LEGEND = (
    f"Equal requests of {STEPS} steps, all submitted at once, LoRAs of random numbers and rank {RANK} on the attention "
    f"layers of the UNet; the median of {ROUNDS} rounds, taken in turns. Forwards in which no row has a LoRA are "
    "compiled where anything is; the others are captured where graphs are on."
)


@dataclass(kw_only=True)
class Way:
    """One kind of traffic. `share` is of the pictures a second without LoRAs."""

    title: str
    rounds: list[Saturated] = field(default_factory=list)
    share: float = 1.0

    @property
    def pictures_per_s(self) -> float:
        return statistics.median(one.pictures_per_s for one in self.rounds)


async def compare(built: Built, say: Say, keep: Keep) -> None:
    """Every kind of traffic in turn."""
    plain = [built.request_of(RequestClass(built.side, STEPS), seed) for seed in range(built.options.pictures)]
    uses = [(AdapterUse(name=f"lora-{i}"),) for i in range(BATCH)]
    traffic = {
        "no LoRA": plain,
        "one LoRA for all": [replace(request, adapters=uses[0]) for request in plain],
        f"{BATCH} different LoRAs": [replace(r, adapters=uses[i % BATCH]) for i, r in enumerate(plain)],
    }
    ways = [Way(title=title) for title in traffic]
    with tempfile.TemporaryDirectory() as folder:
        write_random_loras(Path(folder), {"unet": built.modules["unet"]}, RANK, ATTENTION)
        async with built.shared(Path(folder)) as engine:
            for number in range(1 + ROUNDS):
                for way in ways:
                    run = await driven(engine, Load.saturating(traffic[way.title]), way.title, say)
                    way.rounds += [Saturated.of(run)] if number else []
    for way in ways:
        way.share = way.pictures_per_s / ways[0].pictures_per_s
    keep(Piece.of("loras", built, [_sheet(built, ways)], [LEGEND], ways))


def _sheet(built: Built, ways: Sequence[Way]) -> Sheet:
    name = built.network.name
    return Sheet(
        title=f"{name} at {built.side} px with LoRAs",
        columns=(name, "pictures/s", "of none", "rows", "padded"),
        rows=[
            [
                way.title,
                f"{way.pictures_per_s:.3g}",
                figure(way.share),
                f"{way.rounds[-1].rows_per_forward:.1f}",
                f"{way.rounds[-1].padded_share:.0%}",
            ]
            for way in ways
        ],
    )
