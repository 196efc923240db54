"""A sequence: one image on its way from noise to picture, as plain data."""

import math
from dataclasses import dataclass, field

import torch

from models.adapters.controlnet import Control
from models.adapters.lora import Mix
from models.canvas import Canvas
from models.conditioning import Row
from models.deep_cache import Deep
from models.images import Picture
from models.parts import Enlargement
from models.prompt import PromptReport
from models.request import EffectiveRequest
from models.script import Script
from models.tapes import HISTORY, Tape
from models.turns import PATIENCE_S
from models.work import NEVER, Stage, left

SLOTS = 2 * HISTORY + 2


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One run of a tape on latents of one shape (c, h, w).

    It starts from a picture, or from what the phase before it has made, enlarged, or from noise alone; upscaling
    networks are shown the picture instead. A canvas says which part of it is drawn; `controls` steer it.
    """

    tape: Tape
    shape: tuple[int, int, int]
    picture: Picture | None = None
    canvas: Canvas | None = None
    enlarge: Enlargement | None = None
    controls: tuple[Control, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Kept:
    """What inpainting keeps: where `mask` (1, h, w) is 0 the latents stay `clean` (c, h, w), noised by `noise`."""

    mask: torch.Tensor
    clean: torch.Tensor
    noise: torch.Tensor


@dataclass(eq=False, kw_only=True)
class Sequence:
    """One image being made.

    `history` (8, c, h, w) holds the last latents, newest first, then the last model outputs, of which slot 4 is free
    for the one to come. `estimate` (c, h, w) is the clean latents that the last step expected. `inputs` (k, h, w) is
    what the network sees beside the latents, `deep` what its next step goes on from where that is shallow. `rows` is
    how many rows of a forward the image takes. The image is done after `stop` forwards, if its tapes are not at their
    ends before. `stages` are the phases as work; `key` says whose it is. Times are of time.monotonic().
    """

    request: EffectiveRequest
    index: int
    ticket: str
    phases: tuple[Phase, ...]
    script: Script
    stages: tuple[Stage, ...]
    mix: Mix
    generator: torch.Generator
    submitted: float
    key: str = ""
    deadline: float = math.inf
    stop: int = NEVER
    phase: int = 0
    position: int = 0
    history: torch.Tensor | None = None
    estimate: torch.Tensor | None = None
    kept: Kept | None = None
    inputs: torch.Tensor | None = None
    deep: Deep | None = None
    conditioning: list[Row] = field(default_factory=list)
    reports: dict[str, PromptReport] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    joined: float = 0.0
    encoded: float = 0.0
    denoised: float = 0.0

    @property
    def tape(self) -> Tape:
        return self.phases[self.phase].tape

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of the latents in the present phase."""
        return self.phases[self.phase].shape

    @property
    def canvas(self) -> Canvas | None:
        return self.phases[self.phase].canvas

    @property
    def controls(self) -> tuple[Control, ...]:
        return self.phases[self.phase].controls

    @property
    def rows(self) -> int:
        return len(self.script.lines)

    @property
    def steps(self) -> int:
        """Forwards in all phases together, as far as they will be done."""
        return max(self.step, min(self.stop, sum(len(phase.tape) for phase in self.phases)))

    @property
    def step(self) -> int:
        """Forwards done."""
        return sum(len(phase.tape) for phase in self.phases[: self.phase]) + self.position

    @property
    def stopped(self) -> bool:
        """Whether it ends here, before its tapes do."""
        return self.step >= self.stop and self.estimate is not None

    @property
    def begun(self) -> bool:
        """Whether it has its first latents."""
        return self.history is not None

    @property
    def denoising(self) -> bool:
        """Whether the present phase goes on."""
        return self.position < len(self.tape) and not self.stopped

    @property
    def last(self) -> bool:
        """Whether nothing follows the present phase."""
        return self.stopped or self.phase + 1 == len(self.phases)

    @property
    def work(self) -> float:
        """What is still to come, in row positions (models.work)."""
        phase = self.phase if self.begun else -1
        return left(self.stages, phase, self.position, max(self.stop, self.step))

    @property
    def shallow(self) -> bool:
        """Whether its next step is one of the network's outermost layer alone (models.deep_cache)."""
        return self.position < len(self.tape) and self.stages[self.phase].shallow(self.position)

    @property
    def leaves_deep(self) -> bool:
        """Whether the step after the next one is such a step, which goes on from what the next one leaves."""
        after = self.position + 1
        return after < len(self.tape) and self.stages[self.phase].shallow(after)

    @property
    def breadth(self) -> float:
        """What a forward of the whole network costs, in row positions."""
        return self.stages[self.phase].each

    @property
    def urgency(self) -> tuple[bool, float]:
        """Smaller goes first: interactive before batch, then by when it is due."""
        return self.request.priority == "batch", min(self.deadline, self.submitted + PATIENCE_S)

    @property
    def latents(self) -> torch.Tensor:
        """(c, h, w), as they are now; where it was stopped early, the clean ones that were expected."""
        if self.stopped and self.position < len(self.tape):
            assert self.estimate is not None
            return self.estimate
        assert self.history is not None
        return self.history[0]

    def begin(self, latents: torch.Tensor) -> None:
        """Starts the present phase from latents (c, h, w)."""
        self.history = latents.new_zeros((SLOTS, *latents.shape))
        self.history[0] = latents

    def noise(self) -> torch.Tensor:
        """Unit noise (c, h, w), the next that diffusers would draw for this seed."""
        return torch.randn(self.shape, generator=self.generator)
