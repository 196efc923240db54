"""From a request to a sequence that is ready for its first step."""

import math
import time

import torch

from models.conditioning import Conditioner
from models.family import Family
from models.request import EffectiveRequest
from models.sequence import Phase, Sequence
from models.tapes import Tapes


class Preparation:
    """Makes sequences for one family. `sequence` is quick and safe in any thread; the rest belongs to the engine's."""

    def __init__(self, family: Family):
        self._family = family
        self._tapes = Tapes(family.scheduler_config)
        self._conditioner = Conditioner(family)

    def sequence(self, request: EffectiveRequest, index: int, ticket: str) -> Sequence:
        """Picture `index` of a request, still without tensors. Raises InvalidRequest for a tape diffusers refuses."""
        one = request.sample(index)
        strength = None if one.image is None else one.denoise_strength
        tape = self._tapes.get(one.sampler, one.schedule, one.steps, strength)
        picture = None if one.image is None else one.image.resized(one.width, one.height)
        autoencoder, now = self._family.autoencoder, time.monotonic()
        return Sequence(
            request=one,
            index=index,
            ticket=ticket,
            phases=(Phase(tape, picture),),
            shape=(autoencoder.channels, one.height // autoencoder.factor, one.width // autoencoder.factor),
            generator=torch.Generator().manual_seed(one.seed),
            submitted=now,
            deadline=math.inf if one.deadline_s is None else now + one.deadline_s,
        )

    def join(self, sequences: list[Sequence]) -> None:
        """Encodes prompts together and makes each one's first latents. Doing it again changes nothing."""
        started = time.monotonic()
        encoded = self._conditioner.encode([sequence.request for sequence in sequences])
        for sequence, (rows, warnings) in zip(sequences, encoded, strict=True):
            if sequence.history is None:
                sequence.conditioning, sequence.warnings = rows, warnings
                self.begin_phase(sequence)
                sequence.joined, sequence.encoded = started, time.monotonic()

    def begin_phase(self, sequence: Sequence) -> None:
        """The present phase's first latents: noised clean latents, or noise alone, drawn in diffusers' order."""
        phase = sequence.phases[sequence.phase]
        tape, latents = phase.tape, torch.zeros(sequence.shape, device=self._family.device)
        if phase.picture is not None:
            latents = self._family.autoencoder.encode([phase.picture], [sequence.generator])[0] * tape.signal
        if tape.noise:
            latents = latents + tape.noise * sequence.noise().to(latents.device)
        sequence.begin(latents)
