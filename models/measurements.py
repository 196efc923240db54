"""What a warm-up has measured, kept in a folder for the next start on such a machine."""

import json
import logging
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from models.family import Family
from models.likeness import likeness, name_of
from models.turns import Shape

RECIPE = 1  # another number wherever what is measured, or how, has changed

Seconds = dict[int, float]  # of a forward, by its rows

_log = logging.getLogger(__name__)


class Measurements:
    """Seconds of forwards by their latents' shape and rows, up to `most` rows, of models of one architecture.

    Where there is no `folder` nothing is kept. What is kept holds until the processor, its memory, the precision,
    what makes forwards fast, the number of threads or the libraries change; who wants it measured anew removes it.
    """

    def __init__(self, family: Family, most: int | None, folder: Path | None):
        self._most = most
        self._file = None if folder is None else folder / f"forwards-{_name(family, most)}.json"
        self._known = self._read()

    def of(self, shape: Shape, measure: Callable[[int | None], Seconds]) -> Seconds:
        """As they were measured before, or as `measure`, told the most rows, finds them now."""
        name = "x".join(map(str, shape))
        if name not in self._known:
            self._known[name] = measure(self._most)
            self._write()
        return self._known[name]

    def _read(self) -> dict[str, Seconds]:
        if self._file is None or not self._file.exists():
            return {}
        try:
            return {name: _seconds(rows) for name, rows in json.loads(self._file.read_text()).items()}
        except (OSError, ValueError, TypeError, AttributeError) as fault:
            _log.warning("%s is no measurement, forwards are measured anew: %r", self._file, fault)
            return {}

    def _write(self) -> None:
        if self._file is None:
            return
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            draft = self._file.with_suffix(f".{os.getpid()}")  # replicas of one machine want the same
            draft.write_text(json.dumps(self._known))
            draft.replace(self._file)
        except OSError as fault:
            _log.warning("what was measured is not kept in %s: %s", self._file, fault)


def _name(family: Family, most: int | None) -> str:
    """Another one for whatever would be measured otherwise."""
    placement = family.placement
    how = {"fp8": placement.fp8, "graphs": placement.graphs, "compiled": placement.compiled is not None}
    room = {"offload": placement.offload, "memory": _memory(placement.device), "most": most}
    return name_of(likeness(family.networks["unet"]) | how | room, RECIPE)


def _memory(device: torch.device) -> int | None:
    """Bytes that a GPU has: where they end, a measurement does. None of other devices."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


def _seconds(told: dict[str, Any]) -> Seconds:
    """Raises ValueError, TypeError or AttributeError for anything that is none."""
    seconds = {int(rows): float(value) for rows, value in told.items()}
    if not seconds or not all(rows > 0 and value > 0 and math.isfinite(value) for rows, value in seconds.items()):
        raise ValueError(f"no seconds by rows: {told}")
    return seconds
