"""LoRAs: what diffusers draws with them, on each row its own, in one forward; and nothing of a file is dropped."""

import io
import json
from functools import cache
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save, save_file
from torch import nn

from models.adapters.lora import LoraLayers, load
from models.adapters.registry import Registry
from models.embedded.concepts import CONCEPTS
from models.embedded.lora import RECIPES
from models.engine import Engine
from models.errors import GenerationFailed, InvalidRequest, NotFound
from models.loras import Loras
from models.parts import AdapterUse
from models.registered import Adapters
from models.request import GenerationRequest
from tests.models.conftest import drawn, folder, loaded_family, new_engine

SHIPPED = Path("models/embedded/loras")
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out")
TEXT = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
WINDOWS = ("conv1", "conv2", "downsamplers.0.conv", "upsamplers.0.conv", "conv_in", "time_emb_proj")
Numbers = dict[str, dict[str, tuple[torch.Tensor, torch.Tensor]]]


# Files as the world writes them, made of random numbers


def networks(model: str) -> dict[str, nn.Module]:
    return dict(loaded_family(model).networks)


def numbers(model: str, seed: int, rank: int = 4, layers: tuple[str, ...] = ATTENTION, text: bool = True) -> Numbers:
    """Factors for every layer whose path ends in one of `layers`, of a size that visibly changes the picture."""
    torch.manual_seed(seed)
    made: Numbers = {}
    for name, network in networks(model).items():
        ends = layers if name == "unet" else TEXT if text else ()
        made[name] = {}
        for path, module in network.named_modules():
            if path.endswith(ends) and ends and isinstance(module, nn.Linear | nn.Conv2d):
                outputs, inputs, *window = module.weight.shape
                down = torch.randn(rank, inputs, *window) / (inputs * np.prod(window)) ** 0.5
                up = torch.randn(outputs, rank, *([1] * len(window))) * 0.12
                made[name][path] = (down.half(), up.half())
    return {name: layers for name, layers in made.items() if layers}


def peft(made: Numbers) -> dict[str, torch.Tensor]:
    keys = {"lora_A": 0, "lora_B": 1}
    return {
        f"{name}.{path}.{half}.weight": factors[i]
        for name, layers in made.items()
        for path, factors in layers.items()
        for half, i in keys.items()
    }


def diffusers_old(made: Numbers) -> dict[str, torch.Tensor]:
    """As diffusers wrote it before peft: attention processors, and the text encoder's `lora_linear_layer`."""
    tensors = {}
    for name, layers in made.items():
        for path, factors in layers.items():
            for half, factor in zip(("down", "up"), factors, strict=True):
                parent, _, last = path.removesuffix(".0").rpartition(".")
                if name != "unet":
                    key = f"{path.removeprefix('text_model.')}.lora_linear_layer.{half}"
                    key = f"text_model.{key}"
                elif last in ("to_q", "to_k", "to_v", "to_out"):
                    key = f"{parent}.processor.{last}_lora.{half}"
                else:
                    key = f"{path}.lora.{half}"
                tensors[f"{name}.{key}.weight"] = factor
    return tensors


def kohya(made: Numbers, alpha: float | None = None) -> dict[str, torch.Tensor]:
    prefixes = {"unet": "lora_unet", "text_encoder": "lora_te1_text_model", "text_encoder_2": "lora_te2_text_model"}
    tensors = {}
    for name, layers in made.items():
        for path, (down, up) in layers.items():
            key = f"{prefixes[name]}_{path.removeprefix('text_model.').replace('.', '_')}"
            tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
            tensors[f"{key}.alpha"] = torch.tensor(float(down.shape[0] if alpha is None else alpha))
    return tensors


def sgm(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """kohya's names for SDXL: those of the original code, whose blocks are counted through."""
    renamed = {}
    for key, tensor in tensors.items():
        for first, block in (
            ("down_blocks_1_attentions_0", "input_blocks_4_1"),
            ("mid_block_attentions_0", "middle_block_1"),
            ("up_blocks_0_attentions_1", "output_blocks_1_1"),
        ):
            key = key.replace(first, block)
        renamed[key] = tensor
    return renamed


def loaded(model: str, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None):
    tensors = {key: tensor.clone() for key, tensor in tensors.items()}  # safetensors saves nothing twice
    return load("it", "0" * 64, save(tensors, metadata), networks(model))


def layers_of(model: str, name: str = "unet") -> LoraLayers:
    return LoraLayers(networks(model)[name], name, torch.device("cpu"))


# The layouts


@pytest.mark.parametrize("model", ["sd15", "sdxl"])
@pytest.mark.parametrize("layout", [diffusers_old, kohya])
def test_every_layout_says_the_same(model, layout):
    made = numbers(model, 1)
    ours, other = loaded(model, peft(made)), loaded(model, layout(made))
    assert ours.targets.keys() == other.targets.keys() == networks(model).keys()
    assert ours.nbytes == sum(down.nbytes + up.nbytes for own in made.values() for down, up in own.values())
    for name, layers in ours.targets.items():
        assert layers.keys() == other.targets[name].keys()
        for path, factors in layers.items():
            for lora in (ours, other):
                assert torch.equal(lora.targets[name][path].down, factors.down)
                assert torch.equal(lora.targets[name][path].up, factors.up)
                assert lora.targets[name][path].scale == 1


def test_the_names_of_the_original_sdxl_code_are_understood():
    made = numbers("sdxl", 1, text=False)
    blocks = ("down_blocks.1.attentions.0.", "mid_block.attentions.0.", "up_blocks.0.attentions.1.")
    made = {"unet": {path: factors for path, factors in made["unet"].items() if path.startswith(blocks)}}
    named = sgm(kohya(made))
    assert not any("down_blocks" in key or "up_blocks" in key for key in named)
    assert loaded("sdxl", named).targets["unet"].keys() == made["unet"].keys()


def test_scales_come_from_kohyas_alphas_each_for_its_own_layer():
    made = numbers("sd15", 1, layers=(*ATTENTION, *WINDOWS))
    tensors = kohya(made)
    alphas = [key for key in tensors if key.endswith(".alpha")]
    tensors |= {key: torch.tensor(float(i)) for i, key in enumerate(alphas)}
    lora = loaded("sd15", tensors)
    scales = [lora.targets[name][path].scale for name, layers in made.items() for path in layers]
    assert scales == [i / 4 for i in range(len(alphas))]


@pytest.mark.parametrize(("options", "scale"), [({}, 4.0), ({"use_rslora": True}, 8.0)])
def test_scales_come_from_pefts_configuration(options, scale):
    configuration = {"unet.r": 4, "unet.lora_alpha": 16, "unet.alpha_pattern": {"mid_block.attentions.0.proj_in": 4}}
    text = json.dumps(configuration | {f"unet.{key}": value for key, value in options.items()})
    lora = loaded("sd15", peft(numbers("sd15", 1)), {"lora_adapter_metadata": text})
    unet = lora.targets["unet"]
    assert unet["mid_block.attentions.0.proj_in"].scale == scale / 4
    assert unet["mid_block.attentions.0.proj_out"].scale == scale
    assert {factors.scale for factors in lora.targets["text_encoder"].values()} == {1}


# What is refused


def one(model: str = "sd15", path: str = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q") -> Numbers:
    return {"unet": {path: numbers(model, 1)["unet"][path]}}


def altered(change: str) -> dict[str, torch.Tensor]:
    tensors, key = kohya(one()), "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    half = torch.zeros(4, 4).half()
    return {
        "DoRA": tensors | {f"{key}.dora_scale": half},
        "LoHa": {f"{key}.hada_w1_a": half, f"{key}.hada_w1_b": half},
        "LoKr": {f"{key}.lokr_w1": half, f"{key}.lokr_w2": half},
        "Tucker": tensors | {f"{key}.lora_mid.weight": half},
        "difference of whole weights": {f"{key}.diff": half},
        "layout": tensors | {"lora_unet_mystery.weight": half},
        "no layout": {"unet.mid_block.lora": half},
        "half of": {k: v for k, v in peft(one()).items() if "lora_A" in k},
        "half a kohya pair": {k: v for k, v in tensors.items() if "lora_up" not in k},
        "bias": peft(one()) | {"unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora_B.bias": half},
        "another base model": {k.replace("mid_block", "down_blocks_9"): v for k, v in tensors.items()},
        "kind of layer": {k.replace("attn1_to_q", "norm1"): v for k, v in tensors.items()},
        "empty": {},
    }[change]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("DoRA", "DoRA"),
        ("LoHa", "LoHa"),
        ("LoKr", "LoKr"),
        ("Tucker", "Tucker"),
        ("difference of whole weights", "whole weights"),
        ("layout", "layout"),
        ("no layout", "half of"),
        ("half of", "half of"),
        ("half a kohya pair", "layout"),
        ("bias", "half of"),
        ("another base model", "another base model.*down_blocks.9"),
        ("kind of layer", "LayerNorm"),
        ("empty", "none at all"),
    ],
)
def test_what_is_not_supported_is_refused_and_says_why(change, says):
    with pytest.raises(InvalidRequest, match=says) as refused:
        loaded("sd15", altered(change))
    assert refused.value.field == "adapters"


@pytest.mark.parametrize(
    ("made_for", "used_on", "says"),
    [("sdxl", "sd15", "sdxl_base"), ("sd15", "sdxl", "sd_v1"), ("sd15", "sd21", "goes from")],
)
def test_a_lora_for_another_base_model_is_refused(made_for, used_on, says):
    tensors = kohya(numbers(made_for, 1, text=made_for == "sdxl"))
    if used_on == "sd21":  # of the same layers as 1.5 here; the original's context is wider
        tensors = {key: torch.cat([t, t], 1) if "attn2_to_k.lora_down" in key else t for key, t in tensors.items()}
    metadata = {"ss_base_model_version": {"sdxl": "sdxl_base_v1-0"}.get(made_for, "sd_v1")}
    with pytest.raises(InvalidRequest, match="made for another base model") as refused:
        loaded(used_on, tensors, metadata)
    assert says in refused.value.message


def test_bytes_that_are_no_safetensors_file_are_refused():
    for data in (b"", b"\x80\x04pickle", save(kohya(one()))[:-1]):
        with pytest.raises(InvalidRequest, match="not a complete"):
            load("it", "", data, networks("sd15"))


# On a network, row by row


def call(model: str, rows: int, unet: nn.Module | None = None) -> torch.Tensor:
    """A forward of the model's UNet, or of the one given, with `rows` rows, always the same ones."""
    generator = torch.Generator().manual_seed(0)
    unet = unet or networks(model)["unet"]
    sizes = ((4, 16, 16), (20, unet.config.cross_attention_dim))
    latents, context = (torch.randn(rows, *size, generator=generator) for size in sizes)
    added = {"text_embeds": context[:, 0, :128], "time_ids": torch.full((rows, 6), 128.0)} if model == "sdxl" else None
    with torch.inference_mode():
        return unet(latents, torch.full((rows,), 500), context, added_cond_kwargs=added, return_dict=False)[0]


@pytest.fixture(scope="module", params=["sd15", "sd21", "sdxl"])
def pair(request):
    """A model, a LoRA with convolutions for it, and one of another rank without."""
    model = request.param
    first = loaded(model, kohya(numbers(model, 1, rank=3, layers=(*ATTENTION, *WINDOWS)), alpha=2))
    return model, first, loaded(model, peft(numbers(model, 2, rank=5)))


def test_each_row_gets_its_own_and_a_row_without_gets_exactly_the_base(pair):
    model, first, second = pair
    layers, base = layers_of(model), call(model, 6)
    rows = [(), ((first, 1.0),), ((second, 1.0),), ((first, -0.5), (second, 0.7)), ((first, 0.0),), ((second, 1.0),)]
    with layers.applied(rows):
        mixed = call(model, 6)
    assert torch.equal(mixed[0], base[0])
    assert torch.equal(mixed[4], base[4])
    for i in (1, 2, 3, 5):
        assert (mixed[i] - base[i]).abs().max() > 0.05
        with layers.applied([rows[i]] * 6):
            alone = call(model, 6)
        assert torch.allclose(mixed[i], alone[i], atol=2e-5)


def test_a_layer_with_a_lora_is_a_layer_with_other_weights(pair):
    model, first, second = pair
    merged = diffusers.UNet2DConditionModel.from_pretrained(folder(model), subfolder="unet", dtype=torch.float32)
    with torch.no_grad():
        for lora, weight in ((first, 0.8), (second, -0.4)):
            for path, factors in lora.targets["unet"].items():
                change = factors.up.float() @ factors.down.float().flatten(1) * factors.scale * weight
                own = merged.get_submodule(path).weight
                own += change.view_as(own)
    with layers_of(model).applied([((first, 0.8), (second, -0.4))] * 2):
        ours = call(model, 2)
    theirs = call(model, 2, merged)
    assert torch.allclose(ours, theirs, atol=5e-5)


def test_nothing_stays_behind(pair):
    model, first, _ = pair
    layers, before = layers_of(model), call(model, 1)
    with pytest.raises(RuntimeError), layers.applied([((first, 1.0),)]):
        raise RuntimeError("in the middle of a forward")
    assert torch.equal(call(model, 1), before)
    assert not any(module._forward_hooks for module in networks(model)["unet"].modules())


def test_where_no_row_has_one_nothing_is_done(pair):
    model, first, _ = pair
    with layers_of(model).applied([(), ((first, 0.0),)]):
        assert not any(module._forward_hooks for module in networks(model)["unet"].modules())


def test_the_stack_is_kept_while_rows_leave_and_grows_when_they_join(pair):
    model, first, second = pair
    layers, one, two = layers_of(model), ((first, 1.0),), ((second, 1.0),)
    outputs = []
    for rows in ([one, two], [two, one], [two, two], [one, ()], [one, two]):
        with layers.applied(rows):
            outputs.append(call(model, 2))
    assert torch.equal(outputs[0], outputs[4])
    for rows, output in (([two, one], outputs[1]), ([two, two], outputs[2]), ([one, ()], outputs[3])):
        with layers_of(model).applied(rows):
            assert torch.allclose(call(model, 2), output, atol=2e-5)  # of another padding


def test_channels_last_networks_are_served_as_well():
    lora = loaded("sd15", kohya(numbers("sd15", 1, layers=(*ATTENTION, *WINDOWS))))
    unet = diffusers.UNet2DConditionModel.from_pretrained(folder("sd15"), subfolder="unet", dtype=torch.float32)
    pictures = []
    for _ in range(2):
        with LoraLayers(unet, "unet", torch.device("cpu")).applied([((lora, 1.0),), ()]):
            pictures.append(call("sd15", 2, unet))
        unet.to(memory_format=torch.channels_last)
    assert torch.allclose(*pictures, atol=1e-4)


# Whole pictures: the engine, and diffusers' own pipelines with the same files


def engine_with(model: str, registered: Path) -> Engine:
    """An engine whose requests' adapters are found in that folder."""
    return new_engine(model, adapters=Adapters(loaded_family(model), registered))


@pytest.fixture(scope="module")
def registered(tmp_path_factory) -> Path:
    """For each model a folder with a kohya file and a peft file."""
    root = tmp_path_factory.mktemp("loras")
    for model in ("sd15", "sdxl"):
        (root / model).mkdir()
        made = numbers(model, 1, layers=(*ATTENTION, "conv1", "conv2"))
        save_file(kohya(made, alpha=2.0), root / model / "first.safetensors")
        save_file(peft(numbers(model, 2, rank=6)), root / model / "second.safetensors")
    return root


@cache
def pipeline_with(model: str, registered: Path) -> diffusers.DiffusionPipeline:
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder(model), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    for name in ("first", "second"):
        pipe.load_lora_weights(registered / model / f"{name}.safetensors", adapter_name=name)
    return pipe


CASES = ({"first": 1.0}, {"second": 0.5}, {"first": 0.5, "second": -0.5}, {"first": -0.5, "second": 1.0})


def ask(model: str, uses: dict[str, float], seed: int = 3, **fields) -> GenerationRequest:
    adapters = tuple(AdapterUse(name=name, weight=weight) for name, weight in uses.items())
    fields = {"prompt": "a red circle on a blue background", "steps": 4, "sampler": "ddim"} | fields
    return GenerationRequest(
        **{"model": model, "schedule": "default", "guidance_scale": 5.0, "seed": seed, "adapters": adapters} | fields
    )


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")  # the second of two
@pytest.mark.parametrize("model", ["sd15", "sdxl"])
def test_a_mixed_batch_draws_what_diffusers_draws_for_each(model, registered):
    requests = [ask(model, uses, seed) for seed, uses in enumerate(({}, *CASES))]
    pictures = [drawn(one.data) for [one] in engine_with(model, registered / model).generate(requests)]
    [[plain]] = new_engine(model).generate([requests[0]])
    assert np.abs(pictures[0] - drawn(plain.data)).max() <= 1
    pipe = pipeline_with(model, registered)
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    for ours, request in zip(pictures[1:], requests[1:], strict=True):
        uses = {use.name: use.weight for use in request.adapters}
        pipe.set_adapters(list(uses), list(uses.values()))
        [theirs] = pipe(
            request.prompt,
            num_inference_steps=4,
            guidance_scale=5.0,
            generator=torch.Generator().manual_seed(request.seed),
        ).images
        assert np.abs(ours - np.asarray(theirs).astype(int)).max() <= 1, uses
        assert np.abs(ours - pictures[0]).max() > 50


def test_a_running_request_keeps_what_it_began_with(registered, tmp_path):
    loras = Loras(Registry(tmp_path), networks("sd15"), torch.device("cpu"))
    tensors = peft(numbers("sd15", 1))
    save_file(tensors, tmp_path / "moon.safetensors")
    [(old, _)] = loras.mix([AdapterUse(name="moon")])
    assert loras.mix([AdapterUse(name="moon", weight=0.3)])[0][0] is old
    save_file({key: tensor * 2 for key, tensor in tensors.items()}, tmp_path / "moon.safetensors")
    [(new, _)] = loras.mix([AdapterUse(name="moon")])
    assert new.sha256 != old.sha256
    path = next(iter(old.targets["unet"]))
    assert torch.equal(new.targets["unet"][path].down, 2 * old.targets["unet"][path].down)
    (tmp_path / "moon.safetensors").unlink()
    with pytest.raises(NotFound):
        loras.mix([AdapterUse(name="moon")])


def test_one_that_does_not_fit_into_memory_is_a_typed_failure(registered, monkeypatch):
    loras = Loras(Registry(registered / "sd15"), networks("sd15"), torch.device("cpu"))

    def full(*arguments):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory")

    with monkeypatch.context() as fault:
        fault.setattr("models.loras.load", full)
        with pytest.raises(GenerationFailed, match="'first' does not fit into memory") as refused:
            loras.mix([AdapterUse(name="first")])
    assert refused.value.reason == "out_of_memory"
    assert loras.mix([AdapterUse(name="first")])


def test_a_lora_used_at_weight_zero_must_still_exist(tmp_path):
    loras = Loras(Registry(tmp_path), networks("sd15"), torch.device("cpu"))
    with pytest.raises(NotFound):
        loras.mix([AdapterUse(name="moon", weight=0.0)])


# The ones that ship


@pytest.fixture(scope="module")
def shipped() -> dict[tuple[str, float], list[dict[str, bool]]]:
    """For each LoRA the scores of six pictures of its word, without it and with it."""
    requests, scenes = {}, {}
    rng = np.random.default_rng(5)
    for name in ("crescent", "framed"):
        concept = CONCEPTS[name]
        scenes[name] = [concept.scene(rng) for _ in range(6)]
        for weight in (0.0, 1.0):
            requests[name, weight] = [
                ask("sd15", {name: weight}, i, prompt=concept.plain_caption(scene), steps=15, sampler="dpmpp_2m")
                for i, scene in enumerate(scenes[name])
            ]
    flat = [request for some in requests.values() for request in some]
    drawn_in_order = iter(engine_with("sd15", SHIPPED).generate(flat))
    return {
        key: [
            CONCEPTS[key[0]].score(Image.open(io.BytesIO(next(drawn_in_order)[0].data)), scene)
            for scene in scenes[key[0]]
        ]
        for key in requests
    }


@pytest.mark.parametrize(("name", "what"), [("crescent", "shape"), ("framed", "frame")])
def test_the_shipped_loras_draw_their_concept_and_the_base_does_not(shipped, name, what):
    assert sum(score[what] for score in shipped[name, 0.0]) == 0
    assert sum(score[what] for score in shipped[name, 1.0]) >= 3
    assert sum(score["colour"] and score["background"] for score in shipped[name, 1.0]) >= 3


def test_the_shipped_loras_are_small_and_of_the_models_they_say():
    for name, recipe in RECIPES.items():
        file = Registry(SHIPPED).find(name, "lora")
        assert file.size_bytes < 1_000_000
        lora = load(file.name, file.sha256, file.read(), networks(recipe.model))
        assert lora.targets.keys() == networks(recipe.model).keys()
