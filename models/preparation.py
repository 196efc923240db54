"""From a request to a sequence that is ready for its first step."""

import math
import time
from collections.abc import Mapping

import numpy as np
import torch
from torch.nn.functional import interpolate

from models.adapters.controlnet import ControlNets
from models.canvas import Canvas, plan
from models.conditioning import Conditioner, Run, Script
from models.family import Family
from models.images import Picture
from models.request import EffectiveRequest
from models.sequence import NEVER, Kept, Phase, Sequence
from models.tapes import Tape, Tapes
from models.tokens import Inversion


class Preparation:
    """Makes sequences for one family. `sequences` is quick and safe in any thread; the rest belongs to the engine's."""

    def __init__(self, family: Family, controlnets: ControlNets, inversions: Mapping[str, Inversion] | None = None):
        self._family = family
        self._controlnets = controlnets
        self._autoencoder = family.autoencoder
        self._tapes = Tapes(family.scheduler_config)
        self._conditioner = Conditioner(family, inversions=inversions)

    def sequences(self, request: EffectiveRequest, ticket: str) -> list[Sequence]:
        """A request's pictures, still without tensors. Raises InvalidRequest for a bad tape, mask or prompt."""
        phases = self._phases(request)  # alike for all: only their noise differs
        script = self._conditioner.script(request, [self._run(phase) for phase in phases])
        return [self._sequence(request.sample(i), i, ticket, phases, script) for i in range(request.samples)]

    def _sequence(
        self, one: EffectiveRequest, index: int, ticket: str, phases: tuple[Phase, ...], script: Script
    ) -> Sequence:
        now = time.monotonic()
        return Sequence(
            request=one,
            index=index,
            ticket=ticket,
            phases=phases,
            script=script,
            generator=torch.Generator().manual_seed(one.seed),
            submitted=now,
            deadline=math.inf if one.deadline_s is None else now + one.deadline_s,
            stop=NEVER if one.stop_at_step is None else one.stop_at_step,
        )

    def join(self, sequences: list[Sequence]) -> None:
        """Encodes prompts together and makes each one's first latents. Doing it again changes nothing."""
        started = time.monotonic()
        encoded = self._conditioner.encode([sequence.script for sequence in sequences])
        for sequence, told in zip(sequences, encoded, strict=True):
            if sequence.history is None:
                sequence.conditioning, sequence.reports, sequence.warnings = told.rows, told.reports, told.warnings
                self._begin(sequence)
                sequence.joined, sequence.encoded = started, time.monotonic()

    @torch.inference_mode()
    def next_phase(self, sequence: Sequence) -> None:
        """Begins the phase after the present one, from what that has made."""
        clean = self._enlarged(sequence, sequence.phases[sequence.phase + 1])
        sequence.phase, sequence.position = sequence.phase + 1, 0
        self._start(sequence, clean, sequence.noise())

    @torch.inference_mode()
    def _begin(self, sequence: Sequence) -> None:
        """The first latents: noised clean latents, or noise alone, drawn in diffusers' order."""
        sequence.generator.manual_seed(sequence.request.seed)  # also where an attempt has failed and used it
        phase = sequence.phases[0]
        if phase.canvas is not None:
            clean, noise = self._inpainted(sequence, phase.canvas)
        elif phase.picture is not None:
            clean = self._autoencoder.encode([phase.picture], [sequence.generator])[0]
            noise = _first_noise(sequence)
        else:
            clean, noise = torch.zeros(phase.shape, device=self._family.device), _first_noise(sequence)
        self._start(sequence, clean, noise)

    def _start(self, sequence: Sequence, clean: torch.Tensor, noise: torch.Tensor) -> None:
        tape = sequence.tape
        sequence.begin(clean * tape.signal + tape.noise * noise.to(clean.device))

    def _phases(self, one: EffectiveRequest) -> tuple[Phase, ...]:
        shape = self._shape(one.width, one.height)
        controls = self._controlnets.controls(one.controls, one.width, one.height)
        if one.image is None:
            first = Phase(tape=self._tape(one, one.steps, None), shape=shape, controls=controls)
        elif one.task == "img2img":
            picture = one.image.resized(one.width, one.height)
            tape = self._tape(one, one.steps, one.denoise_strength)
            first = Phase(tape=tape, shape=shape, picture=picture, controls=controls)
        else:
            # diffusers' inpainting starts from noise alone at full strength, its img2img does not.
            strength = None if one.denoise_strength == 1.0 else one.denoise_strength
            tape = self._tape(one, one.steps, strength)
            first = Phase(tape=tape, shape=shape, canvas=plan(one, one.image), controls=controls)
        if one.hires is None:
            return (first,)
        tape = self._tape(one, one.hires.steps or one.steps, one.hires.denoise_strength)
        controls = self._controlnets.controls(one.controls, *one.largest)
        return first, Phase(tape=tape, shape=self._shape(*one.largest), enlarge=one.hires.upscaler, controls=controls)

    def _run(self, phase: Phase) -> Run:
        factor = self._autoencoder.factor
        return Run(phase.tape.steps, width=phase.shape[2] * factor, height=phase.shape[1] * factor)

    def _tape(self, one: EffectiveRequest, steps: int, strength: float | None) -> Tape:
        return self._tapes.get(one.sampler, one.schedule, steps, strength)

    def _shape(self, width: int, height: int) -> tuple[int, int, int]:
        factor = self._autoencoder.factor
        return self._autoencoder.channels, height // factor, width // factor

    def _enlarged(self, sequence: Sequence, phase: Phase) -> torch.Tensor:
        """The sequence's latents at the shape of a phase, enlarged as latents or by way of a picture."""
        if phase.enlarge == "latent":
            return interpolate(sequence.latents[None], size=phase.shape[1:], mode="bilinear")[0]
        pixels = self._autoencoder.decode(sequence.latents[None])[0].permute(1, 2, 0)
        picture = Picture.from_array((pixels.numpy() * 255).round().astype(np.uint8))
        factor = self._autoencoder.factor
        larger = picture.resized(phase.shape[2] * factor, phase.shape[1] * factor)
        return self._autoencoder.encode([larger], [sequence.generator])[0]

    def _inpainted(self, sequence: Sequence, drawn: Canvas) -> tuple[torch.Tensor, torch.Tensor]:
        """Clean latents and unit noise; the sequence is told what it keeps, or what the network is to see of it.

        The generator is used as by diffusers' inpainting pipelines, which encode the masked picture even where the
        network does not take it.
        """
        device, generators = self._family.device, [sequence.generator]
        blended = not self._family.takes_mask
        mask = torch.from_numpy(drawn.latent_mask(self._autoencoder.factor))[None].to(device)
        clean = torch.zeros(sequence.shape, device=device)
        if blended or sequence.tape.signal:
            clean = self._autoencoder.encode([drawn.picture], generators)[0]
        noise = _first_noise(sequence)
        if blended:
            sequence.noise()
            sequence.kept = Kept(mask=mask, clean=clean, noise=noise.to(device))
        else:
            hidden = self._autoencoder.encode([drawn.picture], generators, [drawn.mask])[0]
            sequence.inputs = torch.cat([mask, hidden])
        if sequence.request.mask_fill == "nothing":
            clean = clean * (1 - mask)
        elif sequence.request.mask_fill == "noise":
            clean = clean * (1 - mask) + sequence.noise().to(device) * mask
        return clean, noise


def _first_noise(sequence: Sequence) -> torch.Tensor:
    """Unit noise (c, h, w), turned towards the variation seed's by spherical interpolation where one is asked for."""
    noise, request = sequence.noise(), sequence.request
    if not request.variation_strength or request.variation_seed is None:
        return noise
    other = torch.randn(sequence.shape, generator=torch.Generator().manual_seed(request.variation_seed))
    cosine = (noise * other).sum() / (noise.norm() * other.norm())
    angle = torch.acos(cosine.clamp(-1, 1))
    shares = [torch.sin((1 - request.variation_strength) * angle), torch.sin(request.variation_strength * angle)]
    return (shares[0] * noise + shares[1] * other) / torch.sin(angle)
