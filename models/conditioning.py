"""Prompts to conditioning: what each row of a picture is told, and when; every text encoded once and remembered."""

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import reduce
from operator import add
from typing import TypeVar

import torch
from torch.nn.utils.rnn import pad_sequence

from models.errors import InvalidRequest
from models.family import Conditioning, Embedding, Encoding, Family
from models.prompt import Part, PromptReport, Text, parse
from models.request import EffectiveRequest
from models.tokens import Inversion, Loras, Wording, named

T = TypeVar("T")


@dataclass(frozen=True)
class Run:
    """A phase as prompts see it: of each forward the number of its step, from 0; the size of what is drawn."""

    steps: tuple[int, ...]
    width: int
    height: int


@dataclass(frozen=True)
class Line:
    """What one row is told: (first forward, wording) in order; and how strongly it pulls."""

    field: str
    timeline: tuple[tuple[int, Wording], ...]
    weight: float = 1.0
    zeros: bool = False  # in place of the embedding


@dataclass(frozen=True)
class Script:
    """A picture's lines, the unconditional one first where there are several; (first forward, (width, height))."""

    lines: tuple[Line, ...]
    sizes: tuple[tuple[int, tuple[int, int]], ...]


@dataclass(frozen=True)
class Row:
    """One row of every forward that a picture takes part in: (first forward, conditioning), and its weight.

    Forwards count from the start of the first phase through all of them.
    """

    timeline: tuple[tuple[int, Conditioning], ...]
    weight: float = 1.0

    def at(self, position: int) -> Conditioning:
        """What holds at a forward, the same object until it changes."""
        return _at(self.timeline, position)


@dataclass(frozen=True)
class Encoded:
    """A script's rows, and what became of its prompts by their field."""

    rows: list[Row]
    reports: dict[str, PromptReport]

    @property
    def warnings(self) -> list[str]:
        told = ((name, report.truncated) for name, report in self.reports.items())
        return [f"{name} is longer than the text encoder takes; left out: {text!r}" for name, text in told if text]


class Conditioner:
    """Encodes scripts for one family. Embeddings of `capacity` chunks are kept, least recently used go first.

    `inversions` are the textual inversions by name, in lower case, that prompts may use; within `encoding` of their
    LoRAs the text encoders' rows are encoded.
    """

    def __init__(
        self,
        family: Family,
        inversions: Mapping[str, Inversion] | None = None,
        encoding: Encoding = lambda rows: nullcontext(),
        capacity: int = 256,
    ):
        self._family = family
        self._inversions = {} if inversions is None else inversions
        self._encoding = encoding
        self._capacity = capacity
        self._embeddings: OrderedDict[Wording, Embedding] = OrderedDict()
        self._held = 0  # chunks

    def script(self, request: EffectiveRequest, runs: Sequence[Run] | None = None, loras: Loras = ()) -> Script:
        """What a request's prompts say over the phases of its picture. Quick, and safe in any thread.

        `loras` are those that are on the text encoders meanwhile.

        Raises InvalidRequest for a prompt that cannot be read, or a textual inversion made for another model.
        """
        runs = runs or [Run(tuple(range(request.steps)), request.width, request.height)]
        numbers, sizes, done = [], [], 0
        for run in runs:
            sizes.append((len(numbers), (run.width, run.height)))
            numbers += [done + number for number in run.steps]
            done += run.steps[-1] + 1 if run.steps else 0
        steps = runs[0].steps[-1] + 1 if runs[0].steps else request.steps
        parts = parse("prompt", request.prompt, request.prompt_syntax)
        lines = [self._line(part, part.timeline(numbers, steps), loras, request.clip_skip) for part in parts]
        if request.guided or len(lines) > 1:
            [part] = parse("negative_prompt", request.negative_prompt, request.prompt_syntax)
            negative = self._line(
                part, part.timeline(numbers, steps), loras
            )  # clip skip is the prompt's, as in diffusers
            zeros = self._family.zero_empty_negative and not request.negative_prompt
            lines.insert(0, replace(negative, zeros=zeros))
        return Script(tuple(lines), tuple(sizes))

    def encode(self, scripts: Sequence[Script]) -> list[Encoded]:
        """Each script's rows. What is new of all of them is encoded together."""
        lines = [line for script in scripts for line in script.lines]
        self._embed(dict.fromkeys(wording for line in lines for _, wording in line.timeline))
        encoded = [self._encoded(script) for script in scripts]
        while self._held > self._capacity:
            _, embedding = self._embeddings.popitem(last=False)
            self._held -= embedding.report.chunks
        return encoded

    def _line(self, part: Part, timeline: Iterable[tuple[int, Text]], loras: Loras, clip_skip: int = 0) -> Line:
        worded = [(first, Wording(text, clip_skip, self._named(part.field, text), loras)) for first, text in timeline]
        return Line(part.field, tuple(worded), part.weight)

    def _named(self, field: str, text: Text) -> tuple[tuple[str, Inversion], ...]:
        if not self._inversions:
            return ()
        found = named(text, self._inversions)
        for name, inversion in found.items():
            widths = tuple(vectors.shape[-1] for vectors in inversion.vectors)
            if widths != self._family.text_widths:
                raise InvalidRequest(
                    field,
                    f"{name!r} was made for another base model: its embeddings are {_listed(widths)} wide, "
                    f"those of this model's text encoders {_listed(self._family.text_widths)}",
                )
        return tuple(found.items())

    def _embed(self, wordings: Iterable[Wording]) -> None:
        missing = [wording for wording in wordings if wording not in self._embeddings]
        if missing:
            for wording, embedding in zip(missing, self._family.embed(missing, self._encoding), strict=True):
                self._embeddings[wording] = embedding
                self._held += embedding.report.chunks

    def _encoded(self, script: Script) -> Encoded:
        rows: list[Row] = []
        reports: dict[str, list[PromptReport]] = {}
        for line in script.lines:
            embeddings = [(first, self._embedding(wording)) for first, wording in line.timeline]
            longest = max((embedding.report for _, embedding in embeddings), key=lambda report: report.tokens)
            reports.setdefault(line.field, []).append(longest)
            if line.zeros:
                embeddings = [(first, _zeros(embedding)) for first, embedding in embeddings]
            rows.append(Row(self._timeline(embeddings, script.sizes), line.weight))
        return Encoded(rows, {field: reduce(add, parts) for field, parts in reports.items()})

    def _embedding(self, wording: Wording) -> Embedding:
        self._embeddings.move_to_end(wording)
        return self._embeddings[wording]

    def _timeline(
        self, embeddings: list[tuple[int, Embedding]], sizes: Sequence[tuple[int, tuple[int, int]]]
    ) -> tuple[tuple[int, Conditioning], ...]:
        """Both timelines as one."""
        changes = sorted({first for first, _ in embeddings} | {first for first, _ in sizes})
        return tuple((first, self._family.condition(_at(embeddings, first), *_at(sizes, first))) for first in changes)


def stack(rows: Sequence[Conditioning]) -> Conditioning:
    """Several rows' conditioning as one, with a leading row axis; shorter contexts are padded with zeros and masked."""
    added = {name: torch.stack([row.added[name] for row in rows]) for name in rows[0].added}
    lengths = {len(row.context) for row in rows}
    mask = None
    if len(lengths) > 1 or any(row.mask is not None for row in rows):
        masks = [
            row.context.new_ones(len(row.context), dtype=torch.bool) if row.mask is None else row.mask for row in rows
        ]
        mask = pad_sequence(masks, batch_first=True)
    return Conditioning(context=pad_sequence([row.context for row in rows], batch_first=True), added=added, mask=mask)


def _at(timeline: Sequence[tuple[int, T]], position: int) -> T:
    """What a timeline holds at a forward."""
    return timeline[bisect_right(timeline, position, key=lambda entry: entry[0]) - 1][1]


def _zeros(embedding: Embedding) -> Embedding:
    pooled = None if embedding.pooled is None else torch.zeros_like(embedding.pooled)
    return replace(embedding, context=torch.zeros_like(embedding.context), pooled=pooled)


def _listed(widths: Sequence[int]) -> str:
    return " and ".join(map(str, widths))
