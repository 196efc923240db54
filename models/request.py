"""GenerationRequest: what to make, in canonical form. No torch.

A dialect builds a GenerationRequest in which None means "the model's default"; `resolve` decides everything once and
gives an EffectiveRequest, which is what engines run, answers report and receipts keep.
"""

import secrets
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

from models import limits
from models.card import ModelCard
from models.errors import InvalidRequest, NotFound
from models.images import FORMATS, ImageFormat, Picture
from models.parts import AdapterUse, ArmUse, ControlUse, Hires, Outpaint, Upscale
from models.prompt import extract_loras, parse
from models.samplers import check_pair, find_sampler, find_schedule

Priority = Literal["interactive", "batch"]
PRIORITIES: tuple[Priority, ...] = get_args(Priority)
PromptSyntax = Literal["weighted", "plain"]
PROMPT_SYNTAXES: tuple[PromptSyntax, ...] = get_args(PromptSyntax)
MaskFill = Literal["original", "fill", "noise", "nothing"]
MASK_FILLS: tuple[MaskFill, ...] = get_args(MaskFill)
MaskRegion = Literal["whole", "masked"]
MASK_REGIONS: tuple[MaskRegion, ...] = get_args(MaskRegion)
Metadata = Literal["full", "minimal", "none"]
METADATA: tuple[Metadata, ...] = get_args(Metadata)
Task = Literal["txt2img", "img2img", "inpaint", "upscale"]

_OF_A_MASK = ("mask_blur", "mask_grow", "mask_fill", "mask_padding", "paste_back")
_WITHOUT_ONE = "without which this model draws: its network takes the guidance scale as an input"
_STRENGTH: dict[Task, float] = {"txt2img": 1.0, "img2img": 0.75, "inpaint": 1.0, "upscale": 1.0}


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """What to make. None means: what the model does by default (for seeds: a fresh random one).

    Picture i of seed s is picture 0 of seed s + i; with a `variation_strength` above 0 the seed stays and
    `variation_seed` counts on instead. `prompt_syntax` "weighted" reads `(x:1.2)`, `BREAK`, `[a:b:0.5]` and the like,
    "plain" takes every character for what it is. `clip_skip` counts text-encoder layers left out from the end.

    The whole network runs in every `deep_cache`-th step, in the others its outermost layer alone (models.deep_cache).

    `denoise_strength` 1 ignores the input picture, 0 returns it through the autoencoder. White in `mask` is drawn anew;
    blur, grow and padding are in pixels; region "masked" draws the masked part alone, at the size asked for, and puts
    it back into the picture; `paste_back` keeps every pixel outside the mask exactly as it was. `noise_level` is how
    much noise an upscaling model puts on the picture that it makes larger. `stop_at_step` ends the work early, with the
    estimate that step has come to. `deadline_s` is how long the caller waits, counted from submission. `preview_every`
    asks for a preview in every n-th progress event, 0 for none. `experiments` says which arms it is drawn for,
    and changes nothing.
    """

    model: str
    prompt: str
    negative_prompt: str = ""
    prompt_syntax: PromptSyntax = "weighted"
    width: int | None = None
    height: int | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    guidance_rescale: float = 0.0
    seed: int | None = None
    samples: int = 1
    variation_seed: int | None = None
    variation_strength: float = 0.0
    sampler: str | None = None
    schedule: str | None = None
    clip_skip: int = 0
    deep_cache: int | None = None
    image: Picture | None = None
    denoise_strength: float | None = None
    mask: Picture | None = None
    mask_blur: int = 4
    mask_grow: int = 0
    mask_fill: MaskFill = "original"
    mask_region: MaskRegion = "whole"
    mask_padding: int = 32
    paste_back: bool = True
    outpaint: Outpaint | None = None
    noise_level: int | None = None
    hires: Hires | None = None
    stop_at_step: int | None = None
    controls: tuple[ControlUse, ...] = ()
    adapters: tuple[AdapterUse, ...] = ()
    upscale: Upscale | None = None
    output_format: ImageFormat = "png"
    metadata: Metadata = "none"
    priority: Priority = "interactive"
    deadline_s: float | None = None
    preview_every: int = 0
    experiments: tuple[ArmUse, ...] = ()

    @property
    def task(self) -> Task:
        if self.mask is not None or self.outpaint is not None:
            return "inpaint"
        if self.noise_level is not None:  # resolved, every request to an upscaling model has one
            return "upscale"
        return "txt2img" if self.image is None else "img2img"

    def resolve(self, card: ModelCard) -> "EffectiveRequest":
        """Decides every open parameter by the model's card and checks every range.

        Raises InvalidRequest (naming the field and what is allowed) and NotFound (another model's card).
        """
        _check_model(self.model, card)
        if card.upscaling and self.noise_level is None:
            return replace(self, noise_level=card.upscaling.noise_level or 0).resolve(card)
        sampler, schedule = self._sampling(card)
        width, height = self._size(card)
        values = {f.name: getattr(self, f.name) for f in fields(GenerationRequest)}
        values |= {"sampler": sampler, "schedule": schedule, "width": width, "height": height}
        values |= self._adapted()
        values["steps"] = steps = card.steps if self.steps is None else self.steps
        values["guidance_scale"] = card.guidance_scale if self.guidance_scale is None else self.guidance_scale
        values["deep_cache"] = card.deep_cache if self.deep_cache is None else self.deep_cache
        values["seed"] = secrets.randbelow(2**32) if self.seed is None else self.seed
        values["variation_seed"] = self._variation_seed()
        values["denoise_strength"] = self._strength(steps)
        values["guidance_input"] = card.guidance_input
        if self.hires is not None and self.hires.steps is None:
            values["hires"] = replace(self.hires, steps=steps)
        effective = EffectiveRequest(**values)
        effective.check(card)
        limits.check_takes_a_step("denoise_strength", effective.denoise_strength, steps)
        if effective.hires is not None and effective.hires.steps is not None:
            limits.check_takes_a_step("hires.denoise_strength", effective.hires.denoise_strength, effective.hires.steps)
        return effective

    @property
    def names_parts_of_a_model(self) -> bool:
        """Whether it names what fits one model and not another: LoRAs, in the prompt too, or ControlNets."""
        return bool(self.controls or self._adapted().get("adapters", self.adapters))

    def _adapted(self) -> dict[str, Any]:
        """The prompt without its LoRA tags, which are moved to the adapters."""
        if self.prompt_syntax == "plain":
            return {}
        prompt, tags = extract_loras(self.prompt)
        return {
            "prompt": prompt,
            "adapters": (*self.adapters, *(AdapterUse(name=name, weight=weight) for name, weight in tags)),
        }

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
        """What is drawn: the input picture's size, cut down to the next multiple, stands in for one not given.

        A picture that grows has the size it grows to, a masked region drawn alone the model's own.
        """
        if self.image is not None and card.upscaling:
            return self._grown(*card.upscaling.enlarged(self.image, card.max_pixels))
        if self.image is not None and self.outpaint is not None:
            return self._grown(*self.outpaint.grown(self.image.width, self.image.height))
        if self.image is not None and self.width is None and self.height is None and self.mask_region == "whole":
            width, height = self.image.width, self.image.height
            return width - width % limits.SIDE_MULTIPLE, height - height % limits.SIDE_MULTIPLE
        return card.width if self.width is None else self.width, card.height if self.height is None else self.height

    def _grown(self, width: int, height: int) -> tuple[int, int]:
        for field, asked, side in (("width", self.width, width), ("height", self.height, height)):
            if asked not in (None, side):
                raise InvalidRequest(field, f"must be left out or {side}, to which the picture grows")
        return width, height

    def _variation_seed(self) -> int | None:
        if not self.variation_strength or self.variation_seed is not None:
            return self.variation_seed
        return secrets.randbelow(2**32)

    def _strength(self, steps: int) -> float:
        if self.denoise_strength is not None and self.task in ("txt2img", "upscale"):
            raise InvalidRequest("denoise_strength", "needs an input picture in `image`, one to be drawn anew")
        filled = self.task == "inpaint" and self.mask_fill != "original"  # which from noise alone would not be seen
        default = max(_STRENGTH["img2img" if filled else self.task], limits.least_strength(steps))
        return default if self.denoise_strength is None else self.denoise_strength


@dataclass(frozen=True, kw_only=True)
class EffectiveRequest(GenerationRequest):
    """A request in which everything is decided and within range. Made by `resolve`; the defaults are placeholders.

    `guidance_input` is the card's, so that what a request costs can be told without one.
    """

    width: int = 0
    height: int = 0
    steps: int = 0
    guidance_scale: float = 0.0
    seed: int = 0
    sampler: str = ""
    schedule: str = ""
    deep_cache: int = 1
    denoise_strength: float = 1.0
    guidance_input: bool = False

    @property
    def guided(self) -> bool:
        """Whether each picture brings an unconditional row too (classifier-free guidance, arXiv:2207.12598)."""
        return self.guidance_scale > 1.0 and not self.guidance_input

    @property
    def largest(self) -> tuple[int, int]:
        """(width, height) of the largest picture that is denoised on the way."""
        if self.hires is None:
            return self.width, self.height
        return self.hires.enlarged(self.width), self.hires.enlarged(self.height)

    @property
    def delivered(self) -> tuple[int, int]:
        """(width, height) of each picture that comes of it, before an upscaler: what is drawn, or what it is put back
        into."""
        if self.image is None or self.task != "inpaint" or not self.paste_back:
            return self.largest
        return (self.outpaint or Outpaint()).grown(self.image.width, self.image.height)

    def sample(self, index: int) -> "EffectiveRequest":
        """The request for picture `index` alone."""
        if self.variation_strength and self.variation_seed is not None:
            return replace(self, variation_seed=self.variation_seed + index, samples=1)
        return replace(self, seed=self.seed + index, samples=1)

    def resolve(self, card: ModelCard) -> "EffectiveRequest":
        """Itself for this card, checked again: an engine takes requests that somebody else has resolved."""
        _check_model(self.model, card)
        same = self.guidance_input == card.guidance_input
        own = self if same else replace(self, guidance_input=card.guidance_input)
        own.check(card)
        return own

    def check(self, card: ModelCard) -> None:
        """Raises InvalidRequest for the first field that is out of range or does not go with another."""
        limits.check_text("prompt", self.prompt)
        if not self.prompt.strip() and self.image is None:
            raise InvalidRequest("prompt", "must not be empty without an input picture")
        limits.check_text("negative_prompt", self.negative_prompt)
        self._check_choices()
        parts = parse("prompt", self.prompt, self.prompt_syntax)
        parse("negative_prompt", self.negative_prompt, self.prompt_syntax)
        self._check_ranges()
        if self.guidance_input and len(parts) > 1:
            raise InvalidRequest("prompt", f"`AND` needs an unconditional row, {_WITHOUT_ONE}")
        self._check_company(unconditional=self.guided or len(parts) > 1)
        self._check_input(card)
        self._check_parts()
        self._check_size(card)

    def _check_choices(self) -> None:
        limits.check_choice("prompt_syntax", self.prompt_syntax, PROMPT_SYNTAXES)
        limits.check_choice("mask_fill", self.mask_fill, MASK_FILLS)
        limits.check_choice("mask_region", self.mask_region, MASK_REGIONS)
        limits.check_choice("output_format", self.output_format, FORMATS)
        limits.check_choice("metadata", self.metadata, METADATA)
        limits.check_choice("priority", self.priority, PRIORITIES)

    def _check_ranges(self) -> None:
        limits.STEPS.check("steps", self.steps)
        limits.GUIDANCE_SCALE.check("guidance_scale", self.guidance_scale)
        limits.GUIDANCE_RESCALE.check("guidance_rescale", self.guidance_rescale)
        limits.SEED.check("seed", self.seed)
        limits.SAMPLES.check("samples", self.samples)
        limits.VARIATION_STRENGTH.check("variation_strength", self.variation_strength)
        limits.CLIP_SKIP.check("clip_skip", self.clip_skip)
        limits.DEEP_CACHE.check("deep_cache", self.deep_cache)
        limits.DENOISE_STRENGTH.check("denoise_strength", self.denoise_strength)
        limits.MASK_BLUR.check("mask_blur", self.mask_blur)
        limits.MASK_GROW.check("mask_grow", self.mask_grow)
        limits.MASK_PADDING.check("mask_padding", self.mask_padding)
        limits.PREVIEW_EVERY.check("preview_every", self.preview_every)
        if self.variation_seed is not None:
            limits.SEED.check("variation_seed", self.variation_seed)
        if self.stop_at_step is not None:
            limits.STOP_AT_STEP.check("stop_at_step", self.stop_at_step)
        if self.deadline_s is not None:
            limits.DEADLINE_S.check("deadline_s", self.deadline_s)

    def _check_company(self, unconditional: bool) -> None:
        """Fields that say nothing without another one are not passed over in silence."""
        self._check_needs(self.variation_strength > 0, ("variation_seed",), "a `variation_strength` above 0")
        guidance = f"an unconditional row, {_WITHOUT_ONE}" if self.guidance_input else "a `guidance_scale` above 1"
        self._check_needs(unconditional, ("guidance_rescale",), guidance)
        self._check_needs(self.task == "inpaint", _OF_A_MASK, "a `mask`, or borders to `outpaint`")
        self._check_needs(self.mask_region == "masked", ("mask_padding",), "`mask_region` to be `masked`")
        self._check_needs(self.denoise_strength < 1, ("mask_fill",), "a `denoise_strength` below 1: at 1 noise is all")

    def _check_needs(self, met: bool, names: tuple[str, ...], what: str) -> None:
        for name in names:
            if not met and getattr(self, name) != getattr(GenerationRequest, name):
                raise InvalidRequest(name, f"needs {what}")

    def _check_input(self, card: ModelCard) -> None:
        """The input picture and what needs one."""
        for field in ("mask", "outpaint"):
            if getattr(self, field) is not None and self.image is None:
                raise InvalidRequest(field, "needs an input picture in `image`")
        if self.mask_region == "masked" and (self.mask is None or self.outpaint is not None):
            raise InvalidRequest("mask_region", "`masked` needs a mask, and no borders to outpaint")
        if self.task not in card.tasks:
            field = {"inpaint": "mask", "upscale": "noise_level"}.get(self.task, "image")
            raise InvalidRequest(field, f"{card.name} does {', '.join(card.tasks)}, not {self.task}")

    def _check_parts(self) -> None:
        limits.CONTROLS.check("controls", len(self.controls))
        limits.ADAPTERS.check("adapters", len(self.adapters))
        parts = {"outpaint": self.outpaint, "hires": self.hires, "upscale": self.upscale}
        for field, part in parts.items():
            if part is not None:
                part.check(field)
        for field, uses in (("controls", self.controls), ("adapters", self.adapters)):
            for i, use in enumerate(uses):
                use.check(f"{field}.{i}")
        names = [use.name for use in self.adapters]
        if len(set(names)) < len(names):
            raise InvalidRequest("adapters", f"the same name stands there twice: {', '.join(names)}")
        if self.hires is not None and self.task == "inpaint":
            raise InvalidRequest("hires", "does not go with a mask; draw the masked region larger instead")

    def _check_size(self, card: ModelCard) -> None:
        if card.upscaling:
            card.upscaling.check(self, card.max_pixels)
            return
        limits.check_side("width", self.width)
        limits.check_side("height", self.height)
        width, height = self.largest
        if width * height > card.max_pixels:
            field = "width" if self.hires is None else "hires.scale"
            raise InvalidRequest(
                field, f"{width}x{height} is beyond the {card.max_pixels} pixels that {card.name} allows"
            )


def _check_model(model: str, card: ModelCard) -> None:
    if model != card.name:
        raise NotFound(f"there is no model {model!r} here; this is {card.name!r}")


def warm_up_request(card: ModelCard, **options: Any) -> GenerationRequest:
    """The plainest request that a model takes: without a picture, or with a white one where it needs one."""
    scale = card.upscaling.scale if card.upscaling else 1
    width, height = card.width // scale, card.height // scale
    white = Picture(width=width, height=height, data=b"\xff" * (3 * width * height))
    if "txt2img" not in card.tasks:
        options |= {"image": white}
        options |= {"mask": white} if card.tasks == ("inpaint",) else {}
    return GenerationRequest(model=card.name, prompt="warm-up", seed=0, **options)
