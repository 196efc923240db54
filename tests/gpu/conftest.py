"""Full-size networks with random weights on a GPU; with `--device cpu` the embedded models' untrained ones."""

import gc
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from bench import assembled
from bench.built import TINY_SIDE
from bench.fullsize import NETWORKS, Network, build
from bench.pipeline import Pipeline
from models.engine import Engine
from models.request import GenerationRequest
from models.weights import Components, Placement, place


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model under test, on its device, in float32 until `settle` gives it the precision that is usual there."""

    network: Network
    device: str
    side: int
    components: Components

    def pipeline(self) -> Pipeline:
        """diffusers' own, in whatever precision the networks have now."""
        return assembled.pipeline(self.network, self.components.modules)

    @property
    def placement(self) -> Placement:
        return place(self.device, "auto")

    def settle(self) -> None:
        for name, module in self.components.modules.items():
            if not name.startswith("tokenizer"):
                module.to(self.placement.dtype)

    def engine(self, cap: int | None = None, **how: Any) -> Engine:
        """Warmed up, its networks placed like this; its cap in rows is measured unless it is given."""
        return assembled.engine(self.network, self.components, replace(self.placement, **how), self.side, cap)

    def request(self, seed: int = 7, **options) -> GenerationRequest:
        asked = {
            "prompt": "a red circle on a blue background",
            "width": self.side,
            "height": self.side,
            "sampler": "euler",
            "schedule": "default",
            "steps": 20,
            "guidance_scale": 7.5,
        }
        return GenerationRequest(model=self.network.name, seed=seed, **asked | options)


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    name = request.config.getoption("--device")
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no GPU; --device cpu tries the tests themselves")
    return name


@pytest.fixture
def gpu(device: str) -> str:
    if device != "cuda":
        pytest.skip("a GPU's memory and queue are asked")
    return device


@pytest.fixture(params=list(NETWORKS))
def subject(request: pytest.FixtureRequest, device: str) -> Iterator[Subject]:
    network, tiny = NETWORKS[request.param], device == "cpu"
    components = build(network, torch.device(device), tiny)
    yield Subject(network=network, device=device, side=TINY_SIDE if tiny else network.side, components=components)
    components.modules.clear()
    gc.collect()  # engines hold themselves
    if device == "cuda":
        torch.cuda.empty_cache()
