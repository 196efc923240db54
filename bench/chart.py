"""A chart: panels one below the other over the same seconds, drawn with Pillow."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

Points = Sequence[tuple[float, float]]

WIDTH, HEIGHT = 1000, 240  # of a panel
LEFT, RIGHT, TOP, BOTTOM = 60, 20, 34, 30  # around what is drawn in it
COLOURS = ((31, 95, 160), (205, 92, 30), (70, 140, 60))
INK, RULE = (60, 60, 60), (225, 225, 225)
LINES = 4  # of a panel's grid


@dataclass(frozen=True, kw_only=True)
class Panel:
    """A quantity over time: (second, value) points by the name of whom they are of. A step holds till the next."""

    title: str
    series: dict[str, Points]
    steps: bool = False


def draw(panels: Sequence[Panel], path: Path) -> None:
    """Writes the chart as a PNG."""
    seconds = max((x for panel in panels for points in panel.series.values() for x, _ in points), default=1.0)
    image = Image.new("RGB", (WIDTH, HEIGHT * len(panels)), "white")
    for number, panel in enumerate(panels):
        _panel(ImageDraw.Draw(image), panel, HEIGHT * number, seconds)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, optimize=True)


def _panel(canvas: ImageDraw.ImageDraw, panel: Panel, top: int, seconds: float) -> None:
    font = ImageFont.load_default(14)
    most = _round_up(max((y for points in panel.series.values() for _, y in points), default=1.0))
    across, up = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def place(x: float, y: float) -> tuple[float, float]:
        return LEFT + across * x / seconds, top + TOP + up * (1 - y / most)

    for line in range(LINES + 1):
        value = most * line / LINES
        canvas.line([place(0, value), place(seconds, value)], fill=RULE)
        canvas.text((LEFT - 8, place(0, value)[1]), f"{value:g}", fill=INK, font=font, anchor="rm")
        canvas.text(
            place(seconds * line / LINES, 0), f"{seconds * line / LINES:.0f} s", fill=INK, font=font, anchor="mt"
        )
    canvas.text((LEFT, top + 8), panel.title, fill=INK, font=font)
    right = WIDTH - RIGHT
    for (name, points), colour in zip(panel.series.items(), COLOURS, strict=False):
        corners = _corners(points) if panel.steps else points
        if len(corners) > 1:
            canvas.line([place(x, y) for x, y in corners], fill=colour, width=3)
        if len(panel.series) > 1:
            canvas.text((right, top + 8), name, fill=colour, font=font, anchor="ra")
            right -= round(font.getlength(name)) + 20


def _corners(points: Points) -> list[tuple[float, float]]:
    """A line that keeps each value until the next."""
    corners = list(points[:1])
    for (_, before), (x, y) in pairwise(points):
        corners += [(x, before), (x, y)]
    return corners


def _round_up(value: float) -> float:
    """A top for an axis: the next of 4, 8, 20, 40, 80, 200 and so on, or of their tenths."""
    top = 0.4
    while top < value:
        top *= 2.5 if f"{top:e}".startswith("8") else 2
    return top
