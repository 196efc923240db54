"""Upscaling families: what their models make of a picture, and of which requests. No torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from models.errors import InvalidRequest
from models.images import Picture
from models.limits import NOISE_LEVEL, SIDE

if TYPE_CHECKING:
    from models.request import EffectiveRequest


@dataclass(frozen=True, kw_only=True)
class Upscaling:
    """What becomes of a picture: each side `scale` times as long.

    `noise_level` is how much noise the picture gets before the network sees it, where a request does not say; None
    where it gets none ever. `defaults` are those of a model's card. A position of its latents stands for `factor`
    pixels a side of what becomes of it.
    """

    scale: int
    factor: int = 8
    noise_level: int | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)

    def enlarged(self, picture: Picture, max_pixels: int) -> tuple[int, int]:
        """(width, height) of what becomes of it. Raises InvalidRequest where that is too small or too large."""
        width, height = picture.width * self.scale, picture.height * self.scale
        if min(width, height) < SIDE.low or max(width, height) > SIDE.high or width * height > max_pixels:
            raise InvalidRequest(
                "image",
                f"{picture.width}x{picture.height} becomes {width}x{height}; "
                f"allowed are sides of {SIDE.low} to {SIDE.high} and {max_pixels} pixels in all",
            )
        return width, height

    def most(self, max_pixels: int) -> int:
        """The pixels that a picture may have so that what becomes of it has at most `max_pixels`."""
        return max_pixels // self.scale**2

    def check(self, request: "EffectiveRequest", max_pixels: int) -> None:
        """Raises InvalidRequest where there is no picture to enlarge, for a size or a noise level out of range, and
        for what such a model cannot do."""
        if request.image is None:
            raise InvalidRequest("image", f"is required: {request.model} makes pictures larger and does nothing else")
        self.enlarged(request.image, max_pixels)
        NOISE_LEVEL.check("noise_level", request.noise_level or 0)
        if request.noise_level and self.noise_level is None:
            raise InvalidRequest("noise_level", f"must be left out or 0: {request.model} puts no noise on pictures")
        without = {"controls": request.controls, "hires": request.hires, "deep_cache": request.deep_cache > 1}
        for name, said in without.items():
            if said:
                raise InvalidRequest(name, f"does not go with {request.model}, which makes pictures larger")


# The defaults are those of diffusers' pipelines; for x2 they are its documentation's, without guidance.
UPSCALING: Mapping[str, Upscaling] = {
    "sd_x2": Upscaling(scale=2, defaults={"steps": 20, "guidance_scale": 1.0, "sampler": "euler"}),
    "sd_x4": Upscaling(
        scale=4, factor=4, noise_level=20, defaults={"steps": 75, "guidance_scale": 9.0, "sampler": "ddim"}
    ),
}
