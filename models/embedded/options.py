"""What the programs that make and score the embedded models can all be told, and how they set torch up by it."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import torch
import typer

Device = StrEnum("Device", ["auto", "cpu", "cuda"])

Models = Annotated[Path, typer.Option(help="Where the models' folders are.")]
Work = Annotated[Path, typer.Option(help="Checkpoints and encoded pictures; a run resumes here.")]
On = Annotated[Device, typer.Option(help="auto takes a GPU where there is one.")]
Threads = Annotated[int, typer.Option(help="CPU threads.")]
Scale = Annotated[float, typer.Option(help="Of all numbers; 0.002 is a test of the machinery.")]

MODELS = Path("models/embedded")
WORK = Path(".training")


def set_up_training(threads: int, device: Device = Device.cpu) -> torch.device:
    """Gives torch its threads; returns the device to train on."""
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)  # the moments of weights at rest are denormal, and CPUs are slow at those
    cuda = device is Device.cuda or (device is Device.auto and torch.cuda.is_available())
    return torch.device("cuda" if cuda else "cpu")
