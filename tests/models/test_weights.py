import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import cache, partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from models.errors import InvalidRequest
from models.offload import offload
from models.weights import Components, Placement, Source, load, place
from tests.models.original_layout import save_single_file

HOUSE = Path(__file__).resolve().parents[2]
EMBEDDED = HOUSE / "models" / "embedded"
SD = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel, "tokenizer": CLIPTokenizer}
SDXL = {**SD, "text_encoder_2": CLIPTextModelWithProjection, "tokenizer_2": CLIPTokenizer}
NAMES = {"sd15": SD, "sd21": SD, "sdxl": SDXL}
CPU = place("cpu", "auto")
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@cache
def embedded(model: str) -> Components:
    return load(Source(location=str(EMBEDDED / model)), NAMES[model], CPU)


def networks(components: Components) -> dict[str, torch.nn.Module]:
    return {name: module for name, module in components.modules.items() if isinstance(module, torch.nn.Module)}


def assert_same_tensors(expecting: Components, components: Components) -> None:
    for name, module in networks(components).items():
        found, expected = module.state_dict(), expecting.modules[name].state_dict()
        assert expected.keys() == found.keys()
        assert all(torch.equal(found[key], tensor) for key, tensor in expected.items()), name


@pytest.fixture
def sd15(tmp_path: Path) -> Path:
    """A copy of the embedded SD 1.5 that a test may spoil."""
    return Path(shutil.copytree(EMBEDDED / "sd15", tmp_path / "sd15"))


def refusal(location: Path | str, names: dict[str, type] = SD, **options) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as refused:
        load(Source(location=str(location), **options), names, CPU)
    return refused.value


@pytest.mark.parametrize("model", NAMES)
def test_a_folder_loads_frozen_and_whole(model: str):
    folder = EMBEDDED / model
    components = embedded(model)
    assert components.modules.keys() == NAMES[model].keys()
    for name, module in networks(components).items():
        stored = load_file(next((folder / name).glob("*.safetensors")))
        assert module.state_dict().keys() == stored.keys()
        assert all(torch.equal(tensor, stored[key].float()) for key, tensor in module.state_dict().items())
        assert not any(inside.training for inside in module.modules())
        assert not any(parameter.requires_grad for parameter in module.parameters())
    assert components.scheduler_config == json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    assert components.index == json.loads((folder / "model_index.json").read_text())
    assert components.modules["tokenizer"]("a red circle").input_ids


@pytest.mark.parametrize("model", NAMES)
def test_a_single_file_in_the_original_layout_equals_its_folder(model: str, tmp_path: Path):
    file = tmp_path / f"{model}.safetensors"
    save_single_file(EMBEDDED / model, file)
    folder = embedded(model)
    single = load(Source(location=str(file), config=str(EMBEDDED / model)), NAMES[model], CPU)
    assert_same_tensors(folder, single)
    assert single.scheduler_config == folder.scheduler_config
    assert single.scheduler_config["prediction_type"] == ("v_prediction" if model == "sd21" else "epsilon")
    assert single.revision != folder.revision
    for module in networks(single).values():
        assert not any(inside.training for inside in module.modules())
        assert not any(parameter.requires_grad for parameter in module.parameters())


def test_text_encoders_saved_by_older_transformers_load(sd15: Path):
    file = sd15 / "text_encoder" / "model.safetensors"
    older = {f"text_model.{key}": tensor for key, tensor in load_file(file).items()}
    older["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    save_file(older, file, metadata={"format": "pt"})
    names = {"text_encoder": CLIPTextModel}
    assert_same_tensors(embedded("sd15"), load(Source(location=str(sd15)), names, CPU))


def test_shards_load_as_one(sd15: Path):
    unet = UNet2DConditionModel.from_pretrained(sd15 / "unet")
    (sd15 / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    unet.save_pretrained(sd15 / "unet", max_shard_size="8MB")
    assert len(list((sd15 / "unet").glob("*-of-*.safetensors"))) > 1
    assert_same_tensors(embedded("sd15"), load(Source(location=str(sd15)), {"unet": UNet2DConditionModel}, CPU))


def test_attention_is_scaled_dot_product():
    components = embedded("sdxl")
    for name in ("unet", "vae"):
        assert {type(processor) for processor in components.modules[name].attn_processors.values()} == {
            AttnProcessor2_0
        }
    for name in ("text_encoder", "text_encoder_2"):
        assert components.modules[name].config._attn_implementation == "sdpa"


def test_precision_follows_the_placement_and_the_vae_is_never_float16():
    for dtype, vae_dtype in (("float16", torch.float32), ("bfloat16", torch.bfloat16), ("float32", torch.float32)):
        placement = place("cpu", dtype)
        assert placement.vae_dtype == vae_dtype
        components = load(Source(location=str(EMBEDDED / "sd15")), SD, placement)
        for name, module in networks(components).items():
            expected = vae_dtype if name == "vae" else getattr(torch, dtype)
            assert {parameter.dtype for parameter in module.parameters()} == {expected}


def test_auto_takes_the_best_device_that_is_there():
    placement = place("auto", "auto")
    if torch.cuda.is_available():
        assert (placement.device.type, placement.dtype, placement.vae_dtype) == ("cuda", torch.bfloat16, torch.bfloat16)
    else:
        assert placement.dtype == placement.vae_dtype == torch.float32


@pytest.mark.parametrize(
    ("device", "dtype", "offload", "field"),
    [
        ("tpu", "auto", False, "device"),
        ("cpu", "int8", False, "dtype"),
        ("cpu", "auto", True, "offload"),
        pytest.param(
            *("cuda", "auto", False, "device"),
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_a_placement_that_cannot_be_is_refused(device: str, dtype: str, offload: bool, field: str):
    with pytest.raises(InvalidRequest) as refused:
        place(device, dtype, offload=offload)
    assert refused.value.field == field


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".bin"])
def test_a_pickled_file_is_refused_unread(suffix: str, tmp_path: Path):
    file = tmp_path / f"model{suffix}"
    torch.save({"state_dict": {"weight": torch.ones(2)}}, file)
    refused = refusal(file, config=str(EMBEDDED / "sd15"))
    assert refused.field == "location"
    assert "convert" in refused.message
    renamed = file.rename(file.with_suffix(".safetensors"))
    assert refusal(renamed).field == "location"


def test_a_folder_of_pickled_weights_is_refused(sd15: Path):
    weights = sd15 / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    refused = refusal(sd15)
    assert refused.field == "location"
    assert "diffusion_pytorch_model.bin" in refused.message
    assert "Convert" in refused.message


def test_a_folder_that_sends_the_loader_elsewhere_is_refused(sd15: Path):
    (sd15 / "text_encoder" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    assert refusal(sd15).field == "location"


@pytest.mark.parametrize("spoil", ["truncated", "garbage", "empty", "huge header"])
def test_a_damaged_file_is_refused(spoil: str, sd15: Path):
    weights = sd15 / "vae" / "diffusion_pytorch_model.safetensors"
    content = weights.read_bytes()
    spoiled = {
        "truncated": content[: len(content) // 2],
        "garbage": b"\xff" * 4096,
        "empty": b"",
        "huge header": (1 << 40).to_bytes(8, "little") + content[8:],
    }
    weights.write_bytes(spoiled[spoil])
    refused = refusal(sd15)
    assert refused.field == "location"
    assert str(weights) in refused.message


@pytest.mark.parametrize("model", ["folder", "file"])
def test_missing_weights_are_never_made_up(model: str, sd15: Path, tmp_path: Path):
    weights = sd15 / "text_encoder" / "model.safetensors"
    tensors = load_file(weights)
    del tensors["encoder.layers.1.mlp.fc1.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})
    file = tmp_path / "model.safetensors"
    save_single_file(sd15, file)
    names = {"text_encoder": CLIPTextModel}
    refused = refusal(sd15, names) if model == "folder" else refusal(file, names, config=str(EMBEDDED / "sd15"))
    assert refused.field == "location"
    assert "encoder.layers.1.mlp.fc1.weight" in refused.message


def test_a_file_of_something_else_is_refused(tmp_path: Path):
    file = tmp_path / "other.safetensors"
    save_file({"weight": torch.ones(2)}, file)
    assert refusal(file, config=str(EMBEDDED / "sd15")).field == "location"


def test_another_architecture_s_configuration_is_refused(tmp_path: Path):
    file = tmp_path / "sd15.safetensors"
    save_single_file(EMBEDDED / "sd15", file)
    assert refusal(file, SDXL, config=str(EMBEDDED / "sdxl")).field == "location"
    assert refusal(file, config=str(tmp_path / "nothing")).field == "config"


def test_what_is_not_there_is_refused(sd15: Path, tmp_path: Path):
    assert refusal(tmp_path / "nothing").field == "location"
    assert refusal("https://example.com/model.safetensors").field == "location"
    for part in ("vae", "tokenizer", "scheduler", "model_index.json"):
        there = sd15 / part
        there.rename(tmp_path / "aside")
        assert refusal(sd15).field == "location", part
        (tmp_path / "aside").rename(there)


@pytest.mark.parametrize("revision", [None, "main", "v1.0", COMMIT[:7]])
def test_a_hub_id_needs_a_pinned_commit(revision: str | None):
    refused = refusal("stable-diffusion-v1-5/stable-diffusion-v1-5", revision=revision)
    assert refused.field == "revision"


def test_the_revision_names_the_content_and_not_the_place(sd15: Path, tmp_path: Path):
    original = embedded("sd15").revision

    def revision() -> str:
        return load(Source(location=str(sd15)), SD, CPU).revision

    assert revision() == original
    (sd15 / "README.md").write_text("not part of the model")
    assert revision() == original

    weights = sd15 / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors["conv_in.bias"][0] += 1
    save_file(tensors, weights, metadata={"format": "pt"})
    changed = revision()
    assert changed != original

    scheduler = sd15 / "scheduler" / "scheduler_config.json"
    scheduler.write_text(scheduler.read_text().replace("epsilon", "v_prediction"))
    assert revision() not in (original, changed)


class Hub(BaseHTTPRequestHandler):
    """The two routes of the hub that a snapshot needs, over a folder."""

    def __init__(self, *args, folder: Path, asked: set[str]):
        self.folder, self.asked = folder, asked
        super().__init__(*args)

    def do_GET(self) -> None:
        if "/tree/" in self.path:
            files = [file for file in self.folder.rglob("*") if file.is_file()]
            entries = [
                {"type": "file", "path": str(file.relative_to(self.folder)), "size": file.stat().st_size, "oid": COMMIT}
                for file in files
            ]
            self.answer(json.dumps(entries).encode())
            return
        name = self.path.partition(f"/resolve/{COMMIT}/")[2]
        if not name:
            self.send_error(404)
            return
        self.asked.add(name)
        self.answer((self.folder / name).read_bytes())

    do_HEAD = do_GET

    def answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hash(body)}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args) -> None:
        pass


@pytest.fixture
def hub(sd15: Path) -> Iterator[tuple[str, set[str]]]:
    """A hub on this machine with one repository, which also holds what must not be fetched."""
    for name in ("model.ckpt", "v1-5.safetensors", "unet/diffusion_pytorch_model.bin", "unet/model.py"):
        (sd15 / name).write_bytes(b"not for us")
    asked: set[str] = set()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Hub, folder=sd15, asked=asked))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()


def test_a_pinned_hub_id_fetches_only_what_it_loads(
    hub: tuple[str, set[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    endpoint, asked = hub
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    source = Source(location="org/name", revision=COMMIT)
    components = load(source, SD, CPU)
    assert_same_tensors(embedded("sd15"), components)
    assert components.revision == COMMIT
    assert "unet/diffusion_pytorch_model.safetensors" in asked
    assert {Path(name).suffix for name in asked} == {".json", ".txt", ".safetensors"}
    assert "v1-5.safetensors" not in asked
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert load(source, SD, CPU).revision == COMMIT


def test_without_the_hub_the_refusal_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    refused = refusal("org/name", revision=COMMIT)
    assert refused.field == "location"
    assert "local folder" in refused.message
    file = tmp_path / "sd15.safetensors"
    save_single_file(EMBEDDED / "sd15", file)
    refused = refusal(file)  # no configuration given: the original's repository is asked for it
    assert refused.field == "config"
    assert "stable-diffusion-v1-5/stable-diffusion-v1-5" in refused.message


MEASURE = """
from diffusers import UNet2DConditionModel
from models.weights import Source, load, place

def memory(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field)) * 1024

for folder, config in ((FOLDER, None), (FILE, FOLDER)):
    for dtype in ("float32", "bfloat16"):
        placement = place("cpu", dtype)
        load(Source(location=EMBEDDED), {"unet": UNet2DConditionModel}, placement)  # imports are not what is measured
        open("/proc/self/clear_refs", "w").write("5")  # forgets the peak
        before = memory("VmRSS")
        source = Source(location=folder, config=config)
        unet = load(source, {"unet": UNet2DConditionModel}, placement).modules["unet"]
        assert all(float(parameter.sum()) != 0 for parameter in unet.parameters())
        print((memory("VmHWM") - before) / sum(p.numel() * 4 for p in unet.parameters()))
        del unet
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measures as Linux does")
def test_loading_makes_no_second_copy(tmp_path: Path):
    folder, file = Path(shutil.copytree(EMBEDDED / "sd15", tmp_path / "sd15")), tmp_path / "single.safetensors"
    config = json.loads((folder / "unet" / "config.json").read_text())
    with init_empty_weights():
        unet = UNet2DConditionModel.from_config(config | {"block_out_channels": [96, 192, 256, 256]})
    unet.save_config(folder / "unet")
    tensors = {key: torch.full(tensor.shape, 0.5) for key, tensor in unet.state_dict().items()}
    save_file(tensors, folder / "unet" / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    save_single_file(folder, file)
    size = sum(tensor.nbytes for tensor in tensors.values())
    assert size > 100e6
    del tensors
    code = (
        MEASURE.replace("FOLDER", repr(str(folder)))
        .replace("EMBEDDED", repr(str(EMBEDDED / "sd15")))
        .replace("FILE", repr(str(file)))
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": str(HOUSE)}, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-3000:]
    copies = [float(line) for line in done.stdout.split()]
    print(f"{size / 1e6:.0f} MB on disk; at the peak in memory, times that: {copies}")
    for float32, bfloat16 in (copies[:2], copies[2:]):
        assert float32 < 1.15
        assert bfloat16 < 1.65  # the mapped file, which the system may drop at any time, and a copy of half its size


def test_an_offloaded_module_is_on_the_device_only_while_it_computes():
    """The device is meta, where shapes are computed and values are not: it shows the journey without a GPU."""
    components = load(Source(location=str(EMBEDDED / "sd15")), SD, CPU)
    encoder, vae = components.modules["text_encoder"], components.modules["vae"]
    before = {key: tensor.clone() for module in (encoder, vae) for key, tensor in module.state_dict().items()}
    for module in (encoder, vae):
        offload(module, torch.device("meta"))
    with torch.inference_mode():
        hidden = encoder(torch.zeros(1, 77, dtype=torch.long)).last_hidden_state
        picture = vae.decode(torch.zeros(1, 4, 8, 8)).sample
        latents = vae.encode(torch.zeros(1, 3, 64, 64)).latent_dist.mean
    assert (hidden.device.type, picture.device.type, latents.device.type) == ("meta",) * 3
    assert (hidden.shape, picture.shape, latents.shape) == ((1, 77, 128), (1, 3, 64, 64), (1, 4, 8, 8))
    after = {key: tensor for module in (encoder, vae) for key, tensor in module.state_dict().items()}
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())


def test_offloading_changes_no_result_and_survives_a_failed_call():
    components = load(Source(location=str(EMBEDDED / "sd15")), SD, CPU)
    vae = components.modules["vae"]
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = vae.decode(noise).sample
        offload(vae, torch.device("cpu"))
        with pytest.raises(RuntimeError):
            vae.decode(torch.zeros(1, 3, 8, 8))
        assert torch.equal(vae.decode(noise).sample, expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("offloaded", [False, True])
def test_on_a_gpu_weights_are_channels_last_and_offloading_keeps_only_the_unet(offloaded: bool):
    placement = place("cuda", "float32", offload=offloaded)
    cpu, gpu = (load(Source(location=str(EMBEDDED / "sdxl")), SDXL, where) for where in (CPU, placement))
    for name, module in networks(gpu).items():
        at_home = "cpu" if offloaded and name != "unet" else "cuda"
        assert {parameter.device.type for parameter in module.parameters()} == {at_home}, name
    for name in ("unet", "vae"):
        convolution = gpu.modules[name].conv_in if name == "unet" else gpu.modules[name].decoder.conv_in
        assert convolution.weight.is_contiguous(memory_format=torch.channels_last)
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = cpu.modules["vae"].decode(noise).sample
        picture = gpu.modules["vae"].decode(noise.to("cuda")).sample
    assert picture.device.type == "cuda"
    assert torch.allclose(picture.cpu(), expected, atol=2e-2)


def test_a_placement_is_plain_data():
    cpu = torch.device("cpu")
    assert place("cpu", "auto") == Placement(device=cpu, dtype=torch.float32, vae_dtype=torch.float32)
