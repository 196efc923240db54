"""Models that only take time: the real replica with networks that sleep, so that many fit on a small machine.

`bench.simulated:model` stands in a Serve configuration where `app.main:model` would, with the same args and the times
besides. What a device would compute is all that is different: the replica, its engine, batcher, tapes, preparation,
text encoder, delivery, packing and events are the real ones.
"""

import time
from functools import cache
from typing import Annotated, Any

from pydantic import Field
from ray.serve import Application

from app import main
from app.replica import Model, load_family
from app.settings import ModelSettings

Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class SimulatedSettings(ModelSettings):
    """A model, and how long its networks take: a forward has a fixed part and a part for each row."""

    forward_s: Seconds = 0.02
    row_s: Seconds = 0.01
    picture_s: Seconds = 0.02  # of the decoder
    threads: int | None = Field(default=1, ge=1, le=1)  # rows shared out among threads would sleep side by side


class SimulatedModel(Model):
    """The real replica around a simulated family."""

    @staticmethod
    def load(settings: ModelSettings) -> Any:
        assert isinstance(settings, SimulatedSettings)
        return SimulatedFamily(load_family(settings), settings)


class SimulatedFamily:
    """A family whose denoising network and decoder sleep; see models.family.Family."""

    def __init__(self, family: Any, settings: SimulatedSettings):
        self._family = family
        self._forward_s, self._row_s = settings.forward_s, settings.row_s
        self.autoencoder = SimulatedAutoencoder(family.autoencoder, settings.picture_s)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._family, name)

    def predict(self, latents: Any, timesteps: Any, rows: Any, residuals: Any = None) -> Any:
        """Zeros (r, c, h, w), after the time that so many rows take."""
        time.sleep(self._forward_s + self._row_s * len(latents))
        return latents.new_zeros((len(latents), self.autoencoder.channels, *latents.shape[2:]))


class SimulatedAutoencoder:
    """An autoencoder whose decoder sleeps and shows one picture for all; see models.autoencoder.Autoencoder."""

    def __init__(self, autoencoder: Any, picture_s: float):
        self._autoencoder, self._picture_s = autoencoder, picture_s

    def __getattr__(self, name: str) -> Any:
        return getattr(self._autoencoder, name)

    def decode(self, latents: Any) -> Any:
        """Pictures (n, 3, H, W) in 0..1."""
        time.sleep(self._picture_s * len(latents))
        height, width = (side * self.factor for side in latents.shape[2:])
        return picture(height, width).expand(len(latents), -1, -1, -1)


@cache
def picture(height: int, width: int) -> Any:
    """(3, H, W) in 0..1: soft colours under a little grain, whose PNG is about as large as a photograph's."""
    import torch

    rng = torch.Generator().manual_seed(0)
    coarse = torch.rand((1, 3, 6, 6), generator=rng)
    soft = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bicubic")[0]
    return (soft + 0.01 * torch.randn((3, height, width), generator=rng)).clamp(0, 1)


def model(args: SimulatedSettings) -> Application:
    """The application that runs one simulated model."""
    return main.served(SimulatedModel, args)
