"""A hint: what the choice of a replica has to know of a request. It travels with the call; no torch, no Ray."""

from dataclasses import dataclass

from models.request import EffectiveRequest
from models.work import work


@dataclass(frozen=True, kw_only=True)
class Hint:
    """`work` is in row positions (models/work.py). A replica is warm for the request where it has lately put these
    LoRAs on its model and drawn in this size."""

    work: float = 0.0
    loras: tuple[str, ...] = ()
    size: str = ""

    @classmethod
    def of(cls, request: EffectiveRequest) -> "Hint":
        return cls(
            work=work(request),
            loras=tuple(sorted({use.name for use in request.adapters})),
            size=f"{request.width}x{request.height}",
        )
