"""A process that compiles a network, which standard input describes (models.compiled), to a package, and ends.

The network is made anew with random weights, which the package does not hold. The first line of the input is the job;
where the input ends before it is done, whoever wanted it is gone.
"""

import fcntl
import json
import os
import signal
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch

from models.attention import remember
from models.compiled import MOST_ROWS

ROWS = 2  # of the example; with one row the number would be taken for a constant


def main() -> None:
    package = Path(sys.argv[1])
    draft = package.with_name(f"{package.stem}-{os.getpid()}.pt2")
    job = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_the_input, args=(draft,), daemon=True).start()
    os.nice(10)  # others serve meanwhile
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(package.parent / "inductor")  # for the next shape of the network
    torch.set_num_threads(job["threads"])
    try:
        with package.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # replicas of one machine want the same
            if not package.exists():
                _compile(job, draft)
                draft.replace(package)
    finally:
        draft.unlink(missing_ok=True)


def _end_with_the_input(draft: Path) -> None:
    """With all processes of this one's."""
    sys.stdin.read()
    draft.unlink(missing_ok=True)
    os.killpg(0, signal.SIGKILL)


@torch.no_grad()
def _compile(job: Mapping[str, Any], to: Path) -> None:
    device = torch.device(job["device"])
    example = {name: _made(value, device) for name, value in job["example"].items()}
    rows = torch.export.Dim("rows", min=1, max=MOST_ROWS)
    shapes = {name: _shapes(value, rows) for name, value in example.items()}
    program = torch.export.export(_network(job, device), (), example, dynamic_shapes=shapes, strict=False)
    # What a weight is must not be built in, not even of the smallest ones: these here are random.
    options = {"aot_inductor.package_constants_in_so": False, "always_keep_tensor_constants": True}
    torch._inductor.aoti_compile_and_package(program, package_path=str(to), inductor_configs=options)


def _network(job: Mapping[str, Any], device: torch.device) -> torch.nn.Module:
    network = getattr(diffusers, job["network"]).from_config(job["config"])
    remember(network)
    network.to(device, getattr(torch, job["dtype"])).eval().requires_grad_(False)
    for weight in network.parameters():
        weight.normal_()  # norms begin as ones and zeros, which a compiler would see
    return network.to(memory_format=torch.channels_last) if job["channels_last"] else network


def _made(value: Any, device: torch.device) -> Any:
    """An argument as models.compiled tells it, with numbers in it."""
    if isinstance(value, list):
        return [_made(each, device) for each in value]
    if isinstance(value, dict) and "items" in value:
        return {name: _made(each, device) for name, each in value["items"].items()}
    if not isinstance(value, dict):
        return value
    dtype, shape = getattr(torch, value["tensor"]), (ROWS, *value["shape"])
    made = torch.rand(shape, device=device) if dtype.is_floating_point else torch.ones(shape, device=device)
    return made.to(dtype)


def _shapes(value: Any, rows: Any) -> Any:
    """Which axes of an argument's tensors are as long as there are rows: the first."""
    if isinstance(value, torch.Tensor):
        return {0: rows}
    if isinstance(value, dict):
        return {name: _shapes(each, rows) for name, each in value.items()}
    return [_shapes(each, rows) for each in value] if isinstance(value, list) else None
