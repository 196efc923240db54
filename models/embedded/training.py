"""The loop that all stages share: seeded by step, resumable at any checkpoint, with a progress bar."""

import math
import os
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from models.embedded.optimizer import Muon


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How long and how fast one stage trains."""

    name: str
    steps: int
    learning_rate: float
    averaging: float = 0.995  # decay of the weights' moving average, which is what a stage hands on
    weight_decay: float = 0.01
    warmup: float = 0.03  # share of the steps
    checkpoint_every: int = 250
    muon: bool = False
    seed: int = 0

    def rate(self, step: int) -> float:
        """The learning rate: linear warm-up, then a cosine down to a fiftieth."""
        done = step / self.steps
        return self.learning_rate * min(1.0, done / self.warmup) * (0.02 + 0.49 * (1 + math.cos(math.pi * done)))


@dataclass(frozen=True, kw_only=True)
class Dice:
    """All the chance of one step. Seeded by stage and step, so a resumed run draws what an unbroken one would."""

    numpy: np.random.Generator
    torch: torch.Generator

    @classmethod
    def of(cls, plan: Plan, step: int) -> "Dice":
        """The dice of that step."""
        rng = np.random.default_rng([*plan.name.encode(), plan.seed, step])
        return cls(numpy=rng, torch=torch.Generator().manual_seed(int(rng.integers(2**62))))

    def normal(self, *shape: int) -> Tensor:
        """Gaussian noise of that shape."""
        return torch.randn(*shape, generator=self.torch)

    def uniform(self, *shape: int) -> Tensor:
        """Numbers between 0 and 1."""
        return torch.rand(*shape, generator=self.torch)


def train(
    network: nn.Module,
    plan: Plan,
    loss: Callable[[int, Dice], Tensor],
    *,
    folder: Path,
    device: torch.device,
) -> nn.Module:
    """Trains the network to the end of the plan and returns it holding its averaged weights.

    Starts from `folder`'s checkpoint where there is one; a finished stage only loads.
    """
    network.to(device).train()
    path = folder / f"{plan.name}.safetensors"
    parameters = [p for p in network.parameters() if p.requires_grad]
    optimizer = optimizer_of(plan, network)
    average = [p.detach().clone() for p in parameters]
    start = load_checkpoint(path, parameters, average, optimizer) if path.exists() else 0
    with progress_bar(plan, start) as advance:
        for step in range(start, plan.steps):
            for group in optimizer.param_groups:
                group["lr"] = plan.rate(step)
            value = loss(step, Dice.of(plan, step))
            optimizer.zero_grad()
            value.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            # Early on the average must not remember the initial weights.
            decay = min(plan.averaging, (step + 1) / (step + 10))
            torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - decay)
            if (step + 1) % plan.checkpoint_every == 0 or step + 1 == plan.steps:
                save_checkpoint(path, step + 1, parameters, average, optimizer)
            advance(value.item())
    with torch.no_grad():
        torch._foreach_copy_(parameters, average)
    return network.eval()


def optimizer_of(plan: Plan, network: nn.Module) -> torch.optim.Optimizer:
    """Adam, or Muon for the networks that the plan says it for."""
    parameters = [p for p in network.parameters() if p.requires_grad]
    if plan.muon:
        return Muon(parameters, plan.learning_rate, weight_decay=plan.weight_decay)
    return torch.optim.AdamW(parameters, plan.learning_rate, betas=(0.9, 0.98), weight_decay=plan.weight_decay)


def save_checkpoint(
    path: Path, step: int, parameters: list[Tensor], average: list[Tensor], optimizer: torch.optim.Optimizer
) -> None:
    """Everything a resumed run needs, in one safetensors file, replaced atomically."""
    tensors = {}
    for i, (parameter, mean) in enumerate(zip(parameters, average, strict=True)):
        tensors |= {f"parameter.{i}": parameter.detach(), f"average.{i}": mean}
        tensors |= {f"state.{i}.{key}": value for key, value in optimizer.state[parameter].items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".partial")
    save_file({name: t.contiguous() for name, t in tensors.items()}, temporary, metadata={"step": str(step)})
    os.replace(temporary, path)


def load_checkpoint(
    path: Path, parameters: list[Tensor], average: list[Tensor], optimizer: torch.optim.Optimizer
) -> int:
    """Restores a checkpoint in place and returns the step it was taken at."""
    with safe_open(path, "pt") as file, torch.no_grad():
        for name in file.keys():  # noqa: SIM118 - a safetensors file is no dictionary
            kind, number, *key = name.split(".")
            parameter, tensor = parameters[int(number)], file.get_tensor(name)
            if kind == "parameter":
                parameter.copy_(tensor)
            elif kind == "average":
                average[int(number)].copy_(tensor)
            else:
                optimizer.state[parameter][key[0]] = tensor if tensor.dim() == 0 else tensor.to(parameter.device)
        return int(file.metadata()["step"])


def averaged(path: Path, network: nn.Module) -> nn.Module:
    """The network with the averaged weights of a stage's checkpoint, finished or not."""
    parameters = [p for p in network.parameters() if p.requires_grad]
    with safe_open(path, "pt") as file, torch.no_grad():
        for i, parameter in enumerate(parameters):
            parameter.copy_(file.get_tensor(f"average.{i}"))
    return network.eval()


@contextmanager
def progress_bar(plan: Plan, start: int) -> Iterable[Callable[[float], None]]:
    """A bar with the loss (a running mean), steps done and time left."""
    columns = (
        TextColumn("{task.description:>16}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.4f}"),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, refresh_per_second=1) as progress:
        task = progress.add_task(plan.name, total=plan.steps, completed=start, loss=float("nan"), rate="")
        mean = float("nan")

        def advance(value: float) -> None:
            nonlocal mean
            mean = value if math.isnan(mean) else 0.98 * mean + 0.02 * value
            speed = progress.tasks[0].speed
            rate = f"{speed:.2f} steps/s" if speed else ""
            progress.update(task, advance=1, loss=mean, rate=rate)
            done = progress.tasks[0].completed
            # A log file has no bar to redraw; it gets a line now and then.
            if not progress.console.is_terminal and done % max(1, plan.steps // 100) == 0:
                progress.console.print(f"{plan.name} {int(done)}/{plan.steps} loss {mean:.4f} {rate}", highlight=False)

        yield advance
