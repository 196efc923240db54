"""The report: tables for the terminal and for README, and the run as JSON."""

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench.results import BASELINES, Capacity, Measured, Results, Saturated, WorkloadResults, ratio

NOTHING = "–"
RATIOS_TITLE = (
    "Ratios of saturated throughput, the median of the rounds and each, and of capacity; best of B is the better of B0 "
    "and B1"
)
COLUMNS = (
    "Saturated: pictures a second, everything submitted at once, the median of the rounds; rows: in a forward there. "
    "Capacity: requests a second of which 95 % are in time, that is within three times B0's time for such a request "
    "alone. p50, p99 (seconds) and in time: at one arrival rate for all. Differs: the largest difference from B0's "
    "pictures at any pixel."
)


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """A table before it is drawn: the first column names the row, the others hold figures."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        rule = [":--", *["--:"] * (len(self.columns) - 1)]
        lines = [" | ".join(line) for line in (self.columns, rule, *self.rows)]
        return f"**{self.title}**\n\n" + "\n".join(f"| {line} |" for line in lines)

    def rich(self) -> Table:
        table = Table(title=self.title, title_justify="left", title_style="bold")
        for i, column in enumerate(self.columns):
            table.add_column(column, justify="right" if i else "left")
        for row in self.rows:
            table.add_row(*row)
        return table


def sheets(results: Results) -> list[Sheet]:
    """One table per workload, and the ratios over all of them."""
    return [*map(_workload_sheet, results.workloads), _ratio_sheet(results)]


def _workload_sheet(results: WorkloadResults) -> Sheet:
    alone = ", ".join(f"{kind} {seconds:.2f} s" for kind, seconds in results.isolated_s.items())
    return Sheet(
        title=f"{results.title.capitalize()} (B0 alone: {alone})",
        columns=(
            results.title,
            "saturated",
            "rows",
            "capacity",
            f"p50 at {_rate(results)}",
            "p99",
            "in time",
            "differs",
        ),
        rows=[_row(measured) for measured in results.measured],
    )


def _rate(results: WorkloadResults) -> str:
    common = results.measured[0].common if results.measured else None
    return f"{common.rate:.2f}" if common else NOTHING


def _row(measured: Measured) -> list[str]:
    saturated, capacity, common = measured.saturated, measured.capacity, measured.common
    return [
        measured.contender,
        figure(saturated.pictures_per_s),
        figure(saturated.rows_per_forward, 1),
        figure(capacity and capacity.rate),
        figure(common and common.p50_s),
        figure(common and common.p99_s),
        f"{common.attainment:.0%}" if common else NOTHING,
        f"{saturated.difference}/255" if saturated.difference is not None else NOTHING,
    ]


def _ratio_sheet(results: Results) -> Sheet:
    rows = [
        [
            workload.title,
            _rounds(workload.speedups("E", "B0")),
            _rounds(workload.speedups("E", *BASELINES)),
            _rounds(workload.speedups("H", "E")),
            figure(ratio(workload.capacity("E"), workload.capacity(*BASELINES))),
        ]
        for workload in results.workloads
    ]
    columns = ("ratios", "E / B0", "E / best of B", "H / E", "capacity E / best of B")
    return Sheet(title=RATIOS_TITLE, columns=columns, rows=rows)


def _rounds(ratios: Sequence[float]) -> str:
    """The median, and where there are several, each."""
    if not ratios:
        return NOTHING
    each = f" ({', '.join(map(figure, ratios))})" if len(ratios) > 1 else ""
    return figure(statistics.median(ratios)) + each


def figure(value: float | None, digits: int = 2) -> str:
    return NOTHING if value is None else f"{value:.{digits}f}"


def show(results: Results, console: Console) -> None:
    for sheet in sheets(results):
        console.print(sheet.rich())
    console.print(*_facts(results), sep="\n", highlight=False)


def _facts(results: Results) -> list[str]:
    facts = [
        COLUMNS,
        f"Machine: {results.machine}.",
        f"Command: `{results.command}`, seed {results.seed}, {results.minutes} minutes.",
    ]
    facts += [_steadiness(workload) for workload in results.workloads if workload.of("B0")]
    legend = {m.contender: m.title for w in results.workloads for m in w.measured}
    facts.append(", ".join(f"{name}: {title}" for name, title in legend.items()) + ".")
    facts += [f"{note}." for workload in results.workloads for note in _notes(workload)]
    if results.machine.busy:
        facts.append("The machine was busy with something else: these figures are not worth keeping.")
    return facts


def _notes(workload: WorkloadResults) -> list[str]:
    """The settings that were measured and how a capacity was found, where there is something to tell."""
    parts = [(m.contender, what, part.note) for m in workload.measured for what, part in _parts(m) if part.note]
    return [f"{contender} under {workload.title}, {what}: {note}" for contender, what, note in parts]


def _parts(measured: Measured) -> list[tuple[str, Saturated | Capacity]]:
    parts = [("saturated", measured.saturated), ("capacity", measured.capacity)]
    return [(what, part) for what, part in parts if part is not None]


def _steadiness(workload: WorkloadResults) -> str:
    """How the machine's own speed varied: B0 is the same work in every round."""
    baseline = workload.of("B0")
    rounds = baseline.saturated.rounds if baseline else ()
    return f"B0 under {workload.title}, by round: {', '.join(map(figure, rounds))} pictures a second."


def markdown(results: Results) -> str:
    """The tables and what they were measured on."""
    return "\n\n".join([*(sheet.markdown() for sheet in sheets(results)), *_facts(results)])


def write(results: Results, folder: Path) -> None:
    """bench.json and bench.md."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "bench.json").write_text(json.dumps(results.as_json(), indent=1) + "\n")
    (folder / "bench.md").write_text(markdown(results) + "\n")
