"""The embedded models: the world keeps its secrets, the scorer sees, the recipe resumes, and prompts are drawn."""

import io
import json
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from diffusers import DDIMScheduler
from PIL import Image
from safetensors import safe_open
from transformers import CLIPTokenizer
from typer.testing import CliRunner

from models.embedded.architecture import FAMILIES, SD15
from models.embedded.captions import caption, plain_caption, vocabulary
from models.embedded.drawing import render
from models.embedded.evaluate import KINDS, held_out_scenes
from models.embedded.recipe import Recipe
from models.embedded.scoring import score
from models.embedded.text import tokenise, tokenizers
from models.embedded.training import Dice, Plan, train
from models.embedded.world import (
    COLOURS,
    HELD_OUT_GROUNDS,
    HELD_OUT_OBJECTS,
    SHAPES,
    Scene,
    Thing,
    single,
    training_scene,
)
from models.request import GenerationRequest
from tests.models.conftest import new_engine

EMBEDDED = Path("models/embedded")
NAMES = list(FAMILIES)
LARGEST_MODEL = 15_000_000  # bytes


def test_training_never_draws_a_held_out_combination():
    rng = np.random.default_rng(0)
    for _ in range(5000):
        scene = training_scene(rng)
        for thing in scene.things:
            assert (thing.colour, thing.shape) not in HELD_OUT_OBJECTS
            assert (thing.colour, scene.background) not in HELD_OUT_GROUNDS


def test_every_colour_and_shape_still_occurs_in_training():
    rng = np.random.default_rng(1)
    scenes = [training_scene(rng) for _ in range(2000)]
    things = [thing for scene in scenes for thing in scene.things]
    assert {thing.colour for thing in things} == {scene.background for scene in scenes} == set(COLOURS)
    assert {thing.shape for thing in things} == set(SHAPES)


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_draws_held_out_combinations_only(kind):
    scenes = held_out_scenes(kind, 50)
    assert all(scene.held_out for scene in scenes)
    assert held_out_scenes(kind, 10) == scenes[:10]


@pytest.mark.parametrize("kind", KINDS)
def test_the_scorer_is_right_about_drawn_pictures(kind):
    rng = np.random.default_rng(2)
    scenes = held_out_scenes(kind, 40)
    assert all(score(render(scene, rng), scene)["all"] for scene in scenes)


def test_the_scorer_sees_what_is_wrong():
    rng = np.random.default_rng(3)
    scene = single(rng, placed=True)
    thing = scene.things[0]
    wrong = replace(scene, things=(replace(thing, shape=next(shape for shape in SHAPES if shape != thing.shape)),))
    verdict = score(render(wrong, rng), scene)
    assert not verdict["shape"]
    assert not verdict["all"]
    assert verdict["colour"]
    assert verdict["background"]


def test_captions_name_what_the_scene_shows():
    thing = Thing(shape="star", colour="orange", x=0.5, y=0.5, radius=0.3)
    scene = Scene(things=(thing,), background="blue", size="small")
    assert plain_caption(scene) == "a small orange star on a blue background"
    assert caption(scene, np.random.default_rng(4)) != caption(scene, np.random.default_rng(5))


def test_every_word_of_the_grammar_is_one_token():
    tokenizer = tokenizers(SD15)[0]
    assert all(len(tokenizer(word).input_ids) == 3 for word in vocabulary())  # and the start and the end
    assert len(tokenizer("an astronaut rides").input_ids) > 5  # other words fall back to letters


def test_the_second_generation_pads_as_the_originals_do():
    assert tokenise(tokenizers(FAMILIES["sd21"]), ["a star"])[0][0, -1] == 0
    first, second = tokenise(tokenizers(FAMILIES["sdxl"]), ["a star"])
    assert first[0, -1] != 0
    assert second[0, -1] == 0


def test_a_resumed_run_ends_where_an_unbroken_one_does(tmp_path):
    def run(folder: Path, steps: int) -> torch.Tensor:
        torch.manual_seed(0)
        network = torch.nn.Linear(8, 8)

        def loss(step: int, dice: Dice) -> torch.Tensor:
            if step == steps:
                raise InterruptedError
            return (network(dice.normal(4, 8)) - dice.uniform(4, 8)).square().mean()

        plan = Plan(name="line", steps=20, learning_rate=0.01, checkpoint_every=5)
        return train(network, plan, loss, folder=folder, device=torch.device("cpu")).weight.detach()

    unbroken = run(tmp_path / "unbroken", -1)
    with pytest.raises(InterruptedError):
        run(tmp_path / "broken", 12)
    assert torch.equal(run(tmp_path / "broken", -1), unbroken)


@pytest.mark.parametrize(
    "name", ["train", "lora", "controlnets.__main__", "upscalers.__main__", "evaluate", "evaluate_loras"]
)
def test_the_programs_explain_their_options(name):
    program = typer.Typer()
    program.command()(import_module(f"models.embedded.{name}").main)
    explained = CliRunner().invoke(program, ["--help"])
    assert explained.exit_code == 0, explained.output
    assert "--out" in explained.output


@pytest.fixture
def one_thread():
    """Tiny batches on several threads wait for each other more than they compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_the_whole_recipe_runs_in_miniature_and_then_only_loads(tmp_path):
    recipe = Recipe(folder=tmp_path / "work", device=torch.device("cpu"), scale=0.0005, workers=1)
    recipe.make("sd21", tmp_path / "first")
    recipe.make("sd21", tmp_path / "again")
    weights = "sd21/unet/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "first" / weights).read_bytes() == (tmp_path / "again" / weights).read_bytes()
    index = json.loads((tmp_path / "first/sd21/model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"


@pytest.mark.parametrize("name", NAMES)
def test_a_model_is_small_and_laid_out_as_the_originals_are(name):
    folder = EMBEDDED / name
    files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    assert sum(path.stat().st_size for path in files.values()) <= LARGEST_MODEL
    encoders = ["text_encoder"] + ["text_encoder_2"] * (name == "sdxl")
    weights = {f"{encoder}/model.safetensors" for encoder in encoders}
    weights |= {f"{network}/diffusion_pytorch_model.safetensors" for network in ("unet", "vae")}
    assert {path for path in files if path.endswith(".safetensors")} == weights
    for path in weights:
        with safe_open(files[path], "pt") as file:
            assert {file.get_slice(key).get_dtype() for key in file.keys()} <= {"F16", "I64"}  # noqa: SIM118
    for tokenizer in ["tokenizer"] + ["tokenizer_2"] * (name == "sdxl"):
        assert {f"{tokenizer}/vocab.json", f"{tokenizer}/merges.txt"} <= set(files)
        assert CLIPTokenizer.from_pretrained(folder / tokenizer).model_max_length == 77


@pytest.mark.parametrize("name", NAMES)
def test_a_scheduler_is_configured_as_the_originals_is(name):
    config = json.loads((EMBEDDED / name / "scheduler" / "scheduler_config.json").read_text())
    assert config["prediction_type"] == FAMILIES[name].prediction_type
    assert config["steps_offset"] == 1
    assert config["beta_schedule"] == "scaled_linear"
    assert DDIMScheduler.from_config(config).config.clip_sample is False


@pytest.mark.parametrize("name", NAMES)
def test_a_model_draws_what_prompts_say(name):
    scenes = held_out_scenes("one object", 8)
    requests = [
        GenerationRequest(model=name, prompt=plain_caption(scene), steps=16, guidance_scale=5.0, seed=i)
        for i, scene in enumerate(scenes)
    ]
    finished = new_engine(name).generate(requests)
    pictures = [Image.open(io.BytesIO(picture.data)) for [picture] in finished]
    scores = [score(picture, scene) for picture, scene in zip(pictures, scenes, strict=True)]
    assert sum(right["background"] for right in scores) >= 7
    assert sum(right["colour"] for right in scores) >= 7
