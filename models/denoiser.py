"""One forward for many rows: every sequence of a batch takes one step of its own tape."""

from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import torch

from models.adapters.lora import UNET
from models.ahead import Ahead, Tell
from models.batch import Batch
from models.captured import Captured, Graphs
from models.compiled import Compiled, Package
from models.deep_cache import Taken, shallow, taking
from models.family import Family
from models.forward import Inputs, Outputs, forward
from models.loras import Loras
from models.rowwise import RowThreads
from models.sequence import Sequence


class Denoiser:
    """Steps batches of one latent shape through one family's network."""

    def __init__(self, family: Family, loras: Loras, on_step: Tell = lambda breadth, seconds, shallow: None):
        """`on_step` hears of each step how broad it was, how many seconds it took, and whether it was shallow."""
        self._family = family
        self._loras = loras
        self._share = RowThreads(family.device, torch.get_num_threads())
        self._ahead = Ahead(family.device, on_step)
        self._batch: Batch | None = None
        self._plain = partial(forward, predict=self._predict)
        self.captured = self._faster()

    def _faster(self) -> Captured | None:
        placement = self._family.placement
        recorder = partial(Graphs, self._family.device) if placement.graphs else None
        if placement.compiled is not None:
            compiled = Compiled(self._family.networks[UNET], placement.compiled)
            return Captured(self._plain, recorder, self._fused, compiled)
        return Captured(self._plain, recorder) if recorder else None

    @torch.inference_mode()
    def step(self, sequences: list[Sequence]) -> torch.Tensor:
        """Moves every sequence one forward on. Returns the clean latents each expects now, (n, c, h, w).

        Nothing has changed when it raises, so the same sequences can be stepped again in smaller batches.
        """
        try:
            return self._tried(sequences)
        except torch.OutOfMemoryError:
            if self.captured is None or not self.captured.clear():
                raise
        torch.cuda.empty_cache()
        return self._tried(sequences)  # in the room that what was captured took

    def _tried(self, sequences: list[Sequence]) -> torch.Tensor:
        states = [sequence.generator.get_state() for sequence in sequences]
        try:
            return self._step(sequences)
        except BaseException:
            self._batch = None  # perhaps there was no room
            for sequence, state in zip(sequences, states, strict=True):
                sequence.generator.set_state(state)
            raise

    def _step(self, sequences: list[Sequence]) -> torch.Tensor:
        skips = sequences[0].shallow
        with self._ahead.step(sum(sequence.breadth for sequence in sequences), skips):
            if self._batch is None or not self._batch.holds(sequences):
                self._batch = None  # before another one takes memory
                self._batch = Batch.of(sequences, self._to_device)
            batch = self._batch
            inputs = batch.inputs(self._lines(sequences), self._noise(sequences), self._loras.worn(batch.mixes))
            positions = [sequence.position for sequence in sequences]
            residuals = None
            if not skips:  # what they add deep inside is kept with it
                residuals = batch.controls.residuals(inputs.shown, batch.rows, positions, self._share)
            outputs = (self.captured or self._plain)(replace(inputs, residuals=residuals))
        batch.advance(outputs, residuals)
        if not any(sequence.denoising for sequence in sequences):
            self._batch = None
        return outputs.clean

    def _predict(self, inputs: Inputs) -> tuple[torch.Tensor, ...]:
        """The network's answers to all rows, which have their LoRAs on, and what came to its last layer from below
        where that is to be taken."""
        seen, when = inputs.shown()
        unet = self._family.networks[UNET]
        with self._loras.denoising(inputs.loras), taking(unet) if inputs.taken else nullcontext() as taken:
            return self._share(partial(self._predict_part, inputs, seen, when, taken), seen)

    def _fused(self, package: Package, inputs: Inputs) -> Outputs:
        """A forward with a package for its network, of rows that have no LoRAs on."""
        with Compiled.used(package):
            answers = self._family.predict(*inputs.shown(), inputs.rows, inputs.residuals)
            return forward(inputs, lambda _: (answers,))

    def _predict_part(
        self, inputs: Inputs, seen: torch.Tensor, when: torch.Tensor, taken: Taken | None, part: slice
    ) -> tuple[torch.Tensor, ...]:
        rows = inputs.rows.part(part)
        if inputs.deep is not None:
            unet = self._family.networks[UNET]
            return (shallow(unet, seen[part], when[part], rows, inputs.deep.part(part)),)
        down, mid = inputs.residuals or ((), None)
        own = None if mid is None else ([each[part] for each in down], mid[part])
        answers = self._family.predict(seen[part], when[part], rows, own)
        return (answers,) if taken is None else (answers, taken())

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

    def _to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        if self._family.device.type == "cuda":
            tensor = tensor.pin_memory()  # a copy from elsewhere would be waited for
        return tensor.to(self._family.device, non_blocking=True)
