"""Weights on their way from a folder, a single file or the hub onto a device: safetensors only, no code, one copy."""

import hashlib
import json
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size
from diffusers import ModelMixin
from diffusers.loaders import single_file_utils
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from transformers.utils import SAFE_WEIGHTS_NAME

from models.errors import GenerationFailed, InvalidRequest
from models.fp8 import check_fp8, quantise
from models.offload import offload

Tensors = dict[str, torch.Tensor]

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
COMMIT = re.compile(r"[0-9a-f]{40}")
PICKLED = frozenset({".bin", ".ckpt", ".pt", ".pth", ".pkl"})

# Where a single file keeps each text encoder: SD 1.5 and 2.1 have one, XL numbers two.
TEXT_ENCODERS = {
    "text_encoder": ("cond_stage_model.", "conditioner.embedders.0."),
    "text_encoder_2": ("conditioner.embedders.1.",),
}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a model comes from: a diffusers folder, one `.safetensors` file, or a hub id with a pinned commit.

    `config` goes with a single file, which has neither tokenizer nor scheduler: a folder or hub id that has them.
    Without it diffusers names the original's repository by the file's layout; a fine-tune that predicts v needs it.
    """

    location: str
    revision: str | None = None
    config: str | None = None


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Which device the networks run on, in which precision, and how.

    `fp8` is about the UNet's linear layers alone. With `graphs` its forwards are captured (models.captured); where a
    folder is given it is compiled, and what was compiled is kept there (models.compiled).
    """

    device: torch.device
    dtype: torch.dtype
    vae_dtype: torch.dtype
    offload: bool = False
    fp8: bool = False
    graphs: bool = False
    compiled: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Components:
    """A model in memory: networks and tokenizers by name, what its configuration says, and which weights these are."""

    modules: dict[str, Any]
    scheduler_config: dict[str, Any]
    index: dict[str, Any]
    revision: str


@dataclass(frozen=True, kw_only=True)
class Files:
    """A model on disk: a diffusers folder, whose weights lie in `checkpoint` instead when there is one."""

    folder: Path
    checkpoint: Path | None = None
    commit: str | None = None


def place(
    device: str,
    dtype: str,
    *,
    offload: bool = False,
    fp8: bool = False,
    graphs: bool = False,
    compiled: Path | None = None,
) -> Placement:
    """The placement that these settings mean on this machine."""
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device == "auto":
        device = next(name for name, there in present.items() if there)
    if device not in present:
        raise InvalidRequest("device", f"`{device}` is not a device; allowed: auto, {', '.join(present)}")
    if not present[device]:
        raise InvalidRequest("device", f"`{device}` is not there on this machine; use auto or cpu")
    if dtype == "auto":
        dtype = "bfloat16" if device == "cuda" else "float32"
    if dtype not in DTYPES:
        raise InvalidRequest("dtype", f"`{dtype}` is not a precision; allowed: auto, {', '.join(DTYPES)}")
    if offload and device == "cpu":
        raise InvalidRequest("offload", "offload spares the memory of a GPU and the device is the CPU; set it to false")
    if fp8:
        check_fp8(torch.device(device), DTYPES[dtype])
    if graphs and device != "cuda":
        raise InvalidRequest("graphs", f"graphs are CUDA's and the device is `{device}`; set it to false")
    if compiled is not None:
        _check_compiled(compiled, device, fp8)
    # float16 ends at 65504, and the activations of Stable Diffusion's decoders go beyond: black pictures.
    vae_dtype = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    return Placement(
        device=torch.device(device),
        dtype=DTYPES[dtype],
        vae_dtype=vae_dtype,
        offload=offload,
        fp8=fp8,
        graphs=graphs,
        compiled=compiled,
    )


def _check_compiled(folder: Path, device: str, fp8: bool) -> None:
    if fp8:
        raise InvalidRequest("compiled", "what is compiled runs in the precision of `dtype`: leave out `fp8`, or this")
    if device not in ("cuda", "cpu"):
        raise InvalidRequest("compiled", f"networks are compiled for cuda and cpu and the device is `{device}`")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InvalidRequest("compiled", f"nothing can be kept in {folder}: {error}") from error


def load(source: Source, names: Mapping[str, type], placement: Placement) -> Components:
    """The components `names` of the model at `source`, ready to run at `placement`.

    The classes are the caller's: what the files say about classes is never imported. Networks are made without
    memory (accelerate's meta device) and each tensor goes from the mapped file to its place.
    """
    files = locate(source, names)
    checkpoint = load_file(files.checkpoint) if files.checkpoint else None  # mapped: nothing is read yet
    return Components(
        modules={name: load_component(files, checkpoint, name, kind, placement) for name, kind in names.items()},
        scheduler_config=read_json(files.folder / "scheduler" / "scheduler_config.json"),
        index=read_json(files.folder / "model_index.json"),
        revision=(files.commit or fingerprint(files, names)) + ("-fp8" if placement.fp8 else ""),  # other weights
    )


def locate(source: Source, names: Mapping[str, type]) -> Files:
    """The files of `source`, downloaded if need be, with everything refused that is not safetensors."""
    path = Path(source.location).expanduser()
    if path.is_file():
        check_safetensors(path)
        return Files(folder=configuration(source.config, path), checkpoint=path)
    files = Files(folder=path) if path.is_dir() else Files(folder=download(source, names), commit=source.revision)
    for file in weight_files(files, names):
        check_safetensors(file)
    return files


def configuration(config: str | None, checkpoint: Path) -> Path:
    """The folder with the configurations and tokenizers that a single file goes with."""
    if config is None:
        config = str(single_file_utils.fetch_diffusers_config(load_file(checkpoint))["pretrained_model_name_or_path"])
    if (folder := Path(config).expanduser()).is_dir():
        return folder
    if not HUB_ID.fullmatch(config):
        raise InvalidRequest("config", f"`{config}` is neither a diffusers folder here nor a hub id (org/name)")
    return snapshot("config", config, None, ["model_index.json", "*/*.json", "*/*.txt"])


def download(source: Source, names: Mapping[str, type]) -> Path:
    """The snapshot of a hub id at its pinned commit: only the files that loading reads, and none that can run code."""
    here = f"`{source.location}` is no folder and no file here"
    if not HUB_ID.fullmatch(source.location):
        raise InvalidRequest("location", f"{here}, and no hub id (org/name) either")
    if source.revision is None or not COMMIT.fullmatch(source.revision):
        raise InvalidRequest("revision", f"{here}; as a hub id it needs a pinned commit of 40 hexadecimal digits")
    return snapshot("location", source.location, source.revision, wanted(names))


def wanted(names: Iterable[str]) -> list[str]:
    """The patterns of the files that loading these components reads from a hub's repository."""
    # Not *.safetensors: repositories hold the same weights in several precisions, and as single files besides.
    stems = ("model", "model-*-of-*", "diffusion_pytorch_model", "diffusion_pytorch_model-*-of-*")
    kinds = ("*.json", "*.txt", *(f"{stem}.safetensors" for stem in stems))
    return ["model_index.json", "scheduler/*.json", *(f"{name}/{kind}" for name in names for kind in kinds)]


def snapshot(field: str, hub_id: str, revision: str | None, patterns: list[str]) -> Path:
    """The folder with the hub's files of these patterns, from the local cache where they are in it."""
    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, OSError) as error:
        at = f" at {revision}" if revision else ""
        advice = "check the id and the commit, or give a local folder where the hub cannot be reached"
        raise InvalidRequest(field, f"{hub_id}{at} cannot be downloaded ({error}); {advice}") from error


def weight_files(files: Files, names: Mapping[str, type]) -> list[Path]:
    """The files that hold the weights of `names`."""
    if files.checkpoint is not None:
        return [files.checkpoint]
    networks = {name: kind for name, kind in names.items() if issubclass(kind, torch.nn.Module)}
    return [file for name, kind in networks.items() for file in component_files(files.folder / name, kind)]


def component_files(folder: Path, kind: type) -> list[Path]:
    """The weights of one component folder: one file, or the shards that its index lists."""
    if not folder.is_dir():
        raise InvalidRequest("location", f"{folder} is missing; a diffusers folder has one folder per component")
    # transformers would follow either of these to weights of another name, pickled ones too.
    if (folder / "adapter_config.json").exists() or "transformers_weights" in read_json(folder / "config.json"):
        raise InvalidRequest("location", f"{folder} sends the loader to other files; give a folder with plain weights")
    name = SAFETENSORS_WEIGHTS_NAME if issubclass(kind, ModelMixin) else SAFE_WEIGHTS_NAME
    shards = folder / f"{name}.index.json"
    if shards.is_file():
        return [folder / shard for shard in sorted(set(read_json(shards).get("weight_map", {}).values()))]
    if not (folder / name).is_file():
        found = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLED | {".safetensors"})
        advice = "Convert pickled weights: load them with diffusers where you trust them, then save_pretrained"
        raise InvalidRequest("location", f"{folder} has no {name} but {', '.join(found) or 'no weights'}. {advice}")
    return [folder / name]


def check_safetensors(file: Path) -> None:
    """Refuses a file whose header is not that of a complete safetensors file; reads nothing else."""
    if file.suffix in PICKLED:
        advice = "pickled weights can run code: convert it with safetensors.torch.save_file where you trust it"
        raise InvalidRequest("location", f"{file} is not a .safetensors file; {advice}")
    try:
        with safe_open(file, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise InvalidRequest("location", f"{file} is not a complete .safetensors file: {error}") from error


def read_json(file: Path) -> dict[str, Any]:
    """The object in a configuration file."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InvalidRequest("location", f"{file} is missing; a diffusers folder has it") from error
    except ValueError as error:
        raise InvalidRequest("location", f"{file} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise InvalidRequest("location", f"{file} holds no JSON object")
    return content


def load_component(files: Files, checkpoint: Tensors | None, name: str, kind: Any, placement: Placement) -> Any:
    """One network or tokenizer, as a model server needs it: in eval mode, frozen, where it belongs."""
    folder = files.folder / name
    if not issubclass(kind, torch.nn.Module):
        with refusing(folder):
            return kind.from_pretrained(folder, local_files_only=True)
    stays = name == "unet" or not placement.offload
    device = placement.device if stays else torch.device("cpu")
    dtype = placement.vae_dtype if name == "vae" else placement.dtype
    if checkpoint is None:
        module = from_folder(folder, kind, device, dtype)
    else:
        module = from_checkpoint(checkpoint, folder, kind, device, dtype)
    module.eval().requires_grad_(False)
    if placement.device.type == "cuda" and name in ("unet", "vae"):
        module.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]  (missing in torch's stubs)
    if placement.fp8 and name == "unet":
        quantise(module)
    if not stays:
        offload(module, placement.device)
    return module


def from_folder(folder: Path, kind: Any, device: torch.device, dtype: torch.dtype) -> torch.nn.Module:
    """A network from its component folder; every weight has to be there, none is made up."""
    safely: dict[str, Any] = {"use_safetensors": True, "local_files_only": True, "output_loading_info": True}
    with refusing(folder):
        module, report = kind.from_pretrained(
            folder, dtype=dtype, device_map={"": device}, low_cpu_mem_usage=True, **safely
        )
    if report["missing_keys"]:
        raise InvalidRequest("location", f"{folder} lacks the weights {', '.join(sorted(report['missing_keys'])[:5])}")
    return module


def from_checkpoint(
    checkpoint: Tensors, folder: Path, kind: Any, device: torch.device, dtype: torch.dtype
) -> torch.nn.Module:
    """A network from the layout that Stable Diffusion was first published in, by diffusers' own conversion."""
    where: dict[str, Any] = {"config": str(folder), "torch_dtype": dtype, "local_files_only": True}
    with refusing(folder):
        if folder.name in TEXT_ENCODERS:
            # Each encoder sees its own tensors alone: diffusers tells the two of XL apart by their width only.
            own = {key: value for key, value in checkpoint.items() if key.startswith(TEXT_ENCODERS[folder.name])}
            module = single_file_utils.create_diffusers_clip_model_from_ldm(kind, own, **where)
        else:
            module = kind.from_single_file(checkpoint, device=device, low_cpu_mem_usage=True, **where)
    lacking = sorted(name for name, parameter in module.named_parameters() if parameter.is_meta)
    if lacking:
        raise InvalidRequest("location", f"the file lacks weights of {folder.name}: {', '.join(lacking[:5])}")
    return module.to(device)


@contextmanager
def refusing(what: Path) -> Iterator[None]:
    """Turns what the libraries say of unusable files into the caller's mistake; running out of memory stays itself."""
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, single_file_utils.SingleFileComponentError) as error:
        if out_of_memory(error):
            raise
        reason = "the file lacks some of its weights" if isinstance(error, NotImplementedError) else error  # on meta
        raise InvalidRequest("location", f"{what} cannot be loaded: {reason}") from error


@contextmanager
def fitting(what: str) -> Iterator[None]:
    """Turns running out of memory while something is loaded into a failure that another try may not meet."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise GenerationFailed("out_of_memory", f"{what} does not fit into memory: {error}") from error


def out_of_memory(error: Exception) -> bool:
    """Whether a device or the machine had no room: torch tells the one by a class, the other in words alone."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or should_reduce_batch_size(error)


def fingerprint(files: Files, names: Mapping[str, type]) -> str:
    """A name for these weights: cheap for gigabytes, the same wherever they lie, another when they change.

    It is the SHA-256 of the configurations, and of each weight file its header and the first and last
    2 KiB of every tensor in it; so only a change in the middle of large tensors alone would go unseen.
    """
    digest = hashlib.sha256()
    texts = [file for name in ("scheduler", *sorted(names)) for file in sorted((files.folder / name).glob("*"))]
    for file in [files.folder / "model_index.json", *texts]:
        if file.suffix in (".json", ".txt"):
            digest.update(f"{file.relative_to(files.folder).as_posix()}\0".encode())
            digest.update(hashlib.sha256(file.read_bytes()).digest())
    for file in weight_files(files, names):
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = stream.read(length)
            digest.update(header)
            tensors = (value["data_offsets"] for key, value in json.loads(header).items() if key != "__metadata__")
            for start, end in sorted(tensors):
                for block_start, block_end in ((start, min(start + 2048, end)), (max(start, end - 2048), end)):
                    stream.seek(8 + length + block_start)
                    digest.update(stream.read(block_end - block_start))
    return digest.hexdigest()[:16]
