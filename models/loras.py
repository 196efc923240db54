"""The LoRAs of one model: found by name, loaded once, and put on its networks row by row."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager

import torch
from torch import nn

from models.adapters.lora import TEXT_ENCODERS, UNET, Lora, LoraLayers, Mix, Worn, load
from models.adapters.registry import AdapterCache, AdapterFile, Registry
from models.parts import AdapterUse
from models.weights import fitting

CAPACITY_BYTES = 2 * 2**30


class Loras:
    """`mix` is safe in any thread; the rest belongs to the thread that runs the networks."""

    def __init__(
        self,
        registry: Registry,
        networks: Mapping[str, nn.Module],
        device: torch.device,
        capacity_bytes: int = CAPACITY_BYTES,
    ):
        self._registry = registry
        self._networks = networks
        self._cache: AdapterCache[Lora] = AdapterCache(capacity_bytes)
        self._layers = {name: LoraLayers(network, name, device) for name, network in networks.items()}

    def mix(self, uses: Sequence[AdapterUse]) -> Mix:
        """What a request asks for, loaded; whoever holds it is not concerned by what happens to the files later.

        Raises NotFound for an unknown name, InvalidRequest for a LoRA that this model cannot use, and GenerationFailed
        for one that does not fit into memory.
        """
        found = [(self._registry.find(use.name, "lora"), use.weight) for use in uses]
        return tuple((self._cache.get(file, self._load), weight) for file, weight in found if weight)

    @staticmethod
    def of_encoders(mix: Mix) -> Mix:
        """Those of a mix that are on text encoders too."""
        return tuple((lora, weight) for lora, weight in mix if not lora.targets.keys().isdisjoint(TEXT_ENCODERS))

    @contextmanager
    def encoding(self, rows: Sequence[Mix]) -> Iterator[None]:
        """While it lasts the text encoders are called with these rows: one for each chunk of a prompt."""
        with ExitStack() as stack:
            for name in TEXT_ENCODERS:
                if name in self._layers:
                    stack.enter_context(self._layers[name].applied(rows))
            yield

    def worn(self, rows: Sequence[Mix]) -> Worn | None:
        """What rows of the UNet have on (models.adapters.lora)."""
        return self._layers[UNET].worn(rows)

    def denoising(self, worn: Worn | None) -> AbstractContextManager[None]:
        """While it lasts the UNet is called with rows that have this on."""
        return self._layers[UNET].on(worn)

    def _load(self, file: AdapterFile) -> Lora:
        with fitting(f"the LoRA {file.name!r}"):
            return load(file.name, file.sha256, file.read(), self._networks)
