"""`python -m bench.hits`: how quickly the server answers what it has drawn before, and what equal requests cost."""

import asyncio
import json
import os
import statistics
import sys
import time
from typing import Annotated, Any

import typer
from rich.console import Console

from bench import readme
from bench.report import Sheet

BODY: dict[str, Any] = {"prompt": "a red circle on a blue background", "steps": 20, "cache": True}
WARM_UP = 20
HERD = 50


def main(
    rounds: Annotated[int, typer.Option(help="Answers that are timed, of each kind.", min=20)] = 300,
    threads: Annotated[int, typer.Option(help="torch threads.")] = os.cpu_count() or 1,
    publish: Annotated[bool, typer.Option("--publish", help="Also put the table into bench/README.md.")] = False,
) -> None:
    """Time drawing, hits with the picture and with its address, and 50 equal requests at once, through HTTP."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from bench.machine import Machine

    console, machine = Console(), Machine.here(threads)
    spent, misses = asyncio.run(_measured(rounds, threads))
    sheet = sheet_of(spent)
    facts = [
        f"Of {HERD} equal requests at once, {misses} drew. One client, one request at a time but for these; {rounds} "
        f"hits of each kind. Machine: {machine}.",
        f"Command: `{' '.join(['python -m bench.hits', *sys.argv[1:]])}`.",
    ]
    console.print(sheet.rich())
    console.print(*facts, sep="\n", highlight=False)
    if publish:
        readme.publish("hits", "\n\n".join([sheet.markdown(), *facts]))


def sheet_of(spent: dict[str, list[float]]) -> Sheet:
    """One line for each kind of answer, in milliseconds."""
    rows = []
    for kind, seconds in spent.items():
        hundredths = statistics.quantiles(seconds, n=100, method="inclusive")
        rows.append([kind, *(f"{1000 * value:.1f}" for value in (hundredths[49], hundredths[94], hundredths[98]))])
    return Sheet(title="Milliseconds to an answer", columns=("", "p50", "p95", "p99"), rows=rows)


async def _measured(rounds: int, threads: int) -> tuple[dict[str, list[float]], int]:
    """The seconds of each kind of answer, and how many of a herd were drawn."""
    from bench.server import Server

    async with Server(threads) as server:

        async def ask(**fields: Any) -> tuple[dict[str, Any], float]:
            began = time.perf_counter()
            answer = await server.post("/v1/generate", BODY | fields)
            return json.loads(answer), time.perf_counter() - began

        async def hits(**fields: Any) -> list[float]:
            answers = [await ask(seed=0, **fields) for _ in range(WARM_UP + rounds)]
            if not all(answer["cached"] for answer, _ in answers):
                raise RuntimeError("what was drawn a moment ago was drawn again")
            return [seconds for _, seconds in answers[WARM_UP:]]

        drawn = [(await ask(seed=seed))[1] for seed in range(20)]
        spent = {
            "drawn, 20 steps": drawn[1:],
            "hit, the picture itself": await hits(),
            "hit, its address": await hits(response="url"),
        }
        herd = await asyncio.gather(*(ask(seed=4711) for _ in range(HERD)))
    return spent, sum(not answer["cached"] for answer, _ in herd)


if __name__ == "__main__":
    typer.run(main)
