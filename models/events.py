"""What an engine says while it works: Progress, Finished, Failed. Nothing else ever comes out of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from models.errors import HeliographError
from models.images import ImageFormat
from models.prompt import PromptReport


@dataclass(frozen=True, kw_only=True)
class Progress:
    """A picture took part in a step.

    `step` of `steps` forwards are done. `forward` numbers the engine's forwards since it started and `rows` says how
    many rows shared the one just done, so a reader can see who joined and left when. `preview` is a small JPEG of the
    present estimate, where one was asked for.
    """

    index: int
    step: int
    steps: int
    forward: int
    rows: int
    preview: bytes | None = None


@dataclass(frozen=True, kw_only=True)
class Timings:
    """Seconds a picture spent in each stage: waiting, text and picture encoding, denoising, decoding and packing, and
    enlarging, its wait for the upscaler included; None where it was not enlarged."""

    queued_s: float
    encode_s: float
    denoise_s: float
    decode_s: float
    upscale_s: float | None = None


@dataclass(frozen=True, kw_only=True)
class Finished:
    """Picture `index` of the request, encoded in the format asked for; `prompts` tells how each was read.

    `stop_at_step` is the step at which somebody had it end before its time, None where it ended as the request says.
    """

    index: int
    seed: int
    data: bytes
    format: ImageFormat
    width: int
    height: int
    revision: str
    timings: Timings
    prompts: Mapping[str, PromptReport] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    stop_at_step: int | None = None


@dataclass(frozen=True, kw_only=True)
class Failed:
    """The request ends without (all of) its pictures; nothing of it follows."""

    error: HeliographError


Event = Progress | Finished | Failed
