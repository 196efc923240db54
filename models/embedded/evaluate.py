"""Scores the embedded models on combinations that training never saw: `python -m models.embedded.evaluate --help`."""

import json
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from diffusers import AutoencoderKL, DiffusionPipeline, DPMSolverMultistepScheduler
from PIL import Image
from rich.progress import track

from models.embedded.architecture import FAMILIES
from models.embedded.autoencoder import signed
from models.embedded.captions import plain_caption
from models.embedded.drawing import pixels, render
from models.embedded.options import MODELS, Models, Threads
from models.embedded.scoring import score
from models.embedded.world import RELATIONS, Scene, count, pair, pick, single

SEED = 99
BATCH = 10
SHEET_COLUMNS = 10
Shares = dict[str, tuple[int, int]]  # what was counted -> (right, of)


@dataclass(frozen=True, kw_only=True)
class Question:
    """One kind of prompt and how it was asked."""

    kind: str
    guidance_scale: float
    prompts: int


KINDS: dict[str, Callable[[np.random.Generator], Scene]] = {
    "one object": single,
    "two objects": lambda rng: pair(rng, relation=pick(rng, tuple(RELATIONS))),
    "counts": count,
}


def held_out_scenes(kind: str, n: int) -> list[Scene]:
    """The first n scenes of that kind that hold a reserved combination."""
    rng = np.random.default_rng([SEED, list(KINDS).index(kind)])
    scenes: list[Scene] = []
    while len(scenes) < n:
        scene = KINDS[kind](rng)
        if scene.held_out:
            scenes.append(scene)
    return scenes


def pipeline(folder: Path) -> DiffusionPipeline:
    """The model in diffusers' own pipeline, in float32, with DPM-Solver++ (2M)."""
    pipe = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn(pipe: DiffusionPipeline, scenes: list[Scene], *, guidance_scale: float, steps: int) -> list[Image.Image]:
    """One picture for each scene's caption; each has its own seed, so n prompts are a prefix of more."""
    pictures = []
    for first in track(range(0, len(scenes), BATCH), description=f"guidance {guidance_scale}", transient=True):
        some = scenes[first : first + BATCH]
        pictures += pipe(
            [plain_caption(scene) for scene in some],
            guidance_scale=guidance_scale,
            num_inference_steps=steps,
            generator=[torch.Generator().manual_seed(SEED + first + i) for i in range(len(some))],
        ).images
    return pictures


def shares(pictures: Iterable[Image.Image], scenes: list[Scene]) -> Shares:
    """How many pictures are right on each count."""
    tally: dict[str, list[bool]] = defaultdict(list)
    for picture, scene in zip(pictures, scenes, strict=True):
        for name, right in score(picture, scene).items():
            tally[name].append(right)
    return {name: (int(sum(rights)), len(rights)) for name, rights in tally.items()}


@torch.no_grad()
def round_trip(vae: AutoencoderKL, picture: Image.Image) -> Image.Image:
    """The picture encoded and decoded: no model can be scored above this."""
    latents = vae.encode(signed(torch.from_numpy(pixels(picture).copy())[None])).latent_dist.mean
    decoded = vae.decode(latents).sample.clamp(-1, 1)[0]
    return Image.fromarray(((decoded.permute(1, 2, 0) + 1) * 127.5).round().byte().numpy())


def ceilings(vae: AutoencoderKL, kind: str, n: int) -> dict[str, Shares]:
    """What the scorer says of the right pictures themselves, as drawn and after the autoencoder."""
    scenes = held_out_scenes(kind, n)
    rng = np.random.default_rng(SEED)
    pictures = [render(scene, rng) for scene in scenes]
    trips = [round_trip(vae, picture) for picture in pictures]
    return {"as drawn": shares(pictures, scenes), "after the autoencoder": shares(trips, scenes)}


def contact_sheet(rows: list[list[Image.Image]]) -> Image.Image:
    """Rows of pictures, at half their size."""
    tile = 64
    sheet = Image.new("RGB", (SHEET_COLUMNS * tile, len(rows) * tile), "white")
    for y, row in enumerate(rows):
        for x, picture in enumerate(row[:SHEET_COLUMNS]):
            sheet.paste(picture.resize((tile, tile), Image.Resampling.BOX), (x * tile, y * tile))
    return sheet


def table(results: dict[str, Shares]) -> str:
    """Markdown: one line for each question, percentages with their n."""
    names = list(dict.fromkeys(name for result in results.values() for name in result))
    lines = [f"| | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for title, result in results.items():
        cells = [f"{100 * result[k][0] / result[k][1]:.1f} % ({result[k][1]})" if k in result else "" for k in names]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def questions(singles: int, pairs: int, counts: int) -> list[Question]:
    """One object at guidance 1, 5 and 7.5; two objects and counts at 5."""
    asked = [Question(kind="one object", guidance_scale=scale, prompts=singles) for scale in (1.0, 5.0, 7.5)]
    asked.append(Question(kind="two objects", guidance_scale=5.0, prompts=pairs))
    asked.append(Question(kind="counts", guidance_scale=5.0, prompts=counts))
    return [question for question in asked if question.prompts]


def main(
    only: Annotated[list[str] | None, typer.Option(help="Score only this model; may be repeated.")] = None,
    models: Models = MODELS,
    out: Annotated[Path, typer.Option(help="Where results and contact sheets go.")] = Path("out/embedded"),
    singles: Annotated[int, typer.Option(help="Prompts with one object.")] = 200,
    pairs: Annotated[int, typer.Option(help="Prompts with two objects.")] = 100,
    counts: Annotated[int, typer.Option(help="Prompts with two or three objects alike.")] = 60,
    steps: Annotated[int, typer.Option(help="Sampling steps.")] = 25,
    threads: Threads = 1,
) -> None:
    """Draws held-out prompts and scores colour, shape, place, background, relation and count."""
    torch.set_num_threads(threads)
    out.mkdir(parents=True, exist_ok=True)
    for name in only or list(FAMILIES):
        pipe = pipeline(models / name)
        results, rows = {}, []
        for question in questions(singles, pairs, counts):
            scenes = held_out_scenes(question.kind, question.prompts)
            pictures = drawn(pipe, scenes, guidance_scale=question.guidance_scale, steps=steps)
            results[f"{question.kind}, guidance {question.guidance_scale:g}"] = shares(pictures, scenes)
            rows.append(pictures)
            print(f"{name}\n{table(results)}", flush=True)
        for kind, n in zip(KINDS, (singles, pairs, counts), strict=True):
            for title, result in ceilings(pipe.vae, kind, n).items() if n else ():
                results[f"{kind}, {title}"] = result
        print(f"{name}\n{table(results)}", flush=True)
        (out / f"{name}.md").write_text(table(results) + "\n")
        (out / f"{name}.json").write_text(json.dumps(results, indent=2) + "\n")
        contact_sheet(rows).save(out / f"{name}.jpg", quality=88)


if __name__ == "__main__":
    typer.run(main)
