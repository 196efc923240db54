"""The contract between the engine and an architecture: what every file in `families/` offers."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch.nn.functional import pad

from models.attention import KeysAndValues
from models.autoencoder import Autoencoder
from models.errors import InvalidRequest
from models.images import Picture
from models.prompt import PromptReport
from models.tokens import Loras, Wording
from models.weights import Placement


@dataclass(frozen=True, kw_only=True)
class Embedding:
    """A text as a family's text encoders see it.

    `context` (tokens, width), of all chunks one after the other, and, where the family has one, `pooled` (width,), of
    the first chunk.
    """

    context: torch.Tensor
    pooled: torch.Tensor | None = None
    report: PromptReport


@dataclass(frozen=True, kw_only=True)
class Conditioning:
    """One row's tensors besides the latents: `context` (tokens, width) and whatever else the network takes by name.

    Where `mask` (tokens,), bool, is false the context is padding; None means that there is none. `remembered` is what
    the denoising network has made of the context (models.attention), None where it is to be made every time.
    """

    context: torch.Tensor
    added: Mapping[str, torch.Tensor] = field(default_factory=dict)
    mask: torch.Tensor | None = None
    remembered: KeysAndValues | None = field(default_factory=KeysAndValues, repr=False, compare=False)
    _parts: dict[tuple[int, int], "Conditioning"] = field(default_factory=dict, init=False, repr=False, compare=False)

    def part(self, rows: slice) -> "Conditioning":
        """Some rows of what is stacked over rows, the same object every time."""
        bounds = (rows.start, rows.stop)
        if bounds not in self._parts:
            added = {name: tensor[rows] for name, tensor in self.added.items()}
            mask = None if self.mask is None else self.mask[rows]
            remembered = None if self.remembered is None else KeysAndValues()
            self._parts[bounds] = Conditioning(
                context=self.context[rows], added=added, mask=mask, remembered=remembered
            )
        return self._parts[bounds]


Encoding = Callable[[Sequence[Loras]], AbstractContextManager[None]]


Residuals = tuple[list[torch.Tensor], torch.Tensor]
"""What is added to a UNet's own: after each layer of its encoder, and after the middle."""


class Family(Protocol):
    """An architecture with weights. Called from one thread only, but for `predict`, which several may call at a time
    with parts of the rows (models.rowwise); keeps nothing of a request."""

    autoencoder: Autoencoder
    device: torch.device
    placement: Placement
    networks: Mapping[str, torch.nn.Module]
    """What LoRAs can be put on, by diffusers' names: `unet`, `text_encoder`, `text_encoder_2`."""
    network_config: Mapping[str, Any]
    """The denoising network's own configuration, which adapters are checked against."""
    revision: str
    scheduler_config: Mapping[str, Any]
    takes_mask: bool
    """Whether the network itself takes a mask and the masked picture's latents beside its own (inpainting UNets)."""
    guidance_width: int
    """How wide the network's input for the guidance scale is (`with_guidance`); 0 where it has none, as most."""
    zero_empty_negative: bool
    """Whether an empty negative prompt means zeros instead of the empty text's embedding (SDXL)."""

    text_widths: tuple[int, ...]
    """The width of each text encoder's token embeddings."""
    clip_skips: int
    """How many layers of the text encoders can be left out."""

    def embed(self, wordings: Sequence[Wording], encoding: Encoding) -> list[Embedding]:
        """Text encoders over several texts at once; each call of one is made within `encoding` of its rows' LoRAs."""
        ...

    def condition(self, embedding: Embedding, width: int, height: int) -> Conditioning:
        """What a row of a picture of this size gets besides its latents."""
        ...

    def predict(
        self,
        latents: torch.Tensor,
        timesteps: torch.Tensor,
        rows: Conditioning,
        residuals: Residuals | None = None,
    ) -> torch.Tensor:
        """The network: latents (r, c, h, w), timesteps (r,), conditioning stacked over r -> prediction, float32.

        `residuals` are those of ControlNets, added up.
        """
        ...


@runtime_checkable
class UpscalingFamily(Family, Protocol):
    """An architecture that makes pictures larger, and nothing else; models.upscaling tells of it without torch."""

    scale: int
    """How many times as wide and high a picture becomes."""
    multiple: int
    """What the sides of a picture that it is shown have to be multiples of."""
    least: int
    """What these sides have to have at least, a multiple too."""

    def shown(self, picture: Picture, noise_level: int, generator: torch.Generator) -> torch.Tensor:
        """What the network sees of a picture beside its latents, (k, h, w).

        `predict` gets it behind them. The generator is used as diffusers' pipeline does before it draws the latents.
        """
        ...


def run_unet(
    unet: Any,
    latents: torch.Tensor,
    timesteps: torch.Tensor,
    rows: Conditioning,
    residuals: Residuals | None,
    **beside: Any,
) -> torch.Tensor:
    """`Family.predict` by a UNet of diffusers', in the network's precision; one without added conditions has none.

    Of what is added, `timestep_cond` (r, k) joins the timestep's embedding, the rest has a place of its own. `beside`
    is what a particular UNet takes by name and others do not know.
    """
    down, mid = residuals or (None, None)
    added = dict(rows.added)
    return unet(
        sample=latents.to(unet.dtype),
        timestep=timesteps,
        encoder_hidden_states=rows.context,
        timestep_cond=added.pop("timestep_cond", None),
        encoder_attention_mask=rows.mask,
        added_cond_kwargs=added,
        down_block_additional_residuals=down,
        mid_block_additional_residual=mid,
        **beside,
        return_dict=False,
    )[0].float()


def takes_mask(unet: Any, channels: int) -> bool:
    """Whether a UNet is one for inpainting, which sees a mask and a masked picture's latents beside its own.

    Raises InvalidRequest for a UNet that wants inputs which the engine would leave out in silence.
    """
    wants, inpainting = unet.config.in_channels, 2 * channels + 1
    if wants not in (channels, inpainting):
        raise InvalidRequest(
            "source", f"the UNet takes {wants} channels (for depth?), not {channels}, or {inpainting} for inpainting"
        )
    return wants == inpainting


def with_guidance(told: Conditioning, guidance_scale: float, width: int) -> Conditioning:
    """One row's conditioning for a network that takes the guidance scale itself, as a vector of this width.

    Such a network is distilled to draw at any scale without an unconditional row (guided distillation,
    arXiv:2210.03142; latent consistency models, arXiv:2310.04378). Sines and cosines of a thousandfold w are what it
    was trained with, w being the scale less 1; computed in diffusers' order, since sines of thousands forgive little.
    """
    half = width // 2
    frequencies = torch.exp(torch.arange(half, dtype=torch.float32) * -(torch.log(torch.tensor(10000.0)) / (half - 1)))
    angles = torch.tensor(guidance_scale - 1) * 1000.0 * frequencies
    vector = pad(torch.cat([angles.sin(), angles.cos()]), (0, width % 2))
    return replace(told, added={**told.added, "timestep_cond": vector.to(told.context)})
