"""LoRAs: low-rank additions to a network's layers, for each row of a batch other ones, or none.

A layer's output y becomes y + weight * scale * up(down(x)), summed over all LoRAs of the row. Source: Hu et al.,
arXiv:2106.09685; for convolutions with a window LyCORIS' LoCon, arXiv:2309.14859.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.loaders import StableDiffusionXLLoraLoaderMixin
from diffusers.utils.state_dict_utils import (
    StateDictType,
    convert_state_dict_to_peft,
    convert_unet_state_dict_to_peft,
)
from safetensors import SafetensorError
from safetensors.torch import load as read_safetensors
from torch import Tensor, nn
from torch.nn.functional import conv2d

from models.errors import InvalidRequest
from models.rowwise import part

UNET = "unet"
TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
CONFIGURATION = "lora_adapter_metadata"  # where diffusers' save_lora_weights keeps peft's configuration
GATHERED_BYTES = 256 * 2**20  # up to so many every row gets its own copy once, and not at every layer of every step
PLAIN = "plain"  # marks a field that holds no tensors, and much else (models.forward)
DOWN, UP = ".lora_A.weight", ".lora_B.weight"

# Parts of tensors' names that tell of something else than a LoRA.
OTHER_KINDS = {
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "oft_": "OFT",
    "lora_mid": "Tucker decomposition",
    ".diff": "difference of whole weights",
    ".on_input": "IA3",
    "lora_controlnet": "Control-LoRA",
}


@dataclass(frozen=True, kw_only=True)
class Factors:
    """What one layer gets: `down` (rank, in) or (rank, in, k, k), `up` (out, rank), and alpha / rank."""

    down: Tensor
    up: Tensor
    scale: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Lora:
    """A LoRA in memory: for each network, by its name in the pipeline, the layers' paths and what they get."""

    name: str
    sha256: str
    targets: Mapping[str, Mapping[str, Factors]]

    @property
    def nbytes(self) -> int:
        layers = [factors for target in self.targets.values() for factors in target.values()]
        return sum(factors.down.nbytes + factors.up.nbytes for factors in layers)


Mix = tuple[tuple[Lora, float], ...]
"""The LoRAs of one row and their weights."""


def load(name: str, sha256: str, data: bytes, networks: Mapping[str, nn.Module]) -> Lora:
    """The LoRA in a safetensors file's bytes, for a model with these networks ("unet", "text_encoder", ...).

    Understands kohya's, diffusers' and peft's names of tensors. Raises InvalidRequest for other kinds of adapters, and
    wherever one tensor would be left out: nothing of a file is dropped.
    """
    try:
        tensors = read_safetensors(data)
        metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__") or {}
    except (SafetensorError, ValueError) as error:
        raise _refusal(name, f"is not a complete .safetensors file: {error}") from error
    for mark, kind in OTHER_KINDS.items():
        if key := next((key for key in tensors if mark in key), None):
            raise _refusal(name, f"is a {kind} ({key}); of its kind only LoRA and LoCon are supported")
    base = str(metadata.get("ss_base_model_version") or metadata.get("modelspec.architecture") or "")
    found, alphas = _renamed(name, tensors, networks[UNET])
    targets, unknown = {}, set(found)
    for network in (UNET, *TEXT_ENCODERS):
        own = {key.removeprefix(f"{network}."): t for key, t in found.items() if key.startswith(f"{network}.")}
        if own and network not in networks:
            raise _misfit(name, base, f"it adapts {network}, which this model does not have")
        if own:
            unknown -= {f"{network}.{key}" for key in own}
            scales = _Scales(network, alphas, metadata)
            targets[network] = _targets(name, base, own, scales, networks[network])
    if unknown or not targets:
        raise _refusal(name, f"has tensors of no layout known here: {', '.join(sorted(unknown)[:3]) or 'none at all'}")
    return Lora(name=name, sha256=sha256, targets=targets)


def _refusal(name: str, problem: str) -> InvalidRequest:
    return InvalidRequest("adapters", f"{name!r} {problem}")


def _misfit(name: str, base: str, detail: str) -> InvalidRequest:
    says = f" ({base})" if base else ""
    return _refusal(name, f"was made for another base model{says}: {detail}")


def _renamed(name: str, tensors: dict[str, Tensor], unet: Any) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The tensors by peft's names, each with its network's in front; and kohya's alphas by the layers' paths."""
    try:
        read: Any = StableDiffusionXLLoraLoaderMixin.lora_state_dict(dict(tensors), unet_config=unet.config)
        converted, alphas = read
        if not any(key.startswith((UNET, "text_encoder")) for key in converted):
            converted = {f"{UNET}.{key}": tensor for key, tensor in converted.items()}  # as save_attn_procs wrote it
        downs = {key: float(alpha) for key, alpha in _alphas_by_down(alphas or {}).items()}
        renamed = _to_peft(converted)
        renamed_alphas = {key.removesuffix(DOWN): alpha for key, alpha in _to_peft(downs).items()}
    except (ValueError, KeyError, IndexError, RuntimeError) as error:
        raise _refusal(name, f"has tensors of no layout known here: {str(error)[:200]}") from error
    if len(renamed) + len(renamed_alphas) != len(tensors):  # two of them share a name, or one was passed over
        raise _refusal(
            name, f"has {len(tensors)} tensors, of which {len(renamed) + len(renamed_alphas)} are understood"
        )
    return renamed, renamed_alphas


def _alphas_by_down(alphas: dict[str, float]) -> dict[str, float]:
    """diffusers keeps alphas by names that are cut off in two ways; here by the name of the layer's `down`."""
    named = {key.removesuffix(".alpha"): alpha for key, alpha in alphas.items()}
    return {key if key.endswith(".weight") else f"{key}.lora.down.weight": alpha for key, alpha in named.items()}


def _to_peft(named: dict[str, Any]) -> dict[str, Any]:
    """Anything by diffusers' old or new names, by peft's; who has such a name keeps it."""
    unet = {key: value for key, value in named.items() if key.startswith(f"{UNET}.")}
    text = {key: value for key, value in named.items() if key not in unet}
    for layout in (StateDictType.DIFFUSERS_OLD, StateDictType.DIFFUSERS):
        text = convert_state_dict_to_peft(text, original_type=layout)
    return convert_unet_state_dict_to_peft(unet) | text


class _Scales:
    """alpha / rank of each layer: kohya's files hold alphas, diffusers' may hold peft's configuration, else it is 1."""

    def __init__(self, network: str, alphas: dict[str, float], metadata: Mapping[str, str]):
        self._network = network
        self._alphas = alphas
        configuration = json.loads(metadata.get(CONFIGURATION) or "{}")
        cut = len(network) + 1
        self._peft = {key[cut:]: value for key, value in configuration.items() if key.startswith(f"{network}.")}

    def of(self, path: str, rank: int) -> float:
        alpha = self._alphas.get(f"{self._network}.{path}")
        if alpha is not None:
            return alpha / rank
        if not self._peft:
            return 1.0
        patterns: dict[str, float] = self._peft.get("alpha_pattern") or {}
        ends = (value for pattern, value in patterns.items() if f".{path}".endswith("." + pattern.lstrip("^")))
        alpha = next(ends, self._peft.get("lora_alpha", rank))
        return alpha / (rank**0.5 if self._peft.get("use_rslora") else rank)


def _targets(
    name: str, base: str, tensors: dict[str, Tensor], scales: _Scales, network: nn.Module
) -> dict[str, Factors]:
    """The factors of each layer. Raises InvalidRequest for a layer that is not in the network, or of another shape."""
    modules = dict(network.named_modules())
    found: dict[str, Factors] = {}
    for key in tensors:
        path, kind = next(((key.removesuffix(end), end) for end in (DOWN, UP) if key.endswith(end)), (key, ""))
        if not kind or path + DOWN not in tensors or path + UP not in tensors:
            raise _refusal(name, f"is not supported: {key} is not one half of a LoRA's pair of weights")
        # transformers 5 has CLIP's layers without the prefix that files were written with, and back.
        candidates = (path, path.removeprefix("text_model."), f"text_model.{path}")
        own = next((candidate for candidate in candidates if candidate in modules), None)
        if own is None:
            raise _misfit(name, base, f"it adapts {path}, which this model does not have")
        down, up = tensors[path + DOWN], tensors[path + UP]
        _check_shapes(name, base, own, modules[own], (down, up))
        if down.dim() == 4 and down.shape[2:] == (1, 1):
            down = down.flatten(1)
        found[own] = Factors(down=down, up=up.flatten(1), scale=scales.of(path, down.shape[0]))
    return found


def _check_shapes(name: str, base: str, path: str, module: nn.Module, factors: tuple[Tensor, Tensor]) -> None:
    down, up = (tuple(factor.shape) for factor in factors)
    if isinstance(module, nn.Linear):
        window, inputs, outputs = (1, 1), module.in_features, module.out_features
    elif isinstance(module, nn.Conv2d) and module.groups == 1 and module.padding_mode == "zeros":
        window, inputs, outputs = module.kernel_size, module.in_channels, module.out_channels
    else:
        raise _misfit(name, base, f"it adapts {path}, which is a {type(module).__name__} here")
    rank = down[0] if down else 0
    right_down = down == (rank, inputs, *window) or (window == (1, 1) and down == (rank, inputs))
    right_up = up in ((outputs, rank), (outputs, rank, 1, 1))
    if not rank or not right_down or not right_up or not all(factor.is_floating_point() for factor in factors):
        here = f"{inputs} to {outputs}" + ("" if window == (1, 1) else f" with a window of {window}")
        raise _misfit(name, base, f"{path} has {down} and {up} in it, and goes from {here} here")


@dataclass(frozen=True, kw_only=True)
class _Slot:
    """Where a layer's factors lie in a packed mix: `down` from `start`, `up` after it."""

    start: int
    rank: int
    down: tuple[int, ...]  # shape without the rank
    outputs: int

    @property
    def middle(self) -> int:
        return self.start + self.rank * torch.Size(self.down).numel()

    @property
    def end(self) -> int:
        return self.middle + self.outputs * self.rank


@dataclass(frozen=True, kw_only=True)
class _Stack:
    """Packed mixes under each other, (mixes, numbers), and which is where."""

    layout: dict[str, _Slot]
    positions: dict[Mix, int]
    values: Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Worn:
    """What the rows of a call have on: packed mixes (mixes, numbers), and which of them is whose, (rows,).

    Without an `index` each row has a packed mix of its own.
    """

    values: Tensor
    index: Tensor | None
    layout: tuple[tuple[str, _Slot], ...] = field(metadata={PLAIN: True})


class LoraLayers:
    """Puts LoRAs on one network, row by row, while it is called. One thread at a time.

    The factors of all mixes in use lie in one tensor, padded to a common rank with zeros, of which every row gets its
    own. It stays between calls until a mix comes that it does not hold.
    """

    def __init__(self, network: nn.Module, name: str, device: torch.device):
        self._name = name
        self._device = device
        self._dtype = next(network.parameters()).dtype
        self._modules = dict(network.named_modules())
        self._stack: _Stack | None = None
        self._rows: list[Mix] = []
        self._worn: Worn | None = None
        self._hooked: tuple[Worn | None, dict[str, Callable[..., None]]] = (None, {})

    def worn(self, rows: Sequence[Mix]) -> Worn | None:
        """What rows in this order have on, the last answer again where they are the same; None where no row has any."""
        mixes = [tuple((lora, w) for lora, w in mix if w and self._name in lora.targets) for mix in rows]
        if not any(mixes):
            return None
        worn = list(dict.fromkeys(mixes))
        stack = self._stacked(worn)
        if self._worn is None or stack is not self._stack or mixes != self._rows:
            index = self._indices(worn.index(mix) for mix in mixes)
            values = stack.values
            if worn != list(stack.positions):  # it may hold others too, which have left
                values = values[self._indices(stack.positions[mix] for mix in worn)]
            gathered = len(mixes) * values[0].nbytes <= GATHERED_BYTES
            self._worn = Worn(
                values=values[index] if gathered else values,
                index=None if gathered else index,
                layout=tuple(stack.layout.items()),
            )
            self._stack, self._rows = stack, mixes
        return self._worn

    def applied(self, rows: Sequence[Mix]) -> AbstractContextManager[None]:
        """While it lasts the network is called with rows in this order; see `on`."""
        return self.on(self.worn(rows))

    @contextmanager
    def on(self, worn: Worn | None) -> Iterator[None]:
        """While it lasts the network is called with rows that have this on, the first axis of its inputs.

        A row without LoRAs, or with all its weights 0, gets exactly what it gets without this; where all rows are
        such, nothing is done at all.
        """
        if worn is None:
            yield
            return
        hooks = self._hooked[1] if self._hooked[0] is worn else self._hooks(worn)
        if worn is self._worn:  # others are recorded, and come once
            self._hooked = worn, hooks
        handles = [self._modules[path].register_forward_hook(hook) for path, hook in hooks.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hooks(self, worn: Worn) -> dict[str, Callable[..., None]]:
        return {path: _hook(self._modules[path], worn, slot) for path, slot in worn.layout}

    def _indices(self, numbers: Iterable[int]) -> Tensor:
        return torch.tensor(list(numbers)).to(self._device, non_blocking=True)

    def _stacked(self, mixes: list[Mix]) -> _Stack:
        old = self._stack
        if old is not None and all(mix in old.positions for mix in mixes):
            return old
        layout = self._layout(mixes)
        known = old.positions if old is not None and old.layout == layout else {}
        packed = [old.values[known[m]] if old is not None and m in known else self._packed(m, layout) for m in mixes]
        return _Stack(layout=layout, positions={mix: i for i, mix in enumerate(mixes)}, values=torch.stack(packed))

    def _layout(self, mixes: list[Mix]) -> dict[str, _Slot]:
        """Room for every layer that any of the mixes adapts, at the largest rank that one of them has there."""
        ranks: dict[str, int] = {}
        shapes: dict[str, tuple[tuple[int, ...], int]] = {}
        for mix in mixes:
            own: dict[str, int] = {}
            for lora, _ in mix:
                for path, factors in lora.targets[self._name].items():
                    own[path] = own.get(path, 0) + factors.down.shape[0]
                    shapes[path] = tuple(factors.down.shape[1:]), factors.up.shape[0]
            ranks |= {path: max(rank, ranks.get(path, 0)) for path, rank in own.items()}
        layout, start = {}, 0
        for path in sorted(ranks):
            down, outputs = shapes[path]
            layout[path] = _Slot(start=start, rank=ranks[path], down=down, outputs=outputs)
            start = layout[path].end
        return layout

    def _packed(self, mix: Mix, layout: dict[str, _Slot]) -> Tensor:
        """(numbers,): every layer's factors of one mix side by side, weights and scales in `up`, zeros for the rest."""
        values = torch.zeros(max(slot.end for slot in layout.values()), device=self._device, dtype=self._dtype)
        filled = dict.fromkeys(layout, 0)
        for lora, weight in mix:
            for path, factors in lora.targets[self._name].items():
                slot, first = layout[path], filled[path]
                filled[path] = last = first + factors.down.shape[0]
                values[slot.start : slot.middle].view(slot.rank, *slot.down)[first:last] = factors.down.to(self._device)
                up = factors.up.to(self._device).float() * (weight * factors.scale)
                values[slot.middle : slot.end].view(slot.outputs, slot.rank)[:, first:last] = up
        return values


def _factors(values: Tensor, slot: _Slot) -> tuple[Tensor, Tensor]:
    """A layer's `down` (mixes, rank, ...) and `up` (mixes, out, rank), seen in packed mixes."""
    down = values[:, slot.start : slot.middle].unflatten(1, (slot.rank, *slot.down))
    return down, values[:, slot.middle : slot.end].unflatten(1, (slot.outputs, slot.rank))


def _hook(module: nn.Module, worn: Worn, slot: _Slot) -> Callable[..., None]:
    """What adds each row's part to the layer's output, in place."""
    index, (down, up) = worn.index, _factors(worn.values, slot)

    def rows_of(factors: Tensor) -> Tensor:
        return factors[part()] if index is None else factors[index[part()]]

    def linear(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        mine = rows_of(down)
        x = inputs[0].reshape(len(mine), -1, inputs[0].shape[-1])
        low = torch.bmm(mine, x.mT)  # (rows, rank, tokens): this way round it takes a CPU half the time
        output.view(len(mine), -1, output.shape[-1]).baddbmm_(low.mT, rows_of(up).mT)

    def pointwise(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        low = torch.bmm(rows_of(down), inputs[0].flatten(2))
        output.flatten(2).baddbmm_(rows_of(up), low)

    def windowed(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        x, mine = inputs[0], rows_of(down)
        assert isinstance(module, nn.Conv2d)
        # A convolution in groups, of which each sees one row's channels with that row's weights.
        low = conv2d(
            x.reshape(1, -1, *x.shape[2:]),
            mine.reshape(-1, *mine.shape[2:]),
            stride=module.stride,
            padding=module.padding,
            dilation=module.dilation,
            groups=len(mine),
        )
        output.flatten(2).baddbmm_(rows_of(up), low.view(len(mine), up.shape[2], -1))

    if isinstance(module, nn.Linear):
        return linear
    return pointwise if isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) == module.stride else windowed
