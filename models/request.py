"""GenerationRequest: what to make, in canonical form. Ranges stand here and nowhere else. No torch.

A dialect builds a GenerationRequest in which None means "the model's default"; `resolve` decides everything once and
gives an EffectiveRequest, which is what engines run, answers report and receipts keep.
"""

import math
import secrets
from dataclasses import dataclass, fields, replace
from typing import Literal

from models.card import ModelCard
from models.errors import InvalidRequest, NotFound
from models.images import FORMATS, ImageFormat, Picture
from models.samplers import check_pair, find_sampler, find_schedule

Priority = Literal["interactive", "batch"]
PRIORITIES: tuple[Priority, ...] = ("interactive", "batch")


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
DENOISE_STRENGTH = Range(0.0, 1.0)
DEADLINE_S = Range(0.1, 86400.0)
PREVIEW_EVERY = Range(0, 150)
PROMPT_CHARACTERS = 10_000


@dataclass(frozen=True, kw_only=True)
class AdapterUse:
    """An adapter by its registered name, and how strongly it is put on."""

    name: str
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """What to make. None means: what the model does by default (for `seed`: a fresh random one).

    Picture i of seed s is picture 0 of seed s + i. `denoise_strength` 1 ignores the input picture, 0 returns it through
    the autoencoder. `clip_skip` counts text-encoder layers left out from the end. `deadline_s` is how long the caller
    waits, counted from submission. `preview_every` asks for a preview in every n-th progress event, 0 for none.
    """

    model: str
    prompt: str
    negative_prompt: str = ""
    width: int | None = None
    height: int | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    guidance_rescale: float = 0.0
    seed: int | None = None
    samples: int = 1
    sampler: str | None = None
    schedule: str | None = None
    clip_skip: int = 0
    image: Picture | None = None
    denoise_strength: float | None = None
    mask: Picture | None = None
    adapters: tuple[AdapterUse, ...] = ()
    output_format: ImageFormat = "png"
    priority: Priority = "interactive"
    deadline_s: float | None = None
    preview_every: int = 0

    def resolve(self, card: ModelCard) -> "EffectiveRequest":
        """Decides every open parameter by the model's card and checks every range.

        Raises InvalidRequest (naming the field and what is allowed) and NotFound (another model's card).
        """
        if self.model != card.name:
            raise NotFound(f"there is no model {self.model!r} here; this is {card.name!r}")
        sampler, schedule = self._sampling(card)
        width, height = self._size(card)
        values = {f.name: getattr(self, f.name) for f in fields(GenerationRequest)}
        values |= {"sampler": sampler, "schedule": schedule, "width": width, "height": height}
        values["steps"] = card.steps if self.steps is None else self.steps
        values["guidance_scale"] = card.guidance_scale if self.guidance_scale is None else self.guidance_scale
        values["seed"] = secrets.randbelow(2**32) if self.seed is None else self.seed
        values["denoise_strength"] = self._strength()
        effective = EffectiveRequest(**values)
        effective.check(card)
        return effective

    def _sampling(self, card: ModelCard) -> tuple[str, str]:
        """A sampler named without its schedule gets the model's, where that sampler has it."""
        sampler, schedule = (card.sampler, None) if self.sampler is None else find_sampler(self.sampler)
        if self.schedule is not None:
            schedule = find_schedule(self.schedule)
        elif schedule is None:
            schedule = card.schedule if sampler == card.sampler else "default"
        check_pair(sampler, schedule)
        return sampler, schedule

    def _size(self, card: ModelCard) -> tuple[int, int]:
        """The input picture's size, cut down to the next multiple, stands in for a size that was not given."""
        if self.image is not None and self.width is None and self.height is None:
            width, height = self.image.width, self.image.height
            return width - width % SIDE_MULTIPLE, height - height % SIDE_MULTIPLE
        return card.width if self.width is None else self.width, card.height if self.height is None else self.height

    def _strength(self) -> float:
        if self.image is None:
            if self.denoise_strength is not None:
                raise InvalidRequest("denoise_strength", "needs an input picture in `image`")
            return 1.0
        return 0.75 if self.denoise_strength is None else self.denoise_strength


@dataclass(frozen=True, kw_only=True)
class EffectiveRequest(GenerationRequest):
    """A request in which everything is decided and within range. Made by `resolve`; the defaults are placeholders."""

    width: int = 0
    height: int = 0
    steps: int = 0
    guidance_scale: float = 0.0
    seed: int = 0
    sampler: str = ""
    schedule: str = ""
    denoise_strength: float = 1.0

    @property
    def guided(self) -> bool:
        """Whether each picture brings an unconditional row too (classifier-free guidance, arXiv:2207.12598)."""
        return self.guidance_scale > 1.0

    @property
    def task(self) -> str:
        return "txt2img" if self.image is None else "img2img"

    def sample(self, index: int) -> "EffectiveRequest":
        """The request for picture `index` alone."""
        return replace(self, seed=self.seed + index, samples=1)

    def resolve(self, card: ModelCard) -> "EffectiveRequest":
        """Itself, checked again: an engine takes requests that somebody else has resolved."""
        if self.model != card.name:
            raise NotFound(f"there is no model {self.model!r} here; this is {card.name!r}")
        self.check(card)
        return self

    def check(self, card: ModelCard) -> None:
        """Raises InvalidRequest for the first field out of range."""
        _check_prompt("prompt", self.prompt)
        if not self.prompt.strip():
            raise InvalidRequest("prompt", "must not be empty")
        _check_prompt("negative_prompt", self.negative_prompt)
        self._check_ranges()
        self._check_size(card)
        _check_choice("output_format", self.output_format, FORMATS)
        _check_choice("priority", self.priority, PRIORITIES)
        if self.task not in card.tasks:
            raise InvalidRequest("image", f"{card.name} does {', '.join(card.tasks)}, not {self.task}")
        if self.mask is not None:
            raise InvalidRequest("mask", f"{card.name} does not inpaint")
        if self.adapters:
            raise InvalidRequest("adapters", f"{card.name} takes no adapters")

    def _check_ranges(self) -> None:
        STEPS.check("steps", self.steps)
        GUIDANCE_SCALE.check("guidance_scale", self.guidance_scale)
        GUIDANCE_RESCALE.check("guidance_rescale", self.guidance_rescale)
        SEED.check("seed", self.seed)
        SAMPLES.check("samples", self.samples)
        CLIP_SKIP.check("clip_skip", self.clip_skip)
        DENOISE_STRENGTH.check("denoise_strength", self.denoise_strength)
        PREVIEW_EVERY.check("preview_every", self.preview_every)
        if self.deadline_s is not None:
            DEADLINE_S.check("deadline_s", self.deadline_s)

    def _check_size(self, card: ModelCard) -> None:
        for field, side in (("width", self.width), ("height", self.height)):
            SIDE.check(field, side)
            if side % SIDE_MULTIPLE:
                below = side - side % SIDE_MULTIPLE
                raise InvalidRequest(
                    field,
                    f"must be a multiple of {SIDE_MULTIPLE}, not {side}; {below} or {below + SIDE_MULTIPLE} would do",
                )
        if self.width * self.height > card.max_pixels:
            raise InvalidRequest(
                "width", f"{self.width}x{self.height} is beyond the {card.max_pixels} pixels that {card.name} allows"
            )


def _check_prompt(field: str, text: str) -> None:
    if len(text) > PROMPT_CHARACTERS:
        raise InvalidRequest(field, f"must have at most {PROMPT_CHARACTERS} characters, not {len(text)}")
    if "\0" in text or any("\ud800" <= c <= "\udfff" for c in text):
        raise InvalidRequest(field, "must not contain NUL or lone surrogate characters")


def _check_choice(field: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise InvalidRequest(field, f"must be one of {', '.join(allowed)}, not {value!r}")
