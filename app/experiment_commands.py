"""`heliograph experiments`: the experiments of a server, their reports, and what is to be forgotten."""

from typing import Annotated, Any

import typer

from app.config_option import CONFIG, Config, console
from app.server_option import ADDRESS, Address

experiments_app = typer.Typer(no_args_is_help=True, help="Experiments: who draws with what, and what came of it.")

WIDTH = 41  # characters of a plot
Name = Annotated[str, typer.Argument(help="From `heliograph experiments list`.")]


@experiments_app.command("list")
def list_experiments(address: Address = ADDRESS) -> None:
    """Every experiment of a server: its arms, their weights and parameters, and whether one is switched off."""
    from rich.console import Console
    from rich.table import Table

    from app.client import Client

    table = Table("experiment", "unit", "share", "arm", "weight", "state", "parameters")
    for experiment in Client(address).experiments():
        told = experiment["name"] if experiment["enabled"] else f"{experiment['name']} (off)"
        first = (told, experiment["unit"], f"{experiment['share']:g}")
        for name, arm in experiment["arms"].items():
            state = "shadow" if arm["shadow"] else arm["rail"]["state"]
            parameters = ", ".join(f"{key}={value}" for key, value in arm["parameters"].items())
            table.add_row(*first, name, f"{arm['weight']:g}", state, parameters)
            first = ("", "", "")
    Console().print(table)


@experiments_app.command("report")
def report(
    name: Name,
    json: Annotated[bool, typer.Option("--json", help="All of it, as the server tells it.")] = False,
    address: Address = ADDRESS,
) -> None:
    """What an experiment has come to: its arms, and how they differ from the control, with a plot for each outcome."""
    from rich.console import Console

    from app.client import Client

    told, out = Client(address).experiment(name), Console()
    if json:
        out.print_json(data=told)
        return
    out.print(_arms(told))
    for line in _differences(told):
        out.print(line, markup=False, highlight=False, soft_wrap=True)
    if told["earlier"]:
        out.print(f"{told['earlier']} exposures by earlier rules of assignment are left out")
    check = told["assignment"]
    if check["mismatched"]:
        text = f"The arms have other shares of the units than they should (p = {check['p_value']:.2g}): something keeps"
        out.print(f"{text} units from an arm, and nothing above is to be believed.", style="red", soft_wrap=True)


@experiments_app.command()
def forget(
    name: Annotated[str, typer.Argument(help="Of an experiment that is over.")], config: Config = CONFIG
) -> None:
    """Remove all that the database of a configuration knows of an experiment."""
    from app import deployment
    from app.database import perform
    from app.experiments.store import ExperimentStore

    url = deployment.read(config)[0].gateway.database
    gone = perform(url, lambda database: ExperimentStore(database).forget(name), new=False)
    console.print(f"removed {gone} exposures of {name}", highlight=False, markup=False)


def _arms(told: dict[str, Any]) -> Any:
    from rich.table import Table

    outcomes = list(dict.fromkeys(outcome for arm in told["arms"] for outcome in arm["outcomes"]))
    table = Table("arm", "units", "exposures", "errors", "p50 s", "p95 s", "engine s", *outcomes, title=told["name"])
    for arm in told["arms"]:
        kind = " (control)" if arm["name"] == told["control"] else " (shadow)" if arm["shadow"] else ""
        numbers = (str(arm["units"]), str(arm["exposures"]), str(arm["errors"]))
        times = (_number(arm["p50_s"]), _number(arm["p95_s"]), _number(arm["engine_s"]))
        means = (_mean(outcome, arm["outcomes"].get(outcome)) for outcome in outcomes)
        table.add_row(arm["name"] + kind, *numbers, *times, *means)
    return table


def _differences(told: dict[str, Any]) -> list[str]:
    """A line and a plot for each outcome of each arm but the control."""
    lines = []
    percent = f"{100 * told['confidence']:.0f} %"
    for arm in told["arms"]:
        for outcome, found in arm["outcomes"].items():
            if (difference := found["difference"]) is None:
                continue
            always, once = difference["always"], difference["once"]
            lines.append(f"{arm['name']}, {outcome}: {_change(outcome, difference['estimate'])} against the control")
            whole = 4.0 if outcome == "rating" else 1.0
            lines.append(f"  {plot(always, difference['estimate'], whole)}")
            lines.append(
                f"  at any look, {percent}: {_range(outcome, always)}, p = {difference['p_value']:.3g}"
                + ("" if once is None else f"; at one look: {_range(outcome, once)}")
            )
    return lines


def plot(interval: dict[str, float], estimate: float, whole: float) -> str:
    """An interval and the estimate in it on a line from -whole to whole, with 0 in the middle."""
    line = ["·"] * WIDTH

    def place(x: float) -> int:
        return round((x / whole + 1) / 2 * (WIDTH - 1))

    low, high = place(interval["low"]), place(interval["high"])
    line[low : high + 1] = "─" * (high + 1 - low)
    line[WIDTH // 2] = "┼" if low <= WIDTH // 2 <= high else "│"
    line[low], line[high] = "├", "┤"
    line[place(estimate)] = "●"
    return "".join(line)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _mean(outcome: str, found: dict[str, Any] | None) -> str:
    if found is None:
        return ""
    return f"{found['mean']:.2f}" if outcome == "rating" else f"{100 * found['mean']:.1f} %"


def _change(outcome: str, value: float) -> str:
    return f"{value:+.2f}" if outcome == "rating" else f"{100 * value:+.1f} points"


def _range(outcome: str, interval: dict[str, float]) -> str:
    return f"{_change(outcome, interval['low'])} to {_change(outcome, interval['high'])}"
