"""Work: what drawing costs a device, known before anything is prepared. No torch.

The unit is the row position: one position of the latents in one row of one forward. Everything else that a device does
for a picture is told in the same unit, so that one number serves admission, fair turns, routing and scaling.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from models.limits import SIDE_MULTIPLE
from models.prompt import parse
from models.request import EffectiveRequest
from models.samplers import evaluations
from models.upscaling import UPSCALING

NEVER = 10**9  # forwards

# Shares of the operations that the denoising network does for as many latent positions, in one row of one forward.
# Counted by torch's FlopCounterMode on Stable Diffusion 1.5's networks at 512 px. What a particular device makes of
# them is in its measured pace (models.pace).
CONTROL = 0.35  # a ControlNet, beside each row that it steers; 0.33 there, 0.44 with SDXL
# A step of the outermost layer alone (models.deep_cache): 0.08 there, 0.09 with SD 2.1, 0.015 with SDXL. A little more,
# since at the latents' full resolution memory counts for more than operations.
SHALLOW = 0.1
DECODE = 3.1  # with SDXL half
ENCODE = 1.4  # likewise


class Use(Protocol):
    """A ControlNet's use: from which share of the steps to which."""

    @property
    def weight(self) -> float: ...
    @property
    def start(self) -> float: ...
    @property
    def end(self) -> float: ...


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One run of a sampler for one picture.

    It takes `forwards`, of which `each` costs so much, but that only every `deep_cache`-th of them, the first one too,
    is one of the whole network. `begin` is what comes before them, as encoding an input picture, `end` the decoding
    where the picture ends with it.
    """

    forwards: int
    each: float
    begin: float
    end: float
    deep_cache: int = 1

    @classmethod
    def of(
        cls,
        *,
        forwards: int,
        rows: int,
        positions: int,
        controls: Iterable[Use] = (),
        shown: bool = False,
        larger: int = 0,
        deep_cache: int = 1,
    ) -> "Stage":
        """A stage on so many latent positions. It begins from an input picture where one is `shown`, and from the
        picture of a stage of `larger` positions, decoded and encoded again, where that is not 0."""
        steered = sum(use.end - use.start for use in controls if use.weight)
        return cls(
            forwards=forwards,
            each=rows * positions * (1 + CONTROL * steered),
            begin=(shown or larger > 0) * ENCODE * positions + DECODE * larger,
            end=DECODE * positions,
            deep_cache=deep_cache,
        )

    def shallow(self, position: int) -> bool:
        """Whether the forward at this position is one of the outermost layer alone."""
        return position % self.deep_cache > 0

    def costs(self, first: int, last: int) -> float:
        """Of the forwards from one position to before another, 0 where that is not behind it."""
        whole = -(-last // self.deep_cache) - -(-first // self.deep_cache)
        return self.each * (whole + SHALLOW * (last - first - whole)) if last > first else 0.0


def work(request: EffectiveRequest) -> float:
    """What all pictures of a request cost, in row positions. An upscaler's part, in `upscale`, is not the engine's."""
    return request.samples * left(stages(request), stop=request.stop_at_step or NEVER)


def breadth(request: EffectiveRequest) -> float:
    """Row positions of a forward that all pictures of a request share."""
    return request.samples * stages(request)[0].each


def left(stages: Sequence[Stage], at: int = -1, position: int = 0, stop: int = NEVER) -> float:
    """What is still to come of one picture: it is in stage `at`, -1 before the first, and has done `position` of that
    one's forwards. It is decoded after `stop` forwards in all, if not before."""
    total = 0.0
    for number, stage in enumerate(stages):
        done = position if number == at else stage.forwards if number < at else 0
        total += stage.costs(done, min(stage.forwards, stop))
        total += stage.begin if number > at else 0.0
        stop -= stage.forwards
        if stop <= 0 or stage is stages[-1]:
            return total + stage.end
    return total


def stages(request: EffectiveRequest) -> tuple[Stage, ...]:
    """The stages of each picture of a request, as models.preparation will make them."""
    rows, controls = _rows(request), request.controls
    positions = _positions(request)
    first = Stage.of(
        forwards=evaluations(request.sampler, request.steps, _strength(request)),
        rows=rows,
        positions=positions,
        controls=controls,
        shown=request.image is not None,
        deep_cache=request.deep_cache,
    )
    if request.hires is None:
        return (first,)
    hires = request.hires
    second = Stage.of(
        forwards=evaluations(request.sampler, hires.steps or request.steps, hires.denoise_strength),
        rows=rows,
        positions=_area(*request.largest, SIDE_MULTIPLE),
        controls=controls,
        larger=positions if hires.upscaler == "lanczos" else 0,
        deep_cache=request.deep_cache,
    )
    return first, second


def _rows(request: EffectiveRequest) -> int:
    """One for each part of the prompt, and one without it where there is guidance or anything to compose."""
    parts = len(parse("prompt", request.prompt, request.prompt_syntax))
    return parts + (request.guided or parts > 1)


def _positions(request: EffectiveRequest) -> int:
    factor = SIDE_MULTIPLE
    if request.task == "upscale" and request.image is not None:
        scale = request.width // request.image.width
        factor = next(kind.factor for kind in UPSCALING.values() if kind.scale == scale)
    return _area(request.width, request.height, factor)


def _area(width: int, height: int, factor: int) -> int:
    return -(-width // factor) * -(-height // factor)


def _strength(request: EffectiveRequest) -> float | None:
    """Of the first stage, None where it starts from noise alone."""
    drawn_over = request.task == "img2img" or (request.task == "inpaint" and request.denoise_strength < 1)
    return request.denoise_strength if drawn_over else None
