"""From a wire model to a GenerationRequest: pure functions, one for each endpoint that draws."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

from app import wire
from app.dialects.native.bodies import (
    STREAM_PREVIEW_EVERY,
    Delivered,
    DrawBody,
    GenerateBody,
    OutpaintBody,
    OutputFormat,
)
from models import limits
from models.decoding import check_together
from models.errors import InvalidRequest
from models.images import ImageFormat, Picture, alpha_mask
from models.parts import AdapterUse, ControlUse, Hires, Outpaint, Upscale
from models.request import GenerationRequest

VARIATION_STRENGTH = 0.2  # of a seed's noise: the same composition, other details
VARIATION_DENOISE_STRENGTH = 0.5  # of a picture: colours and places stay
_SIDES = ("left", "right", "top", "bottom")
_NOT_AS_IT_IS = {"stream", "init_image", "image_strength", *Delivered.model_fields, *_SIDES}
_PARTS: dict[str, Callable[..., Any]] = {"outpaint": Outpaint, "hires": Hires, "upscale": Upscale}


def to_request(body: DrawBody, default_model: str) -> GenerationRequest:
    """The request in canonical form.

    Raises InvalidRequest for a picture that cannot be read, for pictures that are too large together, and where two
    fields say the same thing.
    """
    limits.CONTROLS.check("controls", len(body.controls or ()))  # before any of their pictures is looked at
    values = body.model_dump(exclude=_NOT_AS_IT_IS, exclude_none=True)
    values["model"] = default_model if body.model is None else body.model
    values["output_format"] = canonical(body.output_format)
    values["preview_every"] = _preview_every(body)
    values["denoise_strength"] = _denoise_strength(body)
    pictures = _pictures(body)
    values["image"] = pictures.get("image") or pictures.get("init_image")
    values["mask"] = pictures.get("mask")
    values |= {name: part(**values[name]) for name, part in _PARTS.items() if name in values}
    values["adapters"] = tuple(AdapterUse(**use) for use in values.get("adapters", ()))
    uses = (use | {"image": pictures[_of_control(i)]} for i, use in enumerate(values.get("controls", ())))
    values["controls"] = tuple(ControlUse(**use) for use in uses)
    return GenerationRequest(**values)


def img2img(body: GenerateBody, default_model: str) -> GenerationRequest:
    """For /v1/img2img."""
    _required_image(body)
    return to_request(body, default_model)


def inpaint(body: GenerateBody, default_model: str) -> GenerationRequest:
    """For /v1/inpaint. Without a mask, what is transparent in the picture is drawn anew."""
    field, image = _required_image(body)
    request = to_request(body, default_model)
    if request.mask is not None:
        return request
    mask = alpha_mask(encoded_bytes(field, image), field)
    if mask is None:
        raise InvalidRequest("mask", f"is required, white where to draw anew, unless `{field}` is transparent there")
    return replace(request, mask=mask)


def outpaint(body: OutpaintBody, default_model: str) -> GenerationRequest:
    """For /v1/outpaint."""
    _required_image(body)
    borders = {side: getattr(body, side) or 0 for side in _SIDES}
    for side, pixels in borders.items():
        limits.BORDER.check(side, pixels)
    if not any(borders.values()):
        raise InvalidRequest("left", f"or another border must be above 0; they are: {', '.join(_SIDES)}")
    return replace(to_request(body, default_model), outpaint=Outpaint(**borders))


def variations(body: DrawBody, default_model: str) -> GenerationRequest:
    """For /v1/variations: a picture is denoised again, a prompt's picture gets a little of other noise."""
    request = to_request(body, default_model)
    if request.image is not None:
        strength = request.denoise_strength
        return replace(request, denoise_strength=VARIATION_DENOISE_STRENGTH if strength is None else strength)
    if request.seed is None:
        raise InvalidRequest("seed", "is required without `image`: the seed of the picture to vary")
    strength = body.variation_strength
    return replace(request, variation_strength=VARIATION_STRENGTH if strength is None else strength)


def canonical(format: OutputFormat | None) -> ImageFormat:
    return "jpeg" if format == "jpg" else cast(ImageFormat, format or "png")


def _preview_every(body: DrawBody) -> int:
    if body.preview_every is None:
        return STREAM_PREVIEW_EVERY if body.stream else 0
    if not body.stream:
        raise InvalidRequest("preview_every", 'needs "stream": true')
    return body.preview_every


def _denoise_strength(body: DrawBody) -> float | None:
    """`image_strength` says how closely to follow the picture, as in Stability's API: 1 is the picture itself."""
    if body.image_strength is None:
        return body.denoise_strength
    if body.denoise_strength is not None:
        raise InvalidRequest("image_strength", "is 1 - denoise_strength: give one of the two")
    if _image(body) is None:
        raise InvalidRequest("image_strength", "needs an input picture in `image`")
    limits.DENOISE_STRENGTH.check("image_strength", body.image_strength)
    return round(1.0 - body.image_strength, 9)


def _image(body: DrawBody) -> tuple[str, str | bytes] | None:
    """The input picture, after the name that it was given."""
    if body.image is not None and body.init_image is not None:
        raise InvalidRequest("init_image", "is another name of `image`: give one of the two")
    if body.image is not None:
        return "image", body.image
    return None if body.init_image is None else ("init_image", body.init_image)


def _required_image(body: DrawBody) -> tuple[str, str | bytes]:
    given = _image(body)
    if given is None:
        raise InvalidRequest("image", "is required")
    return given


def _pictures(body: DrawBody) -> dict[str, Picture]:
    """Every picture of a body by its field. What is transparent counts as white, and in a mask as kept."""
    image = _image(body)
    given = {} if image is None else dict([image])
    if body.mask is not None:
        given["mask"] = body.mask
    given |= {_of_control(i): use.image for i, use in enumerate(body.controls or ())}
    encoded = {field: encoded_bytes(field, picture) for field, picture in given.items()}
    check_together(encoded)
    return {
        field: Picture.from_bytes(picture, field, "black" if field == "mask" else "white")
        for field, picture in encoded.items()
    }


def _of_control(index: int) -> str:
    return f"controls.{index}.image"


def encoded_bytes(field: str, encoded: str | bytes) -> bytes:
    """A picture's bytes: as they came in a form, or out of base64. Raises InvalidRequest naming the field."""
    return encoded if isinstance(encoded, bytes) else wire.decode_base64(encoded, field)
