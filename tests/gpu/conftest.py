"""Full-size networks with random weights on a GPU; with `--device cpu` the embedded models' untrained ones."""

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

from bench.fullsize import NETWORKS, Network, build
from bench.pipeline import Pipeline
from models import families
from models.card import ModelCard
from models.embedded import architecture
from models.engine import Engine
from models.families.sd import SD
from models.families.sdxl import SDXL
from models.request import GenerationRequest
from models.weights import Components, Placement, place

TINY_SIDE = 64


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model under test, on its device, in float32 until `settle` gives it the precision that is usual there."""

    network: Network
    device: str
    side: int
    components: Components

    def pipeline(self) -> Pipeline:
        """diffusers' own, in whatever precision the networks have now."""
        parts = dict(self.components.modules, scheduler=architecture.FAMILIES[self.network.embedded].scheduler())
        if self.network.family == "sdxl":
            return Pipeline(StableDiffusionXLPipeline(**parts, add_watermarker=False))
        return Pipeline(
            StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
        )

    @property
    def placement(self) -> Placement:
        return place(self.device, "auto", False)

    def settle(self) -> None:
        for name, module in self.components.modules.items():
            if not name.startswith("tokenizer"):
                module.to(self.placement.dtype)

    def engine(self, cap: int | None = None) -> Engine:
        """Warmed up; its cap in rows is measured unless it is given."""
        placement = self.placement
        family: families.Family
        family = (SDXL if self.network.family == "sdxl" else SD)(self.components, placement)
        card = ModelCard(
            name=self.network.name,
            family=self.network.family,
            width=self.side,
            height=self.side,
            max_pixels=4 * self.side**2,
        )
        engine = Engine(family, card, max_waiting=1000)
        engine.warm_up(cap)
        return engine

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
    if device == "cuda":
        torch.cuda.empty_cache()
