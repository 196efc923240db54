"""Forwards made fast: captured as CUDA graphs, so that a whole step is one launch, and of a compiled network.

Graphs want few numbers of rows, so these are rounded up, and tensors in fixed places: they are replayed over what has
been copied there since. Forwards are of one kind when they have the same tensors, but for how many of their rows count.
"""

import logging
import weakref
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import torch

from models.compiled import MOST_ROWS, Compiled, Package
from models.forward import Inputs, Outputs, leaves, planted

SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)  # rows; a forward of more is not captured
WORTH = 3  # forwards of one kind before it is captured, which takes as long as several of them
LASTING = 30  # and before it is compiled: not in the warm-up, whose measurements that would disturb
KINDS = 128  # that are remembered; the least recently used one is given up
BYTES = 2**30  # that the places of all kinds take together; a kind that takes more alone is not captured

_log = logging.getLogger(__name__)


class Recording(Protocol):
    """A call that can be made again. `outputs` lie in the same places each time."""

    outputs: Outputs

    def replay(self) -> None: ...


Record = Callable[[Callable[[], Outputs]], Recording]
Run = Callable[[Inputs], Outputs]
Fused = Callable[[Package, Inputs], Outputs]


class Graphs:
    """Records what calls do on a GPU.

    All of them share one pool of memory: they are replayed one after the other on one stream, and what a replay has
    answered is copied away before the next. The two streams stay the same, because libraries keep a workspace for each.
    """

    def __init__(self, device: torch.device):
        self._trying, self._capturing = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self._pool: Any = torch.cuda.graph_pool_handle()

    def __call__(self, call: Callable[[], Outputs]) -> Recording:
        self._trying.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._trying):
            call()  # libraries choose their kernels when first called
        torch.cuda.current_stream().wait_stream(self._trying)
        graph = torch.cuda.CUDAGraph()
        # Other threads may copy to the GPU meanwhile, as when they load a LoRA.
        with torch.cuda.graph(graph, self._pool, self._capturing, capture_error_mode="thread_local"):
            outputs = call()
        return Graph(graph, outputs)


@dataclass
class Graph:
    """A recording on a GPU."""

    graph: torch.cuda.CUDAGraph
    outputs: Outputs

    def replay(self) -> None:
        self.graph.replay()


@dataclass(kw_only=True)
class _Place:
    """Where a captured forward finds its inputs, `size` rows each, and what lies there now.

    Behind the rows in use there are zeros: indices must not point anywhere else.
    """

    size: int
    tensors: Mapping[str, torch.Tensor]
    held: dict[str, tuple[weakref.ref[torch.Tensor], int]] = field(default_factory=dict)

    @classmethod
    def like(cls, tensors: Mapping[str, torch.Tensor], size: int) -> "_Place":
        return cls(size=size, tensors={name: _zeros(tensor, size) for name, tensor in tensors.items()})

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def fill(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Copies what has changed: what stays the same from step to step is the same object."""
        for name, tensor in tensors.items():
            before, rows = self.held.get(name, (None, 0))
            if before is not None and before() is tensor:
                continue
            place = self.tensors[name]
            place[: len(tensor)].copy_(tensor, non_blocking=True)
            if rows > len(tensor):
                place[len(tensor) : rows].zero_()
            self.held[name] = weakref.ref(tensor), len(tensor)  # it is not kept alive for being compared


@dataclass(kw_only=True)
class _Kind:
    """One kind of forward: how often it was asked for, and what has been made of it since."""

    asked: int = 0
    refused: bool = False
    sought: bool = False  # whether there was a look for a package
    package: Package | None = None
    place: _Place | None = None
    recording: Recording | None = None
    compiled: bool = False  # whether the recording is one of the package


class Captured:
    """Runs forwards as `plain` does, faster where they come often. One thread at a time.

    `recorder` makes what records them; without one nothing is captured. `fused` runs them with one of the packages that
    `compiled` has, which know nothing of LoRAs and let nothing be taken. `rows` and `padded` count the rows of replays
    that were wanted, and those that were computed beside them for nothing.
    """

    def __init__(
        self,
        plain: Run,
        recorder: Callable[[], Record] | None,
        fused: Fused | None = None,
        compiled: Compiled | None = None,
    ):
        self._plain, self._fused = plain, fused
        self._recorder = recorder
        self._record = None if recorder is None else recorder()
        self._compiled = compiled
        self._kinds: OrderedDict[Hashable, _Kind] = OrderedDict()
        self.rows = self.padded = 0

    def __call__(self, inputs: Inputs) -> Outputs:
        bare = replace(inputs, rows=replace(inputs.rows, remembered=None))  # no memory of what lay there before
        tensors = dict(leaves(bare))
        kind = self._kind(bare, tensors)
        if kind is None:
            return self._plain(inputs)
        kind.asked += 1
        plain = inputs.loras is None and inputs.deep is None and not inputs.taken
        if kind.asked >= LASTING and not kind.sought and plain and len(inputs.owners) <= MOST_ROWS:
            kind.sought = True
            kind.package = None if self._compiled is None else self._compiled.package(partial(self._plain, bare))
        made = None
        try:
            made = self._made(kind, bare, tensors)
        except RuntimeError as fault:  # no room, an operation that cannot be captured, a package that fails
            _log.warning("forwards of %d rows and this kind are made as they are: %s", len(inputs.owners), fault)
            kind.place = kind.recording = kind.package = None
            kind.refused = True
        return self._plain(inputs) if made is None else made

    def clear(self) -> bool:
        """Gives up all that was made, and its memory. Whether there was anything."""
        some = any(kind.place is not None for kind in self._kinds.values())
        self._kinds.clear()
        if self._recorder is not None:
            self._record = self._recorder()  # a pool that has been empty cannot be captured into again
        return some

    @property
    def compiled_kinds(self) -> int:
        """How many kinds of forwards are made by the compiled network now."""
        ready = (kind for kind in self._kinds.values() if kind.package is not None and kind.package.ready())
        return sum(kind.compiled or self._record is None for kind in ready)

    @property
    def failed(self) -> bool:
        """Whether something could not be compiled."""
        return any(package.failed for package in self._packages())

    def settled(self) -> bool:
        """Whether nothing is being compiled."""
        return all(package.failed or package.ready() for package in self._packages())

    def _packages(self) -> list[Package]:
        return [kind.package for kind in self._kinds.values() if kind.package is not None]

    def _kind(self, inputs: Inputs, tensors: Mapping[str, torch.Tensor]) -> _Kind | None:
        """None where forwards like this are always made as they are."""
        size = _size(inputs) if self._record is not None else 0
        if size > SIZES[-1] or size * sum(tensor[0].nbytes for tensor in tensors.values()) > BYTES:
            return None
        shapes = tuple((name, tensor.shape[1:], tensor.dtype) for name, tensor in tensors.items())
        key = size, shapes, inputs.taken, None if inputs.loras is None else inputs.loras.layout
        kind = self._kinds.setdefault(key, _Kind())
        self._kinds.move_to_end(key)
        if len(self._kinds) > KINDS:
            self._kinds.popitem(last=False)
        return kind

    def _made(self, kind: _Kind, inputs: Inputs, tensors: Mapping[str, torch.Tensor]) -> Outputs | None:
        """None where they are to be made as they are."""
        if self._record is not None:
            return self._replayed(kind, inputs, tensors) if self._recorded(kind, inputs, tensors) else None
        if self._fused is None or kind.package is None or len(inputs.owners) > MOST_ROWS or not kind.package.ready():
            return None
        return self._fused(kind.package, inputs)

    def _recorded(self, kind: _Kind, inputs: Inputs, tensors: Mapping[str, torch.Tensor]) -> bool:
        """Whether there is a recording of this kind; it is made when it is time."""
        if kind.refused or kind.asked < WORTH or self._record is None:
            return False
        if kind.recording is None:
            self._make_room(_size(inputs) * sum(tensor[0].nbytes for tensor in tensors.values()))
            kind.place = _Place.like(tensors, _size(inputs))
            kind.place.fill(tensors)
            kind.recording = self._record(partial(self._plain, planted(inputs, kind.place.tensors)))
        if kind.package is not None and not kind.compiled and _size(inputs) <= MOST_ROWS and kind.package.ready():
            self._record_compiled(kind, kind.package, inputs)
        return True

    def _record_compiled(self, kind: _Kind, package: Package, inputs: Inputs) -> None:
        assert self._record is not None
        assert self._fused is not None
        assert kind.place is not None
        try:
            kind.recording = self._record(partial(self._fused, package, planted(inputs, kind.place.tensors)))
            kind.compiled = True
        except RuntimeError as fault:  # the recording that there is goes on
            package.fail(f"it cannot be captured: {fault}")

    def _replayed(self, kind: _Kind, inputs: Inputs, tensors: Mapping[str, torch.Tensor]) -> Outputs:
        assert kind.place is not None
        assert kind.recording is not None
        kind.place.fill(tensors)
        kind.recording.replay()
        rows, images = len(inputs.owners), len(inputs.lines)
        self.rows, self.padded = self.rows + rows, self.padded + kind.place.size - rows
        moved, clean, below = kind.recording.outputs
        return Outputs(moved[:images].clone(), clean[:images].clone(), None if below is None else below[:rows].clone())

    def _make_room(self, wanted: int) -> None:
        """Gives up the places of the kinds that have not come for longest."""
        taken = OrderedDict((key, kind.place.nbytes) for key, kind in self._kinds.items() if kind.place is not None)
        while sum(taken.values()) + wanted > BYTES:
            key, _ = taken.popitem(last=False)
            del self._kinds[key]


def _size(inputs: Inputs) -> int:
    """The smallest of the sizes that has room for the rows, or one more than the largest."""
    at = bisect_left(SIZES, len(inputs.owners))
    return SIZES[at] if at < len(SIZES) else SIZES[-1] + 1


def _zeros(tensor: torch.Tensor, size: int) -> torch.Tensor:
    last = tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    made = torch.zeros((size, *tensor.shape[1:]), dtype=tensor.dtype, device=tensor.device)
    return made.to(memory_format=torch.channels_last if last else torch.contiguous_format)
