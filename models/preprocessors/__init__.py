"""What turns a picture into the hint that a ControlNet was trained on: one module each, whose name is its registration.

A module offers `apply(pixels)`, uint8 (height, width, 3) to the same; one that needs weights offers
`load(folder)` instead, which gives such a function. This package itself loads no torch; a module with weights does.
"""

from collections.abc import Callable, Mapping
from functools import cache
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

import numpy as np

from models.errors import InvalidRequest, NotFound
from models.images import Picture

NONE = "none"
NAMES = (NONE, *sorted(module.name for module in iter_modules(__path__) if not module.name.startswith("_")))

Apply = Callable[[np.ndarray], np.ndarray]


def preprocess(name: str, picture: Picture, weights: Mapping[str, str | Path] | None = None) -> Picture:
    """The hint for `picture`, of the same size; "none" takes the picture as a hint already.

    `weights` says in which local folder a preprocessor's model lies. Raises NotFound for an unknown name and
    InvalidRequest for one whose weights are not registered or cannot be loaded.
    """
    if name not in NAMES:
        raise NotFound(f"there is no preprocessor {name!r}; there are: {', '.join(NAMES)}")
    if name == NONE:
        return picture
    module = import_module(f"{__name__}.{name}")
    if hasattr(module, "apply"):
        return Picture.from_array(module.apply(picture.array()))
    folder = (weights or {}).get(name)
    if folder is None:
        raise InvalidRequest("preprocessor", f"{name!r} needs weights and none are registered: {module.ADVICE}")
    return Picture.from_array(_loaded(name, Path(folder))(picture.array()))


@cache
def _loaded(name: str, folder: Path) -> Apply:
    """The model in `folder`, kept for the life of the process."""
    return import_module(f"{__name__}.{name}").load(folder)
