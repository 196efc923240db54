"""One full-size model in memory, and the contenders that draw with it, one at a time."""

import gc
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from bench import assembled
from bench.contender import ROWS
from bench.drift import exact_float32
from bench.fullsize import Flops, Network, build
from bench.inprocess import InProcess
from bench.pipeline import Pipeline
from bench.serial import Serial
from bench.settled import settle
from bench.static import Static
from bench.workloads import RequestClass, Workload, request_of, workloads_at
from models.engine import Engine
from models.request import GenerationRequest
from models.weights import Placement, place

STEPS = 20  # of the request whose drift is told
RECORDED = 3  # steps after which a compiled network has recorded its graphs
TINY_SIDE, TINY_OTHER = 64, 96


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a run is made.

    `pictures` are those of a saturated run of many at a time, `groups` the sizes of B1c's batches. `compile_mode` is
    torch.compile's for diffusers' UNet, None leaves it eager; `compiled` is the folder for what Heliograph
    compiles, None where it compiles nothing. `requests` are those of an open-loop trial, and `minutes` are for all of
    these of one model; None is no bound.
    """

    device: str
    dtype: str
    tiny: bool
    pictures: int
    groups: tuple[int, ...]
    compile_mode: str | None
    graphs: bool
    compiled: Path | None
    workloads: tuple[str, ...]
    requests: int
    refinements: int
    minutes: float | None
    seed: int

    def side(self, network: Network) -> int:
        return TINY_SIDE if self.tiny else network.side

    def other(self, network: Network) -> int:
        return TINY_OTHER if self.tiny else network.other

    def chosen(self, network: Network) -> list[Workload]:
        """The workloads, at this model's sizes."""
        every = workloads_at(self.side(network), self.other(network))
        return [workload for workload in every if workload.name in self.workloads]


class Built:
    """A model whose networks are float32 until `settle` gives them the contenders' precision.

    Whoever is opened finds the UNet as diffusers made it. diffusers' pipelines all run in one thread: graphs that
    torch.compile records belong to the thread that recorded them.
    """

    def __init__(self, network: Network, options: Options):
        self.network = network
        self.options = options
        self.side = options.side(network)
        self.workloads = options.chosen(network)
        self.placement = self.placed(graphs=options.graphs, compiled=options.compiled)
        self.components = build(network, self.placement.device, options.tiny, options.seed)
        self.modules: Mapping[str, Any] = self.components.modules
        self.flops = Flops.count(self.modules, self.side)
        self.request = self.request_of(RequestClass(self.side, STEPS), options.seed)
        self.isolated_s: dict[RequestClass, float] = {}  # of a request alone, by B0
        self._worker = ThreadPoolExecutor(max_workers=1, initializer=_own_graphs if self.cuda else None)

    def placed(self, **how: Any) -> Placement:
        """The options' device and precision, and what is said besides."""
        return place(self.options.device, self.options.dtype, **how)

    @property
    def cuda(self) -> bool:
        return self.placement.device.type == "cuda"

    @property
    def sides(self) -> list[int]:
        """Of the pictures of all workloads."""
        return sorted({self.side, *(kind.side for workload in self.workloads for kind in workload.classes)})

    @property
    def nbytes(self) -> int:
        """Of all weights."""
        networks = [module for module in self.modules.values() if isinstance(module, torch.nn.Module)]
        return sum(parameter.nbytes for network in networks for parameter in network.parameters())

    def request_of(self, kind: RequestClass, seed: int) -> GenerationRequest:
        return request_of(kind, seed, self.network.name)

    def reference(self) -> torch.Tensor:
        """The final latents (c, h, w) of the request, in float32."""
        with exact_float32():
            pipeline = assembled.pipeline(self.network, self.modules)
            latents = self._worker.submit(pipeline.latents, self.request).result().float().cpu()
            pipeline.close()
        return latents

    def settle(self) -> None:
        """Gives the networks the contenders' precision."""
        for name, module in self.modules.items():
            if isinstance(module, torch.nn.Module):
                module.to(self.placement.vae_dtype if name == "vae" else self.placement.dtype)

    def lay_out(self) -> None:
        """Has the weights lie as convolutions on a GPU like them; B0 has them as diffusers does."""
        for name in ("unet", "vae"):
            self.modules[name].to(memory_format=torch.channels_last)

    def free(self) -> None:
        """Takes back what the last contender has left."""
        assembled.restore(self.modules["unet"])
        self._collect()

    def _collect(self) -> None:
        gc.collect()  # engines hold themselves
        if self.cuda:
            torch.cuda.empty_cache()

    def close(self) -> None:
        """Gives its memory back."""
        self._worker.shutdown()
        self.__dict__.pop("_compiled_forward", None)
        self.free()
        self.components.modules.clear()
        self._collect()

    def eager(self) -> Serial:
        return Serial(self._pipeline, "B0", "diffusers, one at a time, eager", self._worker)

    @property
    def baselines(self) -> tuple[str, str]:
        """The names of those that draw one at a time and in groups, compiled where anything is."""
        return ("B0", "B1") if self.options.compile_mode is None else ("B0c", "B1c")

    @property
    def _how(self) -> str:
        return "eager" if self.options.compile_mode is None else "compiled"

    def serial(self, sizes: tuple[int, ...] = (1,)) -> Serial:
        """One at a time; calls of these sizes are ready to be made."""
        make = partial(self._ready_pipeline, sizes)
        return Serial(make, self.baselines[0], f"diffusers, one at a time, {self._how}", self._worker)

    def grouped(self, most: int) -> Static:
        sizes = tuple(size for size in self.group_sizes if size <= most)
        make = partial(self._ready_pipeline, sizes)
        title = f"diffusers, {self._how}, groups of equal parameters, at most {most}"
        return Static(make, sizes, self._worker, self.baselines[1], title)

    @property
    def group_sizes(self) -> tuple[int, ...]:
        return tuple(sorted({1, *self.options.groups}))

    def alone(self) -> InProcess:
        return InProcess(partial(self.engine, ROWS), "E1", "Heliograph, one picture at a time")

    def shared(self, adapters: Path | None = None) -> InProcess:
        make = partial(self.engine, None, adapters=adapters)
        return InProcess(make, "E", "Heliograph, measured cap")

    def engine(
        self,
        cap: int | None,
        placement: Placement | None = None,
        adapters: Path | None = None,
        remembering: bool = True,
        deep_cache: int = 1,
    ) -> Engine:
        """Ready to be measured with what is saturated and says this `deep_cache`; its cap is measured unless it is
        given."""
        self.free()
        made = assembled.engine(
            self.network, self.components, placement or self.placement, self.side, cap, adapters, remembering
        )
        kinds = [RequestClass(side, STEPS) for side in self.sides]
        requests = [replace(self.request_of(kind, 0), deep_cache=deep_cache) for kind in kinds]
        settle(made, requests, self.options.pictures)
        return made

    def _pipeline(self) -> Pipeline:
        self.free()
        return assembled.pipeline(self.network, self.modules)

    def _ready_pipeline(self, sizes: tuple[int, ...]) -> Pipeline:
        """Everything that its calls need is compiled and recorded, where it is compiled at all."""
        made = self._pipeline()
        if self.options.compile_mode is not None:
            self.modules["unet"].forward = self._compiled_forward
        for side in self.sides:
            request = replace(self.request_of(RequestClass(side, STEPS), 0), steps=RECORDED)
            for size in sizes:
                made.draw([request] * size)
        return made

    @cached_property
    def _compiled_forward(self) -> Callable[..., Any]:
        """Made once: what is compiled stays with it."""
        assert self.options.compile_mode is not None, "there are no compiled contenders"
        return assembled.compiled_forward(self.modules["unet"], self.options.compile_mode)


def _own_graphs() -> None:
    """torch.compile keeps its graphs by thread, and until torch 2.13 only the one that imported this has a place."""
    import threading
    from collections import defaultdict

    from torch._inductor import cudagraph_trees

    kept = cudagraph_trees.local
    if not hasattr(kept, "tree_manager_containers"):
        kept.tree_manager_containers = {}
        kept.tree_manager_locks = defaultdict(threading.Lock)
