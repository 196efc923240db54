"""Scenes drawn: as a picture, and as a small map of labels for the text encoders' lessons."""

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from models.embedded.world import COLOURS, SHAPES, Scene, Thing

Points = list[tuple[float, float]]
Paint = tuple[int, int, int]


def outline(shape: str, x: float, y: float, radius: float) -> Points:
    """The shape's corners around (x, y)."""
    turn = np.linspace(0, 2 * np.pi, 60)
    if shape == "square":
        points = [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)]
    elif shape == "triangle":
        points = [(0, -0.95), (1, 0.8), (-1, 0.8)]
    elif shape == "star":
        reach = np.where(np.arange(10) % 2 == 0, 1.08, 0.44)
        angles = -np.pi / 2 + np.arange(10) * np.pi / 5
        points = list(zip(reach * np.cos(angles), reach * np.sin(angles) + 0.08, strict=True))
    elif shape == "cross":
        quarter = [(0.34, -1), (0.34, -0.34), (1, -0.34)]
        points = [turned for k in range(4) for turned in (quarter_turn(point, k) for point in quarter)]
    elif shape == "heart":
        height = 13 * np.cos(turn) - 5 * np.cos(2 * turn) - 2 * np.cos(3 * turn) - np.cos(4 * turn)
        points = list(zip(1.05 * np.sin(turn) ** 3, -height / 16 - 0.1, strict=True))
    else:
        points = list(zip(np.cos(turn), np.sin(turn), strict=True))
    return [(x + radius * float(dx), y + radius * float(dy)) for dx, dy in points]


def quarter_turn(point: tuple[float, float], times: int) -> tuple[float, float]:
    """The point turned clockwise by 90 degrees, `times` times."""
    for _ in range(times):
        point = (-point[1], point[0])
    return point


def render(scene: Scene, rng: np.random.Generator, size: int = 128) -> Image.Image:
    """The scene as a picture of size x size pixels; colours differ a little from picture to picture."""
    side = 2 * size  # drawn at twice the size, for smooth edges
    ground = background(scene, paint(scene.background, rng), side)
    picture = ground.copy()
    for thing in scene.things:
        mask = silhouette(thing, side, line=side // 26 if scene.style == "outline" else 0)
        picture.paste(paint(thing.colour, rng), mask=mask)
    picture = picture.resize((size, size), Image.Resampling.BOX)
    return picture.filter(ImageFilter.GaussianBlur(size / 40)) if scene.style == "soft" else picture


def paint(colour: str, rng: np.random.Generator) -> Paint:
    """The colour with a little jitter."""
    red, green, blue = np.clip(np.array(COLOURS[colour]) + rng.integers(-7, 8, 3), 0, 255)
    return int(red), int(green), int(blue)


def background(scene: Scene, colour: Paint, side: int) -> Image.Image:
    """Plain, darker towards the bottom, or a pattern in two shades of the colour."""
    if scene.style == "gradient":
        shade = np.linspace(1.0, 0.45, side)[:, None, None]
        return Image.fromarray((np.full((side, side, 3), colour) * shade).astype(np.uint8))
    if not scene.pattern:
        return Image.new("RGB", (side, side), colour)
    y, x = np.mgrid[0:side, 0:side] / side
    if scene.pattern == "striped":
        other = (x * 5) % 1 < 0.5
    elif scene.pattern == "checkered":
        other = ((x * 5) % 1 < 0.5) ^ ((y * 5) % 1 < 0.5)
    else:
        other = ((x * 6) % 1 - 0.5) ** 2 + ((y * 6) % 1 - 0.5) ** 2 < 0.08
    pixels = np.where(other[..., None], second_shade(colour), colour)
    return Image.fromarray(pixels.astype(np.uint8))


def second_shade(colour: Paint) -> tuple[float, float, float]:
    """A lighter shade of a dark colour, a darker one of a light colour."""
    light = sum(colour) > 330
    red, green, blue = (part * 0.8 if light else part * 0.8 + 255 * 0.2 for part in colour)
    return red, green, blue


def silhouette(thing: Thing, side: int, *, line: int = 0) -> Image.Image:
    """The thing's mask; with a line's width in pixels, the mask of its outline only."""
    mask = Image.new("L", (side, side), 0)
    draw = ImageDraw.Draw(mask)
    points = outline(thing.shape, thing.x * side, thing.y * side, thing.radius * side)
    hole = outline("circle", thing.x * side, thing.y * side, thing.radius * side * 0.5)
    if line:
        for edge in (points, hole) if thing.shape == "ring" else (points,):
            draw.line(edge + edge[:2], fill=255, width=line, joint="curve")
        return mask
    draw.polygon(points, fill=255)
    if thing.shape == "ring":
        draw.polygon(hole, fill=0)
    return mask


def labels(scene: Scene, size: int = 16) -> np.ndarray:
    """(2, size, size) of uint8: each cell's colour, background's included, and its shape, 0 for none."""
    shape = Image.new("L", (size, size), 0)
    colour = Image.new("L", (size, size), list(COLOURS).index(scene.background))
    for thing in scene.things:
        points = outline(thing.shape, thing.x * size, thing.y * size, thing.radius * size)
        ImageDraw.Draw(shape).polygon(points, fill=1 + SHAPES.index(thing.shape))
        ImageDraw.Draw(colour).polygon(points, fill=list(COLOURS).index(thing.colour))
    return np.stack([np.asarray(colour), np.asarray(shape)])


def pixels(picture: Image.Image) -> np.ndarray:
    """(3, height, width) of uint8."""
    return np.asarray(picture.convert("RGB")).transpose(2, 0, 1)
