"""From latents to pixels beside the steps: on a GPU in a stream of its own, so that no step waits for a picture."""

from collections.abc import Callable
from contextlib import suppress

import numpy as np
import torch

from models.autoencoder import Autoencoder

Pictures = Callable[[], np.ndarray]
"""Waits for pictures, (n, 3, H, W) in 0..1 in float32, NaN where the latents were. For any thread, and as often."""


class Decoder:
    """Decodes one call's pictures at a time. Calls are one thread's. `factor` is how many pixels a latent is wide."""

    def __init__(self, autoencoder: Autoencoder, device: torch.device):
        self.factor = autoencoder.factor
        self._autoencoder = autoencoder
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._ended: torch.cuda.Event | None = None

    @property
    def busy(self) -> bool:
        """Whether the last call's pictures are still being decoded."""
        try:
            return self._ended is not None and not self._ended.query()
        except RuntimeError:  # of anything that the GPU was given: whoever waits for a picture or steps next is told
            return False

    def wait(self) -> None:
        """Until it is not busy."""
        if self._ended is not None:
            with suppress(RuntimeError):
                self._ended.synchronize()

    def __call__(self, latents: torch.Tensor) -> Pictures:
        """Begins with latents (n, c, h, w)."""
        # numpy from here on: torch would give each packing thread OpenMP workers of its own (models.aside).
        if self._stream is None:
            pictures = self._autoencoder.decode(latents).cpu().numpy()
            return lambda: pictures
        self._stream.wait_stream(torch.cuda.current_stream(latents.device))
        with torch.cuda.stream(self._stream):
            latents.record_stream(self._stream)
            pixels = self._autoencoder.decode(latents)
            here = torch.empty(pixels.shape, dtype=pixels.dtype, pin_memory=True)
            here.copy_(pixels, non_blocking=True)
            self._ended = ended = torch.cuda.Event(blocking=True)
            ended.record(self._stream)

        def decoded() -> np.ndarray:
            ended.synchronize()
            return here.numpy()

        return decoded
