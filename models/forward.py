"""One forward as a pure function of tensors: what the network sees, what it answers, and what becomes of the latents.

Nothing is read but the inputs and nothing is written but the answer, so a forward can be captured once and replayed
over other numbers in the same places (models.captured).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, NamedTuple, TypeVar, cast

import torch

from models.adapters.lora import PLAIN, Worn
from models.deep_cache import Deep
from models.family import Conditioning, Residuals
from models.guidance import Guidance
from models.sequence import Kept
from models.tapes import BLEND, COEFFICIENTS, ESTIMATE, HISTORY, SCALE, TIMESTEP, M, Z

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """All that a forward of n images in r rows depends on; None for what nobody among them needs.

    `history` (n, 8, c, h, w) as in models.sequence, `lines` (n, 15) of the tapes, `owners` (r,) the image that each row
    belongs to, `beside` (n, k, h, w) what the network sees beside the latents, `noise` and `kept` (n, ...) each. With
    `deep` only the network's outermost layer runs; where it is `taken`, the answer has what that layer needs next time.
    """

    history: torch.Tensor
    lines: torch.Tensor
    owners: torch.Tensor
    guidance: Guidance
    rows: Conditioning
    beside: torch.Tensor | None
    noise: torch.Tensor | None
    kept: Kept | None
    residuals: Residuals | None
    loras: Worn | None
    deep: Deep | None = None
    taken: bool = False

    def shown(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What the network is shown, (r, c + k, h, w), and the timesteps, (r,)."""
        latents = self.history[:, 0] * self.lines[:, SCALE, None, None, None]
        if self.beside is not None:
            latents = torch.cat([latents, self.beside], 1)
        return latents[self.owners], self.lines[:, TIMESTEP][self.owners]


class Outputs(NamedTuple):
    """The history one step later, the clean latents (n, c, h, w) that each image expects now, and what came to the
    network's last layer from below, (r, c, h, w), where that was to be taken."""

    moved: torch.Tensor
    clean: torch.Tensor
    below: torch.Tensor | None = None


Predict = Callable[[Inputs], tuple[torch.Tensor, ...]]
"""The network's answers (r, c, h, w) to what it is shown, and what was to be taken."""


def forward(inputs: Inputs, predict: Predict) -> Outputs:
    """One step of every image."""
    history, lines = inputs.history, inputs.lines
    answers, *taken = predict(inputs)
    m = inputs.guidance.combine(answers)
    known = torch.cat([history[:, : M.start], m[:, None], history[:, M.start + 1 :]], 1)
    coefficients, each = lines[:, COEFFICIENTS], lines[..., None, None, None]
    after = torch.einsum("ns,nschw->nchw", coefficients[:, :Z], known)
    if inputs.noise is not None:
        after = after + coefficients[:, Z, None, None, None] * inputs.noise
    if inputs.kept is not None:
        after = _with_kept(inputs.kept, after, each[:, BLEND])
    p, q = each[:, ESTIMATE].unbind(1)
    # One step older, both of them; the slot of the answer to come is free again.
    moved = torch.cat([after[:, None], known[:, :HISTORY], known[:, :1], known[:, M.start : M.stop - 1]], 1)
    return Outputs(moved, p * history[:, 0] + q * m, *taken)


def _with_kept(kept: Kept, after: torch.Tensor, blends: torch.Tensor) -> torch.Tensor:
    """The latents with what is kept put back, as noisy as they are (blended inpainting, arXiv:2206.02779)."""
    return (1 - kept.mask) * (blends[:, 0] * kept.clean + blends[:, 1] * kept.noise) + kept.mask * after


def leaves(tree: Any, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors in dataclasses, mappings, lists and tuples inside each other, by where they are."""
    if isinstance(tree, torch.Tensor):
        yield name, tree
    for key, branch in _branches(tree):
        yield from leaves(branch, f"{name}.{key}")


def planted(tree: T, tensors: Mapping[str, torch.Tensor], name: str = "") -> T:
    """The same tree with these tensors instead of its own, by the names that `leaves` gives."""
    if isinstance(tree, torch.Tensor):
        return cast(T, tensors[name])
    grown = {key: planted(branch, tensors, f"{name}.{key}") for key, branch in _branches(tree)}
    if is_dataclass(tree):
        return replace(cast(Any, tree), **grown)
    if isinstance(tree, Mapping):
        return cast(T, grown)
    return type(tree)(grown.values()) if isinstance(tree, list | tuple) else tree


def _branches(tree: object) -> Iterable[tuple[str, Any]]:
    if is_dataclass(tree):
        return (
            (each.name, getattr(tree, each.name)) for each in fields(tree) if each.init and not each.metadata.get(PLAIN)
        )
    if isinstance(tree, Mapping):
        return tree.items()
    return ((str(i), branch) for i, branch in enumerate(tree)) if isinstance(tree, list | tuple) else ()
