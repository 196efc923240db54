"""DeepCache: most steps run a UNet's outermost layer alone, on what the deep ones answered a few steps before.

What a UNet makes of a picture deep inside hardly changes from one step to the next; only the last layer of its decoder
looks at the latents themselves. So a step in which the whole network runs leaves what came to that layer from below,
and the steps after it use that again. Source: Ma, Fang and Wang, arXiv:2312.00858, with the first skip branch and a
uniform interval.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from models.family import Conditioning
from models.rowwise import part


@dataclass(frozen=True, kw_only=True)
class Deep:
    """What a step of the whole network leaves for r rows: `below` (r, c, h, w), what its last layer got from the one
    before it, and `steered` (r, k, h, w), what ControlNets added to what it got from the encoder."""

    below: torch.Tensor
    steered: torch.Tensor | None

    def split(self, rows: Sequence[int]) -> list["Deep"]:
        """Parts of so many rows each, in their order."""
        steered = [None] * len(rows) if self.steered is None else self.steered.split(list(rows))
        return [Deep(below=b, steered=s) for b, s in zip(self.below.split(list(rows)), steered, strict=True)]

    @classmethod
    def joined(cls, parts: Sequence["Deep"]) -> "Deep":
        """Rows side by side; what no ControlNet steers has zeros beside what one does."""
        below = torch.cat([part.below for part in parts])
        like = next((part.steered for part in parts if part.steered is not None), None)
        if like is None:
            return cls(below=below, steered=None)
        nothing = [like.new_zeros(len(part.below), *like.shape[1:]) for part in parts]
        steered = [n if part.steered is None else part.steered for part, n in zip(parts, nothing, strict=True)]
        return cls(below=below, steered=torch.cat(steered))

    def part(self, rows: slice) -> "Deep":
        return Deep(below=self.below[rows], steered=None if self.steered is None else self.steered[rows])

    def copy(self) -> "Deep":
        """The same numbers, which keep no others alive."""
        return Deep(below=self.below.clone(), steered=None if self.steered is None else self.steered.clone())


Taken = Callable[[], torch.Tensor]


@contextmanager
def taking(unet: Any) -> Iterator[Taken]:
    """While it lasts, what comes to a UNet's last layer from below is taken; the function that it gives tells it, after
    a call and to whoever made that, for the same part of the rows (models.rowwise)."""
    last = unet.up_blocks[-1].resnets[-1]
    found: dict[int | None, torch.Tensor] = {}

    def take(_: torch.nn.Module, given: tuple[torch.Tensor, ...]) -> None:
        both = given[0]  # from below, and the encoder's first answer
        form = torch.channels_last if both.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
        below = both[:, : both.shape[1] - unet.conv_in.out_channels]
        found[part().start] = below.contiguous(memory_format=form)  # what lies beside it is not kept alive

    handle = last.register_forward_pre_hook(take)
    try:
        yield lambda: found[part().start]
    finally:
        handle.remove()


def shallow(unet: Any, latents: torch.Tensor, timesteps: torch.Tensor, rows: Conditioning, deep: Deep) -> torch.Tensor:
    """What `models.family.run_unet` answers, by the outermost layer alone: latents (r, c, h, w) -> float32.

    With what the whole network took from the same latents at the same time it is exactly that.
    """
    sample = latents.to(unet.dtype)
    added = dict(rows.added)
    time = unet.time_embedding(unet.get_time_embed(sample=sample, timestep=timesteps), added.pop("timestep_cond", None))
    more = unet.get_aug_embed(emb=time, encoder_hidden_states=rows.context, added_cond_kwargs=added)
    time = time if more is None else time + more
    beside = unet.conv_in(sample)
    if deep.steered is not None:
        beside = beside + deep.steered
    block = unet.up_blocks[-1]
    hidden = block.resnets[-1](torch.cat([deep.below, beside], 1), time)
    if hasattr(block, "attentions"):
        mask = None if rows.mask is None else ((1 - rows.mask.to(sample.dtype)) * -10000.0).unsqueeze(1)
        handed = {"remembered": rows.remembered}
        hidden = block.attentions[-1](
            hidden, rows.context, cross_attention_kwargs=handed, encoder_attention_mask=mask, return_dict=False
        )[0]
    return unet.conv_out(unet.conv_act(unet.conv_norm_out(hidden))).float()
