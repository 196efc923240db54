"""A sequence: one image on its way from noise to picture, as plain data."""

import math
from dataclasses import dataclass, field

import torch

from models.family import Conditioning
from models.images import Picture
from models.request import EffectiveRequest
from models.tapes import HISTORY, Tape

SLOTS = 2 * HISTORY + 2
PATIENCE_S = 60.0  # who says no deadline is due after this long, so that nobody is overtaken for ever


@dataclass(frozen=True)
class Phase:
    """One run of a tape. It starts from `picture`, or from noise alone where there is none."""

    tape: Tape
    picture: Picture | None = None


@dataclass(eq=False, kw_only=True)
class Sequence:
    """One image being made.

    `history` (8, c, h, w) holds the last latents, newest first, then the last model outputs, of which slot 4 is free
    for the one to come. `rows` is how many rows of a forward the image takes. Times are of time.monotonic().
    """

    request: EffectiveRequest
    index: int
    ticket: str
    phases: tuple[Phase, ...]
    shape: tuple[int, int, int]
    generator: torch.Generator
    submitted: float
    deadline: float = math.inf
    phase: int = 0
    position: int = 0
    history: torch.Tensor | None = None
    conditioning: list[Conditioning] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    joined: float = 0.0
    encoded: float = 0.0
    denoised: float = 0.0

    @property
    def tape(self) -> Tape:
        return self.phases[self.phase].tape

    @property
    def rows(self) -> int:
        return 2 if self.request.guided else 1

    @property
    def steps(self) -> int:
        """Forwards in all phases together."""
        return sum(len(phase.tape) for phase in self.phases)

    @property
    def step(self) -> int:
        """Forwards done."""
        return sum(len(phase.tape) for phase in self.phases[: self.phase]) + self.position

    @property
    def denoising(self) -> bool:
        return self.position < len(self.tape)

    @property
    def urgency(self) -> tuple[bool, float]:
        """Smaller goes first: interactive before batch, then by when it is due."""
        return self.request.priority == "batch", min(self.deadline, self.submitted + PATIENCE_S)

    @property
    def latents(self) -> torch.Tensor:
        """(c, h, w), as they are now."""
        assert self.history is not None
        return self.history[0]

    def begin(self, latents: torch.Tensor) -> None:
        """Starts the present phase from latents (c, h, w)."""
        self.history = latents.new_zeros((SLOTS, *latents.shape))
        self.history[0] = latents

    def noise(self) -> torch.Tensor:
        """Unit noise (c, h, w), the next that diffusers would draw for this seed."""
        return torch.randn(self.shape, generator=self.generator)
