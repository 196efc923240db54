"""What clients may send: the wire models, which say what a field is called and means; `resolve` checks its range."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, WithJsonSchema
from pydantic_core import PydanticCustomError

from app import links
from app.jobs.job import WebhookEvent
from models import limits
from models.limits import Range
from models.parts import Enlargement
from models.request import MaskFill, MaskRegion, Metadata, Priority, PromptSyntax
from models.samplers import SAMPLERS

STREAM_PREVIEW_EVERY = 5
VARIATIONS = 4  # pictures, unless said
OutputFormat = Literal["png", "jpeg", "jpg", "webp", "avif"]


def _encoded(value: Any) -> str | bytes:
    if isinstance(value, bytes):
        return value
    if isinstance(value, str):
        return links.link_or_text(value)
    raise PydanticCustomError("picture", "must be a picture: base64, a data URI or an http(s) address")


# A picture: base64, a data URI or a Link, or in a form the file itself.
Encoded = Annotated[str | bytes, PlainValidator(_encoded), WithJsonSchema({"type": "string"})]


def _asynchronous(value: Any) -> bool | str:
    if isinstance(value, bool) or value == "when_cold":
        return value
    raise PydanticCustomError("asynchronous", "must be true, false or when_cold")


Asynchronous = Annotated[
    bool | Literal["when_cold"],
    PlainValidator(_asynchronous),
    WithJsonSchema({"anyOf": [{"type": "boolean"}, {"const": "when_cold"}]}),
]


def within(range: Range, description: str, default: Any = None) -> Any:
    """A number's range for the documentation; `resolve` is what checks it."""
    bounds: dict[str, Any] = {"minimum": range.low, "maximum": range.high}
    return Field(default, description=description, json_schema_extra=bounds)


class Wire(BaseModel):
    """Takes each value for what it is, and no field that it does not know."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Delivered(Wire):
    """How the answer comes: at once, or as a job that is asked about and told of."""

    asynchronous: Asynchronous = Field(
        False,
        alias="async",
        description="Answer 202 with a job at once, and make the pictures whatever happens; "
        "when_cold does so where the model sleeps or loads, and else answers as usual",
    )
    webhook_url: str | None = Field(None, max_length=2048, description="Where the job's events are posted")
    webhook_events: list[WebhookEvent] | None = Field(
        None, min_length=1, description="Which: start, output, logs, completed; completed when left out"
    )
    response: Literal["base64", "url"] | None = Field(
        None, description="Pictures in the JSON itself, or by address; a job's by address when left out, others' not"
    )
    cache: bool = Field(True, description="Whether pictures of the very same request may be given again; needs a seed")


class Borders(Wire):
    """By how many pixels the picture grows on each side."""

    left: int | None = within(limits.BORDER, "Pixels; 0 when left out")
    right: int | None = within(limits.BORDER, "Pixels; 0 when left out")
    top: int | None = within(limits.BORDER, "Pixels; 0 when left out")
    bottom: int | None = within(limits.BORDER, "Pixels; 0 when left out")


class HiresPart(Wire):
    """A second run at a larger size, which starts from what the first one drew."""

    scale: float | None = within(limits.HIRES_SCALE, "How much larger; 2 when left out")
    steps: int | None = within(limits.STEPS, "As many as the first run's when left out")
    denoise_strength: float | None = within(limits.DENOISE_STRENGTH, "1 draws anew; 0.7 when left out")
    upscaler: Enlargement | None = Field(None, description="How the first picture is enlarged; latent when left out")


class ControlPart(Wire):
    """A ControlNet and the picture that it is to follow."""

    name: str = Field(description="A name from GET /v1/adapters")
    image: Encoded = Field(description="The picture to follow: base64, a data URI or an http(s) address")
    weight: float | None = within(limits.CONTROL_WEIGHT, "How strongly; 1 when left out")
    start: float | None = within(limits.SHARE, "The share of the steps after which it begins; 0 when left out")
    end: float | None = within(limits.SHARE, "The share of the steps after which it ends; 1 when left out")
    preprocessor: str | None = Field(None, description="What makes the hint out of the picture; none where it is one")


class AdapterPart(Wire):
    """A LoRA and how strongly it is put on."""

    name: str = Field(description="A name from GET /v1/adapters")
    weight: float | None = within(limits.ADAPTER_WEIGHT, "How strongly; 1 when left out")


class UpscalePart(Wire):
    """Enlargement of the finished picture."""

    scale: float | None = within(limits.UPSCALE, "How much larger; 2 when left out")
    model: str | None = Field(None, description="An upscaler from GET /v1/adapters; the default one when left out")


class DrawBody(Delivered):
    """The fields that every endpoint which draws has in common. What is left out is decided by the model."""

    model: str | None = Field(None, description="A name from GET /v1/models; the default model when left out")
    prompt: str = Field("", description=f"At most {limits.PROMPT_CHARACTERS} characters")
    negative_prompt: str = Field("", description="What the picture should not show")
    prompt_syntax: PromptSyntax | None = Field(
        None, description="weighted (when left out) reads (x:1.2), BREAK and the like; plain takes them as they stand"
    )
    width: int | None = within(limits.SIDE, f"A multiple of {limits.SIDE_MULTIPLE}; the model's size when left out")
    height: int | None = within(limits.SIDE, f"A multiple of {limits.SIDE_MULTIPLE}; the model's size when left out")
    steps: int | None = within(limits.STEPS, "Denoising steps")
    guidance_scale: float | None = within(limits.GUIDANCE_SCALE, "How closely to follow the prompt; 1 is not at all")
    guidance_rescale: float | None = within(limits.GUIDANCE_RESCALE, "Against overexposure; 0 when left out")
    seed: int | None = within(limits.SEED, "Picture i is the picture of seed + i; random when left out")
    samples: int | None = within(limits.SAMPLES, "How many pictures; 1 when left out")
    variation_seed: int | None = within(limits.SEED, "Of the noise that is mixed in; picture i takes this + i")
    variation_strength: float | None = within(limits.VARIATION_STRENGTH, "How much of it; 0 when left out")
    sampler: str | None = Field(None, description=f"One of {', '.join(SAMPLERS)}, or a name people use elsewhere")
    schedule: str | None = Field(None, description="The sampler's spacing of noise levels")
    clip_skip: int | None = within(limits.CLIP_SKIP, "Layers of the text encoder left out from the end")
    deep_cache: int | None = within(limits.DEEP_CACHE, "The whole network runs in every n-th step; 1 is in all of them")
    image: Encoded | None = Field(
        None, description="PNG, JPEG, WebP or AVIF to start from: base64, a data URI or an http(s) address"
    )
    init_image: Encoded | None = Field(None, description="Another name of `image`")
    denoise_strength: float | None = within(limits.DENOISE_STRENGTH, "1 ignores `image`, 0 returns it")
    image_strength: float | None = within(limits.DENOISE_STRENGTH, "The other way round: 1 returns `image`")
    mask: Encoded | None = Field(None, description="White is drawn anew, black is kept; the size of `image`")
    mask_blur: int | None = within(limits.MASK_BLUR, "Pixels over which the mask's edge is softened; 4 when left out")
    mask_grow: int | None = within(limits.MASK_GROW, "Pixels by which the mask grows; 0 when left out")
    mask_fill: MaskFill | None = Field(None, description="What is under the mask at first; original when left out")
    mask_region: MaskRegion | None = Field(
        None, description="masked draws the masked part alone, at width x height; whole when left out"
    )
    mask_padding: int | None = within(limits.MASK_PADDING, "Pixels around the masked part; 32 when left out")
    paste_back: bool | None = Field(None, description="Keep what the mask keeps to the pixel; true when left out")
    noise_level: int | None = within(limits.NOISE_LEVEL, "Of an upscaling model: how much noise it puts on `image`")
    hires: HiresPart | None = Field(None, description="Draw it once more, larger")
    stop_at_step: int | None = within(limits.STOP_AT_STEP, "End there, with what that step has come to")
    controls: list[ControlPart] | None = Field(None, description="ControlNets")
    adapters: list[AdapterPart] | None = Field(None, description="LoRAs")
    upscale: UpscalePart | None = Field(None, description="Enlarge the finished picture")
    output_format: OutputFormat | None = Field(None, description="png when left out; jpg is jpeg")
    metadata: Metadata | None = Field(None, description="What the file tells of its making; none when left out")
    priority: Priority = Field("interactive", description="Batch work waits for interactive work")
    deadline_s: float | None = within(limits.DEADLINE_S, "Seconds after which the picture is of no use")
    stream: bool = Field(False, description="Answer with server-sent events: queued, progress, image, done or error")
    preview_every: int | None = within(
        limits.PREVIEW_EVERY, f"A preview in every n-th progress event, 0 for none; {STREAM_PREVIEW_EVERY} in a stream"
    )


class GenerateBody(DrawBody):
    """What to make. Only `prompt` is required; what is left out is decided by the model and told in the answer."""

    model_config = ConfigDict(
        json_schema_extra={"example": {"prompt": "a red circle on a blue background", "steps": 25, "seed": 7}}
    )

    prompt: str = Field(description=f"At most {limits.PROMPT_CHARACTERS} characters")
    outpaint: Borders | None = Field(None, description="By how many pixels `image` grows on each side")


class OutpaintBody(DrawBody, Borders):
    """A picture continued beyond its borders: `image` is required, and one border at least."""


class VariationsBody(DrawBody):
    """Pictures like one that is there: like `image`, or like the picture of `prompt` and `seed`."""

    samples: int | None = within(limits.SAMPLES, f"How many pictures; {VARIATIONS} when left out", VARIATIONS)
