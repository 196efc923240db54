"""From a request to a sequence that is ready for its first step."""

import math
import time
from dataclasses import replace

import torch
from torch.nn.functional import interpolate

from models.autoencoder import to_bytes
from models.canvas import Canvas, plan
from models.conditioning import Conditioner
from models.errors import InvalidRequest
from models.family import Family, UpscalingFamily
from models.images import Picture
from models.registered import Adapters
from models.request import EffectiveRequest
from models.script import Run
from models.sequence import Kept, Phase, Sequence
from models.tapes import Tape, Tapes
from models.work import NEVER, Stage


class Preparation:
    """Makes sequences for one family. `sequences` is quick and safe in any thread; the rest belongs to the engine's."""

    def __init__(self, family: Family, adapters: Adapters):
        self._family = family
        self._adapters = adapters
        self._autoencoder = family.autoencoder
        self._tapes = Tapes(family.scheduler_config)
        self._conditioner = Conditioner(family, adapters.inversions, adapters.loras.encoding)

    def sequences(self, request: EffectiveRequest, ticket: str, submitted: float, key: str = "") -> list[Sequence]:
        """A request's pictures, still without tensors; `submitted` is when the request came, of time.monotonic(), and
        `key` whose it is.

        Raises InvalidRequest for a bad tape, mask, prompt or adapter, NotFound for one that is not registered, and
        GenerationFailed for one that does not fit into memory.
        """
        phases = self._phases(request)
        _check_stop(request, sum(len(phase.tape) for phase in phases))
        mix = self._adapters.loras.mix(request.adapters)
        phases = tuple(self._steered(request, phase) for phase in phases)
        runs = [Run(phase.tape.steps, *self._size(phase)) for phase in phases]
        script = self._conditioner.script(request, runs, self._adapters.loras.of_encoders(mix))
        stages = _stages(phases, len(script.lines), request.deep_cache)
        return [
            Sequence(
                request=one,
                index=index,
                ticket=ticket,
                phases=phases,
                script=script,
                stages=stages,
                mix=mix,
                generator=torch.Generator().manual_seed(one.seed),
                submitted=submitted,
                key=key,
                deadline=math.inf if one.deadline_s is None else submitted + one.deadline_s,
                stop=NEVER if one.stop_at_step is None else one.stop_at_step,
            )
            for index, one in enumerate(request.sample(i) for i in range(request.samples))
        ]

    def join(self, sequences: list[Sequence]) -> None:
        """Encodes prompts together and makes each one's first latents. Doing it again changes nothing."""
        started = time.monotonic()
        encoded = self._conditioner.encode([sequence.script for sequence in sequences])
        for sequence, told in zip(sequences, encoded, strict=True):
            if not sequence.begun:
                sequence.conditioning, sequence.reports = told.rows, told.reports
                sequence.warnings = [*told.warnings, *_unheard(sequence), *_unseen(sequence)]
                self._begin(sequence)
                sequence.joined, sequence.encoded = started, time.monotonic()

    @torch.inference_mode()
    def next_phase(self, sequence: Sequence) -> None:
        """Begins the phase after the present one, from what that has made."""
        clean = self._enlarged(sequence, sequence.phases[sequence.phase + 1])
        sequence.phase, sequence.position, sequence.estimate = sequence.phase + 1, 0, None
        self._start(sequence, clean, sequence.noise())

    @torch.inference_mode()
    def _begin(self, sequence: Sequence) -> None:
        """The first latents: noised clean latents, or noise alone, drawn in diffusers' order."""
        sequence.generator.manual_seed(sequence.request.seed)  # also where an attempt has failed and used it
        phase = sequence.phases[0]
        if phase.canvas is not None:
            clean, noise = self._inpainted(sequence, phase.canvas)
        elif sequence.request.task == "upscale":
            clean, noise = self._upscaled(sequence)
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
        if one.task == "upscale":
            return (self._upscaling(one),)
        if one.image is None:
            first = Phase(tape=self._tape(one, one.steps, None), shape=shape)
        elif one.task == "img2img":
            picture = one.image.resized(one.width, one.height)
            first = Phase(tape=self._tape(one, one.steps, one.denoise_strength), shape=shape, picture=picture)
        else:
            # diffusers' inpainting starts from noise alone at full strength, its img2img does not.
            strength = None if one.denoise_strength == 1.0 else one.denoise_strength
            first = Phase(tape=self._tape(one, one.steps, strength), shape=shape, canvas=plan(one, one.image))
        if one.hires is None:
            return (first,)
        tape = self._tape(one, one.hires.steps or one.steps, one.hires.denoise_strength)
        return first, Phase(tape=tape, shape=self._shape(*one.largest), enlarge=one.hires.upscaler)

    def _upscaling(self, one: EffectiveRequest) -> Phase:
        """The picture, continued to a size that the network takes; what was added is cut off again in the end."""
        family = self._family
        assert isinstance(family, UpscalingFamily)
        assert one.image is not None
        picture = one.image.continued(family.multiple, family.least)
        shape = self._shape(picture.width * family.scale, picture.height * family.scale)
        return Phase(tape=self._tape(one, one.steps, None), shape=shape, picture=picture)

    def _steered(self, one: EffectiveRequest, phase: Phase) -> Phase:
        """The phase with the request's ControlNets, whose pictures become hints of its size and place."""

        def fit(picture: Picture) -> Picture:
            return picture.resized(*self._size(phase)) if phase.canvas is None else phase.canvas.fitted(picture)

        return replace(phase, controls=self._adapters.controlnets.controls(one.controls, fit))

    def _size(self, phase: Phase) -> tuple[int, int]:
        """(width, height) in pixels."""
        return phase.shape[2] * self._autoencoder.factor, phase.shape[1] * self._autoencoder.factor

    def _tape(self, one: EffectiveRequest, steps: int, strength: float | None) -> Tape:
        return self._tapes.get(one.sampler, one.schedule, steps, strength)

    def _shape(self, width: int, height: int) -> tuple[int, int, int]:
        factor = self._autoencoder.factor
        return self._autoencoder.channels, height // factor, width // factor

    def _enlarged(self, sequence: Sequence, phase: Phase) -> torch.Tensor:
        """The sequence's latents at the shape of a phase, enlarged as latents or by way of a picture."""
        if phase.enlarge == "latent":
            return interpolate(sequence.latents[None], size=phase.shape[1:], mode="bilinear")[0]
        picture = Picture.from_array(to_bytes(self._autoencoder.decode(sequence.latents[None])[0].cpu().numpy()))
        larger = picture.resized(*self._size(phase))
        return self._autoencoder.encode([larger], [sequence.generator])[0]

    def _upscaled(self, sequence: Sequence) -> tuple[torch.Tensor, torch.Tensor]:
        """No clean latents, and unit noise; the sequence is told what the network is to see of its picture."""
        family, phase = self._family, sequence.phases[0]
        assert isinstance(family, UpscalingFamily)
        assert phase.picture is not None
        assert sequence.request.noise_level is not None
        sequence.inputs = family.shown(phase.picture, sequence.request.noise_level, sequence.generator)
        return torch.zeros(phase.shape, device=family.device), _first_noise(sequence)

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


def _stages(phases: tuple[Phase, ...], rows: int, deep_cache: int) -> tuple[Stage, ...]:
    """The phases as work."""
    stages: list[Stage] = []
    for number, phase in enumerate(phases):
        before = phases[number - 1].shape if phase.enlarge == "lanczos" else (0, 0, 0)
        stage = Stage.of(
            forwards=len(phase.tape),
            rows=rows,
            positions=phase.shape[1] * phase.shape[2],
            controls=phase.controls,
            shown=phase.picture is not None or phase.canvas is not None,
            larger=before[1] * before[2],
            deep_cache=deep_cache,
        )
        stages.append(stage)
    return tuple(stages)


def _check_stop(request: EffectiveRequest, forwards: int) -> None:
    """Raises InvalidRequest for a stop behind the end."""
    stop = request.stop_at_step
    if stop is not None and stop > forwards:
        allowed = f"must be at most {forwards}, which is how many forwards this request takes"
        raise InvalidRequest("stop_at_step", f"{allowed}, not {stop}")


def _unheard(sequence: Sequence) -> list[str]:
    """What is said of a negative prompt for which there is no row. Clients send one whatever the guidance."""
    if sequence.rows > 1 or not sequence.request.negative_prompt:
        return []
    if sequence.request.guidance_input:
        return ["negative_prompt plays no part: this model's network takes the guidance scale, and no second prompt"]
    return [f"negative_prompt plays no part at guidance_scale {sequence.request.guidance_scale:g}, only above 1"]


def _unseen(sequence: Sequence) -> list[str]:
    """What is said of ControlNets that act between two steps of the whole network alone: they run in those."""
    every = sequence.request.deep_cache
    numbers = range(len(sequence.request.controls))
    idle = [n for n in numbers if _acts(sequence, n, 1) and not _acts(sequence, n, every)]
    why = f"with deep_cache {every} no step of the whole network lies between its start and its end"
    return [f"controls.{n} plays no part: {why}" for n in idle]


def _acts(sequence: Sequence, number: int, every: int) -> bool:
    """Whether a ControlNet does in any of every so many evaluations, until the picture ends."""
    left = sequence.stop
    for phase in sequence.phases:
        length = len(phase.tape)
        if any(phase.controls[number].acts(at, length) for at in range(0, min(length, left), every)):
            return True
        left -= length
    return False


def _first_noise(sequence: Sequence) -> torch.Tensor:
    """Unit noise (c, h, w), turned towards the variation seed's by spherical interpolation where one is asked for."""
    noise, request = sequence.noise(), sequence.request
    if not request.variation_strength or request.variation_seed is None:
        return noise
    other = torch.randn(sequence.shape, generator=torch.Generator().manual_seed(request.variation_seed))
    cosine = (noise * other).sum() / (noise.norm() * other.norm())
    angle = torch.acos(cosine.clamp(-1, 1))
    if angle.sin() < 1e-4:  # the same noise, or its mirror image: no direction to turn in
        return noise if request.variation_strength < 0.5 else other
    shares = [torch.sin((1 - request.variation_strength) * angle), torch.sin(request.variation_strength * angle)]
    return (shares[0] * noise + shares[1] * other) / torch.sin(angle)
