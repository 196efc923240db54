"""`python -m bench.deep_cache`: what skipping steps costs the embedded models, and how much sooner they are done.

Their prompts are those of the held-out scenes that models.embedded scores them by.
"""

import io
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from PIL import Image
from rich.console import Console
from rich.progress import track

from bench import readme
from bench.drift import recorded_latents
from bench.machine import Machine
from bench.report import Sheet
from models.card import ModelCard
from models.embedded.captions import plain_caption
from models.embedded.evaluate import held_out_scenes, shares
from models.embedded.upscalers.scores import psnr
from models.embedded.world import Scene
from models.engine import Engine
from models.families import sd, sdxl
from models.request import GenerationRequest
from models.weights import Source, load, place

EMBEDDED = Path(__file__).parents[1] / "models" / "embedded"
PAGE = Path(__file__).parents[1] / "docs" / "deep-cache.md"
FAMILIES: dict[str, Any] = {"sd15": (sd.COMPONENTS, sd.SD), "sd21": (sd.COMPONENTS, sd.SD)}
FAMILIES |= {"sdxl": (sdxl.COMPONENTS, sdxl.SDXL)}
INTERVALS = (1, 2, 3, 5)
STEPS = (20, 50)
SCENES = ("one object", "two objects")


@dataclass
class Model:
    """An embedded model in one precision, and its autoencoder, whose inputs tell the final latents."""

    engine: Engine
    vae: Any

    @classmethod
    def load(cls, name: str, dtype: str) -> "Model":
        components, family = FAMILIES[name]
        placement, folder = place("cpu", dtype), str(EMBEDDED / name)
        loaded = load(Source(location=folder), components, placement)
        card = ModelCard.read(name, family.__name__.lower(), folder)
        return cls(Engine(family(loaded, placement), card, max_waiting=1000), loaded.modules["vae"])

    def drawn(self, requests: Sequence[GenerationRequest]) -> list[Image.Image]:
        """All of them together."""
        finished = [one for [one] in self.engine.generate(requests)]
        return [Image.open(io.BytesIO(one.data)).convert("RGB") for one in finished]


@dataclass
class Scored:
    """Pictures of scenes: how many show all that their prompts say, and in how many seconds they were drawn."""

    right: int
    seconds: float


@dataclass
class Found:
    """One model's findings, by interval: of each number of steps (distance, PSNR) of each picture, and of each kind of
    scene what its pictures show."""

    drifts: dict[int, dict[int, list[tuple[float, float]]]] = field(default_factory=dict)
    scenes: dict[str, dict[int, Scored]] = field(default_factory=dict)


def main(
    model: Annotated[list[str] | None, typer.Option(help="Only this one; may be repeated.")] = None,
    pictures: Annotated[int, typer.Option(help="Whose latents and pixels are compared.", min=1)] = 3,
    prompts: Annotated[int, typer.Option(help="Of each kind of scene, for what is drawn.", min=1)] = 96,
    publish: Annotated[bool, typer.Option("--publish", help="Also put the tables into docs/deep-cache.md.")] = False,
) -> None:
    """Compare pictures with steps left out with the same requests' without: latents, pixels, and what they show."""
    console, machine = Console(), Machine.here(torch.get_num_threads())
    found = {name: _measured(name, pictures, prompts, console) for name in model or FAMILIES}
    sheets = [_drifts(found), _scenes(found, prompts)]
    facts = [f"Machine: {machine}.", f"Command: `{' '.join(['python -m bench.deep_cache', *sys.argv[1:]])}`."]
    console.print(*(sheet.rich() for sheet in sheets), *facts, sep="\n", highlight=False)
    if publish:
        readme.publish("measured", "\n\n".join([*(sheet.markdown() for sheet in sheets), *facts]), PAGE)


def _measured(name: str, pictures: int, prompts: int, console: Console) -> Found:
    found, scenes = Found(), held_out_scenes(SCENES[0], pictures)
    model = Model.load(name, "bfloat16")
    for steps in track(STEPS, f"{name}: latents and pixels", console=console, transient=True):
        found.drifts[steps] = _compared(model, scenes, steps)
    model = Model.load(name, "float32")
    for kind in track(SCENES, f"{name}: what is drawn", console=console, transient=True):
        some = held_out_scenes(kind, prompts)
        found.scenes[kind] = {every: _scored(model, some, every) for every in INTERVALS}
    return found


def _compared(model: Model, scenes: Sequence[Scene], steps: int) -> dict[int, list[tuple[float, float]]]:
    """By interval, of each picture, drawn alone, beside the one without: the relative L2 distance of the final latents,
    and the PSNR."""
    found: dict[int, list[tuple[float, float]]] = {every: [] for every in INTERVALS[1:]}
    for seed, scene in enumerate(scenes):
        plain = _request(model, scene, seed, steps=steps, guidance_scale=7.5, sampler="euler", schedule="default")
        with recorded_latents(model.vae) as latents:
            pictures = [model.drawn([replace(plain, deep_cache=every)])[0] for every in INTERVALS]
        whole, first = np.asarray(pictures[0]), latents[0]
        for every, picture, final in zip(found, pictures[1:], latents[1:], strict=True):
            distance = ((final - first).norm() / first.norm()).item()
            found[every].append((distance, psnr(np.asarray(picture), whole)))
    return found


def _scored(model: Model, scenes: Sequence[Scene], every: int) -> Scored:
    how = {"steps": 20, "guidance_scale": 5.0, "sampler": "dpmpp_2m", "deep_cache": every}
    requests = [_request(model, scene, seed, **how) for seed, scene in enumerate(scenes)]
    began = time.perf_counter()
    pictures = model.drawn(requests)
    seconds = time.perf_counter() - began
    right, _ = shares(pictures, list(scenes))["all"]
    return Scored(right, seconds)


def _request(model: Model, scene: Scene, seed: int, **how: Any) -> GenerationRequest:
    return GenerationRequest(model=model.engine.card.name, prompt=plain_caption(scene), seed=seed, **how)


def _drifts(found: Mapping[str, Found]) -> Sheet:
    rows = [
        [f"{name}, {steps} steps", *_ranges(by, 0, ".2f"), *_ranges(by, 1, ".0f")]
        for name, one in found.items()
        for steps, by in one.drifts.items()
    ]
    columns = [f"{what} {every}" for what in ("L2,", "dB,") for every in INTERVALS[1:]]
    title = (
        "Beside the same request without, in bfloat16: relative L2 distance of the final latents and PSNR of the "
        "pictures, smallest to largest; Euler, guidance 7.5"
    )
    return Sheet(title=title, columns=("deep_cache", *columns), rows=rows)


def _ranges(found: Mapping[int, Sequence[tuple[float, float]]], which: int, form: str) -> Iterator[str]:
    for pictures in found.values():
        values = [each[which] for each in pictures]
        yield f"{min(values):{form}} to {max(values):{form}}"


def _scenes(found: Mapping[str, Found], prompts: int) -> Sheet:
    rows = []
    for name, one in found.items():
        for kind, by in one.scenes.items():
            faster = [by[1].seconds / by[every].seconds for every in INTERVALS[1:]]
            right = [str(scored.right) for scored in by.values()]
            rows.append([f"{name}, {kind}", *right, *(f"{each:.1f}" for each in faster)])
    columns = [*(f"right, {every}" for every in INTERVALS), *(f"times as fast, {every}" for every in INTERVALS[1:])]
    title = (
        f"Pictures that show all that their prompts say, of {prompts} held-out ones each, and how much faster these "
        "were drawn, all submitted at once; 20 steps of DPM++ 2M, guidance 5, float32"
    )
    return Sheet(title=title, columns=("deep_cache", *columns), rows=rows)


if __name__ == "__main__":
    typer.run(main)
