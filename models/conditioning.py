"""Prompts to conditioning, remembered: the same prompt is encoded once, several new ones in one small batch."""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch

from models.family import Conditioning, Embedding, Family
from models.request import EffectiveRequest

_Key = tuple[str, int]  # prompt, clip skip


class Conditioner:
    """Encodes requests for one family. `capacity` embeddings are kept, least recently used go first."""

    def __init__(self, family: Family, capacity: int = 256):
        self._family = family
        self._capacity = capacity
        self._embeddings: OrderedDict[_Key, Embedding] = OrderedDict()

    def encode(self, requests: Sequence[EffectiveRequest]) -> list[tuple[list[Conditioning], list[str]]]:
        """For each request its rows' conditioning (unconditional first, where guided) and warnings for its caller."""
        self._embed(dict.fromkeys(key for request in requests for key in _keys(request)))
        encoded = [self._rows(request) for request in requests]
        while len(self._embeddings) > self._capacity:
            self._embeddings.popitem(last=False)
        return encoded

    def _embed(self, keys: Iterable[_Key]) -> None:
        missing: dict[int, list[str]] = {}
        for prompt, clip_skip in keys:
            if (prompt, clip_skip) not in self._embeddings:
                missing.setdefault(clip_skip, []).append(prompt)
        for clip_skip, prompts in missing.items():
            for prompt, embedding in zip(prompts, self._family.embed(prompts, clip_skip), strict=True):
                self._embeddings[prompt, clip_skip] = embedding

    def _rows(self, request: EffectiveRequest) -> tuple[list[Conditioning], list[str]]:
        rows, warnings = [], []
        for key, name in zip(_keys(request), ("prompt", "negative_prompt"), strict=False):
            self._embeddings.move_to_end(key)
            embedding = self._embeddings[key]
            if embedding.truncated:
                warnings.append(f"{name} is longer than the text encoder takes; left out: {embedding.truncated!r}")
            if name == "negative_prompt" and not request.negative_prompt and self._family.zero_empty_negative:
                embedding = _zeros(embedding)
            rows.insert(0, self._family.condition(embedding, request.width, request.height))
        return rows, warnings


def _keys(request: EffectiveRequest) -> list[_Key]:
    """The prompt's key and, where guided, the negative prompt's; clip skip is the prompt's alone, as in diffusers."""
    keys = [(request.prompt, request.clip_skip)]
    return [*keys, (request.negative_prompt, 0)] if request.guided else keys


def _zeros(embedding: Embedding) -> Embedding:
    pooled = None if embedding.pooled is None else torch.zeros_like(embedding.pooled)
    return replace(embedding, context=torch.zeros_like(embedding.context), pooled=pooled)


def stack(rows: Sequence[Conditioning]) -> Conditioning:
    """Several rows' conditioning as one, with a leading row axis."""
    added = {name: torch.stack([row.added[name] for row in rows]) for name in rows[0].added}
    return Conditioning(context=torch.stack([row.context for row in rows]), added=added)
