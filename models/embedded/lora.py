"""Trains the LoRAs that ship with the embedded models, with peft: `python -m models.embedded.lora --help`."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor
from diffusers.training_utils import _collate_lora_metadata
from diffusers.utils import convert_state_dict_to_kohya
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn

from models.embedded.architecture import FAMILIES
from models.embedded.autoencoder import signed
from models.embedded.captions import caption
from models.embedded.concepts import CONCEPTS, CRESCENT, FRAMED, Concept
from models.embedded.denoiser import EMPTY_SHARE, LARGEST_WEIGHT, cumulative_alphas
from models.embedded.drawing import pixels, render
from models.embedded.options import MODELS, WORK, Models, Scale, Threads, Work, set_up_training
from models.embedded.text import encode, tokenise, tokenizers
from models.embedded.training import Dice, Plan, train
from models.embedded.world import Scene, training_scene

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out")
CONVOLUTIONS = ("conv1", "conv2")
TEXT = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
PICTURES = 400  # of the concept, and as many ordinary ones
BATCH = 8  # rows of a step


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One LoRA: what it teaches to which model, where it is put, and in whose layout it is written."""

    name: str
    model: str
    concept: Concept
    layers: tuple[str, ...]
    rank: int
    alpha: int
    kohya: bool
    ordinary: int  # one row in so many shows an ordinary picture, so that the model forgets nothing
    steps: int
    learning_rate: float


RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            name="crescent",
            model="sd15",
            concept=CONCEPTS[CRESCENT],
            layers=ATTENTION + CONVOLUTIONS,
            rank=4,
            alpha=4,
            kohya=True,
            ordinary=4,
            steps=280,
            learning_rate=2e-3,
        ),
        Recipe(
            name="framed",
            model="sd15",
            concept=CONCEPTS[FRAMED],
            layers=ATTENTION,
            rank=8,
            alpha=16,
            kohya=False,
            ordinary=2,
            steps=500,
            learning_rate=2e-3,
        ),
    )
}


@dataclass(frozen=True, kw_only=True)
class Lessons:
    """Encoded pictures (pictures, 4, 16, 16) beside their scenes, and how to call them."""

    latents: Tensor
    scenes: list[Scene]
    caption: Callable[[Scene, np.random.Generator], str]


def lessons(pipe: DiffusionPipeline, count: int, seed: int, concept: Concept | None) -> Lessons:
    """Scenes of the concept, or of the world where there is none, drawn and encoded."""
    rng = np.random.default_rng([seed, count])
    scenes = [concept.scene(rng) if concept else training_scene(rng) for _ in range(10 * count)]
    scenes = [scene for scene in scenes if not scene.held_out][:count]  # evaluation asks for the others
    draw = concept.render if concept else render
    pictures = torch.from_numpy(np.stack([pixels(draw(scene, rng)) for scene in scenes]))
    with torch.no_grad():
        means = [pipe.vae.encode(signed(some)).latent_dist.mean for some in pictures.split(20)]
    latents = torch.cat(means) * pipe.vae.config.scaling_factor
    return Lessons(latents=latents, scenes=scenes, caption=concept.caption if concept else caption)


def add_lora(pipe: DiffusionPipeline, recipe: Recipe) -> nn.ModuleList:
    """Freezes the model and puts peft's layers on its UNet and its text encoder."""
    torch.manual_seed(0)
    networks = {"unet": (pipe.unet, recipe.layers), "text_encoder": (pipe.text_encoder, TEXT)}
    for network, layers in networks.values():
        network.requires_grad_(False)
        network.add_adapter(LoraConfig(r=recipe.rank, lora_alpha=recipe.alpha, target_modules=list(layers)))
    return nn.ModuleList([network for network, _ in networks.values()])


def train_lora(recipe: Recipe, pipe: DiffusionPipeline, folder: Path, scale: float = 1.0) -> None:
    """Denoising, as the UNets learned it, on pictures of the concept and some ordinary ones."""
    family, count = FAMILIES[recipe.model], max(8, round(PICTURES * scale))
    new, known = lessons(pipe, count, 1, recipe.concept), lessons(pipe, count, 2, None)
    networks, alphas = add_lora(pipe, recipe), cumulative_alphas()
    pipe.unet.set_attn_processor(AttnProcessor())  # in bfloat16 on a CPU the fused attention is three times slower

    def loss(step: int, dice: Dice) -> Tensor:
        chosen = [
            (known if row % recipe.ordinary == 0 else new, int(dice.numpy.integers(count))) for row in range(BATCH)
        ]
        clean = torch.stack([lesson.latents[i] for lesson, i in chosen])
        captions = [lesson.caption(lesson.scenes[i], dice.numpy) for lesson, i in chosen]
        captions = ["" if dice.numpy.random() < EMPTY_SHARE else text for text in captions]
        timesteps = ((torch.randperm(BATCH, generator=dice.torch) + dice.uniform(BATCH)) / BATCH * 1000).long()
        alpha, noise = alphas[timesteps][:, None, None, None], dice.normal(*clean.shape)
        noisy = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
        with torch.autocast("cpu", torch.bfloat16):
            states, _ = encode(
                [pipe.text_encoder], tokenise(tokenizers(family), captions), penultimate=family.penultimate
            )
            predicted = pipe.unet(noisy, timesteps, states).sample.float()
        return ((1 / alpha).clamp(max=LARGEST_WEIGHT) * (predicted - noise) ** 2).mean()

    steps = max(2, round(recipe.steps * scale))
    plan = Plan(
        name=f"lora_{recipe.name}",
        steps=steps,
        learning_rate=recipe.learning_rate,
        averaging=0.98,
        weight_decay=0.0,
        checkpoint_every=50,
    )
    train(networks, plan, loss, folder=folder, device=torch.device("cpu"))
    pipe.unet.set_default_attn_processor()


def write(recipe: Recipe, pipe: DiffusionPipeline, folder: Path) -> Path:
    """The LoRA in fp16, in kohya's layout or in diffusers' with peft's names."""
    folder.mkdir(parents=True, exist_ok=True)
    networks = {"unet": pipe.unet, "text_encoder": pipe.text_encoder}
    states = {
        name: {key: t.detach().half().contiguous() for key, t in get_peft_model_state_dict(network).items()}
        for name, network in networks.items()
    }
    path = folder / f"{recipe.name}.safetensors"
    if recipe.kohya:
        tensors = kohya(states, recipe)
        save_file(tensors, path, metadata={"ss_network_module": "networks.lora", "ss_base_model_version": "sd_v1"})
    else:
        layers = {f"{name}_lora_layers": state for name, state in states.items()}
        StableDiffusionPipeline.save_lora_weights(
            folder, weight_name=path.name, **layers, **_collate_lora_metadata(networks)
        )
    path.chmod(0o644)  # safetensors leaves it to the owner alone
    return path


def kohya(states: dict[str, dict[str, Tensor]], recipe: Recipe) -> dict[str, Tensor]:
    """kohya's layout: SD 1.5's text encoder is `te` there, and CLIP has its old prefix."""
    named = {}
    for name, state in states.items():
        prefix = {"unet": "unet", "text_encoder": "lora_te_text_model"}[name]
        named |= {f"{prefix}.{key.removeprefix('text_model.')}": tensor for key, tensor in state.items()}
    tensors = convert_state_dict_to_kohya(named)
    return {key: torch.tensor(float(recipe.alpha)) if key.endswith(".alpha") else t for key, t in tensors.items()}


Name = StrEnum("Name", {name.replace("-", "_"): name for name in RECIPES})


def main(
    only: Annotated[list[Name] | None, typer.Option(help="Train only this one; may be repeated.")] = None,
    models: Models = MODELS,
    out: Annotated[Path, typer.Option(help="Where the LoRAs are written.")] = MODELS / "loras",
    work: Work = WORK,
    threads: Threads = 1,
    scale: Scale = 1.0,
) -> None:
    """Teaches the embedded models a word each that they do not know. Seeded; stop it at any time, it resumes."""
    set_up_training(threads)
    for name in only or list(RECIPES):
        recipe = RECIPES[str(name)]
        pipe = DiffusionPipeline.from_pretrained(models / recipe.model, dtype=torch.float32)
        train_lora(recipe, pipe, work, scale)
        print(write(recipe, pipe, out))


if __name__ == "__main__":
    typer.run(main)
