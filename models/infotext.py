"""Infotext: what AUTOMATIC1111's web UI writes into pictures, read by everything around it. No torch.

Three parts: the prompt, `Negative prompt: ` and that, and one line of settings, `Steps: 20, Sampler: Euler a, ...`. A
setting with a comma, a colon or a newline in it is quoted as JSON. Fields go by the names of models/request.py.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from models.errors import InvalidRequest
from models.samplers import SAMPLERS, SCHEDULE_LABELS, check_pair, find_sampler, find_schedule

_NEGATIVE = "Negative prompt:"
_SETTING = re.compile(r'(?P<name>\w[\w /-]{0,60}+):\s*(?P<value>"(?:[^"\\]|\\.)*"|[^,]*)(?:,|$)')
_FEWEST = 3  # settings in a line that is one of settings
_LONGEST = 100_000  # characters, several times what two prompts may have
_NUMBERS = {
    "Steps": "steps",
    "CFG scale": "guidance_scale",
    "Seed": "seed",
    "Variation seed": "variation_seed",
    "Variation seed strength": "variation_strength",
    "Mask blur": "mask_blur",
    "Masked area padding": "mask_padding",
}
_WHOLE = ("Steps", "Seed", "Variation seed", "Masked area padding")
_WORDS = {
    "Inpaint area": ("mask_region", {"Whole picture": "whole", "Only masked": "masked"}),
    "Masked content": (
        "mask_fill",
        {"original": "original", "fill": "fill", "latent noise": "noise", "latent nothing": "nothing"},
    ),
}
_UPSCALERS = {"Latent": "latent", "Lanczos": "lanczos"}
# What `Automatic` means to A1111 for these samplers; for the others it is the model's own spacing.
_AUTOMATIC = {"dpmpp_2m": "karras", "dpmpp_2m_sde": "exponential", "dpm2": "karras", "dpm2_a": "karras"}


@dataclass(frozen=True, kw_only=True)
class Infotext:
    """The three parts, taken apart."""

    prompt: str
    negative_prompt: str
    settings: Mapping[str, str]


def compose(values: Mapping[str, Any], revision: str) -> str:
    """The infotext of a request, given by its fields' names and plain values; fields that are not there count as unset.

    It is for people and for other programs: guidance rescale, for one, has no place in it.
    """
    loras = "".join(f"<lora:{use['name']}:{use['weight']:g}>" for use in values.get("adapters") or ())
    parts = [" ".join(filter(None, (values["prompt"], loras)))]
    if values["negative_prompt"]:
        parts.append(f"{_NEGATIVE} {values['negative_prompt']}")
    settings = _settings(values, revision)
    return "\n".join([*parts, ", ".join(f"{name}: {_quoted(str(value))}" for name, value in settings.items())])


def parse(text: str) -> Infotext | None:
    """None for what A1111 would not have written: a text without a line of settings, or an absurdly long one.

    Where a prompt has a line that begins with `Negative prompt:`, the text itself cannot tell the two apart.
    """
    lines = text.strip().split("\n") if len(text) <= _LONGEST else []
    at = _settings_line(lines)
    if at is None:
        return None
    negative = next((i for i, line in enumerate(lines[:at]) if line.lstrip().startswith(_NEGATIVE)), at)
    settings = {match["name"]: _unquoted(match["value"].strip()) for match in _SETTING.finditer(lines[at])}
    return Infotext(
        prompt="\n".join(lines[:negative]).strip(),
        negative_prompt="\n".join(lines[negative:at]).strip().removeprefix(_NEGATIVE).strip(),
        settings=settings,
    )


def fields(infotext: Infotext) -> tuple[dict[str, Any], list[str]]:
    """The fields of a request that an infotext tells, and what could not be taken over, one sentence each."""
    values: dict[str, Any] = {"prompt": infotext.prompt}
    if infotext.negative_prompt:
        values["negative_prompt"] = infotext.negative_prompt
    if "Model" in infotext.settings:
        values["model"] = infotext.settings["Model"]
    left: list[str] = []
    for name, value in infotext.settings.items():
        try:
            values |= _field(name, value, infotext.settings)
        except (ValueError, KeyError, InvalidRequest) as unknown:
            reason = unknown.message if isinstance(unknown, InvalidRequest) else "there is nothing like it here"
            left.append(f"`{name}: {value[:100]}` is left out: {reason}")
    return values, left


def _settings(values: Mapping[str, Any], revision: str) -> dict[str, Any]:
    """In A1111's order, which some readers count on."""
    hires, mask = values.get("hires"), values.get("mask")
    settings: dict[str, Any] = {
        "Steps": values["steps"],
        "Sampler": SAMPLERS[values["sampler"]].label,
        "Schedule type": SCHEDULE_LABELS[values["schedule"]],
        "CFG scale": values["guidance_scale"],
        "Seed": values["seed"],
        "Size": f"{values['width']}x{values['height']}",
        "Model hash": revision[:10],
        "Model": values["model"],
    }
    if values.get("variation_strength"):
        settings["Variation seed"] = values["variation_seed"]
        settings["Variation seed strength"] = values["variation_strength"]
    strength = hires["denoise_strength"] if hires else values.get("image") and values["denoise_strength"]
    if strength is not None:
        settings["Denoising strength"] = strength
    if values["clip_skip"]:
        settings["Clip skip"] = values["clip_skip"] + 1  # A1111 counts the layer that is used: 1 is the last
    if mask:
        settings |= _mask_settings(values)
    if hires:
        upscaler = next(label for label, name in _UPSCALERS.items() if name == hires["upscaler"])
        settings |= {"Hires upscale": hires["scale"], "Hires steps": hires["steps"], "Hires upscaler": upscaler}
    return {name: value for name, value in settings.items() if value is not None and value != ""}


def _mask_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    settings: dict[str, Any] = {"Mask blur": values["mask_blur"]}
    for name, (field, words) in _WORDS.items():
        settings[name] = next(word for word, meaning in words.items() if meaning == values[field])
    if values["mask_region"] == "masked":
        settings["Masked area padding"] = values["mask_padding"]
    return settings


def _settings_line(lines: list[str]) -> int | None:
    """The last line of settings; extensions of A1111 write lines of their own below it."""
    steps = [
        i
        for i, line in enumerate(lines)
        if line.lstrip().startswith("Steps:") and len(_SETTING.findall(line)) >= _FEWEST
    ]
    return steps[-1] if steps else None


def _field(name: str, value: str, settings: Mapping[str, str]) -> dict[str, Any]:
    """What one setting means. Raises ValueError, KeyError or InvalidRequest where it means nothing here."""
    if name in _NUMBERS:
        return {_NUMBERS[name]: _whole(value) if name in _WHOLE else _number(value)}
    if name in _WORDS:
        field, words = _WORDS[name]
        return {field: words[value]}
    match name:
        case "Sampler":  # before A1111 1.9 it named the schedule too, and none meant the model's own spacing
            sampler, schedule = find_sampler(value)
            return {"sampler": sampler} | ({} if "Schedule type" in settings else {"schedule": schedule or "default"})
        case "Schedule type":
            return {"schedule": _schedule(value, settings)}
        case "Size":
            width, height = value.split("x")
            return {"width": _whole(width), "height": _whole(height)}
        case "Clip skip":
            return {"clip_skip": _whole(value) - 1}
        case "Denoising strength":
            return {} if "Hires upscale" in settings else {"denoise_strength": _number(value)}
        case "Hires upscale":
            return {"hires": _hires(settings)}
        case "Model" | "Model hash" | "Version" | "Hires steps" | "Hires upscaler":
            return {}  # told already, or only for the record
    raise KeyError(name)


def _schedule(label: str, settings: Mapping[str, str]) -> str:
    sampler, named = find_sampler(settings["Sampler"])
    automatic = named or _AUTOMATIC.get(sampler, "default")
    schedule = automatic if label == "Automatic" else find_schedule(label)
    check_pair(sampler, schedule)
    return schedule


def _hires(settings: Mapping[str, str]) -> dict[str, Any]:
    hires: dict[str, Any] = {"scale": _number(settings["Hires upscale"])}
    if settings.get("Hires steps", "0") != "0":  # 0 is A1111's word for: as many as before
        hires["steps"] = _whole(settings["Hires steps"])
    if "Denoising strength" in settings:
        hires["denoise_strength"] = _number(settings["Denoising strength"])
    if "Hires upscaler" in settings:
        hires["upscaler"] = _UPSCALERS[settings["Hires upscaler"]]
    return hires


def _whole(text: str) -> int:
    value = int(text)
    if abs(value) >= 2**63:
        raise ValueError(text)
    return value


def _number(text: str) -> float:
    if text.isdecimal():
        return _whole(text)
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(text)
    return value


def _quoted(value: str) -> str:
    return orjson.dumps(value).decode() if re.search("[,:\n]", value) else value


def _unquoted(value: str) -> str:
    if not value.startswith('"'):
        return value
    try:
        return str(orjson.loads(value))
    except orjson.JSONDecodeError:
        return value
