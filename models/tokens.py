"""Texts to token ids: chunks as long as a text encoder takes, the same for all encoders, nothing cut off in silence."""

import math
import re
from bisect import bisect_right
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from models.prompt import PromptReport, Span, Text

CHUNKS = 16  # of one text
_NAME = re.compile(r"<([\w.-]+)>|[\w-]+(?:\.[\w-]+)*")

Loras = tuple[tuple[Any, float], ...]
"""What is put on the encoders for one text, and how strongly: each has a `name` and a `sha256`; handed through here."""
Identity = tuple[Text, int, tuple[tuple[str, str], ...], tuple[tuple[str, str, float], ...]]
"""A text, layers left out, inversions by name and sha256, LoRAs by name, sha256 and weight."""


class Inversion(Protocol):
    """A word of its own making: for each text encoder of a family the embeddings (n, width) of its n tokens."""

    @property
    def vectors(self) -> tuple[torch.Tensor, ...]: ...
    @property
    def sha256(self) -> str: ...


@dataclass(frozen=True)
class Wording:
    """All that determines an embedding: a text, how many last layers are left out, the inversions it names, LoRAs."""

    text: Text
    clip_skip: int = 0
    inversions: tuple[tuple[str, Inversion], ...] = ()
    loras: Loras = ()

    @classmethod
    def plain(cls, text: str, clip_skip: int = 0) -> "Wording":
        """A text without any emphasis."""
        return cls(((Span(text),),), clip_skip)

    @property
    def identity(self) -> Identity:
        """What its embedding can be remembered by: the adapters by their content, so that none is kept in memory."""
        inversions = tuple((name, inversion.sha256) for name, inversion in self.inversions)
        return self.text, self.clip_skip, inversions, tuple((lora.name, lora.sha256, w) for lora, w in self.loras)


@dataclass(frozen=True)
class Chunk:
    """What one encoder is given at once: `ids` and `weights`, of its full length, embeddings by their place; how many
    of its last layers are left out, and the LoRAs that are on it."""

    ids: list[int]
    weights: list[float]
    vectors: dict[int, torch.Tensor]
    clip_skip: int
    loras: Loras = ()


@dataclass(frozen=True)
class Cut:
    """A text in chunks: for each encoder as many, which say the same."""

    chunks: tuple[list[Chunk], ...]
    report: PromptReport


@dataclass(frozen=True)
class _Word:
    """What stays in one chunk where it fits: each encoder's `ids`, or its own vectors, which take as many places."""

    text: str
    ids: tuple[list[int], ...]
    weight: float
    inversion: Inversion | None = None

    @property
    def length(self) -> int:
        return max(len(ids) for ids in self.ids)

    def split(self, room: int) -> "list[_Word]":
        """Itself, or its pieces where it is longer than a chunk."""
        starts = range(0, self.length, room)
        pieces = [tuple(ids[start : start + room] for ids in self.ids) for start in starts]
        return [replace(self, text="" if i else self.text, ids=ids) for i, ids in enumerate(pieces)]


def named(text: Text, inversions: Collection[str]) -> list[str]:
    """Which inversions a text names, as `<name>` or as the bare word, whatever their case."""
    spans = (span for section in text for span in section)
    names = (_name(found) for span in spans for found in _NAME.finditer(span.text))
    return [name for name in sorted(set(names)) if name in inversions]


def cut(tokenizers: Sequence[Any], wording: Wording) -> Cut:
    """Cuts a text into chunks: each holds as many words as fit for every encoder, padded as its tokenizer pads.

    What is beyond the 16th chunk is left out and told in the report.
    """
    room = tokenizers[0].model_max_length - 2
    inversions, groups = dict(wording.inversions), []
    for section in wording.text:
        words = [word for span in section for word in _words(tokenizers, span, inversions)]
        groups += _packed([piece for word in words for piece in word.split(room)], room)
    kept, left = groups[:CHUNKS] or [[]], groups[CHUNKS:]
    report = PromptReport(
        tokens=sum(word.length for group in kept for word in group),
        chunks=len(kept),
        truncated="".join(word.text for group in left for word in group).strip(),
    )
    return Cut(tuple([_chunk(t, k, group, wording) for group in kept] for k, t in enumerate(tokenizers)), report)


def _packed(words: Sequence[_Word], room: int) -> list[list[_Word]]:
    """Words in groups of which none is longer than `room` for any encoder."""
    groups: list[list[_Word]] = []
    used: list[int] = []
    for word in words:
        wanted = [len(ids) for ids in word.ids]
        if not groups or any(u + w > room for u, w in zip(used, wanted, strict=True)):
            groups.append([])
            used = [0] * len(wanted)
        groups[-1].append(word)
        used = [u + w for u, w in zip(used, wanted, strict=True)]
    return groups


def _chunk(tokenizer: Any, encoder: int, words: Sequence[_Word], wording: Wording) -> Chunk:
    ids, weights, vectors = [tokenizer.bos_token_id], [1.0], {}
    for word in words:
        if word.inversion is not None:
            vectors[len(ids)] = word.inversion.vectors[encoder]
        ids += word.ids[encoder]
        weights += [word.weight] * len(word.ids[encoder])
    ids.append(tokenizer.eos_token_id)
    padding = tokenizer.model_max_length - len(ids)
    return Chunk(
        ids=ids + [tokenizer.pad_token_id] * padding,
        weights=weights + [1.0] * (padding + 1),
        vectors=vectors,
        clip_skip=wording.clip_skip,
        loras=wording.loras,
    )


def _words(tokenizers: Sequence[Any], span: Span, inversions: Mapping[str, Inversion]) -> Iterator[_Word]:
    start = 0
    for found in _NAME.finditer(span.text) if inversions else ():
        inversion = inversions.get(_name(found))
        if inversion is not None:
            yield from _aligned(tokenizers, Span(span.text[start : found.start()], span.weight))
            ids = [[_ordinary(t)] * len(v) for t, v in zip(tokenizers, inversion.vectors, strict=True)]
            yield _Word(found[0], tuple(ids), span.weight, inversion)
            start = found.end()
    yield from _aligned(tokenizers, Span(span.text[start:], span.weight))


def _aligned(tokenizers: Sequence[Any], span: Span) -> Iterator[_Word]:
    """The words of a text without inversions. A word ends where it does for every tokenizer, of which some have
    tokens that others have not (SDXL's second one takes each `!` for itself)."""
    read = [_tokenized(tokenizer, span.text) for tokenizer in tokenizers]
    starts = sorted({0}.union(set.intersection(*({start for start, _ in words} for words in read))))
    ids: list[tuple[list[int], ...]] = [tuple([] for _ in tokenizers) for _ in starts]
    for k, words in enumerate(read):
        for start, tokens in words:
            ids[bisect_right(starts, start) - 1][k].extend(tokens)
    lead = ""  # what no encoder reads
    for start, end, one in zip(starts, [*starts[1:], len(span.text)], ids, strict=True):
        if not any(one):
            lead += span.text[start:end]
            continue
        yield _Word(lead + span.text[start:end], one, span.weight)
        lead = ""


def _tokenized(tokenizer: Any, text: str) -> list[tuple[int, list[int]]]:
    """(first character, token ids) of each word, without the frame of start and end."""
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    words: list[tuple[int, list[int]]] = []
    previous = math.nan
    for token, word, (start, _) in zip(encoding.input_ids, encoding.word_ids(), encoding.offset_mapping, strict=True):
        if word == previous:
            words[-1][1].append(token)
        else:
            words.append((start, [token]))
        previous = math.nan if word is None else word
    return words


def _name(found: re.Match[str]) -> str:
    return (found[1] or found[0]).lower()


def _ordinary(tokenizer: Any) -> int:
    """A token that neither starts nor ends anything, to keep a place."""
    special = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    return next(token for token in range(len(tokenizer)) if token not in special)
