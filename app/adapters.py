"""What requests may name beside a model, as the configuration and the folders say it at the moment. No torch."""

from collections.abc import Iterator, Sequence

from app.service import AdapterDescription
from app.settings import ModelSettings
from models import preprocessors
from models.adapters.registry import Registry
from models.errors import NotFound
from models.upscaling import UPSCALING


class Shelf:
    """The adapters of several models. Files are looked up when they are asked for; hashes are kept while they stay."""

    def __init__(self, models: Sequence[ModelSettings]):
        self._models = models
        self._registries = {model.name: Registry(model.located_adapters) for model in models}

    def __call__(self) -> list[AdapterDescription]:
        """Every adapter, those of one name and file once, with the models that can use it."""
        found: dict[tuple[str, str, str | None], AdapterDescription] = {}
        for model in self._models:
            for one in self._of(model):
                key = one.name, one.kind, one.sha256
                models = found[key].models if key in found else ()
                found[key] = AdapterDescription(
                    name=one.name,
                    kind=one.kind,
                    models=(*models, model.name),
                    base=one.base,
                    sha256=one.sha256,
                    bytes=one.bytes,
                )
        return list(found.values())

    def _of(self, model: ModelSettings) -> Iterator[AdapterDescription]:
        registry = self._registries[model.name]
        for listed in registry.listing():
            if listed.problem or listed.kind is None:
                continue
            try:
                file = registry.find(listed.name)
            except NotFound:  # gone since it was listed
                continue
            yield AdapterDescription(
                name=file.name,
                kind=file.kind,
                models=(),
                base=file.base or None,
                sha256=file.sha256,
                bytes=file.size_bytes,
            )
        if model.family in UPSCALING:  # nothing steers these
            return
        for name in model.controlnets:
            yield AdapterDescription(name=name, kind="controlnet", models=())
        for name in preprocessors.NAMES:
            if name in model.preprocessors or name not in preprocessors.WEIGHTED:
                yield AdapterDescription(name=name, kind="preprocessor", models=())
