"""One forward for many rows: every sequence of a batch takes one step of its own tape."""

from dataclasses import dataclass, replace
from functools import partial

import torch

from models.adapters.controlnet import ControlBatch
from models.adapters.lora import UNET, Mix, Worn
from models.ahead import Ahead, Tell
from models.captured import Captured, Graph, Outputs
from models.compiled import Compiled, Package
from models.conditioning import stack
from models.family import Conditioning, Family, Residuals
from models.forward import Inputs, forward
from models.guidance import Guidance
from models.loras import Loras
from models.rowwise import RowThreads
from models.sequence import Kept, Sequence


@dataclass
class _Batch:
    """Sequences side by side, and what of them stays the same while they stay together."""

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

    def holds(self, sequences: list[Sequence]) -> bool:
        """Whether these are the same sequences, and none has begun anew."""
        return self.sequences == sequences and all(s.history is h for s, h in zip(sequences, self.parts, strict=True))

    def inputs(self, lines: torch.Tensor, noise: torch.Tensor | None, loras: Worn | None) -> Inputs:
        """Of the next forward, before ControlNets have looked at what is shown."""
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
        )


class Denoiser:
    """Steps batches of one latent shape through one family's network."""

    def __init__(self, family: Family, loras: Loras, on_step: Tell = lambda breadth, seconds: None):
        """`on_step` hears of each step how broad it was and how many seconds it took."""
        self._family = family
        self._loras = loras
        self._share = RowThreads(family.device, torch.get_num_threads())
        self._ahead = Ahead(family.device, on_step)
        self._batch: _Batch | None = None
        self._plain = partial(forward, predict=self._predict)
        self.captured = self._faster()

    def _faster(self) -> Captured | None:
        placement = self._family.placement
        record = partial(Graph, torch.cuda.graph_pool_handle()) if placement.graphs else None
        if placement.compiled is not None:
            compiled = Compiled(self._family.networks[UNET], placement.compiled)
            return Captured(self._plain, record, self._fused, compiled)
        return Captured(self._plain, record) if record else None

    @torch.inference_mode()
    def step(self, sequences: list[Sequence]) -> torch.Tensor:
        """Moves every sequence one forward on. Returns the clean latents each expects now, (n, c, h, w).

        Nothing has changed when it raises, so the same sequences can be stepped again in smaller batches.
        """
        states = [sequence.generator.get_state() for sequence in sequences]
        try:
            return self._step(sequences)
        except BaseException:
            if self.captured is not None:
                self.captured.clear()  # perhaps there was no room
            for sequence, state in zip(sequences, states, strict=True):
                sequence.generator.set_state(state)
            raise

    def _step(self, sequences: list[Sequence]) -> torch.Tensor:
        with self._ahead.step(sum(sequence.breadth for sequence in sequences)):
            batch = self._assemble(sequences)
            inputs = batch.inputs(self._lines(sequences), self._noise(sequences), self._loras.worn(batch.mixes))
            positions = [sequence.position for sequence in sequences]
            residuals = batch.controls.residuals(inputs.shown, batch.rows, positions, self._share)
            moved, clean = (self.captured or self._plain)(replace(inputs, residuals=residuals))
        self._advance(batch, moved, clean)
        return clean

    def _predict(self, inputs: Inputs) -> torch.Tensor:
        """The network's answers to all rows, which have their LoRAs on."""
        seen, when = inputs.shown()
        with self._loras.denoising(inputs.loras):
            [outputs] = self._share(partial(self._predict_part, seen, when, inputs.rows, inputs.residuals), seen)
        return outputs

    def _fused(self, package: Package, inputs: Inputs) -> Outputs:
        """A forward with a package for its network, of rows that have no LoRAs on."""
        with Compiled.used(package):
            return forward(inputs, lambda inputs: self._family.predict(*inputs.shown(), inputs.rows, inputs.residuals))

    def _predict_part(
        self, seen: torch.Tensor, when: torch.Tensor, rows: Conditioning, residuals: Residuals | None, part: slice
    ) -> tuple[torch.Tensor]:
        down, mid = residuals or ((), None)
        own = None if mid is None else ([each[part] for each in down], mid[part])
        return (self._family.predict(seen[part], when[part], rows.part(part), own),)

    def _assemble(self, sequences: list[Sequence]) -> _Batch:
        """The batch for these sequences; the last one again, when nobody has joined or left since."""
        told = [row.at(s.step) for s in sequences for row in s.conditioning]
        if self._batch is not None and self._batch.holds(sequences):
            if any(now is not before for now, before in zip(told, self._batch.told, strict=True)):
                self._batch.told, self._batch.rows = told, stack(told)
            return self._batch
        self._batch = None  # before another one takes memory
        owners = [n for n, sequence in enumerate(sequences) for _ in range(sequence.rows)]
        beside = [s.inputs for s in sequences if s.inputs is not None]  # all or none: a network takes them or not
        return _Batch(
            sequences=list(sequences),
            history=torch.stack([s.history for s in sequences if s.history is not None]),
            parts=[],
            told=told,
            rows=stack(told),
            owners=self._to_device(torch.tensor(owners)),
            guidance=Guidance.of(sequences, self._to_device),
            beside=torch.stack(beside) if beside else None,
            kept=self._kept(sequences),
            mixes=[s.mix for s in sequences for _ in range(s.rows)],
            controls=ControlBatch([s.controls for s in sequences], owners, [len(s.tape) for s in sequences]),
        )

    def _kept(self, sequences: list[Sequence]) -> Kept | None:
        """What the sequences keep, side by side; who keeps nothing has a mask of ones."""
        if all(s.kept is None for s in sequences):
            return None
        zeros = torch.zeros(sequences[0].shape, device=self._family.device)
        nothing = Kept(mask=torch.ones_like(zeros[:1]), clean=zeros, noise=zeros)
        kept = [s.kept or nothing for s in sequences]
        return Kept(
            mask=torch.stack([k.mask for k in kept]),
            clean=torch.stack([k.clean for k in kept]),
            noise=torch.stack([k.noise for k in kept]),
        )

    def _lines(self, sequences: list[Sequence]) -> torch.Tensor:
        return self._to_device(torch.stack([s.tape.lines[s.position] for s in sequences]))

    def _noise(self, sequences: list[Sequence]) -> torch.Tensor | None:
        """Fresh noise (n, c, h, w) for whoever's solver draws it at this step, zeros for the others.

        None where nobody's does; but what is captured has a place for it, whether anybody's does or not.
        """
        if not any(s.tape.draws[s.position] for s in sequences):
            if self.captured is None:
                return None
            return torch.zeros((), device=self._family.device).expand(len(sequences), *sequences[0].shape)
        drawn = [s.noise() if s.tape.draws[s.position] else torch.zeros(s.shape) for s in sequences]
        return self._to_device(torch.stack(drawn))

    def _advance(self, batch: _Batch, moved: torch.Tensor, clean: torch.Tensor) -> None:
        """Hands each sequence its history, one step later, and the clean latents it expects."""
        batch.history, batch.parts = moved, list(moved)
        for sequence, history, estimate in zip(batch.sequences, batch.parts, clean, strict=True):
            sequence.history, sequence.estimate = history, estimate
            sequence.position += 1
        self._batch = batch if any(sequence.denoising for sequence in batch.sequences) else None

    def _to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        if self._family.device.type == "cuda":
            tensor = tensor.pin_memory()  # a copy from elsewhere would be waited for
        return tensor.to(self._family.device, non_blocking=True)
