"""The options of `heliograph generate`: a table with one for each field of a request, and the JSON body they make."""

import base64
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from models.errors import InvalidRequest

_SIDES = ("left", "right", "top", "bottom")


@dataclass(frozen=True)
class Option:
    """A field on the command line. None is not sent, and so is the model's default."""

    name: str
    kind: Any
    help: str = ""
    flags: tuple[str, ...] = ()

    def parameter(self, panel: str) -> inspect.Parameter:
        """As typer reads it from a command's signature."""
        option = typer.Option(*self.flags, help=self.help or None, rich_help_panel=panel)
        kind = Annotated[self.kind | None, option]
        return inspect.Parameter(self.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind)


PANELS: dict[str, tuple[Option, ...]] = {
    "What to draw": (
        Option("model", str, "One of `heliograph models list`."),
        Option("negative_prompt", str, "What it should not show.", ("--negative-prompt", "-n")),
        Option("prompt_syntax", str, "weighted reads (x:1.2) and the like; plain takes them as they stand."),
        Option("width", int),
        Option("height", int),
        Option("samples", int, "How many pictures."),
    ),
    "How to draw it": (
        Option("steps", int),
        Option("guidance_scale", float, "How closely to follow the prompt.", ("--guidance-scale", "-g")),
        Option("guidance_rescale", float, "Against overexposure."),
        Option("seed", int, "Picture i is the picture of seed + i.", ("--seed", "-s")),
        Option("variation_strength", float, "How much of another seed's noise is mixed in."),
        Option("variation_seed", int, "That other seed; picture i takes this + i."),
        Option("sampler", str, "Such as euler_a or 'DPM++ 2M Karras'; see `heliograph samplers`."),
        Option("schedule", str, "The sampler's spacing of noise levels."),
        Option("clip_skip", int, "Layers of the text encoder left out from the end."),
        Option("deep_cache", int, "The whole network runs in every n-th step: faster, and a little different."),
        Option("stop_at_step", int, "End there, with what that step has come to."),
    ),
    "From a picture": (
        Option("image", Path, "A picture to start from.", ("--image", "-i")),
        Option("denoise_strength", float, "1 ignores the picture, 0 returns it."),
        Option("mask", Path, "White is drawn anew, black is kept."),
        Option("mask_blur", int, "Pixels over which the mask's edge is softened."),
        Option("mask_grow", int, "Pixels by which the mask grows."),
        Option("mask_fill", str, "What is under the mask at first: original, fill, noise or nothing."),
        Option("mask_region", str, "whole, or masked: the masked part alone, at --width x --height."),
        Option("mask_padding", int, "Pixels around the masked part."),
        Option("paste_back", bool, "Keep what the mask keeps to the pixel.", ("--paste-back/--no-paste-back",)),
        Option("outpaint", str, "Pixels by which it grows: LEFT,RIGHT,TOP,BOTTOM."),
    ),
    "Larger": (
        Option("noise_level", int, "How much noise an upscaling model puts on the picture."),
        Option("hires", float, "Draw it once more, this many times as large."),
        Option("hires_steps", int),
        Option("hires_denoise_strength", float),
        Option("hires_upscaler", str, "What enlarges in between: latent or lanczos."),
        Option("upscale", float, "Enlarge the finished picture this many times."),
        Option("upscaler", str, "What enlarges it; one of `heliograph adapters`."),
    ),
    "More networks": (
        Option("lora", list[str], "NAME[:WEIGHT], of `heliograph adapters`. May be repeated."),
        Option("control", list[str], "NAME:PICTURE[:WEIGHT], a ControlNet and what it follows. May be repeated."),
        Option("preprocessor", str, "What makes the hints out of the pictures of --control, such as canny."),
    ),
    "The answer": (
        Option("metadata", str, "What the file tells of its making: full, minimal or none."),
        Option("priority", str, "interactive or batch."),
        Option("deadline_s", float, "Seconds after which the picture is of no use.", ("--deadline",)),
        Option("cache", bool, "Take what a server has drawn before for the same request.", ("--cache/--no-cache",)),
    ),
}
# Options that are no field by themselves but a part of one: the field, and the part's name.
_PARTS = {
    "hires": ("hires", "scale"),
    "hires_steps": ("hires", "steps"),
    "hires_denoise_strength": ("hires", "denoise_strength"),
    "hires_upscaler": ("hires", "upscaler"),
    "upscale": ("upscale", "scale"),
    "upscaler": ("upscale", "model"),
}


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """Puts the table in the place of a command's `**options`, where typer looks: in its signature."""
    signature = inspect.signature(command)
    own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    table = [option.parameter(panel) for panel, options in PANELS.items() for option in options]
    first = [p for p in own if p.default is inspect.Parameter.empty]
    last = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own if p not in first]
    parameters = [*first, *table, *last]
    command.__signature__ = signature.replace(parameters=parameters)  # pyright: ignore[reportFunctionMemberAccess]
    return command


def to_body(options: dict[str, Any]) -> dict[str, Any]:
    """The JSON body of what was given. Raises InvalidRequest naming the option."""
    given = {name: value for name, value in options.items() if value is not None and value != []}
    body = {name: value for name, value in given.items() if name not in {*_PARTS, "lora", "control", "preprocessor"}}
    for name, (field, part) in _PARTS.items():
        if name in given:
            body.setdefault(field, {})[part] = given[name]
    body |= {name: _encoded(name, given[name]) for name in ("image", "mask") if name in given}
    if "outpaint" in given:
        body["outpaint"] = _borders(given["outpaint"])
    if "lora" in given:
        body["adapters"] = [_weighted(*_split_weight(text)) for text in given["lora"]]
    if "control" in given:
        body["controls"] = [_control(text, given.get("preprocessor")) for text in given["control"]]
    elif "preprocessor" in given:
        raise InvalidRequest("preprocessor", "needs a --control")
    return body


def _encoded(option: str, picture: Path | str) -> str:
    return base64.b64encode(read_picture(option, picture)).decode()


def read_picture(option: str, picture: Path | str) -> bytes:
    """The file's bytes. Raises InvalidRequest naming the option."""
    try:
        return Path(picture).read_bytes()
    except OSError as unreadable:
        raise InvalidRequest(option, f"cannot read {picture}: {unreadable.strerror}") from unreadable


def _borders(text: str) -> dict[str, int]:
    numbers = text.split(",")
    if len(numbers) != len(_SIDES) or not all(number.strip().isdecimal() for number in numbers):
        raise InvalidRequest("outpaint", f"must be LEFT,RIGHT,TOP,BOTTOM in pixels, not {text!r}")
    return {side: int(number) for side, number in zip(_SIDES, numbers, strict=True)}


def _control(text: str, preprocessor: str | None) -> dict[str, Any]:
    name, _, rest = text.partition(":")
    picture, weight = _split_weight(rest)
    if not name or not picture:
        raise InvalidRequest("control", f"must be NAME:PICTURE or NAME:PICTURE:WEIGHT, not {text!r}")
    control = _weighted(name, weight) | {"image": _encoded("control", picture)}
    return control if preprocessor is None else control | {"preprocessor": preprocessor}


def _weighted(name: str, weight: float | None) -> dict[str, Any]:
    return {"name": name} if weight is None else {"name": name, "weight": weight}


def _split_weight(text: str) -> tuple[str, float | None]:
    """What stands before a last `:` with a number behind it, and the number."""
    name, colon, weight = text.rpartition(":")
    try:
        return (name, float(weight)) if colon else (text, None)
    except ValueError:
        return text, None
