"""The workloads: what is asked for, as seeded lists of requests. No torch, no ray."""

import random
from collections.abc import Mapping
from dataclasses import dataclass

from models.request import GenerationRequest

MODEL = "sd15"
COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "white", "black")
SHAPES = ("circle", "square", "triangle", "star")


@dataclass(frozen=True, order=True)
class RequestClass:
    """What decides how long a request takes alone: its size in pixels and its steps."""

    side: int
    steps: int

    def __str__(self) -> str:
        return f"{self.side} px, {self.steps} steps"


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A named mixture of request classes; the numbers are their shares, in parts of a hundred."""

    name: str
    title: str
    shares: Mapping[RequestClass, int]

    @property
    def classes(self) -> list[RequestClass]:
        return sorted(self.shares)


def steps_mixed(side: int, percent: int) -> dict[RequestClass, int]:
    """20, 30 and 50 steps at 50, 30 and 20 % of `percent`."""
    return {RequestClass(side, steps): percent * part // 10 for steps, part in ((20, 5), (30, 3), (50, 2))}


def workloads_at(side: int, other: int) -> tuple[Workload, Workload, Workload]:
    """Equal requests and mixed steps at `side` pixels, and mixed sizes, of which 40 % have the other side."""
    return (
        Workload(name="equal", title="equal requests", shares={RequestClass(side, 20): 100}),
        Workload(name="steps", title="mixed steps", shares=steps_mixed(side, 100)),
        Workload(name="sizes", title="mixed steps and sizes", shares=steps_mixed(side, 60) | steps_mixed(other, 40)),
    )


EQUAL, MIXED_STEPS, MIXED_SIZES = workloads_at(128, 192)
WORKLOADS: Mapping[str, Workload] = {w.name: w for w in (EQUAL, MIXED_STEPS, MIXED_SIZES)}


def class_of(request: GenerationRequest) -> RequestClass:
    """The class a request of these workloads belongs to."""
    assert request.width, "workloads say everything"
    assert request.steps, "workloads say everything"
    return RequestClass(request.width, request.steps)


def request_of(kind: RequestClass, seed: int, model: str = MODEL) -> GenerationRequest:
    """One request of a class, its prompt drawn by its seed; one sampler throughout, the embedded model's default."""
    rng = random.Random(seed)
    figure, ground = rng.sample(COLOURS, 2)
    return GenerationRequest(
        model=model,
        prompt=f"a {figure} {rng.choice(SHAPES)} on a {ground} background",
        width=kind.side,
        height=kind.side,
        steps=kind.steps,
        guidance_scale=7.5,
        seed=seed,
        sampler="dpmpp_2m",
        schedule="karras",
    )


def requests_of(workload: Workload, count: int, seed: int, model: str = MODEL) -> list[GenerationRequest]:
    """`count` requests whose classes have the workload's shares exactly (to a request), in a seeded order."""
    total = sum(workload.shares.values())
    deck = [kind for kind, share in workload.shares.items() for _ in range(round(count * share / total))]
    rng = random.Random(seed)
    while len(deck) < count:  # rounding can leave a place or take one too many
        deck.append(rng.choice(workload.classes))
    rng.shuffle(deck)
    return [request_of(kind, seed * 100_000 + i, model) for i, kind in enumerate(deck[:count])]
