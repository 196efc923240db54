"""What turns a picture into the hint that a ControlNet was trained on: one module each, whose name is its registration.

A module offers `apply(pixels)`, uint8 (height, width, 3) to the same. One that needs weights offers `load(folder)`,
which gives such a function, and `ADVICE` for who has none. Only a module with weights loads torch.
"""

from collections.abc import Callable, Mapping
from functools import cache, lru_cache
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

import numpy as np

from models.errors import InvalidRequest, NotFound
from models.images import Picture

NONE = "none"
NAMES = (NONE, *sorted(module.name for module in iter_modules(__path__) if not module.name.startswith("_")))
_REMEMBERED = 16  # hints: a request's samples and phases ask for the same ones


def preprocess(name: str, picture: Picture, weights: Mapping[str, str | Path] | None = None) -> Picture:
    """The hint for `picture`, of the same size; "none" takes the picture as a hint already. Safe in any thread.

    `weights` says in which local folder a preprocessor's model lies. Raises NotFound for an unknown name and
    InvalidRequest for one whose weights are not registered or cannot be loaded.
    """
    if name not in NAMES:
        raise NotFound(f"there is no preprocessor {name!r}; there are: {', '.join(NAMES)}")
    if name == NONE:
        return picture
    folder = (weights or {}).get(name)
    return _hint(name, picture, None if folder is None else Path(folder))


@lru_cache(maxsize=_REMEMBERED)
def _hint(name: str, picture: Picture, folder: Path | None) -> Picture:
    return Picture.from_array(_function(name, folder)(picture.array()))


@cache
def _function(name: str, folder: Path | None) -> Callable[[np.ndarray], np.ndarray]:
    """What the module does, with the model in `folder` where it needs one; kept for the life of the process."""
    module = import_module(f"{__name__}.{name}")
    if hasattr(module, "apply"):
        return module.apply
    if folder is None:
        raise InvalidRequest("preprocessor", f"{name!r} needs weights and none are registered: {module.ADVICE}")
    return module.load(folder)
