"""Forwards made fast: captured as CUDA graphs, so that a whole step is one launch, and of a compiled network.

Both want few numbers of rows, so these are rounded up, and tensors in fixed places: a graph is replayed over what has
been copied there since. Forwards are of one kind when they have the same tensors, but for how many of their rows count.
"""

import logging
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Protocol

import torch

from models.compiled import SHAPES, Compiled
from models.forward import Inputs, leaves, planted

SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)  # rows; a forward of more is made as it is
WORTH = 3  # forwards of one kind before it is captured, which takes as long as several of them
LASTING = 30  # and before it is compiled, which takes minutes: not in the warm-up, whose measurements it would disturb
BYTES = 2**30  # that the inputs of one may take; many large LoRAs take more, and are not captured

Outputs = tuple[torch.Tensor, torch.Tensor]
_log = logging.getLogger(__name__)


class Recording(Protocol):
    """A call that can be made again. `outputs` lie in the same places each time."""

    outputs: Outputs

    def replay(self) -> None: ...


Record = Callable[[Callable[[], Outputs]], Recording]
Run = Callable[[Inputs], Outputs]


class Again:
    """The call itself, made again each time."""

    def __init__(self, call: Callable[[], Outputs]):
        self._call = call
        self.outputs = call()

    def replay(self) -> None:
        self.outputs = self._call()


class Graph:
    """A recording of what a call does on a GPU.

    Several share one `pool` of memory: they are replayed one after the other on one stream, and what a replay has
    answered is copied away before the next.
    """

    def __init__(self, pool: tuple[int, int], call: Callable[[], Outputs]):
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            call()  # libraries choose their kernels and take their workspaces when first called
        torch.cuda.current_stream().wait_stream(aside)
        self._graph = torch.cuda.CUDAGraph()
        # Other threads may copy to the GPU meanwhile, as when they load a LoRA.
        with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
            self.outputs = call()

    def replay(self) -> None:
        self._graph.replay()


@dataclass(kw_only=True)
class _Place:
    """Where a captured forward finds its inputs, `size` rows each, and what lies there now.

    Behind the rows in use there are zeros: indices must not point anywhere else.
    """

    size: int
    tensors: Mapping[str, torch.Tensor]
    held: dict[str, torch.Tensor] = field(default_factory=dict)

    @classmethod
    def like(cls, tensors: Mapping[str, torch.Tensor], size: int) -> "_Place":
        return cls(size=size, tensors={name: _zeros(tensor, size) for name, tensor in tensors.items()})

    def fill(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Copies what has changed: what stays the same from step to step is the same object."""
        for name, tensor in tensors.items():
            before = self.held.get(name)
            if tensor is before:
                continue
            place = self.tensors[name]
            place[: len(tensor)].copy_(tensor, non_blocking=True)
            if before is not None and len(before) > len(tensor):
                place[len(tensor) : len(before)].zero_()
            self.held[name] = tensor


@dataclass(kw_only=True)
class _Kind:
    """One kind of forward: how often it was asked for, and what has been made of it since."""

    asked: int = 0
    refused: bool = False
    place: _Place | None = None
    compiling: Future[None] | None = None
    compiled: bool = False  # the recording is one of the compiled network
    recording: Recording | None = None


class Captured:
    """Runs forwards as `plain` does, faster where they come often. One thread at a time.

    Without `record` nothing is captured. `compiled` makes `fused` run what it says, which knows nothing of LoRAs; while
    it is at work nothing is captured, since it uses the GPU as it likes. `rows` and `padded` count the rows that were
    wanted, and those that were computed beside them for nothing.
    """

    def __init__(self, plain: Run, record: Record | None, fused: Run | None = None, compiled: Compiled | None = None):
        self._plain, self._fused = plain, fused
        self._record = record
        self._compiled = compiled
        self._kinds: OrderedDict[Hashable, _Kind] = OrderedDict()
        self.rows = self.padded = 0

    def __call__(self, inputs: Inputs) -> Outputs:
        bare = replace(inputs, rows=replace(inputs.rows, remembered=None))  # no memory of what lay there before
        tensors = dict(leaves(bare))
        kind = self._kind(bare, tensors)
        if kind is not None:
            self._advance(kind, bare, tensors)
        if kind is None or kind.place is None or kind.recording is None:
            return self._plain(inputs)
        kind.place.fill(tensors)
        kind.recording.replay()
        rows, images = len(inputs.owners), len(inputs.lines)
        self.rows, self.padded = self.rows + rows, self.padded + kind.place.size - rows
        moved, clean = kind.recording.outputs
        return moved[:images].clone(), clean[:images].clone()

    def clear(self) -> None:
        """Gives up all that was made, and its memory."""
        self._kinds.clear()

    @property
    def compiled_kinds(self) -> int:
        """How many kinds of forwards are made by the compiled network now."""
        return sum(kind.compiled for kind in self._kinds.values())

    def settled(self) -> bool:
        """Whether nothing is being compiled."""
        return self._compiled is None or self._compiled.idle

    def _kind(self, inputs: Inputs, tensors: Mapping[str, torch.Tensor]) -> _Kind | None:
        """None where forwards like this are always made as they are."""
        size = _size(len(inputs.owners))
        if not size or size * sum(tensor[0].nbytes for tensor in tensors.values()) > BYTES:
            return None
        if any(len(tensor) > size for tensor in tensors.values()):
            return None  # more LoRAs are at hand than there are rows
        shapes = tuple((name, tensor.shape[1:], tensor.dtype) for name, tensor in tensors.items())
        key = size, shapes, None if inputs.loras is None else inputs.loras.layout
        kind = self._kinds.setdefault(key, _Kind())
        self._kinds.move_to_end(key)
        if len(self._kinds) > SHAPES:
            self._kinds.popitem(last=False)
        return kind

    def _advance(self, kind: _Kind, inputs: Inputs, tensors: Mapping[str, torch.Tensor]) -> None:
        """Makes of a kind what it is time for."""
        kind.asked += 1
        if kind.refused or kind.compiled or kind.asked < WORTH:
            return
        try:
            self._make(kind, inputs, tensors)
        except RuntimeError as fault:  # out of memory, or an operation that cannot be captured
            _log.warning("a forward of %d rows stays as it is: %s", len(inputs.owners), fault)
            kind.place = kind.recording = None
            kind.refused = True

    def _make(self, kind: _Kind, inputs: Inputs, tensors: Mapping[str, torch.Tensor]) -> None:
        if kind.place is None:
            kind.place = _Place.like(tensors, _size(len(inputs.owners)))
            kind.place.fill(tensors)
        where = planted(inputs, kind.place.tensors)
        lasting = kind.asked >= LASTING and inputs.loras is None
        if lasting and self._compiled is not None and self._fused is not None and kind.compiling is None:
            kind.compiling = self._compiled.prepare(partial(self._fused, where))
        if not self.settled():
            return
        if kind.compiling is not None and kind.compiling.exception() is None and self._fused is not None:
            kind.recording = (self._record or Again)(partial(self._fused, where))
            kind.compiled = True
        elif kind.recording is None and self._record is not None:
            kind.recording = self._record(partial(self._plain, where))


def _size(rows: int) -> int:
    """The smallest of the sizes that has room, 0 where none has."""
    at = bisect_left(SIZES, rows)
    return SIZES[at] if at < len(SIZES) else 0


def _zeros(tensor: torch.Tensor, size: int) -> torch.Tensor:
    last = tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    return torch.zeros(
        (size, *tensor.shape[1:]),
        dtype=tensor.dtype,
        device=tensor.device,
    ).to(memory_format=torch.channels_last if last else torch.contiguous_format)
