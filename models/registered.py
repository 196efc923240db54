"""What may be put on one model: LoRAs and learned words from a folder, ControlNets by their names."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from models.adapters.controlnet import ControlNets
from models.adapters.registry import AdapterCache, AdapterFile, Listed, Registry
from models.adapters.textual_inversion import TextualInversion
from models.errors import InvalidRequest, NotFound
from models.family import Family
from models.loras import CAPACITY_BYTES, Loras
from models.weights import fitting


class Adapters:
    """The adapters of one model. Files are looked up when they are asked for, so new ones need no restart.

    `folder` has LoRAs and textual inversions, a `.safetensors` file each; `controlnets` and `preprocessors` say where
    those of a name lie; `lora_bytes` is how much memory LoRAs may take that are kept for later. Raises InvalidRequest
    for a folder that is none, and where nothing lies.
    """

    def __init__(
        self,
        family: Family,
        folder: Path | None = None,
        controlnets: Mapping[str, str | Path] | None = None,
        preprocessors: Mapping[str, str | Path] | None = None,
        lora_bytes: int = CAPACITY_BYTES,
    ):
        if folder is not None and not folder.is_dir():
            raise InvalidRequest("adapters", f"{folder} is no folder")
        registry = Registry(folder)
        self.loras = Loras(registry, family.networks, family.device, lora_bytes)
        self.inversions = Inversions(registry)
        self.controlnets = ControlNets(
            controlnets or {}, family.network_config, family.placement, preprocessors=preprocessors
        )


class Inversions(Mapping[str, TextualInversion]):
    """The textual inversions of a folder by name, loaded when a prompt has the name. Safe to use from any thread."""

    def __init__(self, registry: Registry, capacity_bytes: int = 64 * 2**20):
        self._registry = registry
        self._cache: AdapterCache[TextualInversion] = AdapterCache(capacity_bytes)

    def __getitem__(self, name: str) -> TextualInversion:
        try:
            file = self._registry.find(name, "textual_inversion")
        except NotFound as gone:
            raise KeyError(name) from gone
        return self._cache.get(file, _load)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names())

    def __len__(self) -> int:
        return len(self._names())

    def _names(self) -> list[str]:
        return [one.name for one in self._registry.listing() if _usable(one)]


def _usable(listed: Listed) -> bool:
    return listed.kind == "textual_inversion" and not listed.problem


def _load(file: AdapterFile) -> TextualInversion:
    with fitting(f"the textual inversion {file.name!r}"):
        return TextualInversion.read(file.name, file.read())
