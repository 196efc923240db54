"""The deployment that makes pictures larger: one picture at a time in a thread, the others in a short queue.

torch is imported when a replica is made, never when this module is: Serve's own processes import it too.
"""

import asyncio
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from app.events import Upscaled
from app.settings import UpscalerSettings, cores
from models.errors import HeliographError, Overloaded
from models.events import Failed
from models.images import ImageFormat
from models.parts import Upscale

if TYPE_CHECKING:
    from models.upscaler import Upscaler as Networks

STUCK_S = 300.0  # without a finished tile: the slowest network on one core needs a minute
FIRST_GUESS_S = 2.0  # how long a picture takes, until one has told


class Upscaler:
    """A replica: the registered upscalers and the thread that runs them."""

    async def __init__(self, settings: UpscalerSettings):
        self._max_waiting = settings.max_waiting
        loop = asyncio.get_running_loop()
        # Importing torch takes seconds: on Serve's event loop it would look like a replica that does not answer.
        self._networks = await loop.run_in_executor(None, start_networks, settings)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="upscaling")
        self._pictures = 0  # that wait or are worked on
        self._seconds = FIRST_GUESS_S  # per picture, a running mean
        self._touched = time.monotonic()  # when something last moved on

    async def upscale(
        self, picture: bytes, wanted: Upscale, format: ImageFormat, text: Mapping[str, str] | None = None
    ) -> Upscaled | Failed:
        """The encoded picture, enlarged, in that format and with these texts in it. A caller who leaves
        cancels it, at the next tile at the latest.

        A refusal is returned as Failed, not raised, so that Serve's log has no stack trace for each full queue.
        """
        if self._pictures > self._max_waiting:
            message = f"{self._max_waiting} pictures wait for the upscaler already"
            return Failed(error=Overloaded(self._seconds * self._pictures, message))
        if not self._pictures:
            self._touched = time.monotonic()
        left = threading.Event()
        self._pictures += 1
        try:
            return await asyncio.wrap_future(self._thread.submit(self._work, picture, wanted, format, text, left))
        except HeliographError as error:
            return Failed(error=error)
        finally:
            left.set()
            self._pictures -= 1

    def _work(
        self,
        picture: bytes,
        wanted: Upscale,
        format: ImageFormat,
        text: Mapping[str, str] | None,
        left: threading.Event,
    ) -> Upscaled:
        started = time.monotonic()
        wanted = self._networks.card.resolve(wanted)
        enlarged = self._networks.upscale(picture, wanted, on_tile=self._touch, cancelled=left.is_set)
        width, height = enlarged.size
        data = enlarged.encode(format, text)
        self._seconds += 0.3 * (time.monotonic() - started - self._seconds)
        return Upscaled(data=data, format=format, width=width, height=height, model=str(wanted.model))

    def _touch(self, done: int, total: int) -> None:
        self._touched = time.monotonic()

    def record_autoscaling_stats(self) -> dict[str, float]:
        """For app.autoscaling.WorkPolicy: what a model's replica tells too (app/vitals.py)."""
        return {
            "seconds_left": self._pictures * self._seconds,
            "requests": float(self._pictures),
            "request_s": self._seconds,
            "busy": float(self._pictures > 0),
        }

    def check_health(self) -> None:
        """Raises when the picture in work makes no progress, so that Serve replaces the replica."""
        if self._pictures and time.monotonic() - self._touched > STUCK_S:
            raise RuntimeError(f"the upscaler has not finished a tile for {STUCK_S:.0f} s")

    def __del__(self) -> None:
        # Serve calls this after the last request has left. A replica that never started has no thread.
        thread = getattr(self, "_thread", None)
        if thread is not None:
            thread.shutdown(wait=False, cancel_futures=True)


def start_networks(settings: UpscalerSettings) -> "Networks":
    """The upscalers that these settings name, ready to be asked."""
    import torch

    from models.upscaler import Upscaler as Networks

    # Ray sets OMP_NUM_THREADS from num_cpus, which counts for placement only.
    torch.set_num_threads(settings.threads or cores())
    return Networks(
        settings.card(), settings.located_models, device=settings.device, dtype=settings.dtype, tile=settings.tile
    )
