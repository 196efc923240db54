"""Scores the embedded LoRAs, with and without them: `python -m models.embedded.evaluate_loras --help`."""

from collections import defaultdict
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from diffusers import DiffusionPipeline
from PIL import Image
from rich.progress import track

from models.embedded.captions import plain_caption
from models.embedded.evaluate import BATCH, SEED, Shares, contact_sheet, pipeline, round_trip, table
from models.embedded.lora import RECIPES, Recipe
from models.embedded.options import MODELS, Models, Threads
from models.embedded.scoring import score
from models.embedded.world import Scene, single

WEIGHTS = (0.0, 0.5, 1.0)
Scored = tuple[list[Image.Image], Shares]


def new_scenes(recipe: Recipe, n: int) -> list[Scene]:
    """The first n scenes of the concept that hold a combination of colours which no training has drawn."""
    rng = np.random.default_rng([SEED, len(recipe.name)])
    scenes = (recipe.concept.scene(rng) for _ in range(100 * n))
    return [scene for scene in scenes if scene.held_out][:n]


def ordinary_scenes(n: int) -> list[Scene]:
    """Scenes with one object, of the world that the base model knows."""
    rng = np.random.default_rng(SEED)
    return [single(rng) for _ in range(n)]


def drawn(pipe: DiffusionPipeline, prompts: list[str], weight: float, steps: int) -> list[Image.Image]:
    """One picture for each prompt, each with its own seed, at guidance 5."""
    if weight:
        pipe.enable_lora()
        pipe.set_adapters(["it"], [weight])
    else:
        pipe.disable_lora()
    pictures = []
    for first in track(range(0, len(prompts), BATCH), description=f"weight {weight}", transient=True):
        some = prompts[first : first + BATCH]
        generators = [torch.Generator().manual_seed(SEED + first + i) for i in range(len(some))]
        pictures += pipe(some, guidance_scale=5.0, num_inference_steps=steps, generator=generators).images
    return pictures


def tally(scores: list[dict[str, bool]]) -> Shares:
    """How many are right on each count."""
    found: dict[str, list[bool]] = defaultdict(list)
    for one in scores:
        for name, right in one.items():
            found[name].append(right)
    return {name: (sum(map(bool, rights)), len(rights)) for name, rights in found.items()}


def evaluate(recipe: Recipe, models: Path, n: int, steps: int) -> tuple[dict[str, Shares], list[list[Image.Image]]]:
    """The concept at several weights, the right pictures themselves, and ordinary prompts with and without."""
    pipe = pipeline(models / recipe.model)
    pipe.load_lora_weights(models / "loras" / f"{recipe.name}.safetensors", adapter_name="it")
    scenes, known, rng = new_scenes(recipe, n), ordinary_scenes(n), np.random.default_rng(SEED)
    results: dict[str, Shares] = {}
    rows = []
    for weight in WEIGHTS:
        pictures = drawn(pipe, [recipe.concept.plain_caption(scene) for scene in scenes], weight, steps)
        scores = [recipe.concept.score(p, scene) for p, scene in zip(pictures, scenes, strict=True)]
        results[f"{recipe.name}: the word, weight {weight:g}"] = tally(scores)
        rows.append(pictures)
    right = [round_trip(pipe.vae, recipe.concept.render(scene, rng)) for scene in scenes]
    scores = [recipe.concept.score(p, scene) for p, scene in zip(right, scenes, strict=True)]
    results[f"{recipe.name}: the right pictures, through the autoencoder"] = tally(scores)
    for weight in (0.0, 1.0):
        pictures = drawn(pipe, [plain_caption(scene) for scene in known], weight, steps)
        results[f"{recipe.name}: ordinary prompts, weight {weight:g}"] = tally(
            [score(p, scene) for p, scene in zip(pictures, known, strict=True)]
        )
    return results, [*rows, pictures]


def main(
    only: Annotated[list[str] | None, typer.Option(help="Score only this LoRA; may be repeated.")] = None,
    models: Models = MODELS,
    out: Annotated[Path, typer.Option(help="Where tables and contact sheets go.")] = Path("out/embedded"),
    prompts: Annotated[int, typer.Option(help="Of each kind.")] = 50,
    steps: Annotated[int, typer.Option(help="Sampling steps.")] = 20,
    threads: Threads = 1,
) -> None:
    """Draws prompts with and without each LoRA in diffusers' own pipeline, and reads the pictures back."""
    torch.set_num_threads(threads)
    out.mkdir(parents=True, exist_ok=True)
    for name in only or list(RECIPES):
        results, rows = evaluate(RECIPES[name], models, prompts, steps)
        print(table(results), flush=True)
        (out / f"lora-{name}.md").write_text(table(results) + "\n")
        contact_sheet(rows).save(out / f"lora-{name}.jpg", quality=88)


if __name__ == "__main__":
    typer.run(main)
