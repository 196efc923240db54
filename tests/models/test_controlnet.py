"""ControlNets: what diffusers draws with them, in batches mixed at will; and the embedded canny ones follow edges."""

import gc
import io
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel
from PIL import Image
from safetensors.torch import load_file, save_file

from models.adapters.controlnet import Control, ControlBatch, ControlNet, ControlNets
from models.card import ModelCard
from models.embedded.captions import plain_caption
from models.embedded.controlnets.agreement import agreement, questions
from models.embedded.controlnets.gallery import moved
from models.embedded.controlnets.recipe import make
from models.embedded.world import training_scene
from models.engine import Engine
from models.errors import GenerationFailed, InvalidRequest, NotFound
from models.family import Conditioning
from models.images import Picture
from models.parts import ControlUse, Hires
from models.preprocessors import preprocess
from models.registered import Adapters
from models.request import GenerationRequest
from models.rowwise import RowThreads
from tests.models.conftest import FAMILIES, folder, loaded_family, pipeline, reference

MODELS = ("sd15", "sdxl")
STEPS = 5
SHARE = RowThreads(torch.device("cpu"), 1)


def canny(model: str) -> Path:
    return Path(f"models/embedded/controlnets/canny-{model}")


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> dict[str, Path]:
    """For each model a second ControlNet, untrained but not silent, that reads hints by other layers."""
    made = {}
    for model in MODELS:
        torch.manual_seed(1)
        net = ControlNetModel.from_unet(pipeline(model).unet, conditioning_embedding_out_channels=(8, 8, 16, 16))
        for convolution in (
            *net.controlnet_down_blocks,
            net.controlnet_mid_block,
            net.controlnet_cond_embedding.conv_out,
        ):
            torch.nn.init.normal_(convolution.weight, std=0.02)
        made[model] = tmp_path_factory.mktemp(f"other-{model}")
        net.save_pretrained(made[model])
    return made


def adapters(model: str, other: dict[str, Path]) -> Adapters:
    return Adapters(loaded_family(model), controlnets={"canny": canny(model), "other": other[model]})


def controlnets(model: str, other: dict[str, Path]) -> ControlNets:
    return adapters(model, other).controlnets


def engine(model: str, other: dict[str, Path]) -> Engine:
    card = ModelCard.read(model, FAMILIES[model], folder(model))
    return Engine(loaded_family(model), card, max_waiting=100, adapters=adapters(model, other))


def colours() -> Picture:
    return Picture.from_array(np.random.default_rng(0).integers(0, 256, (4, 4, 3), np.uint8)).resized(128, 128)


def circle() -> Picture:
    y, x = np.mgrid[0:96, 0:96]
    inside = (x - 30) ** 2 + (y - 62) ** 2 < 22**2
    return Picture.from_array(np.where(inside[..., None], (220, 40, 40), (40, 60, 220)).astype(np.uint8))


def drawn(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data))).astype(int)


def cases(model: str) -> dict[str, GenerationRequest]:
    """One and two nets, weights, starts and ends, from noise and from a picture; and one request without any."""
    edges = ControlUse(name="canny", image=circle(), preprocessor="canny")
    second = ControlUse(name="other", image=colours(), weight=0.6)
    prompt = "a red circle on a blue background"
    base = GenerationRequest(
        model=model, prompt=prompt, steps=STEPS, guidance_scale=4.0, sampler="dpmpp_2m", schedule="default"
    )
    varied = {
        "none": {},
        "one": {"controls": (edges,)},
        "weight": {"controls": (replace(edges, weight=0.35),), "sampler": "unipc", "steps": STEPS + 1},
        "start and end": {"controls": (replace(edges, start=0.2, end=0.75),), "sampler": "euler", "steps": 8},
        "second order": {"controls": (replace(edges, start=0.1, end=0.5),), "sampler": "heun"},
        "two": {"controls": (edges, replace(second, end=0.6)), "sampler": "ddim"},
        "unguided": {"controls": (second,), "guidance_scale": 1.0},
        "img2img": {"controls": (replace(edges, end=0.8),), "image": colours(), "denoise_strength": 0.7},
        "img2img, two": {"controls": (second, replace(edges, weight=0.5)), "image": colours(), "denoise_strength": 0.8},
    }
    return {name: replace(base, seed=i, **options) for i, (name, options) in enumerate(varied.items())}


def by_diffusers(request: GenerationRequest, other: dict[str, Path]) -> np.ndarray:
    """The picture that diffusers' own ControlNet pipeline draws."""
    model, parts, from_picture = request.model, dict(pipeline(request.model).components), request.image is not None
    kind = ("ControlNet" if request.controls else "") + ("Img2Img" if from_picture else "")
    options = {"height": 128, "width": 128} if not from_picture else {"strength": request.denoise_strength}
    if request.controls:
        where = {"canny": canny(model), "other": other[model]}
        nets = [ControlNetModel.from_pretrained(where[u.name], dtype=torch.float32).eval() for u in request.controls]
        hints = [hint_of(use) for use in request.controls]
        options["control_image" if from_picture else "image"] = hints if len(nets) > 1 else hints[0]
        options["controlnet_conditioning_scale"] = [use.weight for use in request.controls]
        options["control_guidance_start"] = [use.start for use in request.controls]
        options["control_guidance_end"] = [use.end for use in request.controls]
        if len(nets) == 1:
            options["controlnet_conditioning_scale"] = request.controls[0].weight
        parts["controlnet"] = nets if len(nets) > 1 else nets[0]
    if request.image is not None:
        options["image"] = Image.fromarray(request.image.array())
    return reference(kind, parts, request, **options)


def hint_of(use: ControlUse, side: int = 128) -> Image.Image:
    """What the engine is to make of a use's picture."""
    return Image.fromarray(preprocess(use.preprocessor or "none", use.image.resized(side, side)).array())


@pytest.fixture(scope="module")
def together(other) -> dict[str, dict[str, np.ndarray]]:
    """All of each model's cases, drawn in one batch: as many forwards as the longest of them takes alone."""
    pictures = {}
    for model in MODELS:
        requests, mixed = cases(model), engine(model, other)
        results = mixed.generate(requests.values())
        assert mixed.load().forwards == 2 * STEPS - 1  # Heun's
        pictures[model] = {name: drawn(one.data) for name, [one] in zip(requests, results, strict=True)}
    return pictures


@pytest.mark.parametrize("name", cases("sd15"))
@pytest.mark.parametrize("model", MODELS)
def test_a_mixed_batch_draws_what_diffusers_draws(together, other, model, name):
    difference = np.abs(together[model][name] - by_diffusers(cases(model)[name], other)).max()
    assert difference <= 1, f"{difference}/255 away from diffusers"


def test_controls_act_at_all(together):
    for pictures in together.values():
        assert np.abs(pictures["one"] - pictures["none"]).max() > 50


def test_weight_zero_and_an_empty_span_are_exactly_no_control(other):
    plain = cases("sd15")["none"]
    use = ControlUse(name="canny", image=circle(), preprocessor="canny")
    variants = [plain, replace(plain, controls=(replace(use, weight=0.0),))]
    variants.append(replace(plain, controls=(replace(use, start=0.99, end=1.0),)))
    first, *others = [engine("sd15", other).generate([request])[0][0].data for request in variants]
    assert all(picture == first for picture in others)


def test_hires_steers_both_phases_at_their_own_size(other):
    use = ControlUse(name="canny", image=circle(), preprocessor="canny")
    hires = Hires(scale=1.5, steps=4, denoise_strength=0.6)
    request = replace(cases("sd15")["none"], controls=(use,), hires=hires)
    [[finished]] = engine("sd15", other).generate([request])
    assert (finished.width, finished.height) == (192, 192)
    assert agreement(Image.open(io.BytesIO(finished.data)), hint_of(use, 192)) > 0.5


# Rows


def batch_of(model: str, lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor, Conditioning]:
    """Latents, timesteps and conditioning for as many rows, each with a context of its own length, padded."""
    torch.manual_seed(0)
    config = loaded_family(model).network_config
    contexts = torch.zeros(len(lengths), max(lengths), config["cross_attention_dim"])
    for context, length in zip(contexts, lengths, strict=True):
        context[:length] = torch.randn(length, contexts.shape[2])
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    added = {}
    if model == "sdxl":
        added = {"text_embeds": torch.randn(len(lengths), 128), "time_ids": torch.full((len(lengths), 6), 128.0)}
    timesteps = torch.linspace(900, 100, len(lengths))
    return torch.randn(len(lengths), 4, 16, 16), timesteps, Conditioning(context=contexts, added=added, mask=mask)


@pytest.mark.parametrize("model", MODELS)
def test_rows_of_different_lengths_get_what_each_gets_alone(model, other):
    nets = controlnets(model, other)
    edges, second = nets.get("canny"), nets.get("other")
    hints = [torch.rand(3, 128, 128) for _ in range(3)]
    controls = [
        [Control(net=edges, hint=hints[0], weight=0.5)],
        [],
        [
            Control(net=second, hint=hints[1]),
            Control(net=edges, hint=hints[2], weight=1.5),
            Control(net=second, hint=hints[0]),
        ],
    ]
    owners, lengths = [0, 0, 1, 2, 2], [77, 154, 77, 77, 231]
    latents, timesteps, rows = batch_of(model, lengths)
    with torch.inference_mode():
        down, mid = ControlBatch(controls, owners, [10, 10, 10]).residuals(
            lambda: (latents, timesteps), rows, [3, 3, 3], SHARE
        )
        for row, (owner, length) in enumerate(zip(owners, lengths, strict=True)):
            added = {name: value[row : row + 1] for name, value in rows.added.items()}
            own = Conditioning(context=rows.context[row : row + 1, :length], added=added)
            seen = latents[row : row + 1], timesteps[row : row + 1]
            alone = ControlBatch([controls[owner]], [0], [10]).residuals(lambda seen=seen: seen, own, [3], SHARE)
            if alone is None:
                assert not any(part[row].any() for part in (*down, mid))
                continue
            for part, expected in zip((*down, mid), (*alone[0], alone[1]), strict=True):
                torch.testing.assert_close(part[row], expected[0], atol=1e-5, rtol=1e-4)


def test_nothing_runs_where_nothing_acts(other):
    net = controlnets("sd15", other).get("canny")
    late = Control(net=net, hint=torch.rand(3, 128, 128), start=0.5)
    batch = ControlBatch([[late], []], [0, 0, 1], [4, 4])
    latents, timesteps, rows = batch_of("sd15", [77, 77, 77])
    with torch.inference_mode():
        assert batch.residuals(lambda: (latents, timesteps), rows, [1, 3], SHARE) is None
        assert batch.residuals(lambda: (latents, timesteps), rows, [2, 3], SHARE) is not None
    assert ControlBatch([[], []], [0, 1], [4, 4]).residuals(lambda: (latents, timesteps), rows, [0, 0], SHARE) is None


def test_a_hint_is_read_once_and_plans_are_kept(other, monkeypatch):
    net = controlnets("sd15", other).get("canny")
    reads = []
    monkeypatch.setattr(net, "_reader", CountingReader(net._reader, reads))
    batch = ControlBatch([[Control(net=net, hint=torch.rand(3, 128, 128))]], [0, 0], [9])
    latents, timesteps, rows = batch_of("sd15", [77, 77])
    with torch.inference_mode():
        for position in range(4):
            batch.residuals(lambda: (latents, timesteps), rows, [position], SHARE)
    assert len(reads) == 1


class CountingReader:
    """A hint reader that keeps count."""

    def __init__(self, reader, reads: list):
        self._reader, self._reads, self.conv_in = reader, reads, reader.conv_in

    def __call__(self, hint: torch.Tensor) -> torch.Tensor:
        self._reads.append(hint.shape)
        return self._reader(hint)


# Loading


def load(location: str | Path, model: str = "sd15") -> ControlNet:
    family = loaded_family(model)
    return ControlNet.load(location, family.network_config, family.placement)


def residuals_of(net: ControlNet, model: str = "sd15") -> torch.Tensor:
    latents, timesteps, rows = batch_of(model, [77])
    with torch.inference_mode():
        batch = ControlBatch([[Control(net=net, hint=torch.ones(3, 128, 128))]], [0], [1])
        return batch.residuals(lambda: (latents, timesteps), rows, [0], SHARE)[1]


@pytest.mark.parametrize("model", MODELS)
def test_a_single_file_is_the_same_as_its_folder(model):
    file = canny(model) / "diffusion_pytorch_model.safetensors"
    assert torch.equal(residuals_of(load(file, model), model), residuals_of(load(canny(model), model), model))


def test_a_net_that_wants_blue_first_gets_it(tmp_path):
    net = ControlNetModel.from_pretrained(canny("sd15"))
    net.register_to_config(controlnet_conditioning_channel_order="bgr")
    net.save_pretrained(tmp_path)
    hint = torch.rand(3, 128, 128)
    with torch.inference_mode():
        assert torch.equal(load(tmp_path).read(hint), load(canny("sd15")).read(hint.flip(0)))


@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize(("model", "base"), [("sdxl", "sd15"), ("sd15", "sdxl")])
def test_another_base_models_is_refused(model, base, single):
    location = canny(model) / "diffusion_pytorch_model.safetensors" if single else canny(model)
    with pytest.raises(InvalidRequest, match="made for another base model"):
        load(location, base)


def test_what_is_no_controlnet_is_refused(tmp_path):
    with pytest.raises(InvalidRequest, match="no ControlNet"):
        load("models/embedded/sd15/unet/diffusion_pytorch_model.safetensors")
    with pytest.raises(InvalidRequest, match="neither a folder nor a file"):
        load(tmp_path / "nothing")
    (tmp_path / "config.json").write_text('{"_class_name": "ControlNetUnionModel"}')
    with pytest.raises(InvalidRequest, match="ControlNetUnionModel"):
        load(tmp_path)
    (tmp_path / "net.ckpt").write_bytes(b"pickled")
    with pytest.raises(InvalidRequest, match="pickled"):
        load(tmp_path / "net.ckpt")
    weights = load_file(canny("sd15") / "diffusion_pytorch_model.safetensors")
    weights.pop("controlnet_mid_block.weight")
    save_file(weights, tmp_path / "torn.safetensors")
    with pytest.raises(InvalidRequest, match="controlnet_mid_block"):
        load(tmp_path / "torn.safetensors")


def test_a_net_that_pools_its_residuals_is_refused(tmp_path):
    net = ControlNetModel.from_pretrained(canny("sd15"))
    net.register_to_config(global_pool_conditions=True)
    net.save_pretrained(tmp_path)
    with pytest.raises(InvalidRequest, match="shuffle"):
        load(tmp_path)


def test_names_are_registered_and_the_least_recently_used_leaves(other):
    with pytest.raises(NotFound, match="canny, other"):
        controlnets("sd15", other).get("depth")
    family = loaded_family("sd15")
    locations = {"canny": canny("sd15"), "other": other["sd15"]}
    small = ControlNets(locations, family.network_config, family.placement, capacity_bytes=1)
    in_flight = small.get("canny")
    assert small.get("canny") is in_flight
    assert small.get("other").nbytes > 1
    assert small.get("canny") is in_flight, "a copy that is still in use is found again"
    gone = weakref.ref(small.get("other"))
    small.get("canny")
    gc.collect()
    assert gone() is None, "what nobody uses is not kept beyond its bytes"


def test_one_that_does_not_fit_into_memory_is_a_typed_failure_that_makes_room(other, monkeypatch):
    made = adapters("sd15", other)
    card = ModelCard.read("sd15", "sd", folder("sd15"))
    tight = Engine(loaded_family("sd15"), card, adapters=made)
    unused = weakref.ref(made.controlnets.get("canny"))

    def full(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    request = replace(cases("sd15")["none"], controls=(ControlUse(name="other", image=circle()),))
    with monkeypatch.context() as fault:
        fault.setattr(ControlNet, "load", full)
        with pytest.raises(GenerationFailed, match="'other' does not fit into memory") as refused:
            tight.submit(request, on_event=print)
    assert (refused.value.reason, refused.value.retryable) == ("out_of_memory", True)
    gc.collect()
    assert unused() is None
    assert tight.load().waiting == 0
    assert tight.generate([request])[0][0].data


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"controlnets": {"canny": canny("sd15"), "lost": "/nowhere/at-all"}}, "controlnets.lost"),
        ({"preprocessors": {"depth": "/nowhere/at-all"}}, "preprocessors.depth"),
    ],
)
def test_a_location_where_nothing_lies_is_told_before_any_request(options, field):
    with pytest.raises(InvalidRequest, match="/nowhere/at-all is neither a folder nor a file") as refused:
        Adapters(loaded_family("sd15"), **options)
    assert refused.value.field == field


def test_an_unknown_name_or_preprocessor_is_refused_when_submitted(other):
    plain = cases("sd15")["none"]
    unknown = ControlUse(name="nobody", image=circle())
    unprepared = ControlUse(name="canny", image=circle(), preprocessor="depth")
    for use, error in ((unknown, NotFound), (unprepared, InvalidRequest)):
        with pytest.raises(error) as refused:
            engine("sd15", other).submit(replace(plain, controls=(use,)), on_event=print)
    assert refused.value.field == "controls.0.preprocessor"


# The embedded ControlNets


@pytest.fixture
def one_thread():
    """Tiny batches on several threads wait for each other more than they compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("model", MODELS)
def test_an_embedded_controlnet_is_small_and_diffusers_loads_it(model):
    files = list(canny(model).iterdir())
    assert {file.name for file in files} == {"config.json", "diffusion_pytorch_model.safetensors"}
    assert sum(file.stat().st_size for file in files) < 6_000_000
    assert isinstance(ControlNetModel.from_pretrained(canny(model)), ControlNetModel)
    weights = load_file(canny(model) / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}


@pytest.mark.parametrize("model", MODELS)
def test_pictures_follow_the_edges(model, other):
    asked = questions("one object", 8)
    requests = [
        GenerationRequest(
            model=model,
            prompt=plain_caption(question.scene),
            steps=12,
            guidance_scale=5.0,
            seed=i,
            controls=(ControlUse(name="canny", image=Picture.from_array(np.asarray(question.hint))),) * with_hint,
        )
        for with_hint in (0, 1)
        for i, question in enumerate(asked)
    ]
    pictures = [Image.open(io.BytesIO(one.data)) for [one] in engine(model, other).generate(requests)]
    hints = [question.hint for question in asked] * 2
    scores = [agreement(picture, hint) for picture, hint in zip(pictures, hints, strict=True)]
    without, steered = np.mean(scores[:8]), np.mean(scores[8:])
    assert steered > 0.75, (without, steered)
    assert without < steered - 0.3, (without, steered)


@pytest.mark.usefixtures("one_thread")
def test_the_recipe_runs_in_miniature_and_then_only_loads(tmp_path):
    for out in ("first", "again"):
        folders = Path("models/embedded"), tmp_path / out, tmp_path / "work"
        make("sd15", *folders, device=torch.device("cpu"), scale=0.001)
    weights = "canny-sd15/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "first" / weights).read_bytes() == (tmp_path / "again" / weights).read_bytes()
    assert isinstance(load(tmp_path / "first" / "canny-sd15"), ControlNet)


def test_moved_scenes_stay_true_to_their_captions():
    rng = np.random.default_rng(0)
    for _ in range(200):
        before = training_scene(rng)
        after = moved(before, rng)
        assert (after.place, after.size) == ("", "")
        assert [(t.shape, t.colour) for t in after.things] == [(t.shape, t.colour) for t in before.things]
        assert all(t.x - t.radius > 0 and t.x + t.radius < 1 for t in after.things)
        if after.relation == "left of":
            assert after.things[0].x < after.things[1].x
