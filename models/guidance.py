"""How the rows of each sequence in a batch become its one prediction."""

from collections.abc import Callable
from collections.abc import Sequence as Several
from dataclasses import dataclass

import torch

from models.sequence import Sequence

ToDevice = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class _Composed:
    """The conditional rows of all sequences, side by side: each pulls its sequence away from the unconditional row."""

    parts: torch.Tensor  # (p,) rows
    firsts: torch.Tensor  # (p,) the unconditional row of each one's sequence
    owners: torch.Tensor  # (p,) sequences
    weights: torch.Tensor  # (p, 1, 1, 1)


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """Classifier-free guidance (arXiv:2207.12598) and its rescaling (arXiv:2305.08891, 3.4), per sequence."""

    guided: torch.Tensor  # (n,) each sequence's conditional row
    unguided: torch.Tensor  # (n,) its unconditional row; the conditional one again where it has none
    scale: torch.Tensor  # (n, 1, 1, 1)
    rescale: torch.Tensor | None  # (n, 1, 1, 1), where any sequence asks for it
    composed: _Composed | None  # where any sequence has several conditional rows

    @classmethod
    def of(cls, sequences: Several[Sequence], to_device: ToDevice) -> "Guidance":
        """For these sequences, whose rows lie one after the other, the unconditional one of each first."""
        last, row = [], -1
        for sequence in sequences:
            row += sequence.rows
            last.append(row)
        guided = torch.tensor(last)
        rescales = [s.request.guidance_rescale if s.rows > 1 else 0.0 for s in sequences]
        scales = [s.request.guidance_scale if s.request.guided else 1.0 for s in sequences]
        return cls(
            guided=to_device(guided),
            unguided=to_device(guided - torch.tensor([s.rows - 1 for s in sequences])),
            scale=column(scales, to_device),
            rescale=column(rescales, to_device) if any(rescales) else None,
            composed=_composed(sequences, to_device) if any(s.rows > 2 for s in sequences) else None,
        )

    def combine(self, outputs: torch.Tensor) -> torch.Tensor:
        """The network's answers (rows, c, h, w) as one for each sequence, (n, c, h, w).

        Several conditional rows are composed first (arXiv:2206.01714).
        """
        conditional, unconditional = outputs[self.guided], outputs[self.unguided]
        if self.composed is not None:
            parts = self.composed
            pulls = parts.weights * (outputs[parts.parts] - outputs[parts.firsts])
            conditional = unconditional.index_add(0, parts.owners, pulls)
        guided = unconditional + self.scale * (conditional - unconditional)
        if self.rescale is None:
            return guided
        axes = (1, 2, 3)
        matched = guided * (conditional.std(axes, keepdim=True) / guided.std(axes, keepdim=True))
        return torch.where(self.rescale > 0, self.rescale * matched + (1 - self.rescale) * guided, guided)


def column(values: Several[float | torch.Tensor], to_device: ToDevice) -> torch.Tensor:
    """(n, 1, 1, 1) float32."""
    return to_device(torch.tensor([float(v) for v in values]))[:, None, None, None]


def _composed(sequences: Several[Sequence], to_device: ToDevice) -> _Composed:
    parts, firsts, owners, first = [], [], [], 0
    for n, sequence in enumerate(sequences):
        count = max(1, sequence.rows - 1)
        parts += range(first + sequence.rows - count, first + sequence.rows)
        firsts += [first] * count
        owners += [n] * count
        first += sequence.rows
    weights = [row.weight for s in sequences for row in (s.conditioning[1:] or s.conditioning)]
    return _Composed(
        parts=to_device(torch.tensor(parts)),
        firsts=to_device(torch.tensor(firsts)),
        owners=to_device(torch.tensor(owners)),
        weights=column(weights, to_device),
    )
