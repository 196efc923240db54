"""What a picture shows, by plain image processing: background, and each object's colour, shape and place."""

from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image
from scipy import ndimage

from models.embedded.drawing import silhouette
from models.embedded.world import COLOURS, SHAPES, Scene, Thing

OBJECT_CONTRAST = 16  # Lab distance from the background at which a pixel belongs to an object
SMALLEST_OBJECT = 0.008  # of the picture
TEMPLATE = 32  # pixels


@dataclass(frozen=True, kw_only=True)
class Found:
    """One object as the picture shows it; centre and area are fractions of the picture."""

    shape: str
    colour: str
    x: float
    y: float
    area: float


@dataclass(frozen=True, kw_only=True)
class Reading:
    """All that the scorer sees in one picture, the largest object first."""

    background: str
    objects: tuple[Found, ...]


def read(picture: Image.Image) -> Reading:
    """The background's colour is the border's median; objects are pieces of one colour that stand out from it.

    A pixel belongs to the colour it is nearest to, so a faint smear between two objects does not join them.
    """
    pixels = np.asarray(picture.convert("RGB")).astype(float)
    side = len(pixels)
    edge = side // 20
    rim = np.ones((side, side), bool)
    rim[edge:-edge, edge:-edge] = False
    ground = np.median(pixels[rim], 0)
    stands_out = np.linalg.norm(lab(pixels) - lab(ground), axis=-1) > OBJECT_CONTRAST
    distances = np.linalg.norm(lab(pixels)[..., None, :] - lab(np.array(list(COLOURS.values()))), axis=-1)
    nearest = np.where(stands_out, distances.argmin(-1), -1)
    masks = [mask for number in range(len(COLOURS)) for mask in pieces(nearest == number)]
    found = [describe(pixels, mask) for mask in masks]
    return Reading(background=nearest_colour(ground), objects=tuple(sorted(found, key=lambda one: -one.area)))


def pieces(mask: np.ndarray) -> list[np.ndarray]:
    """The connected pieces of a mask, but for blurred rims and specks."""
    numbers, count = ndimage.label(ndimage.binary_opening(mask))
    return [piece for piece in (numbers == i for i in range(1, count + 1)) if piece.mean() > SMALLEST_OBJECT]


def describe(pixels: np.ndarray, mask: np.ndarray) -> Found:
    """One object, given its mask; its colour is taken well inside, away from blurred edges."""
    core = ndimage.binary_erosion(mask, iterations=2)
    core = core if core.sum() > 20 else mask
    rows, columns = np.nonzero(mask)
    return Found(
        shape=nearest_shape(mask),
        colour=nearest_colour(np.median(pixels[core], 0)),
        x=(columns.min() + columns.max()) / 2 / len(mask),
        y=(rows.min() + rows.max()) / 2 / len(mask),
        area=float(mask.mean()),
    )


def lab(rgb: np.ndarray) -> np.ndarray:
    """CIE Lab (D65) of sRGB values from 0 to 255; the last axis holds the three channels."""
    value = np.asarray(rgb, float) / 255
    linear = np.where(value > 0.04045, ((value + 0.055) / 1.055) ** 2.4, value / 12.92)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = linear @ to_xyz.T / np.array([0.9505, 1.0, 1.089])
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    x, y, z = f[..., 0], f[..., 1], f[..., 2]
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -1)


def nearest_colour(rgb: np.ndarray) -> str:
    """The world's colour nearest in Lab."""
    palette = np.array(list(COLOURS.values()))
    return list(COLOURS)[int(np.linalg.norm(lab(palette) - lab(rgb), axis=1).argmin())]


def nearest_shape(mask: np.ndarray) -> str:
    """The world's shape whose template overlaps best (intersection over union), both fitted to their bounding box."""
    fitted = fit(mask)
    overlaps = {shape: (fitted & known).sum() / (fitted | known).sum() for shape, known in templates().items()}
    return max(overlaps, key=lambda shape: overlaps[shape])


@cache
def templates() -> dict[str, np.ndarray]:
    """Each shape's mask, fitted to its bounding box."""
    centred = {shape: Thing(shape=shape, colour="black", x=0.5, y=0.5, radius=0.35) for shape in SHAPES}
    return {shape: fit(np.asarray(silhouette(thing, 256)) > 0) for shape, thing in centred.items()}


def fit(mask: np.ndarray) -> np.ndarray:
    """The mask's bounding box, resized to TEMPLATE x TEMPLATE."""
    rows, columns = np.nonzero(mask)
    cut = mask[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    resized = Image.fromarray((cut * 255).astype(np.uint8)).resize((TEMPLATE, TEMPLATE), Image.Resampling.BILINEAR)
    return np.asarray(resized) > 127


def score(picture: Image.Image, scene: Scene) -> dict[str, bool]:
    """Right or wrong on each count that the scene's caption names."""
    reading = read(picture)
    if scene.relation:
        return score_pair(reading, scene)
    if len(scene.things) > 1:
        return score_count(reading, scene)
    return score_single(reading, scene)


def score_single(reading: Reading, scene: Scene) -> dict[str, bool]:
    """One object: place counts where the caption names one."""
    wanted = scene.things[0]
    seen = reading.objects[0] if reading.objects else None
    right = {
        "background": reading.background == scene.background,
        "colour": seen is not None and seen.colour == wanted.colour,
        "shape": seen is not None and seen.shape == wanted.shape,
    }
    if scene.place:
        right["place"] = seen is not None and max(abs(seen.x - wanted.x), abs(seen.y - wanted.y)) < 0.12
    return right | {"all": all(right.values())}


def score_pair(reading: Reading, scene: Scene) -> dict[str, bool]:
    """Two objects: both colours present, in the right relation, each of the right shape."""
    first, second = (
        next((found for found in reading.objects if found.colour == thing.colour), None) for thing in scene.things
    )
    right = {"background": reading.background == scene.background, "both colours": bool(first and second)}
    if first and second:
        right["relation"] = related(first, second, scene.relation)
        right["both shapes"] = (first.shape, second.shape) == tuple(thing.shape for thing in scene.things)
    else:
        right["relation"] = right["both shapes"] = False
    return right | {"all": all(right.values()) and len(reading.objects) == 2}


def related(first: Found, second: Found, relation: str) -> bool:
    """Whether the first object stands to the second as the relation says, by a tenth of the picture at least."""
    right, down = first.x - second.x, first.y - second.y
    return {
        "left of": right < -0.1,
        "right of": right > 0.1,
        "above": down < -0.1,
        "below": down > 0.1,
        "and": True,
    }[relation]


def score_count(reading: Reading, scene: Scene) -> dict[str, bool]:
    """Objects alike: exactly as many as asked for, all of the right colour and shape."""
    wanted, seen = scene.things[0], reading.objects
    right = {
        "background": reading.background == scene.background,
        "colour": bool(seen) and all(found.colour == wanted.colour for found in seen),
        "count": len(seen) == len(scene.things),
        "shape": bool(seen) and all(found.shape == wanted.shape for found in seen),
    }
    return right | {"all": all(right.values())}
