"""Prompts to conditioning: what each row of a picture is told, and when; every text encoded once and remembered."""

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import reduce
from operator import add
from typing import TypeVar

import torch
from torch.nn.utils.rnn import pad_sequence

from models.family import Conditioning, Embedding, Encoding, Family, with_guidance
from models.prompt import PromptReport
from models.request import EffectiveRequest
from models.script import Run, Script, write
from models.tokens import Identity, Inversion, Loras, Wording

T = TypeVar("T")


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
        self._embeddings: OrderedDict[Identity, Embedding] = OrderedDict()
        self._held = 0  # chunks

    def script(self, request: EffectiveRequest, runs: Sequence[Run] | None = None, loras: Loras = ()) -> Script:
        """What a request's prompts say over the phases of its picture; see models.script. Safe in any thread."""
        return write(self._family, self._inversions, request, runs, loras)

    def encode(self, scripts: Sequence[Script]) -> list[Encoded]:
        """Each script's rows. What is new of all of them is encoded together."""
        lines = [line for script in scripts for line in script.lines]
        self._embed({wording.identity: wording for line in lines for _, wording in line.timeline})
        encoded = [self._encoded(script) for script in scripts]
        while self._held > self._capacity:
            _, embedding = self._embeddings.popitem(last=False)
            self._held -= embedding.report.chunks
        return encoded

    def _embed(self, wordings: Mapping[Identity, Wording]) -> None:
        missing = {identity: wording for identity, wording in wordings.items() if identity not in self._embeddings}
        if missing:
            embeddings = self._family.embed(list(missing.values()), self._encoding)
            for identity, embedding in zip(missing, embeddings, strict=True):
                self._embeddings[identity] = embedding
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
            rows.append(Row(self._timeline(embeddings, script), line.weight))
        return Encoded(rows, {field: reduce(add, parts) for field, parts in reports.items()})

    def _embedding(self, wording: Wording) -> Embedding:
        self._embeddings.move_to_end(wording.identity)
        return self._embeddings[wording.identity]

    def _timeline(
        self, embeddings: list[tuple[int, Embedding]], script: Script
    ) -> tuple[tuple[int, Conditioning], ...]:
        """The embeddings' timeline and that of the sizes as one."""
        changes = sorted({first for first, _ in (*embeddings, *script.sizes)})
        told = [self._family.condition(_at(embeddings, first), *_at(script.sizes, first)) for first in changes]
        if width := self._family.guidance_width:
            told = [with_guidance(each, script.guidance_scale, width) for each in told]
        return tuple(zip(changes, told, strict=True))


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
