"""What numbers and words a request may hold. Every range stands here and nowhere else. No torch."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from models.errors import InvalidRequest


@dataclass(frozen=True)
class Range:
    """A closed range of allowed numbers."""

    low: float
    high: float

    def check(self, field: str, value: float) -> None:
        """Raises InvalidRequest naming the field and the range; NaN and infinities are never inside."""
        if not (math.isfinite(value) and self.low <= value <= self.high):
            raise InvalidRequest(field, f"must be between {self.low} and {self.high}, not {value}")


SIDE_MULTIPLE = 8
SIDE = Range(64, 8192)
STEPS = Range(1, 150)
GUIDANCE_SCALE = Range(0.0, 50.0)
GUIDANCE_RESCALE = Range(0.0, 1.0)
SEED = Range(0, 2**53 - 1)  # what every JSON client can hold exactly
SAMPLES = Range(1, 16)
CLIP_SKIP = Range(0, 4)
DEEP_CACHE = Range(1, 10)  # steps
DENOISE_STRENGTH = Range(0.0, 1.0)
VARIATION_STRENGTH = Range(0.0, 1.0)
DEADLINE_S = Range(0.1, 86400.0)
PREVIEW_EVERY = Range(0, 150)
MASK_BLUR = Range(0, 64)
MASK_GROW = Range(0, 256)
MASK_PADDING = Range(0, 512)
BORDER = Range(0, 2048)
HIRES_SCALE = Range(1.0, 4.0)
STOP_AT_STEP = Range(1, 1000)  # forwards: some samplers take two to a step
CONTROLS = Range(0, 4)
CONTROL_WEIGHT = Range(0.0, 2.0)
SHARE = Range(0.0, 1.0)
ADAPTERS = Range(0, 8)
ADAPTER_WEIGHT = Range(-4.0, 4.0)
UPSCALE = Range(1.0, 8.0)
NOISE_LEVEL = Range(0, 350)  # of 1000 steps; upscaling models have seen no more
PROMPT_CHARACTERS = 10_000


def check_text(field: str, text: str) -> None:
    """Raises InvalidRequest for text that is too long or that cannot be stored."""
    if len(text) > PROMPT_CHARACTERS:
        raise InvalidRequest(field, f"must have at most {PROMPT_CHARACTERS} characters, not {len(text)}")
    if "\0" in text or any("\ud800" <= c <= "\udfff" for c in text):
        raise InvalidRequest(field, "must not contain NUL or lone surrogate characters")


def check_choice(field: str, value: str, allowed: Iterable[str]) -> None:
    """Raises InvalidRequest where the value is not among the allowed ones, which it lists."""
    if value not in (allowed := tuple(allowed)):
        raise InvalidRequest(field, f"must be one of {', '.join(allowed)}, not {value!r}")


def check_takes_a_step(field: str, strength: float, steps: int) -> None:
    """Raises InvalidRequest for a strength above 0 that leaves not one of the steps, so that nothing would be drawn."""
    if strength and int(steps * strength) == 0:
        counted = "1 step" if steps == 1 else f"{steps} steps"
        raise InvalidRequest(
            field,
            f"{strength:g} of {counted} leaves no step to take: say more steps, or a higher denoise strength (which is "
            "a lower image_strength)",
        )


def least_strength(steps: int) -> float:
    """A strength that takes one of the steps, and hardly more."""
    return math.ceil(1e6 / steps) / 1e6 if steps > 0 else 1.0


def check_side(field: str, side: int) -> None:
    """Raises InvalidRequest for a picture's side that is out of range or no multiple of 8; says which ones would do."""
    SIDE.check(field, side)
    if side % SIDE_MULTIPLE:
        below = side - side % SIDE_MULTIPLE
        raise InvalidRequest(
            field, f"must be a multiple of {SIDE_MULTIPLE}, not {side}; {below} or {below + SIDE_MULTIPLE} would do"
        )
