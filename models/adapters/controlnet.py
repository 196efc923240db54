"""ControlNets: copies of a UNet's encoder that read a picture and add to the UNet's residuals, row by row.

Source: Zhang et al., arXiv:2302.05543. Several on one row add up; a row without any gets zeros.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from inspect import signature
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import torch
from accelerate import init_empty_weights
from diffusers import ControlNetModel
from diffusers.loaders.single_file_utils import convert_controlnet_checkpoint
from safetensors.torch import load_file

from models.errors import GenerationFailed, InvalidRequest, NotFound
from models.family import Conditioning, Residuals
from models.images import Picture
from models.parts import ControlUse
from models.preprocessors import preprocess
from models.rowwise import RowThreads
from models.weights import Placement, check_safetensors, component_files, fitting, from_folder, read_json, refusing

# What has to be as in the UNet, for the residuals to fit and to mean what it expects.
SHARED = ("block_out_channels", "layers_per_block", "cross_attention_dim", "addition_embed_type")
CAPACITY_BYTES = 4 * 2**30


class ControlNet:
    """One ControlNet with weights. `nbytes` is how much memory they take."""

    def __init__(self, network: ControlNetModel):
        config = network.config
        if config["global_pool_conditions"]:
            raise InvalidRequest("controls", "ControlNets that pool their residuals (of the kind `shuffle`) do not run")
        self.nbytes = sum(tensor.nbytes for tensor in network.state_dict().values())
        self._network: Any = network
        self._channels = config["in_channels"]
        # A hint is the same at every step: `read` does once what the network would do first in each.
        self._reader: Any = network.controlnet_cond_embedding
        self._network.controlnet_cond_embedding = torch.nn.Identity()
        self._reversed = config["controlnet_conditioning_channel_order"] == "bgr"
        network.register_to_config(controlnet_conditioning_channel_order="rgb")

    @classmethod
    def load(cls, location: str | Path, base: Mapping[str, Any], placement: Placement) -> "ControlNet":
        """The ControlNet in a diffusers folder or a single .safetensors file, for the UNet of configuration `base`.

        Raises InvalidRequest for anything that is not safetensors, and for one made for another base model.
        """
        path = _found("location", location)
        network = (_from_folder if path.is_dir() else _from_file)(path, base, placement)
        network.eval().requires_grad_(False)
        if placement.device.type == "cuda":
            network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]  (as in models.weights)
        return cls(network)

    @torch.inference_mode()
    def read(self, hint: torch.Tensor) -> torch.Tensor:
        """A hint (3, height, width) of 0 to 1 as the network's first layer takes it, (channels, height/8, width/8)."""
        weight = self._reader.conv_in.weight
        hint = hint.flip(0) if self._reversed else hint
        return self._reader(hint[None].to(weight.device, weight.dtype))[0]

    def residuals(
        self, latents: torch.Tensor, timesteps: torch.Tensor, rows: Conditioning, features: torch.Tensor
    ) -> Residuals:
        """What it adds at full weight: latents (r, c, h, w), timesteps (r,), hints as `read` gives them, stacked."""
        inputs = latents[:, : self._channels].to(features.dtype)  # not what an inpainting UNet sees besides
        added = dict(rows.added) or None
        return self._network(inputs, timesteps, rows.context, features, added_cond_kwargs=added, return_dict=False)


@dataclass(frozen=True, eq=False, kw_only=True)
class Control:
    """One ControlNet's use by one image, on all its rows. `hint` is (3, height, width) of 0 to 1.

    It acts on the evaluations that lie wholly between `start` and `end`, shares of the tape.
    """

    net: ControlNet
    hint: torch.Tensor
    weight: float = 1.0
    start: float = 0.0
    end: float = 1.0

    @cached_property
    def features(self) -> torch.Tensor:
        """The hint, read once for all steps."""
        return self.net.read(self.hint)

    def acts(self, position: int, evaluations: int) -> bool:
        """Whether it does at this evaluation, by the comparison that diffusers' pipelines make."""
        outside = position / evaluations < self.start or (position + 1) / evaluations > self.end
        return self.weight != 0 and not outside


class ControlNets:
    """The ControlNets registered for one model, name -> folder or file: loaded when first asked for, kept by bytes.

    `base` is the UNet's configuration; `preprocessors` says where those that need weights have them. Safe to use from
    several threads, of which one loads at a time. What leaves lives on as long as somebody uses it, and is found again
    until then. Raises InvalidRequest where nothing lies at a location, so that it is told when a model starts.
    """

    def __init__(
        self,
        locations: Mapping[str, str | Path],
        base: Mapping[str, Any],
        placement: Placement,
        *,
        preprocessors: Mapping[str, str | Path] | None = None,
        capacity_bytes: int = CAPACITY_BYTES,
    ):
        self._locations = {name: _found(f"controlnets.{name}", at) for name, at in locations.items()}
        self._preprocessors = {name: _found(f"preprocessors.{name}", at) for name, at in (preprocessors or {}).items()}
        self._base, self._placement = base, placement
        self._capacity = capacity_bytes
        self._kept: OrderedDict[str, ControlNet] = OrderedDict()
        self._alive: WeakValueDictionary[str, ControlNet] = WeakValueDictionary()
        self._lock = threading.Lock()

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._locations)

    def get(self, name: str) -> ControlNet:
        """Raises NotFound for a name that is not registered, InvalidRequest for one that cannot be loaded, and
        GenerationFailed for one that does not fit into memory."""
        if name not in self._locations:
            there_are = ", ".join(self._locations) or "none"
            raise NotFound(f"there is no ControlNet {name!r} for this model; there are: {there_are}")
        with self._lock:
            net = self._alive.get(name)
            if net is None:
                net = self._alive[name] = self._load(name)
            self._kept[name] = net
            self._kept.move_to_end(name)
            while sum(each.nbytes for each in self._kept.values()) > self._capacity and len(self._kept) > 1:
                self._kept.popitem(last=False)
        return net

    def _load(self, name: str) -> ControlNet:
        try:
            with fitting(f"the ControlNet {name!r}"):
                return ControlNet.load(self._locations[name], self._base, self._placement)
        except GenerationFailed:
            self._kept.clear()  # the next try has the room of all that nobody uses
            raise

    def controls(self, uses: Sequence[ControlUse], fit: Callable[[Picture], Picture]) -> tuple[Control, ...]:
        """A request's uses. Their own pictures are fitted to what is drawn by `fit`, and then preprocessed.

        Raises NotFound for names that are not there, InvalidRequest for what cannot be loaded, and GenerationFailed for
        what does not fit into memory.
        """
        return tuple(self._control(f"controls.{i}", use, fit) for i, use in enumerate(uses))

    def _control(self, field: str, use: ControlUse, fit: Callable[[Picture], Picture]) -> Control:
        net = self.get(use.name)
        try:
            picture = preprocess(use.preprocessor or "none", fit(use.image), self._preprocessors)
        except InvalidRequest as refused:
            raise InvalidRequest(f"{field}.{refused.field}", refused.message) from refused
        hint = torch.from_numpy(np.array(picture.array().transpose(2, 0, 1))).float() / 255
        return Control(net=net, hint=hint, weight=use.weight, start=use.start, end=use.end)


@dataclass(frozen=True, kw_only=True)
class _Call:
    """One run of a network: its rows in the batch, and each one's hint and weight."""

    net: ControlNet
    rows: torch.Tensor  # (k,)
    tokens: int | None  # the rows' true number of tokens; None where nothing is padded
    features: torch.Tensor  # (k, channels, h, w)
    weights: torch.Tensor  # (k, 1, 1, 1)


class ControlBatch:
    """Who is steered by what among the images of a batch: built while they stay together, asked at every step.

    `controls` and `evaluations` (the length of its tape) are each image's; `owners` says which image a row belongs to.
    """

    def __init__(self, controls: Sequence[Sequence[Control]], owners: Sequence[int], evaluations: Sequence[int]):
        self._uses = [(image, control) for image, several in enumerate(controls) for control in several]
        self._rows = [[row for row, owner in enumerate(owners) if owner == image] for image in range(len(controls))]
        self._evaluations = evaluations
        self._lengths: tuple[torch.Tensor | None, list[int]] = (None, [])
        self._plan: tuple[Any, list[_Call]] = (None, [])

    def residuals(
        self,
        shown: Callable[[], tuple[torch.Tensor, torch.Tensor]],
        rows: Conditioning,
        positions: Sequence[int],
        share: RowThreads,
    ) -> Residuals | None:
        """What is added to the UNet's own residuals at this evaluation, for all rows; None where nothing acts.

        `shown` gives latents (rows, c, h, w) and timesteps (rows,) as the UNet gets them; `positions` are the images'
        on their tapes.
        """
        calls = self._calls(rows, positions)
        if not calls:
            return None
        latents, timesteps = shown()
        sums: list[torch.Tensor] = []
        for call in calls:
            its = latents[call.rows], timesteps[call.rows], _pick(rows, call), call.features
            parts = share(partial(_run, call.net, *its), its[0])
            sums = sums or [part.new_zeros(len(latents), *part.shape[1:]) for part in parts]
            for total, part in zip(sums, parts, strict=True):
                total.index_add_(0, call.rows, part * call.weights)
        return sums[:-1], sums[-1]

    def _calls(self, rows: Conditioning, positions: Sequence[int]) -> list[_Call]:
        """The runs at this evaluation: the last one's again, while the same controls act on contexts of one length."""
        acting = [control.acts(positions[image], self._evaluations[image]) for image, control in self._uses]
        if not any(acting):
            return []
        lengths = self._true_lengths(rows)
        if self._plan[0] != (acting, lengths):
            self._plan = (acting, lengths), self._planned(acting, lengths)
        return self._plan[1]

    def _planned(self, acting: list[bool], lengths: list[int]) -> list[_Call]:
        """One run for each network and number of tokens: diffusers' ControlNets take no mask over the context."""
        groups: dict[tuple[ControlNet, int | None], list[tuple[int, Control]]] = {}
        for (image, control), acts in zip(self._uses, acting, strict=True):
            for row in self._rows[image] if acts else ():
                groups.setdefault((control.net, lengths[row] if lengths else None), []).append((row, control))
        calls = []
        for (net, tokens), members in groups.items():
            features = torch.stack([control.features for _, control in members])
            rows = torch.tensor([row for row, _ in members], device=features.device)
            weights = features.new_tensor([control.weight for _, control in members])[:, None, None, None]
            calls.append(_Call(net=net, rows=rows, tokens=tokens, features=features, weights=weights))
        return calls

    def _true_lengths(self, rows: Conditioning) -> list[int]:
        """Each row's number of tokens that are not padding; empty where nothing is masked."""
        if rows.mask is None:
            return []
        if self._lengths[0] is not rows.mask:
            self._lengths = rows.mask, rows.mask.sum(1).tolist()
        return self._lengths[1]


def _run(
    net: ControlNet,
    latents: torch.Tensor,
    timesteps: torch.Tensor,
    rows: Conditioning,
    features: torch.Tensor,
    part: slice,
) -> tuple[torch.Tensor, ...]:
    down, mid = net.residuals(latents[part], timesteps[part], rows.part(part), features[part])
    return *down, mid


def _pick(rows: Conditioning, call: _Call) -> Conditioning:
    """The conditioning of the call's rows alone, without padding."""
    added = {name: tensor[call.rows] for name, tensor in rows.added.items()}
    return Conditioning(context=rows.context[call.rows][:, : call.tokens], added=added)


def _found(field: str, location: str | Path) -> Path:
    """Where something lies. Raises InvalidRequest naming the field where nothing does."""
    path = Path(location).expanduser()
    if not (path.is_dir() or path.is_file()):
        raise InvalidRequest(field, f"{path} is neither a folder nor a file")
    return path


def _from_folder(folder: Path, base: Mapping[str, Any], placement: Placement) -> Any:
    """From diffusers' layout, whose configuration tells what it is and what it was made for."""
    config = read_json(folder / "config.json")
    if (kind := config.get("_class_name")) != "ControlNetModel":
        raise InvalidRequest("location", f"{folder} is no ControlNet (a ControlNetModel) but says it is a {kind}")
    theirs = {name: _plain(config.get(name)) for name in SHARED}
    ours = {name: _plain(base.get(name)) for name in SHARED}
    if theirs != ours:
        differ = ", ".join(f"{name} {theirs[name]}, not {ours[name]}" for name in SHARED if theirs[name] != ours[name])
        raise InvalidRequest("controls", f"{folder} was made for another base model: it has {differ}")
    for file in component_files(folder, ControlNetModel):
        check_safetensors(file)
    return from_folder(folder, ControlNetModel, placement.device, placement.dtype)


def _from_file(file: Path, base: Mapping[str, Any], placement: Placement) -> Any:
    """From a single file, of diffusers' names or the original's: a ControlNet is built as its UNet's encoder is."""
    check_safetensors(file)
    with refusing(file):
        weights = convert_controlnet_checkpoint(load_file(file), base)
    reader = [key for key in weights if key.startswith("controlnet_cond_embedding.") and key.endswith(".weight")]
    if not reader:
        raise InvalidRequest("location", f"{file} is no ControlNet: no layer of it reads a hint")
    widths = {key: len(weights[key]) for key in reader}
    config = {name: base[name] for name in signature(ControlNetModel.__init__).parameters if name in base}
    config["in_channels"] = weights["conv_in.weight"].shape[1]
    config["conditioning_channels"] = weights["controlnet_cond_embedding.conv_in.weight"].shape[1]
    blocks = sorted((int(key.split(".")[2]), width) for key, width in widths.items() if ".blocks." in key)
    first = widths["controlnet_cond_embedding.conv_in.weight"]
    config["conditioning_embedding_out_channels"] = (first, *(width for i, width in blocks if i % 2))
    with init_empty_weights():
        network: Any = ControlNetModel(**config)
    try:
        network.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        raise InvalidRequest("controls", f"{file} was made for another base model: {error}") from error
    return network.to(placement.device, placement.dtype)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
