"""The parts of a request that have several fields of their own. No torch."""

from dataclasses import dataclass
from typing import Literal, get_args

from models import limits
from models.errors import InvalidRequest
from models.images import Picture

Enlargement = Literal["latent", "lanczos"]
ENLARGEMENTS: tuple[Enlargement, ...] = get_args(Enlargement)


@dataclass(frozen=True, kw_only=True)
class AdapterUse:
    """A LoRA by its registered name, and how strongly it is put on; 0 is not at all, below 0 the opposite."""

    name: str
    weight: float = 1.0

    def check(self, field: str) -> None:
        """Raises InvalidRequest for a weight out of range."""
        limits.ADAPTER_WEIGHT.check(f"{field}.weight", self.weight)


@dataclass(frozen=True, kw_only=True)
class ControlUse:
    """A ControlNet by its registered name, and the picture it is to follow (arXiv:2302.05543).

    It works from share `start` of the steps to share `end`. `preprocessor` makes the hint (edges, say) out of the
    picture; None says that the picture is one already.
    """

    name: str
    image: Picture
    weight: float = 1.0
    start: float = 0.0
    end: float = 1.0
    preprocessor: str | None = None

    def check(self, field: str) -> None:
        """Raises InvalidRequest for the first field out of range."""
        limits.CONTROL_WEIGHT.check(f"{field}.weight", self.weight)
        limits.SHARE.check(f"{field}.start", self.start)
        limits.SHARE.check(f"{field}.end", self.end)
        if self.start >= self.end:
            raise InvalidRequest(f"{field}.start", f"must be below end ({self.end}), not {self.start}")


@dataclass(frozen=True, kw_only=True)
class Outpaint:
    """By how many pixels the canvas grows on each side."""

    left: int = 0
    right: int = 0
    top: int = 0
    bottom: int = 0

    def check(self, field: str) -> None:
        """Raises InvalidRequest for borders out of range, or none at all."""
        for side in ("left", "right", "top", "bottom"):
            limits.BORDER.check(f"{field}.{side}", getattr(self, side))
        if not (self.left or self.right or self.top or self.bottom):
            raise InvalidRequest(field, "must grow the picture on one side at least")

    def grown(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) of a picture after it has grown."""
        return width + self.left + self.right, height + self.top + self.bottom


@dataclass(frozen=True, kw_only=True)
class Hires:
    """A second phase at a larger size: the first one's picture, enlarged and denoised again from `denoise_strength`.

    `steps` None means as many as the first phase.
    """

    scale: float = 2.0
    steps: int | None = None
    denoise_strength: float = 0.7
    upscaler: Enlargement = "latent"

    def check(self, field: str) -> None:
        """Raises InvalidRequest for the first field out of range."""
        limits.HIRES_SCALE.check(f"{field}.scale", self.scale)
        if self.steps is not None:
            limits.STEPS.check(f"{field}.steps", self.steps)
        limits.DENOISE_STRENGTH.check(f"{field}.denoise_strength", self.denoise_strength)
        limits.check_choice(f"{field}.upscaler", self.upscaler, ENLARGEMENTS)

    def enlarged(self, side: int) -> int:
        """A side in the second phase: `scale` times the first's, to the nearest multiple of 8."""
        return round(side * self.scale / limits.SIDE_MULTIPLE) * limits.SIDE_MULTIPLE


@dataclass(frozen=True, kw_only=True)
class Upscale:
    """Enlargement of the finished picture by an upscaler; `model` None is the application's default one."""

    scale: float = 2.0
    model: str | None = None

    def check(self, field: str) -> None:
        """Raises InvalidRequest for a scale out of range."""
        limits.UPSCALE.check(f"{field}.scale", self.scale)


@dataclass(frozen=True, kw_only=True)
class ArmUse:
    """An arm of an experiment that the request was put in. It says how the request came about and changes nothing.

    `arm` is the one that draws, `assigned` the unit's own, which may be switched off. `unit` is a pseudonym, and
    `version` names the rules by which it was assigned. A `shadow` is drawn and shown to nobody.
    """

    experiment: str
    arm: str
    assigned: str
    version: str
    unit: str
    shadow: bool = False
