"""The engine: requests in, events out. Everything alive shares the next step; a step is the unit of everything."""

import logging
import math
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from models.batcher import Batcher, Shape, knee
from models.card import ModelCard
from models.conditioning import Conditioner
from models.denoiser import Denoiser
from models.errors import Cancelled, GenerationFailed, HeliographError, Overloaded
from models.events import Event, Failed, Finished, Progress, Timings
from models.family import Family
from models.images import encode, encode_preview
from models.request import EffectiveRequest, GenerationRequest
from models.sequence import Phase, Sequence
from models.tapes import Tapes

OnEvent = Callable[[Event], None]

_JOINING = 8  # newcomers whose prompts are encoded before one step
_DECODING = 4  # native pictures that are decoded between two steps
_PREVIEW_SIDE = 256  # pixels that a preview has at most
_FAULTS = 3  # unexpected failures in a row that make an engine unhealthy
_STALL_S = 120.0  # busy without a step for so long means stuck
_ROW_COUNTS = (1, 2, 4, 8, 16, 24, 32, 48, 64)
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Load:
    """How busy an engine is. `seconds_left` estimates when all that it holds now will be done."""

    waiting: int
    running: int
    rows: int
    forwards: int
    seconds_left: float


@dataclass
class _Ticket:
    """A submitted request: who is told, and which of its pictures are still to come."""

    on_event: OnEvent
    progress: bool
    preview_every: int
    pending: set[int]
    cancelled: bool = False


@dataclass
class _Pace:
    """Measured speed: seconds of one row of one latent position, a running mean."""

    seconds: float = 1e-5
    known: bool = False

    def learn(self, seconds: float, work: int) -> None:
        self.seconds = seconds / work if not self.known else 0.9 * self.seconds + 0.1 * seconds / work
        self.known = True


@dataclass
class _State:
    """What the lock guards: who is alive, who finished denoising, who is told."""

    tickets: dict[str, _Ticket] = field(default_factory=dict)
    live: list[Sequence] = field(default_factory=list)
    decoding: list[Sequence] = field(default_factory=list)
    closed: bool = False


class Engine:
    """One model on one device. `submit` and `cancel` may be called from any thread; one thread at a time steps."""

    def __init__(self, family: Family, card: ModelCard, *, max_waiting: int = 64, cap: int | None = None):
        self.card = card
        self.revision = family.revision
        self.batcher = Batcher()
        self._family = family
        self._cap = cap
        self._tapes = Tapes(family.scheduler_config)
        self._conditioner = Conditioner(family)
        self._denoiser = Denoiser(family)
        self._max_waiting = max_waiting
        self._state = _State()
        self._lock = threading.Condition()
        self._thread: threading.Thread | None = None
        self._packing = ThreadPoolExecutor(2, thread_name_prefix="packing")
        self._pace = _Pace()
        self._forwards = 0
        self._faults = 0
        self._stepped = time.monotonic()

    # What callers do

    def submit(self, request: GenerationRequest, on_event: OnEvent, *, progress: bool = True) -> str:
        """Takes a request on; `on_event` hears of it from the engine's threads, of Progress only where wanted.

        Raises InvalidRequest, NotFound, and Overloaded when `max_waiting` pictures wait already.
        """
        effective = request.resolve(self.card)
        ticket_id = uuid.uuid4().hex
        sequences = [self._sequence(effective, index, ticket_id) for index in range(effective.samples)]
        ticket = _Ticket(on_event, progress, effective.preview_every, set(range(effective.samples)))
        with self._lock:
            waiting = sum(sequence.history is None for sequence in self._state.live)
            if self._state.closed:
                raise Overloaded(5.0, "this engine is shutting down")
            if waiting + len(sequences) > self._max_waiting:
                raise Overloaded(max(1.0, self._seconds_left()), f"{waiting} pictures wait already")
            self._state.tickets[ticket_id] = ticket
            self._state.live += sequences
            self._lock.notify()
        return ticket_id

    def cancel(self, ticket_id: str) -> None:
        """The request leaves before the next step and nothing more is heard of it. Unknown ids are done already."""
        with self._lock:
            if ticket := self._state.tickets.pop(ticket_id, None):
                ticket.cancelled = True
            self._lock.notify()

    def load(self) -> Load:
        with self._lock:
            live = self._state.live
            waiting = sum(sequence.history is None for sequence in live)
            return Load(
                waiting=waiting,
                running=len(live) - waiting + len(self._state.decoding),
                rows=sum(sequence.rows for sequence in live),
                forwards=self._forwards,
                seconds_left=self._seconds_left(),
            )

    def healthy(self) -> str | None:
        """None, or what is wrong with this engine so that it should be replaced."""
        if self._faults >= _FAULTS:
            return f"{self._faults} steps in a row failed"
        if self._thread is not None and not self._thread.is_alive() and not self._state.closed:
            return "the engine's thread has died"
        busy = self._state.live or self._state.decoding
        if self._thread is not None and busy and time.monotonic() - self._stepped > _STALL_S:
            return f"no step finished within {_STALL_S:.0f} s"
        return None

    def generate(self, requests: Iterable[GenerationRequest]) -> list[list[Finished]]:
        """Draws the requests, together, and returns each one's pictures in order. Raises the first failure."""
        futures = [self._future(request) for request in requests]
        while self._thread is None and not all(future.done() for future in futures):
            if not self.step():
                time.sleep(0.001)  # the last pictures are being packed
        return [future.result() for future in futures]

    # The loop

    def start(self) -> None:
        """Steps in a thread of its own until `close`."""
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def close(self, drain_s: float = 0.0) -> None:
        """Takes no more requests, gives the present ones `drain_s` seconds, fails the rest and stops the thread."""
        with self._lock:
            self._state.closed = True
            self._lock.notify()
        end = time.monotonic() + drain_s
        while self._state.tickets and time.monotonic() < end:
            time.sleep(0.01)
        for ticket_id in list(self._state.tickets):
            self._fail(ticket_id, Cancelled("the engine was shut down"))
        if self._thread is not None:
            self._thread.join(timeout=10)
        self._packing.shutdown()

    def _run(self) -> None:
        while True:
            with self._lock:
                while not self._state.live and not self._state.decoding and not self._state.closed:
                    self._stepped = time.monotonic()
                    self._lock.wait(1.0)
                if self._state.closed and not self._state.tickets:
                    return
            self.step()

    def step(self) -> bool:
        """One turn: whoever left is dropped, the most urgent batch takes a step, a few pictures are decoded.

        Returns whether there was anything to do.
        """
        self._drop()
        batch = self._next_batch()
        try:
            if joining := [sequence for sequence in batch if sequence.history is None]:
                self._join(joining)
            self._denoise([sequence for sequence in batch if sequence.denoising])
            decoded = self._decode()
            self._faults = 0
        except Exception as fault:
            _log.exception("a step failed")
            self._faults += 1
            for sequence in batch:
                self._fail(sequence.ticket, GenerationFailed("engine_fault", f"a step failed: {fault}"))
            return True
        self._stepped = time.monotonic()
        return bool(batch or decoded)

    # One turn's parts

    def _drop(self) -> None:
        """Sequences whose request was cancelled, failed or is overdue leave."""
        now = time.monotonic()
        for ticket_id in {s.ticket for s in [*self._state.live, *self._state.decoding] if s.deadline < now}:
            self._fail(ticket_id, GenerationFailed("deadline", "the deadline passed before the pictures were finished"))
        with self._lock:
            for name in ("live", "decoding"):
                kept = [s for s in getattr(self._state, name) if s.ticket in self._state.tickets]
                setattr(self._state, name, kept)

    def _next_batch(self) -> list[Sequence]:
        """The batcher's choice, with no more newcomers than can be encoded without holding up the others."""
        with self._lock:
            batch = self.batcher.next(self._state.live)
        newcomers = [sequence for sequence in batch if sequence.history is None]
        late = set(newcomers[_JOINING:])
        return [sequence for sequence in batch if sequence not in late]

    def _join(self, sequences: list[Sequence]) -> None:
        """Text and input pictures are encoded, and the first latents made."""
        started = time.monotonic()
        encoded = self._conditioner.encode([sequence.request for sequence in sequences])
        for sequence, (rows, warnings) in zip(sequences, encoded, strict=True):
            sequence.conditioning, sequence.warnings = rows, warnings
            sequence.begin(self._first_latents(sequence))
            sequence.joined, sequence.encoded = started, time.monotonic()
            if not sequence.denoising:  # an input picture kept as it is takes no step
                self._end_phase(sequence)

    def _first_latents(self, sequence: Sequence) -> torch.Tensor:
        """The present phase's beginning: noised clean latents, or noise alone; drawn in diffusers' order."""
        phase = sequence.phases[sequence.phase]
        clean = torch.zeros(())
        if phase.picture is not None:
            clean = self._family.autoencoder.encode([phase.picture], [sequence.generator])[0]
        if phase.tape.noise == 0.0:
            return clean * phase.tape.signal
        noise = sequence.noise().to(self._family.device)
        return phase.tape.signal * clean.to(noise.device) + phase.tape.noise * noise

    def _denoise(self, batch: list[Sequence]) -> None:
        """One forward; where memory does not suffice, the batch is halved until it does or one sequence fails."""
        if not batch:
            return
        started = time.monotonic()
        try:
            clean = self._denoiser.step(batch)
        except torch.OutOfMemoryError:
            self._out_of_memory(batch)
            return
        self._forwards += 1
        rows = sum(sequence.rows for sequence in batch)
        self._pace.learn(time.monotonic() - started, rows * math.prod(batch[0].shape[1:]))
        for sequence, estimate in zip(batch, clean, strict=True):
            self._tell_progress(sequence, estimate, rows)
            if not sequence.denoising:
                self._end_phase(sequence)

    def _out_of_memory(self, batch: list[Sequence]) -> None:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if len(batch) == 1:
            self._fail(batch[0].ticket, GenerationFailed("out_of_memory", "the device has too little memory for it"))
            return
        half = len(batch) // 2
        self.batcher.set_cap(batch[0].shape, sum(sequence.rows for sequence in batch[:half]))
        self._denoise(batch[:half])
        self._denoise(batch[half:])

    def _end_phase(self, sequence: Sequence) -> None:
        """On to the next phase, or to the decoder."""
        if sequence.phase + 1 < len(sequence.phases):
            sequence.phase, sequence.position = sequence.phase + 1, 0
            sequence.begin(self._first_latents(sequence))
            return
        sequence.denoised = time.monotonic()
        with self._lock:
            self._state.live.remove(sequence)
            self._state.decoding.append(sequence)

    def _decode(self) -> bool:
        """Decodes a few finished sequences of one shape and hands them to the packing threads."""
        with self._lock:
            waiting = self._state.decoding
            if not waiting:
                return False
            native = self.card.width * self.card.height
            room = max(1, _DECODING * native // (waiting[0].request.width * waiting[0].request.height))
            chosen = [sequence for sequence in waiting if sequence.shape == waiting[0].shape][:room]
            self._state.decoding = [sequence for sequence in waiting if sequence not in chosen]
        pictures = self._family.autoencoder.decode(torch.stack([sequence.latents for sequence in chosen]))
        for sequence, picture in zip(chosen, pictures, strict=True):
            self._packing.submit(self._pack, sequence, picture)
        return True

    def _pack(self, sequence: Sequence, picture: torch.Tensor) -> None:
        """Checks and encodes one picture (3, h, w) in 0..1, off the engine's thread."""
        try:
            if not torch.isfinite(picture).all():
                raise GenerationFailed("nan_latents", "the network's output was not finite; try another dtype")
            if picture.min() == picture.max():
                raise GenerationFailed("constant_picture", "the picture came out in one flat colour")
            array = (picture.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
            self._tell_finished(sequence, encode(array, sequence.request.output_format))
        except HeliographError as error:
            self._fail(sequence.ticket, error)
        except Exception as fault:
            _log.exception("packing a picture failed")
            self._fail(sequence.ticket, GenerationFailed("engine_fault", f"packing failed: {fault}"))

    # What is told

    def _tell_progress(self, sequence: Sequence, clean: torch.Tensor, rows: int) -> None:
        ticket = self._state.tickets.get(sequence.ticket)
        if ticket is None or not ticket.progress:
            return
        progress = Progress(
            index=sequence.index, step=sequence.step, steps=sequence.steps, forward=self._forwards, rows=rows
        )
        if ticket.preview_every and sequence.step % ticket.preview_every == 0:
            small = self._family.autoencoder.preview(clean)
            scale = max(1, min(self._family.autoencoder.factor // 2, _PREVIEW_SIDE // max(small.shape[:2])))
            progress = replace(progress, preview=encode_preview(small, scale))
        ticket.on_event(progress)

    def _tell_finished(self, sequence: Sequence, data: bytes) -> None:
        request = sequence.request
        finished = Finished(
            index=sequence.index,
            seed=request.seed,
            data=data,
            format=request.output_format,
            width=request.width,
            height=request.height,
            revision=self.revision,
            timings=Timings(
                queued_s=sequence.joined - sequence.submitted,
                encode_s=sequence.encoded - sequence.joined,
                denoise_s=sequence.denoised - sequence.encoded,
                decode_s=time.monotonic() - sequence.denoised,
            ),
            warnings=tuple(sequence.warnings),
        )
        with self._lock:
            ticket = self._state.tickets.get(sequence.ticket)
            if ticket is None:
                return
            ticket.pending.discard(sequence.index)
            if not ticket.pending:
                del self._state.tickets[sequence.ticket]
        ticket.on_event(finished)

    def _fail(self, ticket_id: str, error: HeliographError) -> None:
        with self._lock:
            ticket = self._state.tickets.pop(ticket_id, None)
        if ticket is not None:
            ticket.on_event(Failed(error=error))

    # Making sequences, and measuring

    def _sequence(self, request: EffectiveRequest, index: int, ticket: str) -> Sequence:
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

    def _future(self, request: GenerationRequest) -> Future[list[Finished]]:
        future: Future[list[Finished]] = Future()
        finished: dict[int, Finished] = {}
        samples = request.samples

        def on_event(event: Event) -> None:
            if isinstance(event, Failed):
                future.set_exception(event.error)
            elif isinstance(event, Finished):
                finished[event.index] = event
                if len(finished) == samples:
                    future.set_result([finished[index] for index in range(samples)])

        self.submit(request, on_event, progress=False)
        return future

    def _seconds_left(self) -> float:
        work = sum((s.steps - s.step) * s.rows * math.prod(s.shape[1:]) for s in self._state.live)
        return work * self._pace.seconds

    def warm_up(self) -> None:
        """Draws a picture and measures the cap at the model's native size. Call it before `start`."""
        request = GenerationRequest(model=self.card.name, prompt="warm-up", steps=2, seed=0)
        self.generate([request])
        shape = self._sequence(request.resolve(self.card), 0, "").shape
        self.batcher.set_cap(shape, self._cap or knee(self._measure(shape)))

    def _measure(self, shape: Shape) -> dict[int, float]:
        """Seconds of one forward by number of rows, up to where more rows no longer pay or memory ends."""
        seconds: dict[int, float] = {}
        for rows in _ROW_COUNTS:
            try:
                seconds[rows] = min(self._time_forward(shape, rows) for _ in range(3))
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
                break
            if knee(seconds) < rows:
                break
        return seconds

    def _time_forward(self, shape: Shape, rows: int) -> float:
        """Seconds that one step of `rows` unguided sequences takes, its results awaited."""
        plain = GenerationRequest(model=self.card.name, prompt="warm-up", guidance_scale=1.0, seed=0, sampler="euler")
        sequences = [self._sequence(plain.resolve(self.card), 0, "") for _ in range(rows)]
        self._join(sequences)
        started = time.perf_counter()
        self._denoiser.step(sequences)[0].sum().item()
        return time.perf_counter() - started
