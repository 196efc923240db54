"""A hint: what the choice of a replica has to know of a request. It travels with the call; no torch, no Ray."""

from dataclasses import dataclass
from typing import NamedTuple

from models.request import EffectiveRequest
from models.work import work


class Party(NamedTuple):
    """Those whose requests take turns as one: a caller's interactive ones, or its batch work."""

    key: str
    batch: bool


NOBODY = Party("", False)


@dataclass(frozen=True, kw_only=True)
class Hint:
    """`work` is in row positions (models/work.py). A replica is warm for the request where it has lately put these
    LoRAs on its model and drawn in this size. A request that is `urgent` has a deadline to keep, and is no batch work:
    that waits for whoever waits."""

    work: float = 0.0
    loras: tuple[str, ...] = ()
    size: str = ""
    party: Party = NOBODY
    urgent: bool = False

    @classmethod
    def of(cls, request: EffectiveRequest, key: str = "") -> "Hint":
        """Of a request of the caller with this key."""
        return cls(
            work=work(request),
            loras=tuple(sorted({use.name for use in request.adapters})),
            size=f"{request.width}x{request.height}",
            party=Party(key, request.priority == "batch"),
            urgent=request.deadline_s is not None and request.priority != "batch",
        )
