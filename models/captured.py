"""Forwards made fast: captured as CUDA graphs, so that a whole step is one launch, and of a compiled network.

Both want few numbers of rows, so these are rounded up, and tensors in fixed places: a graph is replayed over what has
been copied there since. Forwards are of one kind when they have the same tensors, but for how many of their rows count.
"""

import logging
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import torch

from models.compiled import MOST_ROWS, Compiled, Package
from models.forward import Inputs, leaves, planted

SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)  # rows; a forward of more is made as it is
WORTH = 3  # forwards of one kind before it is captured, which takes as long as several of them
LASTING = 30  # and before it is compiled: not in the warm-up, whose measurements that would disturb
KINDS = 64  # that are remembered; the least recently used one is given up
BYTES = 2**30  # that the inputs of one may take; many large LoRAs take more, and are not captured

Outputs = tuple[torch.Tensor, torch.Tensor]
_log = logging.getLogger(__name__)


class Recording(Protocol):
    """A call that can be made again. `outputs` lie in the same places each time."""

    outputs: Outputs

    def replay(self) -> None: ...


Record = Callable[[Callable[[], Outputs]], Recording]
Run = Callable[[Inputs], Outputs]
Fused = Callable[[Package, Inputs], Outputs]


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

    def __init__(self, pool: Any, call: Callable[[], Outputs]):
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
    where: Inputs | None = None  # the place, as a forward takes it
    package: Package | None = None
    compiled: bool = False  # the recording is one of the compiled network
    recording: Recording | None = None


class Captured:
    """Runs forwards as `plain` does, faster where they come often. One thread at a time.

    Without `record` nothing is captured. `fused` runs them with one of the packages that `compiled` has, which know
    nothing of LoRAs. `rows` and `padded` count the rows that were wanted, and those that were computed beside them for
    nothing.
    """

    def __init__(self, plain: Run, record: Record | None, fused: Fused | None = None, compiled: Compiled | None = None):
        self._plain, self._fused = plain, fused
        self._record = record
        self._compiled = compiled
        self._kinds: OrderedDict[Hashable, _Kind] = OrderedDict()
        self.rows = self.padded = 0

    def __call__(self, inputs: Inputs) -> Outputs:
        bare = replace(inputs, rows=replace(inputs.rows, remembered=None))  # no memory of what lay there before
        tensors = dict(leaves(bare))
        kind = self._kind(bare, tensors)
        try:
            if kind is not None and self._advance(kind, bare, tensors):
                return self._replayed(kind, tensors)
        except RuntimeError as fault:  # no room, an operation that cannot be captured, a package that fails
            assert kind is not None
            _log.warning("forwards of %d rows and this kind are made as they are: %s", len(inputs.owners), fault)
            kind.place = kind.where = kind.recording = None
            kind.refused = True
        return self._plain(inputs)

    def clear(self) -> None:
        """Gives up all that was made, and its memory."""
        self._kinds.clear()

    def _kind(self, inputs: Inputs, tensors: Mapping[str, torch.Tensor]) -> _Kind | None:
        """None where forwards like this are always made as they are."""
        size = _size(len(inputs.owners))
        if not size or size * sum(tensor[0].nbytes for tensor in tensors.values()) > BYTES:
            return None
        shapes = tuple((name, tensor.shape[1:], tensor.dtype) for name, tensor in tensors.items())
        key = size, shapes, None if inputs.loras is None else inputs.loras.layout
        kind = self._kinds.setdefault(key, _Kind())
        self._kinds.move_to_end(key)
        if len(self._kinds) > KINDS:
            self._kinds.popitem(last=False)
        return kind

    def _replayed(self, kind: _Kind, tensors: Mapping[str, torch.Tensor]) -> Outputs:
        assert kind.place is not None
        assert kind.recording is not None
        kind.place.fill(tensors)
        kind.recording.replay()
        rows, images = len(tensors[".owners"]), len(tensors[".lines"])
        self.rows, self.padded = self.rows + rows, self.padded + kind.place.size - rows
        moved, clean = kind.recording.outputs
        return moved[:images].clone(), clean[:images].clone()

    def _advance(self, kind: _Kind, inputs: Inputs, tensors: Mapping[str, torch.Tensor]) -> bool:
        """Makes of a kind what it is time for. Whether there is a recording."""
        kind.asked += 1
        finished = kind.compiled if self._compiled is not None else kind.recording is not None
        if not (kind.refused or finished or kind.asked < WORTH):
            if kind.where is None:
                kind.place = _Place.like(tensors, _size(len(inputs.owners)))
                kind.place.fill(tensors)
                kind.where = planted(inputs, kind.place.tensors)
            self._make(kind, kind.where)
        return kind.recording is not None

    def _make(self, kind: _Kind, where: Inputs) -> None:
        if kind.recording is None and self._record is not None:
            kind.recording = self._record(partial(self._plain, where))
        if self._compiled is None or self._fused is None or where.loras is not None:
            return
        if kind.asked == LASTING and len(where.owners) <= MOST_ROWS:
            kind.package = self._compiled.package(partial(self._plain, where))
        if kind.package is not None and kind.package.ready():
            kind.recording = (self._record or Again)(partial(self._fused, kind.package, where))
            kind.compiled = True


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
