"""A batch: sequences side by side, and what of their forwards stays the same while they stay together."""

import itertools
from dataclasses import dataclass
from typing import Self

import torch

from models.adapters.controlnet import ControlBatch
from models.adapters.lora import Mix, Worn
from models.conditioning import stack
from models.deep_cache import Deep
from models.family import Conditioning, Residuals
from models.forward import Inputs, Outputs
from models.guidance import Guidance, ToDevice
from models.sequence import Kept, Sequence


@dataclass
class Batch:
    """Sequences of one latent shape, whose next steps are all shallow or none is; tensors are on the device."""

    sequences: list[Sequence]
    history: torch.Tensor  # (n, 8, c, h, w), of which each sequence holds its own part
    parts: list[torch.Tensor]
    told: list[Conditioning]  # each row's, as it is now
    rows: Conditioning  # the same, stacked
    owners: torch.Tensor  # (rows,) the sequence that each row belongs to
    guidance: Guidance
    beside: torch.Tensor | None  # (n, k, h, w) what an inpainting network sees beside the latents
    kept: Kept | None  # (n, ...) each, where any sequence keeps a part of its picture
    controls: ControlBatch
    mixes: list[Mix]  # each row's LoRAs
    deep: Deep | None  # of all rows, where the next step is shallow

    @classmethod
    def of(cls, sequences: list[Sequence], to_device: ToDevice) -> Self:
        told = _told(sequences)
        owners = [n for n, sequence in enumerate(sequences) for _ in range(sequence.rows)]
        history = [s.history for s in sequences if s.history is not None]
        beside = [s.inputs for s in sequences if s.inputs is not None]  # all or none: a network takes them or not
        return cls(
            sequences=list(sequences),
            history=torch.stack(history),
            parts=history,
            told=told,
            rows=stack(told),
            owners=to_device(torch.tensor(owners)),
            guidance=Guidance.of(sequences, to_device),
            beside=torch.stack(beside) if beside else None,
            kept=_kept(sequences, history[0].device),
            mixes=[s.mix for s in sequences for _ in range(s.rows)],
            deep=_deep(sequences),
            controls=ControlBatch([s.controls for s in sequences], owners, [len(s.tape) for s in sequences]),
        )

    def holds(self, sequences: list[Sequence]) -> bool:
        """Whether these are the same sequences, and none has begun anew."""
        return self.sequences == sequences and all(s.history is h for s, h in zip(sequences, self.parts, strict=True))

    def inputs(self, lines: torch.Tensor, noise: torch.Tensor | None, loras: Worn | None) -> Inputs:
        """Of the next forward, before ControlNets have looked at what is shown."""
        told = _told(self.sequences)
        if any(now is not before for now, before in zip(told, self.told, strict=True)):
            self.told, self.rows = told, stack(told)
        return Inputs(
            history=self.history,
            lines=lines,
            owners=self.owners,
            guidance=self.guidance,
            rows=self.rows,
            beside=self.beside,
            noise=noise,
            kept=self.kept,
            residuals=None,
            loras=loras,
            deep=self.deep,
            taken=self.deep is None and any(s.leaves_deep for s in self.sequences),
        )

    def advance(self, outputs: Outputs, residuals: Residuals | None) -> None:
        """Hands each sequence its history, one step later, the clean latents it expects, and what its next step needs
        where that is shallow. `residuals` are those that the network was given."""
        self.history, self.parts = outputs.moved, list(outputs.moved)
        deep = self.deep
        if outputs.below is not None:
            deep = Deep(below=outputs.below, steered=None if residuals is None else residuals[0][0])
        for sequence, history, estimate in zip(self.sequences, self.parts, outputs.clean, strict=True):
            sequence.history, sequence.estimate, sequence.deep = history, estimate, None
            sequence.position += 1
        skip = [sequence.shallow and sequence.denoising for sequence in self.sequences]
        self.deep = deep if all(skip) else None
        if deep is not None:
            parts = deep.split([sequence.rows for sequence in self.sequences])
            for sequence, part in itertools.compress(zip(self.sequences, parts, strict=True), skip):
                sequence.deep = part if all(skip) else part.copy()


def _told(sequences: list[Sequence]) -> list[Conditioning]:
    return [row.at(s.step) for s in sequences for row in s.conditioning]


def _deep(sequences: list[Sequence]) -> Deep | None:
    """What their shallow steps go on from; None where the whole network is to run."""
    if not sequences[0].shallow:
        return None
    parts = [s.deep for s in sequences if s.deep is not None]
    assert len(parts) == len(sequences), "the step before was one of the whole network, or shallow too"
    return Deep.joined(parts)


def _kept(sequences: list[Sequence], device: torch.device) -> Kept | None:
    """What the sequences keep, side by side; who keeps nothing has a mask of ones."""
    if all(s.kept is None for s in sequences):
        return None
    zeros = torch.zeros(sequences[0].shape, device=device)
    nothing = Kept(mask=torch.ones_like(zeros[:1]), clean=zeros, noise=zeros)
    kept = [s.kept or nothing for s in sequences]
    return Kept(
        mask=torch.stack([k.mask for k in kept]),
        clean=torch.stack([k.clean for k in kept]),
        noise=torch.stack([k.noise for k in kept]),
    )
