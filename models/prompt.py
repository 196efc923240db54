r"""Prompts as people write them: A1111's grammar, and what a prompt says at each step of a picture. No torch.

    (x)  (x:1.3)  [x]               attention to x times 1.1, 1.3 and 1/1.1; brackets nest
    \(  \)  \[  \]  \:  \|  \\      the character itself
    [a:b:0.5]  [b:0.5]  [a::0.5]    a, and after half of the steps b; a whole number counts steps
    [a|b|c]                         another one at each step, in turn
    BREAK                           what follows starts a new chunk of the text encoder
    a AND b :0.5                    both, each with its weight (composition, arXiv:2206.01714)
    <lora:name:0.8>                 an adapter, taken out by `extract_loras`

What has no such meaning is text: a bracket that closes nothing, `[a:b]`, a colon. A bracket left open holds to the end.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple, TypeAlias

from models.errors import InvalidRequest
from models.limits import Range

TOKEN_WEIGHT = Range(0.0, 10.0)
PART_WEIGHT = Range(-10.0, 10.0)  # below 0: away from the part
PARTS = 8  # of one prompt with AND: each is one more row of every forward
VARIANTS = 32  # different texts that a prompt, all its parts together, becomes over the steps: each is encoded
NESTING = 50  # brackets inside each other
_MORE = 1.1

_TOKEN = re.compile(r"\\[\\()\[\]:|]|[()\[\]:|]|\b(?:BREAK|AND)\b")
_NUMBER = re.compile(r"\s*[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)\s*")
_LORA = re.compile(r"<lora:([^<>]*)(>?)", re.IGNORECASE)


class Span(NamedTuple):
    """Text of one weight."""

    text: str
    weight: float = 1.0


Text: TypeAlias = tuple[tuple[Span, ...], ...]
"""What an encoder is given: sections, of which each starts a new chunk, made of spans."""
Timeline: TypeAlias = tuple[tuple[int, Text], ...]
"""(first forward, text) wherever a text changes."""


@dataclass(frozen=True, kw_only=True)
class PromptReport:
    """What became of a prompt: how many tokens were read, in how many chunks, and the text beyond the last chunk.

    Where the text changes over the steps these are of its longest form; the parts of a composition are added up.
    """

    tokens: int
    chunks: int
    truncated: str = ""

    def __add__(self, other: "PromptReport") -> "PromptReport":
        truncated = " ".join(text for text in (self.truncated, other.truncated) if text)
        return PromptReport(tokens=self.tokens + other.tokens, chunks=self.chunks + other.chunks, truncated=truncated)


class _Mark(Enum):
    """What cuts the inside of a bracket."""

    COLON = ":"
    BAR = "|"
    BREAK = "BREAK"


@dataclass(frozen=True)
class _Emphasis:
    items: "_Items"
    factor: float

    def at(self, step: int, steps: int) -> "_Items":
        return self.items


@dataclass(frozen=True)
class _Change:
    """The first option for `when` steps, or for that share of them all; the second from there on."""

    options: tuple["_Items", ...]
    when: float
    share: bool
    factor = 1.0

    def choice(self, step: int, steps: int) -> int:
        return int(step >= (int(self.when * steps + 1e-9) if self.share else self.when))

    def at(self, step: int, steps: int) -> "_Items":
        return self.options[self.choice(step, steps)]


@dataclass(frozen=True)
class _Turns:
    options: tuple["_Items", ...]
    factor = 1.0

    def choice(self, step: int, steps: int) -> int:
        return step % len(self.options)

    def at(self, step: int, steps: int) -> "_Items":
        return self.options[self.choice(step, steps)]


_Item: TypeAlias = str | _Mark | _Emphasis | _Change | _Turns
_Items: TypeAlias = list[_Item]


@dataclass(frozen=True)
class Part:
    """One prompt, or what stands on one side of an AND."""

    field: str
    items: _Items
    weight: float = 1.0
    changes: "tuple[_Change | _Turns, ...]" = ()

    def at(self, step: int, steps: int) -> Text:
        """The text at a step, counted from 0, of so many. Raises InvalidRequest where a weight is out of range."""
        sections: list[list[tuple[list[str], float]]] = [[]]
        for piece in _flat(self.items, 1.0, step, steps):
            if not isinstance(piece, Span):
                sections.append([])
                continue
            self._check(piece)
            if sections[-1] and sections[-1][-1][1] == piece.weight:
                sections[-1][-1][0].append(piece.text)
            else:
                sections[-1].append(([piece.text], piece.weight))
        return tuple(tuple(Span("".join(texts), weight) for texts, weight in section) for section in sections)

    def timeline(self, numbers: Sequence[int], steps: int, room: int = VARIANTS) -> Timeline:
        """(first forward, text) wherever the text changes. `numbers` says of each forward which step it belongs to.

        Shares count of `steps`. Raises InvalidRequest for more than `room` different texts, or weights out of range.
        """
        texts: dict[tuple[int, ...], Text] = {}
        line: list[tuple[int, Text]] = []
        for forward, number in enumerate(numbers or (0,)):
            choices = tuple(change.choice(number, steps) for change in self.changes)
            if choices not in texts:
                if len(texts) == room:
                    together = f"more than {VARIANTS} different texts, those of parts joined by AND counted together"
                    raise InvalidRequest(self.field, f"becomes {together}; change it less often")
                texts[choices] = self.at(number, steps)
            if not line or texts[choices] != line[-1][1]:
                line.append((forward, texts[choices]))
        return tuple(line)

    def _check(self, span: Span) -> None:
        if span.text.strip() and not TOKEN_WEIGHT.low <= span.weight <= TOKEN_WEIGHT.high:
            allowed = f"weights must be between {TOKEN_WEIGHT.low:g} and {TOKEN_WEIGHT.high:g}"
            raise InvalidRequest(self.field, f"{allowed}; {span.text.strip()[:40]!r} gets {span.weight:g}")


def parse(field: str, prompt: str, syntax: str = "weighted") -> tuple[Part, ...]:
    """The parts of a prompt: one, or several where it says AND. In syntax "plain" everything is text.

    Raises InvalidRequest, naming the field, for a composition in the negative prompt, in a bracket, with an empty part
    or more than 8; adapters in it; a change at no step; brackets nested deeper than 50; weights out of range.
    """
    if syntax == "plain":
        return (Part(field, [prompt]),)
    if _LORA.search(prompt):
        raise InvalidRequest(field, "adapters stand in the prompt, as <lora:name:weight>, and nowhere else")
    return _Reader(field).read(prompt)


def timelines(parts: Sequence[Part], numbers: Sequence[int], steps: int) -> list[Timeline]:
    """The timeline of each part of one prompt.

    Raises InvalidRequest for more than 32 different texts in all of them together, or weights out of range.
    """
    lines: list[Timeline] = []
    room = VARIANTS
    for part in parts:
        lines.append(part.timeline(numbers, steps, room))
        room -= len({text for _, text in lines[-1]})
    return lines


def extract_loras(prompt: str) -> tuple[str, tuple[tuple[str, float], ...]]:
    """The prompt without its `<lora:name:weight>` tags, and their (name, weight); the weight is 1 unless said.

    Raises InvalidRequest for a tag without a name, with a weight that is no number, or without an end.
    """
    loras: list[tuple[str, float]] = []

    def take(tag: re.Match[str]) -> str:
        name, colon, weight = tag[1].partition(":")
        if not (name.strip() and tag[2] and (_NUMBER.fullmatch(weight) or not colon)):
            raise InvalidRequest("prompt", f"write <lora:name> or <lora:name:0.8>, not {tag[0][:80]!r}")
        loras.append((name.strip(), float(weight) if colon else 1.0))
        return ""

    return _LORA.sub(take, prompt), tuple(loras)


class _Reader:
    """Reads one prompt from left to right, keeping the brackets that are still open."""

    def __init__(self, field: str):
        self._field = field
        self._open: list[tuple[str, _Items]] = [("", [])]  # the bracket, and what stands in it so far
        self._parts: list[tuple[_Items, tuple[_Change | _Turns, ...]]] = []
        self._changes: list[_Change | _Turns] = []  # in the part that is being read

    def read(self, prompt: str) -> tuple[Part, ...]:
        end = 0
        for token in _TOKEN.finditer(prompt):
            self._text(prompt[end : token.start()])
            self._token(token[0])
            end = token.end()
        self._text(prompt[end:])
        while len(self._open) > 1:
            bracket, items = self._open.pop()
            self._add(_Emphasis(_literal(items), _MORE if bracket == "(" else 1 / _MORE))
        self._end_part()
        if len(self._parts) == 1:
            [(items, changes)] = self._parts
            return (Part(self._field, _literal(items), changes=changes),)
        return self._composed()

    def _end_part(self) -> None:
        self._parts.append((self._open.pop()[1], tuple(self._changes)))
        self._open.append(("", []))
        self._changes = []

    def _text(self, text: str) -> None:
        if text:
            self._add(text)

    def _add(self, item: _Item) -> None:
        self._open[-1][1].append(item)

    def _token(self, token: str) -> None:
        if token[0] == "\\":
            self._add(token[1])
        elif token in "([":
            if len(self._open) > NESTING:
                raise InvalidRequest(self._field, f"nests brackets deeper than {NESTING}")
            self._open.append((token, []))
        elif token in ")]":
            self._close(token)
        elif token == "AND":
            self._compose()
        else:
            self._add(_Mark(token))

    def _close(self, token: str) -> None:
        bracket, items = self._open[-1]
        if bracket + token not in ("()", "[]"):
            self._add(token)
            return
        self._open.pop()
        self._add(self._round(items) if bracket == "(" else self._square(items))

    def _round(self, items: _Items) -> _Item:
        content, number = _numbered(items)
        return _Emphasis(content, _MORE if number is None else float(number))

    def _square(self, items: _Items) -> _Item:
        options = _split(items, _Mark.BAR)
        if len(options) > 1:
            return self._changing(_Turns(tuple(_literal(option) for option in options)))
        texts, (_, number) = _split(items[:-2], _Mark.COLON), _numbered(items)
        if number is None or len(texts) > 2:
            return _Emphasis(_literal(items), 1 / _MORE)
        share, when = "." in number, float(number)
        if when < 0 or (share and when > 1):
            raise InvalidRequest(
                self._field, f"changes at {number}: say a share of the steps, 0.0 to 1.0, or a whole number of steps"
            )
        return self._changing(_Change((texts[0] if len(texts) == 2 else [], texts[-1]), when, share))

    def _changing(self, change: "_Change | _Turns") -> _Item:
        self._changes.append(change)
        return change

    def _compose(self) -> None:
        if self._field != "prompt":
            raise InvalidRequest(self._field, "AND composes parts of the prompt only; write `and` for the word")
        if len(self._open) > 1:
            raise InvalidRequest(self._field, "AND stands between whole prompts, outside of brackets")
        self._end_part()
        if len(self._parts) >= PARTS:
            raise InvalidRequest(self._field, f"has more than {PARTS} parts joined by AND")

    def _composed(self) -> tuple[Part, ...]:
        parts = []
        for items, changes in self._parts:
            content, number = _numbered(items)
            if not any(not isinstance(item, str) or item.strip() for item in content):
                raise InvalidRequest(self._field, "has nothing on one side of an AND; write `and` for the word")
            weight = 1.0 if number is None else float(number)
            if not PART_WEIGHT.low <= weight <= PART_WEIGHT.high:
                allowed = f"must be between {PART_WEIGHT.low:g} and {PART_WEIGHT.high:g}"
                raise InvalidRequest(self._field, f"the weight of a part {allowed}, not {weight:g}")
            parts.append(Part(self._field, content, weight, changes))
        return tuple(parts)


def _numbered(items: _Items) -> tuple[_Items, str | None]:
    """What stands before a colon and a number at the end, and the number; else all of it, and None."""
    if len(items) > 1 and items[-2] is _Mark.COLON and isinstance(items[-1], str) and _NUMBER.fullmatch(items[-1]):
        return _literal(items[:-2]), items[-1].strip()
    return _literal(items), None


def _literal(items: _Items) -> _Items:
    """With colons and bars as the text that they are here."""
    return [item.value if item in (_Mark.COLON, _Mark.BAR) else item for item in items]


def _split(items: _Items, mark: _Mark) -> list[_Items]:
    pieces: list[_Items] = [[]]
    for item in items:
        if item is mark:
            pieces.append([])
        else:
            pieces[-1].append(item)
    return pieces


def _flat(items: _Items, weight: float, step: int, steps: int) -> Iterator[Span | _Mark]:
    """The spans at a step, and BREAK between sections. No deeper than brackets nest."""
    for item in items:
        if isinstance(item, str):
            yield Span(item, round(weight, 6))  # 1.1 / 1.1 is 1
        elif isinstance(item, _Mark):
            yield item
        else:
            yield from _flat(item.at(step, steps), weight * item.factor, step, steps)
