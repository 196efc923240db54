"""What a picture depends on besides its request: weights, adapters, versions, device. No torch.

A replica knows; the gateway asks it before it gives out a picture of an earlier drawing, and keeps it in receipts.
"""

import hashlib
import os
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from app.settings import PROJECT, ModelSettings
from models.adapters.registry import SUFFIX, Registry
from models.request import EffectiveRequest

LIBRARIES = ("torch", "diffusers", "transformers", "numpy")


@dataclass(frozen=True, kw_only=True)
class Origin:
    """A replica as far as its pictures depend on it.

    `adapters` has the SHA-256 of the files of what a request puts on the model, by kind and name: `lora:moon`,
    `textual_inversion:moon`, `controlnet:canny`, `preprocessor:depth`.
    """

    revision: str
    device: str
    dtype: str
    versions: Mapping[str, str]
    adapters: Mapping[str, str]

    def drew(self, receipt: Mapping[str, Any]) -> bool:
        """Whether a receipt's pictures were drawn with the same weights: the model's, and those put on it."""
        return (receipt.get("revision"), receipt.get("adapters")) == (self.revision, dict(self.adapters))


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a request puts on the model, by name; `prompts` because they may hold the names of textual inversions."""

    loras: tuple[str, ...] = ()
    controlnets: tuple[str, ...] = ()
    preprocessors: tuple[str, ...] = ()
    prompts: str = ""

    @classmethod
    def of(cls, request: EffectiveRequest) -> "Needs":
        return cls(
            loras=tuple(use.name for use in request.adapters),
            controlnets=tuple(use.name for use in request.controls),
            preprocessors=tuple(use.preprocessor for use in request.controls if use.preprocessor),
            prompts=f"{request.prompt}\n{request.negative_prompt}",
        )


class Origins:
    """The origins of one replica's pictures. Safe to use from any thread; a file is hashed once while it stays."""

    def __init__(self, settings: ModelSettings, revision: str, device: str, dtype: str):
        self._settings = settings
        self._registry = Registry(settings.located_adapters)
        self._known = {
            "revision": revision,
            "device": device,
            "dtype": dtype,
            "versions": {"heliograph": _own_version()} | {name: version(name) for name in LIBRARIES},
        }

    def of(self, needs: Needs) -> Origin:
        """The origin of a picture that needs these. Raises NotFound for a LoRA that is not there."""
        return Origin(adapters=dict(self._hashes(needs)), **self._known)

    def _hashes(self, needs: Needs) -> Iterator[tuple[str, str]]:
        for name in needs.loras:
            yield f"lora:{name}", self._registry.find(name, "lora").sha256
        for listed in self._registry.listing():
            if listed.kind == "textual_inversion" and not listed.problem and listed.name in needs.prompts.lower():
                yield f"textual_inversion:{listed.name}", self._registry.find(listed.name, listed.kind).sha256
        yield from _located("controlnet", needs.controlnets, self._settings.located_controlnets)
        preprocessors: dict[Any, str] = self._settings.located_preprocessors
        yield from _located("preprocessor", needs.preprocessors, preprocessors)


def _own_version() -> str:
    """That of the package, or of the folder that runs where it is not installed."""
    try:
        return version("heliograph")
    except PackageNotFoundError:
        return tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]["version"]


def _located(kind: str, names: tuple[str, ...], places: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Hashes of what lies somewhere; names without a place have no weights, or are refused by the engine."""
    for name in names:
        if name in places:
            yield f"{kind}:{name}", _sha256(Path(places[name]))


def _sha256(place: Path) -> str:
    """Of a file, or of all weights and configurations in a folder, told apart by their names."""
    if place.is_file():
        return _of_file(place, *_state(place))
    digest = hashlib.sha256()
    for file in sorted(file for file in place.rglob("*") if file.suffix in (SUFFIX, ".json")):
        digest.update(f"{file.relative_to(place).as_posix()} {_of_file(file, *_state(file))}\n".encode())
    return digest.hexdigest()


def _state(file: Path) -> tuple[int, int]:
    facts: os.stat_result = file.stat()
    return facts.st_size, facts.st_mtime_ns


@lru_cache(maxsize=256)
def _of_file(file: Path, _size: int, _changed_ns: int) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
