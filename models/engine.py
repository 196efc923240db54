"""The engine: requests in, events out. Everything alive shares the next step; a step is the unit of everything."""

import logging
import math
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from models import admission
from models.admission import Bounds, Claim
from models.aside import aside
from models.batcher import Batcher
from models.captured import Captured
from models.card import ModelCard
from models.decoder import Decoder
from models.delivery import Delivery
from models.denoiser import Denoiser
from models.errors import Cancelled, GenerationFailed, HeliographError, InvalidRequest, Overloaded
from models.events import Event, Failed, Finished, Progress
from models.family import Family
from models.images import encode_preview
from models.load import Load
from models.measurements import Measurements
from models.measuring import knee, measured, plainest
from models.pace import Pace
from models.preparation import Preparation
from models.registered import Adapters
from models.request import GenerationRequest, warm_up_request
from models.sequence import Sequence
from models.weights import out_of_memory

OnEvent = Callable[[Event], None]

_PREVIEW_SIDE = 256  # pixels that a preview has at most
_FAULTS = 3  # unexpected failures in a row that make an engine unhealthy
_STALL_S = 120.0  # busy without a step for so long means stuck
_log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class _Ticket:
    """A submitted request: who is told, of how much, which pictures are still to come; what it takes up, until it is
    prepared, when its sequences tell."""

    on_event: OnEvent
    progress: bool
    preview_every: int
    pending: set[int]
    claim: Claim
    prepared: bool = False


class Engine:
    """One model on one device. `submit` and `cancel` may be called from any thread; one thread at a time steps."""

    def __init__(
        self,
        family: Family,
        card: ModelCard,
        *,
        max_waiting: int = 256,
        max_wait_s: float = math.inf,
        adapters: Adapters | None = None,
    ):
        _check_card(family, card)
        self.family = family
        self.card = card
        self.revision = family.revision
        self.pace = Pace()
        self.batcher = Batcher(self.pace)
        self._autoencoder = family.autoencoder
        adapters = adapters or Adapters(family)
        self._preparation = Preparation(family, adapters)
        self._denoiser = Denoiser(family, adapters.loras, self.pace.follow)
        decoder = Decoder(family.autoencoder, family.device)
        self._delivery = Delivery(decoder, family.revision, card.width * card.height, self._packed)
        self._bounds = Bounds(max_waiting=max_waiting, max_wait_s=max_wait_s)
        self._lock = threading.Condition()  # guards the next three
        self._tickets: dict[str, _Ticket] = {}
        self._live: list[Sequence] = []
        self._closed = False
        self._thread: threading.Thread | None = None
        self._forwards = 0
        self._faults = 0
        self._turned = time.monotonic()
        self._stepped: list[tuple[Sequence, int]] = []  # in this turn, and the rows that shared the forward

    @property
    def captured(self) -> Captured | None:
        """Its forwards made fast, where they are."""
        return self._denoiser.captured

    # What callers do

    def submit(
        self, request: GenerationRequest, on_event: OnEvent, *, progress: bool = True, id: str = "", key: str = ""
    ) -> str:
        """Takes a request on; `on_event` hears of it from the engine's threads, of Progress only where wanted. `key`
        says whose it is: keys share the engine fairly (models.turns).

        Gives the id that `cancel` and `accept` know it by: the one handed in, which no other request has, or a new one.
        Raises Overloaded and DeadlineTooShort (models.admission) before anything is prepared; InvalidRequest, NotFound
        and GenerationFailed for what cannot be prepared.
        """
        submitted = time.monotonic()
        effective = request.resolve(self.card)
        if effective.upscale is not None:
            raise InvalidRequest("upscale", "an engine does not enlarge what it has drawn; models.upscaler does")
        ticket_id = id or uuid.uuid4().hex
        ticket = _Ticket(
            on_event=on_event,
            progress=progress,
            preview_every=effective.preview_every,
            pending=set(range(effective.samples)),
            claim=Claim.of(effective, key, submitted),
        )
        self._admit(ticket_id, ticket)
        try:
            sequences = aside(lambda: self._preparation.sequences(effective, ticket_id, submitted, key))
        except BaseException:
            self.cancel(ticket_id)
            raise
        with self._lock:
            ticket.prepared = True
            self._live += sequences  # where the ticket has gone meanwhile, they leave before the next step
            self._lock.notify()
        return ticket_id

    def _admit(self, ticket_id: str, ticket: _Ticket) -> None:
        with self._lock:
            if self._closed:
                raise Overloaded(5.0, "this engine is shutting down")
            admission.check(ticket.claim, self._held(), self._bounds, self.pace)
            self._tickets[ticket_id] = ticket

    def _held(self) -> list[Claim]:
        """What all requests take up that are here; under the lock."""
        here: dict[str, list[Sequence]] = {ticket_id: [] for ticket_id in self._tickets}
        for sequence in (*self._live, *self._delivery.queue):
            if sequence.ticket in here:
                here[sequence.ticket].append(sequence)
        tickets = self._tickets.items()
        return [t.claim.left(here[ticket_id]) if t.prepared else t.claim for ticket_id, t in tickets]

    def cancel(self, ticket_id: str) -> None:
        """The request leaves before the next step and nothing more is heard of it. Unknown ids are done already."""
        with self._lock:
            self._tickets.pop(ticket_id, None)

    def accept(self, ticket_id: str) -> None:
        """The request's pictures end as what their last step expected, or the first one will. Unknown ids are done."""
        with self._lock:
            for sequence in self._live:
                if sequence.ticket == ticket_id:
                    sequence.stop = 1

    def load(self) -> Load:
        with self._lock:
            held = self._held()
            return Load(
                waiting=sum(claim.waiting for claim in held),
                running=sum(sequence.begun for sequence in self._live) + len(self._delivery.queue),
                rows=sum(sequence.rows for sequence in self._live),
                forwards=self._forwards,
                work_left=sum(claim.work for claim in held),
                seconds_per_work=self.pace.seconds_per_work(sum(claim.breadth for claim in held)),
            )

    def healthy(self) -> str | None:
        """None, or what is wrong with this engine so that it should be replaced."""
        if self._faults >= _FAULTS:
            return f"{self._faults} steps in a row failed"
        if self._thread is not None and not self._closed:
            if not self._thread.is_alive():
                return "the engine's thread has died"
            if (self._live or self._delivery.queue) and time.monotonic() - self._turned > _STALL_S:
                return f"no step finished within {_STALL_S:.0f} s"
        return None

    def generate(self, requests: Iterable[GenerationRequest]) -> list[list[Finished]]:
        """Draws the requests, together, and returns each one's pictures in order. Raises the first failure."""
        futures = [self._future(request) for request in requests]
        while self._thread is None and not all(future.done() for future in futures):
            if not self.step():
                time.sleep(0.001)  # the last pictures are being packed
        return [future.result() for future in futures]

    def close(self, drain_s: float = 0.0) -> None:
        """Takes no more requests, gives the present ones `drain_s` seconds, fails the rest and stops the thread."""
        with self._lock:
            self._closed = True
            self._lock.notify()
        end = time.monotonic() + drain_s
        while self._tickets and time.monotonic() < end:
            time.sleep(0.01)
        for ticket_id in list(self._tickets):
            self._fail(ticket_id, Cancelled("the engine was shut down"))
        if self._thread is not None:
            self._thread.join(timeout=10)
        self._delivery.close()

    # One turn

    def step(self) -> bool:
        """One turn: who left is dropped, newcomers join, a batch takes a step, a few pictures are decoded.

        Returns whether there was anything to do.
        """
        started = time.monotonic()
        self._drop()
        self._stepped = []
        with self._lock:
            batch = self.batcher.next(self._live)
        shallow = any(sequence.shallow for sequence in batch)
        newcomers = [sequence for sequence in batch if not sequence.begun]
        self._attempt(self._preparation.join, newcomers)
        joined = [sequence for sequence in batch if sequence.begun]
        self._attempt(self._denoise, [sequence for sequence in joined if sequence.denoising])
        for sequence, rows in self._stepped:  # each alone: who fails here has taken the step all the same
            self._attempt(partial(self._tell_progress, rows), [sequence])
        breadth = sum(sequence.breadth for sequence, _ in self._stepped)
        self._hand_over(sequence for sequence in joined if not sequence.denoising)
        decoding = self._delivery.take(self._live)
        self._attempt(self._delivery.decode, decoding)
        self._turned = time.monotonic()
        beside = sum(s.stages[0].begin for s in newcomers) + sum(s.work for s in decoding)
        self.pace.note(breadth, beside, self._turned - started, shallow)
        return bool(batch or decoding)

    def _run(self) -> None:
        """Steps until `close`."""
        while not (self._closed and not self._tickets):
            with self._lock:
                if not self._live and not self._delivery.queue:
                    self._turned = time.monotonic()
                    self._lock.wait(0.1)
            self.step()

    def _drop(self) -> None:
        """Sequences leave whose request was cancelled, has failed or is overdue."""
        now = time.monotonic()
        for ticket_id in {s.ticket for s in [*self._live, *self._delivery.queue] if s.deadline < now}:
            self._fail(ticket_id, GenerationFailed("deadline", "the deadline passed before the pictures were finished"))
        with self._lock:
            self._live = [sequence for sequence in self._live if sequence.ticket in self._tickets]
            self._delivery.queue = [s for s in self._delivery.queue if s.ticket in self._tickets]

    def _attempt(self, work: Callable[[list[Sequence]], None], sequences: list[Sequence]) -> None:
        """Works on sequences together; where that fails, on either half, until what fails fails alone."""
        if not sequences:
            return
        try:
            work(sequences)
            return
        except HeliographError as refusal:  # of one sequence that was worked on alone
            self._fail(sequences[0].ticket, refusal)
            return
        except Exception as caught:
            memory = out_of_memory(caught)
            fault = caught.with_traceback(None) if memory else caught  # whose frames hold all that they had allocated
        half = len(sequences) // 2
        if memory:
            self._spare_memory(sequences[:half])
        if half:
            self._attempt(work, sequences[:half])
            self._attempt(work, sequences[half:])
            return
        if not memory:
            _log.error("a step failed", exc_info=fault)
            self._faults += 1
        reason = "out_of_memory" if memory else "engine_fault"
        self._fail(sequences[0].ticket, GenerationFailed(reason, f"the step failed: {fault!r}"))

    def _spare_memory(self, half: list[Sequence]) -> None:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if half:
            self.batcher.set_cap(half[0].shape, sum(sequence.rows for sequence in half))

    def _denoise(self, batch: list[Sequence]) -> None:
        self._denoiser.step(batch)
        self._forwards += 1
        self._faults = 0
        rows = sum(sequence.rows for sequence in batch)
        self._stepped += [(sequence, rows) for sequence in batch]

    def _hand_over(self, sequences: Iterable[Sequence]) -> None:
        """At a phase's end: on to the next one, or to the decoder."""
        for sequence in sequences:
            if not sequence.last:
                self._attempt(lambda one: self._preparation.next_phase(one[0]), [sequence])
                continue
            sequence.denoised = time.monotonic()
            with self._lock:
                self._live.remove(sequence)
            self._delivery.queue.append(sequence)

    # What is told

    def _tell_progress(self, rows: int, of: list[Sequence]) -> None:
        [sequence] = of
        ticket = self._tickets.get(sequence.ticket)
        if ticket is None or not ticket.progress:
            return
        progress = Progress(
            index=sequence.index, step=sequence.step, steps=sequence.steps, forward=self._forwards, rows=rows
        )
        if ticket.preview_every and sequence.step % ticket.preview_every == 0 and sequence.estimate is not None:
            small = self._autoencoder.preview(sequence.estimate)
            scale = max(1, min(self._autoencoder.factor, _PREVIEW_SIDE // max(small.shape[:2])))
            progress = replace(progress, preview=encode_preview(small, scale))
        ticket.on_event(progress)

    def _packed(self, sequence: Sequence, outcome: Finished | GenerationFailed) -> None:
        """Called from the packing threads."""
        if isinstance(outcome, GenerationFailed):
            self._fail(sequence.ticket, outcome)
            return
        with self._lock:
            ticket = self._tickets.get(sequence.ticket)
            if ticket is None:
                return
            ticket.pending.discard(sequence.index)
            if not ticket.pending:
                del self._tickets[sequence.ticket]
        ticket.on_event(outcome)

    def _fail(self, ticket_id: str, error: HeliographError) -> None:
        with self._lock:
            ticket = self._tickets.pop(ticket_id, None)
        if ticket is not None:
            ticket.on_event(Failed(error=error))

    def _future(self, request: GenerationRequest) -> Future[list[Finished]]:
        future: Future[list[Finished]] = Future()
        finished: dict[int, Finished] = {}

        def on_event(event: Event) -> None:
            if isinstance(event, Failed):
                future.set_exception(event.error)
            elif isinstance(event, Finished):
                finished[event.index] = event
                if len(finished) == request.samples:
                    future.set_result([finished[index] for index in range(request.samples)])

        self.submit(request, on_event, progress=False)
        return future

    def warm_up(self, cap: int | None = None, sizes: Iterable[tuple[int, int]] = (), kept: Path | None = None) -> None:
        """Draws a picture, measures the pace at the native size, and from it the cap in rows, unless told that; caps of
        other `sizes`, (width, height), too. What is measured is `kept` in a folder. Call it before stepping."""
        native, *others = plainest(self.card, sizes)
        request = warm_up_request(self.card, steps=2)
        self.generate([request])
        [sequence] = self._preparation.sequences(request.resolve(self.card), "", time.monotonic())
        measure = partial(measured, self._preparation, self._denoiser, Measurements(self.family, cap, kept))
        shape, seconds = measure(native)
        cap, row = cap or knee(seconds), sequence.breadth / sequence.rows
        self.batcher.set_cap(shape, cap)
        self.pace.learn({rows * row: s for rows, s in seconds.items()}, usual=sequence.breadth, full=cap * row)
        for shape, seconds in map(measure, others):
            self.batcher.set_cap(shape, knee(seconds))


def host(make: Callable[[], Engine]) -> Engine:
    """An engine that is made, and then stepped until `close`, in one thread of its own. Raises what `make` raises.

    One thread for both: a second one that has computed would slow the first (models.aside).
    """
    made: Future[Engine] = Future()

    def live() -> None:
        try:
            engine = make()
        except BaseException as fault:
            made.set_exception(fault)
            return
        engine._thread = threading.current_thread()
        made.set_result(engine)
        engine._run()

    threading.Thread(target=live, name="engine", daemon=True).start()
    return made.result()


def _check_card(family: Family, card: ModelCard) -> None:
    """What a card cannot read where the weights are not in a folder here is said in its defaults."""
    if family.takes_mask and card.tasks != ("inpaint",):
        raise InvalidRequest("defaults.tasks", f"the UNet of {card.name} is one for inpainting alone: say [inpaint]")
    if card.guidance_input != (family.guidance_width > 0):
        does, say = ("takes", "true") if family.guidance_width else ("does not take", "false")
        reason = f"the UNet of {card.name} {does} the guidance scale as an input: say {say}"
        raise InvalidRequest("defaults.guidance_input", reason)
