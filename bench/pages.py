"""What a benchmark on a GPU has found, piece by piece: as JSON that can be read again, and as a page of tables."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.report import Sheet

if TYPE_CHECKING:
    from bench.built import Built


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One part's findings with one model: tables, what is to be known of them, and all figures."""

    part: str
    model: str
    tables: Sequence[Sheet]
    notes: Sequence[str]
    figures: Any

    @classmethod
    def of(cls, part: str, built: "Built", tables: list[Sheet], notes: list[str], figures: Any) -> "Piece":
        return cls(part=part, model=built.network.name, tables=tables, notes=notes, figures=plain(figures))


Keep = Callable[[Piece], None]
"""Takes a piece as far as it has come; the same one again, with more in it, takes its place."""


def plain(found: Any) -> Any:
    """Dataclasses in lists and mappings as JSON has them."""
    if isinstance(found, dict):
        return {str(key): plain(value) for key, value in found.items()}
    if isinstance(found, list | tuple):
        return [plain(each) for each in found]
    return plain(asdict(found)) if is_dataclass(found) and not isinstance(found, type) else found


@dataclass(kw_only=True)
class Findings:
    """One run's pieces, and the facts without which they mean nothing: the device, versions, the command."""

    facts: list[str]
    options: dict[str, Any]
    pieces: list[Piece] = field(default_factory=list)

    @classmethod
    def read(cls, file: Path) -> "Findings":
        """What `write` has written. Raises OSError and ValueError where that is not it."""
        told = json.loads(file.read_text())
        pieces = [
            Piece(**piece | {"tables": [Sheet(**table) for table in piece["tables"]]}) for piece in told["pieces"]
        ]
        return cls(facts=told["facts"], options=told["options"], pieces=pieces)

    def put(self, piece: Piece) -> None:
        """Takes a piece, in the place of an earlier one of the same part and model."""
        same = [i for i, one in enumerate(self.pieces) if (one.part, one.model) == (piece.part, piece.model)]
        if same:
            self.pieces[same[0]] = piece
        else:
            self.pieces.append(piece)

    def write(self, folder: Path) -> None:
        """gpu.json and gpu.md, whole at any time."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in (
            ("gpu.json", json.dumps(asdict(self), indent=1, default=str)),
            ("gpu.md", page([self])),
        ):
            partial = folder / f"{name}.partial"
            partial.write_text(text + "\n")
            partial.rename(folder / name)


def page(runs: Iterable[Findings]) -> str:
    """All runs' tables, each with its notes; what was said already is not said again."""
    paragraphs: list[str] = []
    for run in runs:
        for piece in run.pieces:
            paragraphs += [*(table.markdown() for table in piece.tables), *piece.notes]
        paragraphs += run.facts
    return "\n\n".join(dict.fromkeys(paragraphs))
