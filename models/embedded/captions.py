"""What a scene is called: a grammar of captions with synonyms, and the list of words the tokenizer must know."""

import re

import numpy as np

from models.embedded.world import COLOURS, PATTERNS, PLACES, RELATIONS, SHAPES, STYLES, Scene, Thing, pick

COLOUR_SYNONYMS = {
    "red": ("scarlet", "crimson"),
    "yellow": ("golden",),
    "green": ("emerald",),
    "cyan": ("turquoise",),
    "blue": ("azure",),
    "purple": ("violet",),
    "pink": ("rosy",),
}
SHAPE_SYNONYMS = {
    "circle": ("disc", "ball"),
    "square": ("box", "block"),
    "cross": ("plus sign",),
    "ring": ("hoop", "donut"),
}
SIZE_SYNONYMS = {"small": ("little", "tiny"), "large": ("big", "huge")}
PLACE_PHRASES = {
    "top left": ("in the top left", "in the top left corner", "at the top left", "in the upper left"),
    "top": ("at the top", "near the top"),
    "top right": ("in the top right", "in the top right corner", "at the top right", "in the upper right"),
    "left": ("on the left", "on the left side", "at the left"),
    "centre": ("in the center", "in the middle", "in the centre"),
    "right": ("on the right", "on the right side", "at the right"),
    "bottom left": ("in the bottom left", "in the bottom left corner", "at the bottom left", "in the lower left"),
    "bottom": ("at the bottom", "near the bottom"),
    "bottom right": ("in the bottom right", "in the bottom right corner", "at the bottom right", "in the lower right"),
}
RELATION_PHRASES = {
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
    "and": ("and", "and", "next to"),
}
NUMBERS = {2: ("two", "2"), 3: ("three", "3")}
PATTERN_SYNONYMS = {"striped": ("stripy",), "dotted": ("polka dot",), "checkered": ("chequered",)}
STYLE_PHRASES = {
    "outline": ("outline", "line drawing", "outline drawing"),
    "soft": ("soft", "blurry", "soft focus"),
    "gradient": ("gradient", "gradient background"),
}
GROUND_PHRASES = (
    "on a {} background",
    "on a {} background",
    "on {} background",
    "against a {} background",
    "with a {} background",
    "on a {} backdrop",
    "over a {} background",
    ", {} background",
)
OPENINGS = ("a photo of", "a picture of", "an image of", "a drawing of", "a painting of", "an illustration of")
TAILS = ("high quality", "best quality", "masterpiece", "detailed", "simple", "4k", "highly detailed")
PLAIN = "on a {} background"


def plain_caption(scene: Scene) -> str:
    """The scene in the grammar's first words: what evaluation asks for."""
    return with_article(f"{subject(scene)} {PLAIN.format(ground(scene))}")


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """One of the many ways to say the scene; now and then incomplete, or with words that mean nothing."""
    text = subject(scene, rng)
    if rng.random() < 0.94:
        phrase = GROUND_PHRASES[0] if rng.random() < 0.5 else pick(rng, GROUND_PHRASES)
        text = f"{text} {phrase.format(ground(scene, rng))}".replace(" ,", ",")
    if rng.random() < 0.15:
        text = f"{pick(rng, OPENINGS)} {text}"
    tails = [synonym(scene.style, STYLE_PHRASES, rng)] if scene.style else []
    if rng.random() < 0.12:
        tails.append(pick(rng, TAILS))
    if rng.random() < 0.04:
        tails.append("".join(chr(97 + int(letter)) for letter in rng.integers(0, 26, rng.integers(3, 8))))
    rng.shuffle(tails)
    return with_article(", ".join([text, *tails]))


def subject(scene: Scene, rng: np.random.Generator | None = None) -> str:
    """The objects of the scene, without the background."""
    first = scene.things[0]
    if scene.relation:
        relation = choose(RELATION_PHRASES[scene.relation], rng)
        return f"a {noun(first, rng)} {relation} a {noun(scene.things[1], rng)}"
    if len(scene.things) > 1:
        number = choose(NUMBERS[len(scene.things)], rng)
        return f"{number} {plural(noun(first, rng))}"
    size = synonym(scene.size, SIZE_SYNONYMS, rng) if scene.size else ""
    words = " ".join(filter(None, ["a", size, noun(first, rng)]))
    return f"{words} {choose(PLACE_PHRASES[scene.place], rng)}" if scene.place else words


def noun(thing: Thing, rng: np.random.Generator | None) -> str:
    """Colour and shape."""
    return f"{synonym(thing.colour, COLOUR_SYNONYMS, rng)} {synonym(thing.shape, SHAPE_SYNONYMS, rng)}"


def ground(scene: Scene, rng: np.random.Generator | None = None) -> str:
    """The background's pattern and colour."""
    pattern = synonym(scene.pattern, PATTERN_SYNONYMS, rng) if scene.pattern else ""
    return " ".join(filter(None, [pattern, synonym(scene.background, COLOUR_SYNONYMS, rng)]))


def synonym(word: str, synonyms: dict[str, tuple[str, ...]], rng: np.random.Generator | None) -> str:
    """Mostly the word itself."""
    if rng is None or word not in synonyms or rng.random() < 0.85:
        return word
    return pick(rng, synonyms[word])


def choose(phrases: tuple[str, ...], rng: np.random.Generator | None) -> str:
    """The first phrase half of the time, and always where nothing is left to chance."""
    return phrases[0] if rng is None or rng.random() < 0.5 else pick(rng, phrases)


def plural(words: str) -> str:
    """`words` with an English plural at the end."""
    return words + ("es" if words.endswith(("s", "x")) else "s")


def with_article(text: str) -> str:
    """`a` before a vowel is `an`."""
    return re.sub(r"\ba (?=[aeiou])", "an ", text)


def vocabulary() -> list[str]:
    """Every word the grammar can say, in a fixed order."""
    tables = (COLOUR_SYNONYMS, SHAPE_SYNONYMS, SIZE_SYNONYMS, PLACE_PHRASES, RELATION_PHRASES, NUMBERS)
    phrases = [*COLOURS, *SHAPES, *PLACES, *RELATIONS, *STYLES, *PATTERNS, *OPENINGS, *TAILS, *GROUND_PHRASES]
    for table in (*tables, PATTERN_SYNONYMS, STYLE_PHRASES):
        phrases += [phrase for key, values in table.items() for phrase in (str(key), *values)]
    nouns = [*SHAPES, *(name for names in SHAPE_SYNONYMS.values() for name in names)]
    phrases += [plural(name) for name in nouns] + ["an", "the", ",", "."]
    words = [word for phrase in phrases for word in re.findall(r"[a-z]+|[0-9]|,|\.", phrase)]
    return list(dict.fromkeys(words))
