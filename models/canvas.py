"""Canvases: which part of a picture is drawn anew, at which size, and how it goes back into the picture. No torch."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFilter
from scipy import ndimage

from models.errors import InvalidRequest
from models.images import Picture
from models.limits import SIDE_MULTIPLE
from models.parts import Outpaint
from models.request import EffectiveRequest

WHITE = 128  # of 255: from here on a mask's pixel counts as white where there is nothing between white and black
_LANCZOS = Image.Resampling.LANCZOS
_MID_GREY = 127.5
_SMOOTHNESS = 16  # pixels, two latents: what outpainting starts from has colours and no lines


class Box(NamedTuple):
    """A rectangle of pixels; right and bottom are the first ones outside."""

    left: int
    top: int
    right: int
    bottom: int

    @property
    def size(self) -> tuple[int, int]:
        return self.right - self.left, self.bottom - self.top

    @property
    def pixels(self) -> tuple[slice, slice]:
        """The rectangle in arrays (height, width, ...)."""
        return slice(self.top, self.bottom), slice(self.left, self.right)


@dataclass(frozen=True, eq=False, kw_only=True)
class Canvas:
    """What is drawn on, and what it is put back into.

    `picture` and its `mask` (h, w), uint8, white is drawn anew, have the size that is drawn. What comes of it covers
    `box` of the `base` (H, W, 3), uint8, which is the input picture, grown where it is outpainted: wholly where
    `cover` (H, W), uint8, is 255, not at all where it is 0. A `cropped` box keeps its proportions on the way.
    """

    picture: Picture
    mask: np.ndarray
    base: np.ndarray
    cover: np.ndarray
    box: Box
    cropped: bool

    def latent_mask(self, factor: int) -> np.ndarray:
        """The mask for latents, float32 (h / factor, w / factor), 0 or 1, sampled as diffusers samples it."""
        return (self.mask[::factor, ::factor] >= WHITE).astype(np.float32)

    def fitted(self, picture: Picture) -> Picture:
        """Another picture of what `base` shows, a ControlNet's, say: cut out and scaled as the canvas's own was.

        Equal to what diffusers' ControlNet inpainting pipelines make of their control image.
        """
        size = self.picture.width, self.picture.height
        if not self.cropped:
            return picture.resized(*size)
        height, width, _ = self.base.shape
        return Picture.from_array(_worked(picture.resized(width, height).array(), self.box, size, cropped=True))

    def paste(self, drawn: np.ndarray) -> np.ndarray:
        """The base with the drawn picture (h, w, 3) in it, uint8 (H, W, 3); equal to the base where cover is 0."""
        image = Image.fromarray(drawn)
        image = _filling(image, self.box.size) if self.cropped else image.resize(self.box.size, _LANCZOS)
        share = self.cover[self.box.pixels][..., None].astype(np.uint16)
        mixed = self.base[self.box.pixels] * (255 - share) + np.asarray(image) * share
        pasted = self.base.copy()
        pasted[self.box.pixels] = (mixed + 127) // 255
        return pasted


def plan(request: EffectiveRequest, image: Picture) -> Canvas:
    """The canvas for a picture with a mask, with borders to outpaint, or with both.

    The mask grows by `mask_grow` pixels on every side and is then blurred by a Gaussian of `mask_blur` pixels, which
    reaches three times as far; both count in pixels of the input picture. What is outpainted is covered wholly.
    Raises InvalidRequest for a mask of another size than the picture, or with nothing to edit in it.
    """
    base, white, new = _grown(image, request.mask, request.outpaint or Outpaint())
    cover = np.maximum(_softened(white, request.mask_grow, request.mask_blur), new)
    if cover.max() < WHITE:
        raise _too_small(request)
    cropped, size = request.mask_region == "masked", (request.width, request.height)
    box = _region(cover, request.mask_padding, size) if cropped else Box(0, 0, base.shape[1], base.shape[0])
    picture, mask, outside = (_worked(whole, box, size, cropped) for whole in (base, cover, new))
    mask = np.maximum(mask, _cells(outside))
    picture = _continued(picture, outside)
    if request.mask_fill == "fill":
        picture = _spread(picture, np.where(outside > 0, 0, mask))
    canvas = Canvas(picture=Picture.from_array(picture), mask=mask, base=base, cover=cover, box=box, cropped=cropped)
    if not canvas.latent_mask(SIDE_MULTIPLE).any():
        raise _too_small(request)
    return canvas


def _too_small(request: EffectiveRequest) -> InvalidRequest:
    return InvalidRequest(
        "mask",
        f"nothing to edit: its white is too small to be drawn at {request.width}x{request.height} with mask_blur "
        f"{request.mask_blur}; let it grow with mask_grow, or draw it alone with mask_region `masked`",
    )


def _grown(image: Picture, mask: Picture | None, outpaint: Outpaint) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The picture (H, W, 3) with its borders drawn out, its mask (H, W), and what of it is new (H, W), all uint8."""
    margins = ((outpaint.top, outpaint.bottom), (outpaint.left, outpaint.right))
    new = np.pad(np.zeros((image.height, image.width), np.uint8), margins, constant_values=255)
    white = new if mask is None else np.maximum(new, np.pad(_brightness(mask, image), margins))
    return np.pad(image.array(), (*margins, (0, 0)), mode="edge"), white, new


def _brightness(mask: Picture, image: Picture) -> np.ndarray:
    """uint8 (height, width), the mask's, which has to be the picture's."""
    if (mask.width, mask.height) != (image.width, image.height):
        raise InvalidRequest(
            "mask", f"must be as large as the picture, {image.width}x{image.height}, not {mask.width}x{mask.height}"
        )
    white = np.asarray(Image.fromarray(mask.array()).convert("L"))
    if white.max() < WHITE:
        raise InvalidRequest("mask", f"nothing to edit: no pixel of it is white, which is {WHITE} of 255 and above")
    return white


def _worked(whole: np.ndarray, box: Box, size: tuple[int, int], cropped: bool) -> np.ndarray:
    """The box of a picture or a mask at the size that is drawn."""
    part = Image.fromarray(whole).crop(box)
    return np.array(_within(part, size) if cropped else part.resize(size, _LANCZOS))


def _softened(white: np.ndarray, grow: int, blur: int) -> np.ndarray:
    if grow:
        white = ndimage.maximum_filter(white, 2 * grow + 1)
    if blur:
        white = np.asarray(Image.fromarray(white).filter(ImageFilter.GaussianBlur(blur)))
    return white


def _region(cover: np.ndarray, padding: int, size: tuple[int, int]) -> Box:
    """The part of a picture around all that is covered, in the proportions of `size` as far as the picture reaches.

    Equal to diffusers' `VaeImageProcessor.get_crop_region`.
    """
    height, width = cover.shape
    columns, rows = np.flatnonzero(cover.any(0)), np.flatnonzero(cover.any(1))
    left, right = max(int(columns[0]) - padding, 0), min(int(columns[-1]) + 1 + padding, width)
    top, bottom = max(int(rows[0]) - padding, 0), min(int(rows[-1]) + 1 + padding, height)
    ratio = size[0] / size[1]
    if (right - left) / (bottom - top) > ratio:
        top, bottom = _lengthened(top, bottom, (right - left) / ratio, height)
    else:
        left, right = _lengthened(left, right, (bottom - top) * ratio, width)
    return Box(left, top, right, bottom)


def _lengthened(low: int, high: int, length: float, limit: int) -> tuple[int, int]:
    """The stretch low..high grown on both sides to a length, moved and if need be cut to lie in 0..limit."""
    missing = int(length - (high - low))
    low, high = low - missing // 2, high + missing - missing // 2
    beyond = max(high - limit, 0)
    low, high = low - beyond, high - beyond
    return max(low, 0), min(high - min(low, 0), limit)


def _within(part: Image.Image, size: tuple[int, int]) -> Image.Image:
    """A part of a picture scaled to lie within a size, in the middle; its edges are drawn out to the rest.

    Equal to diffusers' resize mode "fill".
    """
    width, height = size
    wide = part.width / part.height > width / height
    inner = (width, part.height * width // part.width) if wide else (part.width * height // part.height, height)
    scaled = part.resize((max(inner[0], 1), max(inner[1], 1)), _LANCZOS)
    left, top = width // 2 - scaled.width // 2, height // 2 - scaled.height // 2
    whole = Image.new(part.mode, size)
    whole.paste(scaled, (left, top))
    if left:
        whole.paste(scaled.resize((left, height), box=(0, 0, 0, height)), (0, 0))
        end = scaled.width
        whole.paste(scaled.resize((left, height), box=(end, 0, end, height)), (left + end, 0))
    elif top:
        whole.paste(scaled.resize((width, top), box=(0, 0, width, 0)), (0, 0))
        end = scaled.height
        whole.paste(scaled.resize((width, top), box=(0, end, width, end)), (0, top + end))
    return whole


def _filling(drawn: Image.Image, size: tuple[int, int]) -> Image.Image:
    """A drawn picture scaled to fill a size; what reaches beyond is cut off on both sides: the way back of `_within`.

    Equal to diffusers' resize mode "crop".
    """
    width, height = size
    wide = width / height > drawn.width / drawn.height
    outer = (width, drawn.height * width // drawn.width) if wide else (drawn.width * height // drawn.height, height)
    left, top = outer[0] // 2 - width // 2, outer[1] // 2 - height // 2
    return drawn.resize(outer, _LANCZOS).crop((left, top, left + width, top + height))


def _cells(outside: np.ndarray) -> np.ndarray:
    """Grown to whole latent positions, so that none of what is outpainted is kept by a position that is half old."""
    height, width = outside.shape
    blocks = outside.reshape(height // SIDE_MULTIPLE, SIDE_MULTIPLE, width // SIDE_MULTIPLE, SIDE_MULTIPLE)
    return blocks.max((1, 3)).repeat(SIDE_MULTIPLE, 0).repeat(SIDE_MULTIPLE, 1)


def _continued(picture: np.ndarray, outside: np.ndarray) -> np.ndarray:
    """The picture (h, w, 3) with what is outside it, 255 in (h, w), smoothed; its borders are drawn out already."""
    if not outside.any():
        return picture
    smooth = Image.fromarray(picture).filter(ImageFilter.GaussianBlur(_SMOOTHNESS))
    return np.where(outside[..., None] > 0, np.asarray(smooth), picture)


def _spread(picture: np.ndarray, hidden: np.ndarray) -> np.ndarray:
    """The picture (h, w, 3) with what is hidden, 255 in (h, w), filled from the colours around it; all uint8."""
    known = 1 - hidden.astype(np.float32)[..., None] / 255
    return np.rint(_filled(picture.astype(np.float32), known)).clip(0, 255).astype(np.uint8)


def _filled(colours: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Colours (h, w, 3), float32, where `known` (h, w, 1) is 1; where it is 0, those of ever larger surroundings.

    Pull and push (Gortler and others, The Lumigraph, 1996, 3.4): halve the picture, leaving out what is not known,
    until all of it is, and take from the halves what the whole lacks.
    """
    height, width, _ = colours.shape
    if known.min() == 1:
        return colours
    if height == width == 1:
        return known * colours + (1 - known) * _MID_GREY
    weights = _halved(known)
    means = _halved(known * colours) / np.maximum(weights, np.float32(1e-6))
    coarse = _filled(means, np.minimum(4 * weights, np.float32(1)))
    return known * colours + (1 - known) * _enlarged(coarse)[:height, :width]


def _halved(array: np.ndarray) -> np.ndarray:
    """Means over squares of two by two, (h, w, n) to half of it, rounded up; beyond the edges there is nothing."""
    return _by_channel(np.pad(array, ((0, len(array) % 2), (0, array.shape[1] % 2), (0, 0))), lambda c: c.reduce(2))


def _enlarged(array: np.ndarray) -> np.ndarray:
    """(h, w, n) at twice its height and width, interpolated bilinearly."""
    size = (2 * array.shape[1], 2 * array.shape[0])
    return _by_channel(array, lambda c: c.resize(size, Image.Resampling.BILINEAR))


def _by_channel(array: np.ndarray, change: Callable[[Image.Image], Image.Image]) -> np.ndarray:
    channels = [Image.fromarray(np.ascontiguousarray(channel)) for channel in np.moveaxis(array, 2, 0)]
    return np.stack([np.asarray(change(channel)) for channel in channels], 2)
