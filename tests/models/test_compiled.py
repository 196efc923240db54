"""The compiled network: the same numbers, made beside the serving, and found again by the next start."""

import json
import logging
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file

from models import compiled
from models.captured import LASTING, Captured
from models.card import ModelCard
from models.compiled import Compiled
from models.engine import Engine
from models.errors import InvalidRequest
from models.families.sd import SD
from models.likeness import name_of
from models.parts import AdapterUse
from models.registered import Adapters
from models.request import GenerationRequest
from models.weights import Components, place
from tests.models.conftest import drawn, folder, loaded_family

# Compiling even this takes a minute or two of a slow processor.
pytestmark = pytest.mark.timeout(600)

DEADLINE_S = 500.0


def small_unet(seed: int = 1) -> UNet2DConditionModel:
    """One block each way, so that compiling takes seconds."""
    torch.manual_seed(seed)
    width = loaded_family("sd15").network_config["cross_attention_dim"]
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32,),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        attention_head_dim=8,
        norm_num_groups=8,
        cross_attention_dim=width,
    )
    return unet.eval().requires_grad_(False)


def small_engine(cache: Path | None, adapters: Path | None = None, seed: int = 1) -> Engine:
    family = loaded_family("sd15")
    modules = {
        "unet": small_unet(seed),
        "vae": family.autoencoder._vae,
        "text_encoder": family._text_encoder,
        "tokenizer": family._tokenizer,
    }
    components = Components(modules=modules, scheduler_config=family.scheduler_config, index={}, revision="small")
    small = SD(components, replace(family.placement, compiled=cache))
    return Engine(small, ModelCard.read("sd15", "sd", folder("sd15")), adapters=Adapters(small, adapters))


def ask(seed: int, **options) -> GenerationRequest:
    asked = {"prompt": "a red circle", "width": 64, "height": 64, "steps": LASTING + 5, "sampler": "dpmpp_2m"}
    return GenerationRequest(model="sd15", seed=seed, **asked | options)


def pictures(engine: Engine, requests: list[GenerationRequest]) -> list[np.ndarray]:
    return [drawn(one.data) for [one] in engine.generate(requests)]


def settle(engine: Engine) -> float:
    """Draws what is asked for often, leaves the cores to the compiler, and draws again; the seconds that took."""
    began = time.monotonic()
    while not captured(engine).compiled_kinds:
        engine.generate([ask(1)])
        while not captured(engine).settled():
            assert time.monotonic() < began + DEADLINE_S
            time.sleep(0.2)
        assert not captured(engine).failed
    return time.monotonic() - began


def captured(engine: Engine) -> Captured:
    made = engine._denoiser.captured
    assert made is not None
    return made


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module")
def registered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a LoRA for the small network."""
    folder, factors = tmp_path_factory.mktemp("loras"), torch.Generator().manual_seed(3)
    layer = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_v"
    down, up = (torch.randn(shape, generator=factors) for shape in ((4, 32), (32, 4)))
    save_file({f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up}, folder / "loud.safetensors")
    return folder


@pytest.fixture(scope="module")
def settled(cache: Path, registered: Path) -> tuple[Engine, float]:
    """An engine whose network is compiled, and how long that took."""
    engine = small_engine(cache, registered)
    return engine, settle(engine)


REQUESTS = [ask(seed, sampler=sampler) for seed, sampler in enumerate(("dpmpp_2m", "euler_a", "ddim"))]


def test_it_draws_what_the_network_draws(settled: tuple[Engine, float]):
    engine, _ = settled
    expected, rows = pictures(small_engine(None), REQUESTS), []
    [package] = captured(engine)._compiled._packages.values()
    model = package._model
    package._model = lambda **named: rows.append(len(named["sample"])) or model(**named)
    found = pictures(engine, REQUESTS)
    package._model = model
    for ours, theirs in zip(found, expected, strict=True):
        assert np.abs(ours - theirs).max() <= 1
    assert rows == [2 * len(REQUESTS)] * (LASTING + 5)  # any number of them


def test_the_next_start_finds_it_whatever_the_weights(settled: tuple[Engine, float], cache: Path):
    _, cold_s = settled
    made = list(cache.glob("*.pt2"))
    another = small_engine(cache, seed=2)
    warm_s = settle(another)
    assert warm_s < cold_s / 2
    assert list(cache.glob("*.pt2")) == made
    for ours, theirs in zip(
        pictures(another, REQUESTS[:1]), pictures(small_engine(None, seed=2), REQUESTS[:1]), strict=True
    ):
        assert np.abs(ours - theirs).max() <= 1


def test_rows_with_loras_on_are_not_left_without(settled: tuple[Engine, float], registered: Path):
    engine, _ = settled
    request = ask(3, adapters=(AdapterUse(name="loud", weight=1.0),))
    [plain] = pictures(small_engine(None, registered), [request])
    for _ in range(2):
        [ours] = pictures(engine, [request])
    [without] = pictures(engine, [ask(3)])
    assert np.abs(ours - plain).max() <= 1
    assert np.abs(ours - without).max() > 1


def example(rows: int) -> dict:
    width = loaded_family("sd15").network_config["cross_attention_dim"]
    latents, context = torch.randn(rows, 4, 8, 8), torch.randn(rows, 77, width)
    return {"sample": latents, "timestep": torch.ones(rows), "encoder_hidden_states": context, "return_dict": False}


@torch.inference_mode()
def test_one_that_answers_something_else_is_not_used(
    settled: tuple[Engine, float], cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(compiled, "TOLERANCE", -1.0)
    engine = small_engine(cache)
    with caplog.at_level(logging.WARNING, "models.compiled"):
        for _ in range(3):
            [ours] = pictures(engine, REQUESTS[:1])
    assert captured(engine).failed
    assert "from the network's" in caplog.text
    assert (ours == pictures(small_engine(None), REQUESTS[:1])[0]).all()


@torch.inference_mode()
def test_what_cannot_be_compiled_serves_as_it_is(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    network = small_unet()
    network.register_to_config(block_out_channels=(32, 64))  # which contradicts the rest
    wanted = Compiled(network, tmp_path)
    with caplog.at_level(logging.WARNING, "models.compiled"):
        package = wanted.package(lambda: network(**example(2)))
        ended = time.monotonic() + DEADLINE_S
        while not package.failed and time.monotonic() < ended:
            time.sleep(0.2)
    assert package.failed
    assert not package.ready()
    assert "ValueError" in caplog.text
    assert not list(tmp_path.glob("*.pt2"))
    network.mid_block.register_forward_hook(lambda *_: None)
    assert wanted.package(lambda: network(**example(2))) is None


def test_what_cannot_be_kept_or_compiled_is_refused_when_the_model_is_placed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "file").touch()
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    for device, folder_ in (("cpu", tmp_path / "file" / "below"), ("mps", tmp_path)):
        with pytest.raises(InvalidRequest) as refused:
            place(device, "float32", compiled=folder_)
        assert refused.value.field == "compiled"


def test_packages_are_for_an_architecture_and_not_for_the_place_it_came_from():
    network = small_unet()
    name = name_of(compiled._job(network, example(2)), 1)
    assert name_of(compiled._job(network, example(5)), 1) == name
    network.register_to_config(_name_or_path="some/where/else")
    assert name_of(compiled._job(network, example(2)), 1) == name
    assert name_of(compiled._job(network, example(2) | {"sample": torch.randn(2, 4, 8, 16)}), 1) != name
    assert name_of(compiled._job(network, example(2)), 2) != name


def test_the_compiler_ends_with_whoever_wanted_it(tmp_path: Path):
    program = "from models.compiling import main; main()"
    command = [sys.executable, "-c", program, str(tmp_path / "package.pt2")]
    network = small_unet()
    job = json.dumps(compiled._job(network, example(2)))
    with subprocess.Popen(command, stdin=subprocess.PIPE, text=True, start_new_session=True) as process:
        process.stdin.write(job + "\n")
        process.stdin.close()
        assert process.wait(120) == -signal.SIGKILL
    assert not list(tmp_path.glob("*.pt2"))
