"""ModelCard: what one model can do and what it does when nothing is said. Read from configuration alone, no torch."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.errors import InvalidRequest
from models.samplers import check_pair, find_sampler, find_schedule
from models.upscaling import UPSCALING, Upscaling

TASKS = ("txt2img", "img2img", "inpaint")
INPAINTING_CHANNELS = 9  # latents, mask and masked picture: a UNet that does nothing else
_LATENT_CONSISTENCY = {"steps": 4, "guidance_scale": 8.5, "sampler": "lcm"}  # of LatentConsistencyModelPipeline


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """A model's name, family, native size in pixels, limits and default parameters.

    `guidance_input` says that the network takes the guidance scale as an input and needs no unconditional row, as
    latent consistency models do (arXiv:2310.04378). The size of a model that makes pictures larger is that of its
    results; it has `upscaling` and no other task.
    """

    name: str
    family: str
    width: int
    height: int
    max_pixels: int
    steps: int = 25
    guidance_scale: float = 7.5
    sampler: str = "dpmpp_2m"
    schedule: str = "karras"
    guidance_input: bool = False
    deep_cache: int = 1
    tasks: tuple[str, ...] = TASKS
    upscaling: Upscaling | None = None

    @classmethod
    def read(cls, name: str, family: str, source: str, defaults: dict[str, Any] | None = None) -> "ModelCard":
        """The card of a model; the native size comes from `defaults` or from the source folder's own configuration.

        `defaults` may set any field of the card but name and family; `max_pixels` is four times the native area
        unless said. With `guidance_input` the others are those of diffusers' pipeline for such models. Raises
        InvalidRequest where the source is not a local diffusers folder and no width is given, and for tasks that are
        not the family's.
        """
        upscaling = UPSCALING.get(family)
        values = dict(defaults or {}) if upscaling is None else {**upscaling.defaults, **(defaults or {})}
        own = TASKS if upscaling is None else ("upscale",)
        if "width" not in values:
            values["width"] = _native_side(Path(source))
        values.setdefault("height", values["width"])
        unet = _unet(Path(source))
        if unet.get("in_channels") == INPAINTING_CHANNELS:
            values.setdefault("tasks", ("inpaint",))
        if upscaling is None:  # the latent upscaler's network has the same input for something else
            values.setdefault("guidance_input", unet.get("time_cond_proj_dim") is not None)
        if values.get("guidance_input"):
            values = {**_LATENT_CONSISTENCY, **values}
        values.setdefault("tasks", own)
        if not set(values["tasks"]) <= set(own):
            raise InvalidRequest("defaults.tasks", f"a model of the family {family} does {', '.join(own)}")
        values.setdefault("max_pixels", 4 * values["width"] * values["height"])
        if "sampler" in values:
            values["sampler"], schedule = find_sampler(values["sampler"])
            values.setdefault("schedule", schedule or "default")
        if "schedule" in values:
            values["schedule"] = find_schedule(values["schedule"])
        card = cls(name=name, family=family, upscaling=upscaling, **values)
        check_pair(card.sampler, card.schedule)
        return card


def _unet(folder: Path) -> dict[str, Any]:
    """The UNet's configuration, empty where the source is no local diffusers folder."""
    config = folder / "unet" / "config.json"
    return json.loads(config.read_text()) if config.is_file() else {}


def _native_side(folder: Path) -> int:
    """The side in pixels that the networks were trained at: latent side times the autoencoder's factor."""
    try:
        unet = json.loads((folder / "unet" / "config.json").read_text())
        vae = json.loads((folder / "vae" / "config.json").read_text())
    except FileNotFoundError as missing:
        raise InvalidRequest(
            "defaults.width", f"{folder} is not a local diffusers folder; say the model's native width"
        ) from missing
    return int(unet["sample_size"]) * 2 ** (len(vae["block_out_channels"]) - 1)
