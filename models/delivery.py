"""From finished latents to encoded pictures: decoded a few at a time between steps, packed in threads of their own."""

import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import torch

from models import heap, metadata
from models.autoencoder import to_bytes
from models.decoder import Decoder, Pictures
from models.errors import GenerationFailed
from models.events import Finished, Timings
from models.images import encode
from models.sequence import Sequence
from models.turns import Flow, flow_of
from models.work import NEVER

_PICTURES = 4  # of the native size, decoded between two steps at most
_TIDY_S = 20.0  # between two times that freed memory is given back, in which it grows by some tens of MiB

OnPacked = Callable[[Sequence, Finished | GenerationFailed], None]


class Delivery:
    """The queue behind the last step. `on_packed` hears, from the packing threads, what became of each sequence."""

    def __init__(self, decoder: Decoder, revision: str, native_pixels: int, on_packed: OnPacked):
        self.queue: list[Sequence] = []
        self._decoder = decoder
        self._revision = revision
        self._pixels = _PICTURES * native_pixels
        self._on_packed = on_packed
        self._served: dict[Flow, float] = {}  # when pictures of a flow were taken last, of those in the queue
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="packing")
        self._tidied = time.monotonic()

    def take(self, stepping: Iterable[Sequence] = ()) -> list[Sequence]:
        """The next few to decode together: one shape, and no more than would hold up the steps.

        Interactive work comes first, then whoever has waited for longest since pictures of theirs were taken. While
        there are others whose work is as urgent, one picture of each is enough: it is their time. Nothing while the
        last ones are still being decoded beside the steps.
        """
        stepping = list(stepping)
        if self.queue and not stepping:
            self._decoder.wait()  # there is nothing else to do
        if not self.queue or self._decoder.busy:
            return []
        first, *others = sorted(self.queue, key=self._turn)
        is_batch, _ = flow_of(first)
        queue = [first, *(sequence for sequence in others if flow_of(sequence)[0] == is_batch)]
        flows = {flow_of(sequence) for sequence in (*self.queue, *stepping)}
        if len([batch for batch, _ in flows if batch <= is_batch]) > 1:
            firsts: dict[Flow, Sequence] = {}
            for sequence in queue:
                firsts.setdefault(flow_of(sequence), sequence)
            queue = list(firsts.values())
        pixels = first.shape[1] * first.shape[2] * self._decoder.factor**2
        room = max(1, self._pixels // pixels)
        taken = [sequence for sequence in queue if sequence.shape == first.shape][:room]
        self.queue = [sequence for sequence in self.queue if sequence not in taken]
        self._served |= dict.fromkeys(map(flow_of, taken), time.monotonic())
        self._served = {flow: self._served[flow] for flow in map(flow_of, self.queue) if flow in self._served}
        return taken

    def _turn(self, sequence: Sequence) -> tuple[bool, float]:
        """Smaller goes first."""
        flow = flow_of(sequence)
        return flow[0], max(sequence.denoised, self._served.get(flow, 0.0))

    def decode(self, sequences: list[Sequence]) -> None:
        """Decodes sequences of one shape and hands them to the packing threads."""
        pictures = self._decoder(torch.stack([sequence.latents for sequence in sequences]))
        for number, sequence in enumerate(sequences):
            self._threads.submit(self._pack, sequence, pictures, number)
        if time.monotonic() - self._tidied > _TIDY_S:
            self._tidied = time.monotonic()
            self._threads.submit(heap.give_back)

    def close(self) -> None:
        """Waits for the pictures that are being packed."""
        self._threads.shutdown()

    def _pack(self, sequence: Sequence, pictures: Pictures, number: int) -> None:
        try:
            self._on_packed(sequence, _finished(sequence, pictures()[number], self._revision))
        except GenerationFailed as failed:
            self._on_packed(sequence, failed)
        except Exception as fault:
            self._on_packed(sequence, GenerationFailed("engine_fault", f"packing the picture failed: {fault!r}"))


def _finished(sequence: Sequence, picture: np.ndarray, revision: str) -> Finished:
    """The encoded picture of (3, h, w) in 0..1; what is no picture is a typed failure, never a black one."""
    ended, array = _ended(sequence), to_bytes(picture)
    request = sequence.request if ended is None else replace(sequence.request, stop_at_step=ended)
    if picture.min() == picture.max():
        raise GenerationFailed("constant_picture", "the picture came out in one flat colour")
    width, height = request.largest  # what an upscaling model was shown may reach beyond it
    array = array[:height, :width]
    if sequence.canvas is not None and request.paste_back:
        array = sequence.canvas.paste(array)
    return Finished(
        index=sequence.index,
        seed=request.seed,
        data=encode(array, request.output_format, metadata.write(request, revision, request.metadata)),
        format=request.output_format,
        width=array.shape[1],
        height=array.shape[0],
        revision=revision,
        timings=Timings(
            queued_s=sequence.joined - sequence.submitted,
            encode_s=sequence.encoded - sequence.joined,
            denoise_s=sequence.denoised - sequence.encoded,
            decode_s=time.monotonic() - sequence.denoised,
        ),
        prompts=sequence.reports,
        warnings=tuple(sequence.warnings),
        stop_at_step=ended,
    )


def _ended(sequence: Sequence) -> int | None:
    """The step at which a sequence was made to end before its time."""
    planned = min(sequence.request.stop_at_step or NEVER, sum(len(phase.tape) for phase in sequence.phases))
    return sequence.step if sequence.step < planned else None
