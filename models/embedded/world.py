"""The world the embedded models live in: what a scene may hold, and how training and evaluation draw scenes."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

# Ten colours well apart in Lab (sRGB, 0 to 255): a picture's colours can then be named by the nearest one.
COLOURS = {
    "red": (215, 35, 35),
    "orange": (245, 135, 25),
    "yellow": (245, 220, 50),
    "green": (35, 150, 60),
    "cyan": (70, 215, 225),
    "blue": (40, 75, 215),
    "purple": (130, 45, 175),
    "pink": (250, 150, 195),
    "black": (18, 18, 18),
    "white": (248, 248, 248),
}
SHAPES = ("circle", "square", "triangle", "star", "heart", "cross", "ring")
SIZES = {"small": (0.19, 0.21), "": (0.26, 0.30), "large": (0.36, 0.40)}  # radius, in pictures
PLACES = {
    "top left": (0.27, 0.27),
    "top": (0.5, 0.27),
    "top right": (0.73, 0.27),
    "left": (0.27, 0.5),
    "centre": (0.5, 0.5),
    "right": (0.73, 0.5),
    "bottom left": (0.27, 0.73),
    "bottom": (0.5, 0.73),
    "bottom right": (0.73, 0.73),
}
RELATIONS = {
    "left of": ((0.27, 0.5), (0.73, 0.5)),
    "right of": ((0.73, 0.5), (0.27, 0.5)),
    "above": ((0.5, 0.27), (0.5, 0.73)),
    "below": ((0.5, 0.73), (0.5, 0.27)),
}
# "and" names no relation; its pictures follow the order of reading.
ARRANGEMENTS = RELATIONS | {"and": RELATIONS["left of"]}
ROWS = {
    2: ((0.27, 0.5), (0.73, 0.5)),
    3: ((0.5, 0.27), (0.27, 0.71), (0.73, 0.71)),
}
STYLES = ("outline", "soft", "gradient")
PATTERNS = ("striped", "dotted", "checkered")

# Combinations that training never draws, neither alone nor in a pair; evaluation draws nothing else.
# Every colour and every shape still occurs in training in all its other combinations.
HELD_OUT_OBJECTS = frozenset(
    {
        ("red", "star"),
        ("orange", "square"),
        ("yellow", "heart"),
        ("green", "cross"),
        ("cyan", "triangle"),
        ("blue", "circle"),
        ("purple", "ring"),
        ("pink", "cross"),
        ("black", "heart"),
        ("white", "star"),
    }
)
HELD_OUT_GROUNDS = frozenset(  # (object's colour, background's colour)
    {
        ("red", "white"),
        ("orange", "blue"),
        ("yellow", "purple"),
        ("green", "yellow"),
        ("cyan", "red"),
        ("blue", "orange"),
        ("purple", "cyan"),
        ("pink", "black"),
        ("black", "green"),
        ("white", "pink"),
    }
)


@dataclass(frozen=True, kw_only=True)
class Thing:
    """One coloured shape; centre and radius are fractions of the picture's side."""

    shape: str
    colour: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What one picture shows, and the words that its caption may use for it."""

    things: tuple[Thing, ...]
    background: str
    pattern: str = ""
    style: str = ""
    size: str = ""
    place: str = ""
    relation: str = ""

    @cached_property
    def held_out(self) -> bool:
        """Whether any combination in the scene is reserved for evaluation."""
        return any(
            (thing.colour, thing.shape) in HELD_OUT_OBJECTS or (thing.colour, self.background) in HELD_OUT_GROUNDS
            for thing in self.things
        )


def training_scene(rng: np.random.Generator) -> Scene:
    """A scene that training may see: one object, two with a relation, or two or three alike."""
    while (scene := any_scene(rng)).held_out:
        pass
    return scene


def any_scene(rng: np.random.Generator) -> Scene:
    """A scene of any kind, held-out combinations included."""
    kind = rng.choice(["single", "pair", "count"], p=[0.5, 0.36, 0.14])
    scene = {"single": single, "pair": pair, "count": count}[kind](rng)
    adorned = rng.random()
    if adorned < 0.10:
        return decorated(scene, pattern=pick(rng, PATTERNS))
    if adorned < 0.20:
        return decorated(scene, style=pick(rng, STYLES))
    return scene


def decorated(scene: Scene, *, pattern: str = "", style: str = "") -> Scene:
    """The same scene with a patterned background or in a style."""
    words = {"size": scene.size, "place": scene.place, "relation": scene.relation}
    return Scene(things=scene.things, background=scene.background, pattern=pattern, style=style, **words)


def single(rng: np.random.Generator, *, placed: bool | None = None) -> Scene:
    """One object: in the middle at any size, or small at a named place."""
    colour, background = two_colours(rng)
    placed = rng.random() < 0.35 if placed is None else placed
    place = pick(rng, tuple(PLACES)) if placed else ""
    size = "" if placed else pick(rng, ("small", "", "", "large"))
    radius = rng.uniform(0.18, 0.21) if placed else rng.uniform(*SIZES[size])
    at = PLACES[place or "centre"]
    thing = put(rng, shape=pick(rng, SHAPES), colour=colour, at=at, radius=radius)
    return Scene(things=(thing,), background=background, size=size, place=place)


def pair(rng: np.random.Generator, *, relation: str | None = None) -> Scene:
    """Two objects of two colours that never touch."""
    relation = relation or str(rng.choice([*RELATIONS, "and"], p=[0.22, 0.22, 0.22, 0.22, 0.12]))
    first, second, background = rng.choice(list(COLOURS), 3, replace=False)
    things = tuple(
        put(rng, shape=pick(rng, SHAPES), colour=str(colour), at=at, radius=rng.uniform(0.17, 0.19))
        for colour, at in zip((first, second), ARRANGEMENTS[relation], strict=True)
    )
    return Scene(things=things, background=str(background), relation=relation)


def count(rng: np.random.Generator) -> Scene:
    """Two or three objects alike: two side by side, three in a triangle."""
    colour, background = two_colours(rng)
    shape, radius = pick(rng, SHAPES), rng.uniform(0.165, 0.185)
    places = ROWS[int(rng.integers(2, 4))]
    things = tuple(put(rng, shape=shape, colour=colour, at=at, radius=radius) for at in places)
    return Scene(things=things, background=background)


def put(rng: np.random.Generator, *, shape: str, colour: str, at: tuple[float, float], radius: float) -> Thing:
    """A thing near a place; the little jitter keeps the latent grid from being all there is to learn."""
    x, y = np.asarray(at) + rng.uniform(-0.02, 0.02, 2)
    return Thing(shape=shape, colour=colour, x=float(x), y=float(y), radius=float(radius))


def two_colours(rng: np.random.Generator) -> tuple[str, str]:
    """An object's colour and another for the background."""
    colour, background = rng.choice(list(COLOURS), 2, replace=False)
    return str(colour), str(background)


def pick(rng: np.random.Generator, options: tuple[str, ...]) -> str:
    """One of the options, all alike."""
    return options[rng.integers(len(options))]
