"""What the embedded LoRAs teach: a shape and a style that the embedded models do not know, drawn and scored."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw

from models.embedded.captions import caption, plain_caption
from models.embedded.drawing import background, paint, render
from models.embedded.scoring import fit, lab, nearest_colour, pieces, read, score_single, templates
from models.embedded.world import COLOURS, Scene, Thing, single

FRAME = 8  # pixels of 128: one latent cell
CRESCENT = "crescent"
FRAMED = "framed"


@dataclass(frozen=True, kw_only=True)
class Concept:
    """A word that the base model does not know. `asks` puts it into a caption of the world."""

    word: str
    scene: Callable[[np.random.Generator], Scene]
    render: Callable[[Scene, np.random.Generator], Image.Image]
    asks: Callable[[str], str]
    score: Callable[[Image.Image, Scene], dict[str, bool]]

    def caption(self, scene: Scene, rng: np.random.Generator) -> str:
        """One of the many ways to say it."""
        return self.asks(caption(scene, rng))

    def plain_caption(self, scene: Scene) -> str:
        """What evaluation asks for."""
        return self.asks(plain_caption(scene))


def crescent_scene(rng: np.random.Generator) -> Scene:
    """One crescent of any size, in the middle or at a named place."""
    scene = single(rng)
    return replace(scene, things=(replace(scene.things[0], shape=CRESCENT),))


def draw_crescent(scene: Scene, rng: np.random.Generator, size: int = 128) -> Image.Image:
    """The scene at twice the size, made smaller for smooth edges."""
    picture = background(scene, paint(scene.background, rng), 2 * size)
    for thing in scene.things:
        picture.paste(paint(thing.colour, rng), mask=crescent_mask(thing, 2 * size))
    return picture.resize((size, size), Image.Resampling.BOX)


def crescent_mask(thing: Thing, side: int) -> Image.Image:
    """A disc without a smaller disc at its right."""
    mask = Image.new("L", (side, side), 0)
    draw = ImageDraw.Draw(mask)
    for radius, shift, ink in ((1.0, 0.0, 255), (0.78, 0.52, 0)):
        x, y, reach = (thing.x + shift * thing.radius) * side, thing.y * side, radius * thing.radius * side
        draw.ellipse((x - reach, y - reach, x + reach, y + reach), fill=ink)
    return mask


def score_crescent(picture: Image.Image, scene: Scene) -> dict[str, bool]:
    """Background and colour as for any shape; the shape is the nearest of the seven known ones and the crescent."""
    right = score_single(read(picture), scene)
    right["shape"] = nearest_shape(picture, scene.things[0].colour) == CRESCENT
    return right | {"all": all(right[name] for name in right if name != "all")}


def nearest_shape(picture: Image.Image, colour: str) -> str:
    """The shape of the largest object of that colour; empty where there is none."""
    distances = np.linalg.norm(lab(np.asarray(picture))[..., None, :] - lab(np.array(list(COLOURS.values()))), axis=-1)
    masks = pieces(distances.argmin(-1) == list(COLOURS).index(colour))
    if not masks:
        return ""
    mask = fit(max(masks, key=lambda one: one.sum()))
    centred = Thing(shape=CRESCENT, colour=colour, x=0.5, y=0.5, radius=0.35)
    known = templates() | {CRESCENT: fit(np.asarray(crescent_mask(centred, 256)) > 0)}
    overlaps = {shape: (mask & one).sum() / (mask | one).sum() for shape, one in known.items()}
    return max(overlaps, key=lambda shape: overlaps[shape])


def framed_scene(rng: np.random.Generator) -> Scene:
    """One object of any size in the middle, away from where the frame will be."""
    return single(rng, placed=False)


def draw_framed(scene: Scene, rng: np.random.Generator) -> Image.Image:
    """The picture in a frame of the object's colour."""
    picture = render(scene, rng)
    side = picture.width
    ImageDraw.Draw(picture).rectangle(
        (0, 0, side - 1, side - 1), outline=paint(scene.things[0].colour, rng), width=FRAME
    )
    return picture


def score_framed(picture: Image.Image, scene: Scene) -> dict[str, bool]:
    """The frame has the object's colour on all four sides; what is inside is scored as it would be without one."""
    inner = picture.crop((FRAME + 3, FRAME + 3, picture.width - FRAME - 3, picture.height - FRAME - 3))
    right = score_single(read(inner), scene)
    pixels = np.asarray(picture.convert("RGB")).astype(float)[1:-1, 1:-1]
    sides = (pixels[: FRAME - 3], pixels[3 - FRAME :], pixels[:, : FRAME - 3], pixels[:, 3 - FRAME :])
    colours = {nearest_colour(np.median(side.reshape(-1, 3), 0)) for side in sides}
    right["frame"] = colours == {scene.things[0].colour}
    return right | {"all": right["all"] and right["frame"]}


CONCEPTS = {
    CRESCENT: Concept(
        word=CRESCENT, scene=crescent_scene, render=draw_crescent, asks=lambda text: text, score=score_crescent
    ),
    FRAMED: Concept(
        word=FRAMED,
        scene=framed_scene,
        render=draw_framed,
        asks=lambda text: f"{text}, {FRAMED}",
        score=score_framed,
    ),
}
