"""The architectures: one module each, whose name is its registration."""

from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

from models.errors import InvalidRequest
from models.family import Family
from models.weights import Source, place

NAMES = tuple(sorted(module.name for module in iter_modules(__path__)))


def load(
    *,
    family: str,
    source: str,
    revision: str | None = None,
    config: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    offload: bool = False,
    fp8: bool = False,
    graphs: bool = False,
    compiled: Path | None = None,
) -> Family:
    """Loads a model's weights straight to the device. Takes seconds to minutes.

    Raises InvalidRequest for an unknown family, weights that are not safetensors, or a placement that cannot be.
    """
    if family not in NAMES:
        raise InvalidRequest("family", f"unknown family {family!r}; one of: {', '.join(NAMES)}")
    module = import_module(f"{__name__}.{family}")
    placement = place(device, dtype, offload=offload, fp8=fp8, graphs=graphs, compiled=compiled)
    return module.load(Source(location=source, revision=revision, config=config), placement)
