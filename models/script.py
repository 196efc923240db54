"""What a picture's prompts say, to which row and when: planned before anything is encoded."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from models.errors import InvalidRequest
from models.family import Family
from models.prompt import Text, parse, timelines
from models.request import EffectiveRequest
from models.tokens import Inversion, Loras, Wording, named

TEXTS = 256  # of one picture: each change of a line counts


@dataclass(frozen=True)
class Run:
    """A phase as prompts see it: of each forward the number of its step, from 0; the size of what is drawn."""

    steps: tuple[int, ...]
    width: int
    height: int


@dataclass(frozen=True)
class Line:
    """What one row is told: (first forward, wording) in order; and how strongly it pulls."""

    field: str
    timeline: tuple[tuple[int, Wording], ...]
    weight: float = 1.0
    zeros: bool = False  # in place of the embedding


@dataclass(frozen=True)
class Script:
    """A picture's lines, the unconditional one first where there are several; (first forward, (width, height)); and the
    guidance scale, which some networks are told too."""

    lines: tuple[Line, ...]
    sizes: tuple[tuple[int, tuple[int, int]], ...]
    guidance_scale: float


def write(
    family: Family,
    inversions: Mapping[str, Inversion],
    request: EffectiveRequest,
    runs: Sequence[Run] | None = None,
    loras: Loras = (),
) -> Script:
    """What a request's prompts say over the phases of its picture. Quick, and safe in any thread.

    `inversions` are the textual inversions that prompts may use, `loras` those that are on the text encoders meanwhile.
    Raises InvalidRequest for a prompt that cannot be read, or a textual inversion made for another model.
    """
    if request.clip_skip > family.clip_skips:
        raise InvalidRequest("clip_skip", f"must be at most {family.clip_skips} with this model's text encoders")
    runs = runs or [Run(tuple(range(request.steps)), request.width, request.height)]
    numbers, sizes, done = [], [], 0
    for run in runs:
        sizes.append((len(numbers), (run.width, run.height)))
        numbers += [done + number for number in run.steps]
        done += run.steps[-1] + 1 if run.steps else 0
    steps = runs[0].steps[-1] + 1 if runs[0].steps else request.steps

    def written(field: str, prompt: str, clip_skip: int) -> list[Line]:
        parts = parse(field, prompt, request.prompt_syntax)
        lines = []
        for part, timeline in zip(parts, timelines(parts, numbers, steps), strict=True):
            worded = [
                (first, Wording(text, clip_skip, _named(family, inversions, field, text), loras))
                for first, text in timeline
            ]
            lines.append(Line(field, tuple(worded), part.weight))
        return lines

    lines = written("prompt", request.prompt, request.clip_skip)
    if request.guided or len(lines) > 1:
        [negative] = written(
            "negative_prompt", request.negative_prompt, clip_skip=0
        )  # which is the prompt's in diffusers
        zeros = family.zero_empty_negative and not request.negative_prompt
        lines.insert(0, replace(negative, zeros=zeros))
    if sum(len(line.timeline) for line in lines) > TEXTS:
        raise InvalidRequest(
            "prompt", f"changes through more than {TEXTS} texts in all, the negative prompt's included"
        )
    return Script(tuple(lines), tuple(sizes), request.guidance_scale)


def _named(
    family: Family, inversions: Mapping[str, Inversion], field: str, text: Text
) -> tuple[tuple[str, Inversion], ...]:
    """The inversions in a text, each checked against the text encoders."""
    there_are = frozenset(inversions)
    if not there_are:
        return ()
    found = {name: inversions[name] for name in named(text, there_are)}
    for name, inversion in found.items():
        widths = tuple(vectors.shape[-1] for vectors in inversion.vectors)
        if widths != family.text_widths:
            raise InvalidRequest(
                field,
                f"{name!r} was made for another base model: its embeddings are {_listed(widths)} wide, "
                f"those of this model's text encoders {_listed(family.text_widths)}",
            )
    return tuple(found.items())


def _listed(widths: Sequence[int]) -> str:
    return " and ".join(map(str, widths))
