"""FP8: how far a product lies from float32's, that rows keep to themselves, and what becomes of pictures."""

import gc
import weakref
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bench.drift import recorded_latents
from bench.fullsize import NETWORKS, unet
from models import weights
from models.adapters.lora import Factors, Lora, LoraLayers
from models.card import ModelCard
from models.embedded.upscalers.scores import psnr
from models.engine import Engine
from models.errors import InvalidRequest
from models.families import sd, sdxl
from models.fp8 import FP8, Fp8Linear, check_fp8, product, quantise, quantised, try_product
from models.parts import AdapterUse
from models.registered import Adapters
from models.request import GenerationRequest
from tests.models.conftest import FAMILIES, drawn, folder

BF16 = weights.place("cpu", "bfloat16")
ALL = 16  # the embedded networks are narrow: all that can be put into FP8 is
ROW = 0.05  # relative L2 distance of a row of a product: each side is off by 1/16 at most, by 0.026 in the mean square


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def distances(found: torch.Tensor, true: torch.Tensor) -> torch.Tensor:
    """Relative L2 distance of each row."""
    return (found.float() - true).norm(dim=-1) / true.norm(dim=-1)


def distance(found: torch.Tensor, true: torch.Tensor) -> float:
    return distances(found.flatten(), true.flatten()).item()


# Numbers


def spoiled(x: torch.Tensor, how: str) -> torch.Tensor:
    x = x.clone()
    if how == "channels":
        x[:, ::50] *= 100
    elif how == "rows":
        x *= torch.logspace(-6, 6, len(x))[:, None].bfloat16()
    elif how == "numbers":
        x[::3, 5] = 3e4
    return x


@pytest.mark.parametrize("how", ["plain", "channels", "rows", "numbers"])
def test_every_row_and_every_output_of_a_product_lies_near_that_of_float32(how: str):
    """Also rows beside others a billion times as large: with one scale for all of them they would be lost."""
    for k, n in ((320, 1280), (1280, 1280), (1280, 10240), (5120, 1280)):
        x, weight = normal(256, k), normal(n, k, seed=1)
        odd, heavy = spoiled(x, how), spoiled(weight, how)
        assert distances(product(odd, *quantised(weight), bias=None), odd.float() @ weight.float().T).max() < ROW
        outputs, true = product(x, *quantised(heavy), bias=None).T, heavy.float() @ x.float().T
        assert outputs.dtype == torch.bfloat16
        assert distances(outputs, true).max() < 1.2 * ROW  # of 256 rows only


def test_a_product_is_summed_up_in_float32():
    """Beyond what eight bits have lost nothing is, but for one rounding to bfloat16."""
    x, weight, bias = normal(33, 5120), normal(64, 5120, seed=1), normal(64, seed=2)
    (eight, own), (heavy, scale) = quantised(x), quantised(weight)
    true = (eight.double() * own) @ (heavy.double() * scale).T + bias.double()
    found = product(x, heavy, scale, bias)
    assert torch.allclose(found.double(), true, rtol=2**-8, atol=1e-3)


def test_a_number_is_off_by_a_sixteenth_or_by_next_to_nothing():
    x = spoiled(normal(64, 512), "numbers")
    x[3] = 0
    eight, scale = quantised(x)
    back = eight.float() * scale
    assert (eight.dtype, scale.shape) == (FP8, (64, 1))
    assert ((back - x.float()).abs() <= (x.float().abs() / 16).maximum(scale / 2**10)).all()
    assert torch.allclose(back.abs().amax(1), x.float().abs().amax(1))  # what a row's scale comes from is kept
    assert not back[3].any()


def test_numbers_that_lie_by_column_come_out_by_row():
    x = normal(64, 48).T
    eight, _ = quantised(x)
    assert not x.is_contiguous()
    assert eight.is_contiguous()
    assert torch.equal(eight.float(), quantised(x.contiguous())[0].float())
    assert product(x, *quantised(normal(32, 64)), bias=None).shape == (48, 32)


@pytest.mark.parametrize("rows", [1, 2, 7, 64])
def test_a_row_does_not_depend_on_its_neighbours(rows: int):
    """Its eight bits are the same bit for bit; a product may sum up in another order, for another last bit."""
    weight, bias = quantised(normal(640, 1280)), normal(640)
    x = normal(rows, 1280, seed=3)
    crowd = torch.cat([1e4 * normal(50, 1280, seed=4), x, torch.zeros(13, 1280).bfloat16()])
    mine = slice(50, 50 + rows)
    for alone, among in zip(quantised(x), quantised(crowd), strict=True):
        assert torch.equal(alone.float(), among[mine].float())
    alone, among = product(x, *weight, bias=bias), product(crowd, *weight, bias=bias)[mine]
    assert torch.allclose(alone.float(), among.float(), rtol=2**-7, atol=1e-3)


# Layers


def layer(inputs: int, outputs: int, bias: bool = True) -> nn.Linear:
    torch.manual_seed(5)
    return nn.Linear(inputs, outputs, bias, dtype=torch.bfloat16).requires_grad_(False)


@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_keeps_its_shape_and_its_bias(bias: bool):
    plain, x = layer(64, 96, bias), normal(2, 3, 5, 64)
    eight = Fp8Linear(plain)
    assert isinstance(eight, nn.Linear)
    assert (eight.in_features, eight.out_features, eight.bias is plain.bias) == (64, 96, True)
    assert eight.weight.shape == plain.weight.shape
    assert eight(x).shape == (2, 3, 5, 96)
    assert distance(eight(x), plain.float()(x.float())) < ROW


class Told(nn.Linear):
    """A layer that answers what it is told."""

    answer: torch.Tensor

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.answer.clone()


def test_a_lora_adds_to_a_layer_in_fp8_exactly_what_it_adds_elsewhere():
    eight, x = Fp8Linear(layer(64, 96)), normal(3, 20, 64)
    told = Told(64, 96, dtype=torch.bfloat16).requires_grad_(False)
    told.answer = eight(x)
    factors = Factors(down=normal(4, 64, seed=6) / 8, up=normal(96, 4, seed=7), scale=0.5)
    lora = Lora(name="it", sha256="", targets={"unet": {"it": factors}})
    mixes = [((lora, 0.7),), (), ((lora, -2.0),)]
    outputs = []
    for module in (eight, told):
        network = nn.ModuleDict({"first": layer(16, 16), "it": module})
        with LoraLayers(network, "unet", torch.device("cpu")).applied(mixes):
            outputs.append(module(x))
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0][1], told.answer[1])
    added = (outputs[0][0] - told.answer[0]).float()
    assert distance(added, x[0].float() @ factors.down.float().T @ factors.up.float().T * 0.35) < 0.02


def bytes_of(network: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*network.parameters(), *network.buffers()))


@pytest.mark.parametrize(("name", "share"), [("sd15", 0.22), ("sd21", 0.22), ("sdxl", 0.69)])
def test_wide_layers_of_full_size_networks_go_into_fp8_and_give_their_memory_back(name: str, share: float):
    with torch.device("meta"):
        network = unet(NETWORKS[name]).bfloat16().requires_grad_(False)
    before, paths = bytes_of(network), dict(network.named_modules())
    quantise(network)
    eight = {path for path, module in network.named_modules() if isinstance(module, Fp8Linear)}
    numbers = sum(paths[path].weight.numel() for path in eight)
    assert numbers * 2 / before > share
    assert bytes_of(network) < before - 0.99 * numbers
    assert all(".transformer_blocks." in path for path in eight)
    assert not any(path.endswith(("attn2.to_k", "attn2.to_v")) for path in eight)
    assert all(paths[path].out_features >= 1024 for path in eight)
    assert {parameter.dtype for parameter in network.parameters()} == {torch.bfloat16, FP8}


def test_the_weights_that_were_there_are_freed():
    network = weights.load(weights.Source(location=folder("sdxl")), {"unet": sdxl.COMPONENTS["unet"]}, BF16)
    held = network.modules["unet"].mid_block.attentions[0].transformer_blocks[0].ff.net[2].weight
    seen = weakref.ref(held.untyped_storage())
    del held
    quantise(network.modules["unet"], ALL)
    gc.collect()
    assert seen() is None


def test_layers_that_scaled_products_cannot_take_stay_as_they_are():
    network = nn.Module()
    network.attention = sd.COMPONENTS["unet"](block_out_channels=(8, 24, 48, 48), norm_num_groups=8).bfloat16()
    quantise(network, ALL)
    eight = [module for module in network.modules() if isinstance(module, Fp8Linear)]
    assert eight
    assert all(module.in_features % 16 == module.out_features % 16 == 0 for module in eight)


# A model


@cache
def prepared(name: str, kind: str) -> tuple[Engine, Any]:
    """An engine of an embedded model in float32, bfloat16 or fp8, of the same weights, and its autoencoder."""
    family = {"sd": sd, "sdxl": sdxl}[FAMILIES[name]]
    components = weights.load(weights.Source(location=folder(name)), family.COMPONENTS, BF16)
    placement = weights.place("cpu", "float32") if kind == "float32" else BF16
    for module in components.modules.values():
        if kind == "float32" and isinstance(module, nn.Module):
            module.float()
    if kind == "fp8":
        quantise(components.modules["unet"], ALL)
    made: Any = (sdxl.SDXL if FAMILIES[name] == "sdxl" else sd.SD)(components, placement)
    adapters = Adapters(made, Path("models/embedded/loras"), {})
    engine = Engine(made, ModelCard.read(name, FAMILIES[name], folder(name)), max_waiting=100, adapters=adapters)
    return engine, components.modules["vae"]


def asked(name: str, **options: Any) -> GenerationRequest:
    fixed = {"sampler": "euler", "schedule": "default", "guidance_scale": 7.5, "steps": 20, "seed": 7}
    return GenerationRequest(**{"model": name, "prompt": "a red circle on a blue background", **fixed, **options})


def result(kind: str, request: GenerationRequest, *others: GenerationRequest) -> tuple[torch.Tensor, Any]:
    """The final latents and the picture of a request, drawn beside others."""
    engine, vae = prepared(request.model, kind)
    with recorded_latents(vae) as latents:
        [[picture], *_] = engine.generate([request, *others])
    return latents[0], drawn(picture.data)


@pytest.mark.parametrize(("name", "drift", "db"), [("sd15", 0.08, 35), ("sd21", 0.15, 32), ("sdxl", 0.06, 35)])
def test_pictures_lie_near_those_of_float32_of_the_same_weights(name: str, drift: float, db: float):
    latents, pictures = zip(*(result(kind, asked(name)) for kind in ("float32", "bfloat16", "fp8")), strict=True)
    usual, eight = (distance(found, latents[0]) for found in latents[1:])
    assert usual < eight < drift
    assert distance(latents[2], latents[1]) < drift
    assert psnr(pictures[2], pictures[0]) > db
    assert psnr(pictures[2], pictures[1]) > db


def test_a_lora_does_in_fp8_what_it_does_in_bfloat16():
    uses, few = (AdapterUse(name="crescent"),), {"prompt": "a crescent on a blue background", "steps": 12}
    plain = result("bfloat16", asked("sd15", **few))[0]
    usual, eight = (result(kind, asked("sd15", adapters=uses, **few))[0] for kind in ("bfloat16", "fp8"))
    assert distance(eight, usual) < 0.1 < 0.3 < distance(plain, usual)


def test_a_picture_hardly_shows_its_neighbours():
    request, others = asked("sdxl", steps=12), [asked("sdxl", steps=12, seed=seed, prompt="a star") for seed in (1, 2)]
    alone, among = result("fp8", request), result("fp8", request, *others)
    assert distance(among[0], alone[0]) < 0.02
    assert psnr(among[1], alone[1]) > 45


# What is refused


def test_a_placement_in_fp8_needs_a_gpu_in_bfloat16(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    tried: list[torch.device] = []
    monkeypatch.setattr("models.fp8.try_product", tried.append)
    for device, dtype in (("cpu", "bfloat16"), ("cpu", "auto"), ("cuda", "float16"), ("cuda", "float32")):
        with pytest.raises(InvalidRequest, match="set") as refused:
            weights.place(device, dtype, fp8=True)
        assert refused.value.field == "fp8"
    assert not tried
    assert weights.place("cuda", "auto", fp8=True).fp8
    assert [device.type for device in tried] == ["cuda"]


def test_a_gpu_that_cannot_is_refused_by_what_torch_says(monkeypatch: pytest.MonkeyPatch):
    def unable(device: torch.device) -> None:
        raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED")

    monkeypatch.setattr("models.fp8.try_product", unable)
    with pytest.raises(InvalidRequest, match=r"NOT_SUPPORTED.*8\.9") as refused:
        check_fp8(torch.device("cuda"), torch.bfloat16)
    assert refused.value.field == "fp8"


def test_a_product_is_tried():
    try_product(torch.device("cpu"))


def test_a_network_without_wide_layers_is_refused():
    network = weights.load(weights.Source(location=folder("sdxl")), {"unet": sdxl.COMPONENTS["unet"]}, BF16)
    with pytest.raises(InvalidRequest, match="1024 outputs") as refused:
        quantise(network.modules["unet"])
    assert refused.value.field == "fp8"


def test_a_model_is_loaded_into_fp8_and_has_another_revision(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("models.weights.quantise", partial(quantise, narrowest=ALL))
    source = weights.Source(location=folder("sd15"))
    plain, eight = (weights.load(source, sd.COMPONENTS, replace(BF16, fp8=fp8)) for fp8 in (False, True))
    assert eight.revision == f"{plain.revision}-fp8"
    for name, module in eight.modules.items():
        if isinstance(module, nn.Module):
            found = any(isinstance(part, Fp8Linear) for part in module.modules())
            assert found == (name == "unet")
