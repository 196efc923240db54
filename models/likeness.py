"""What a network is on a machine, but for its weights: as plain data, and as a name for what is kept of it."""

import hashlib
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


def likeness(network: Any) -> dict[str, Any]:
    """What all networks have in common that compute the same with other weights, and take as long."""
    parameter = next(network.parameters())
    config = json.loads(network.to_json_string())
    return {
        "network": type(network).__name__,
        "config": {name: value for name, value in config.items() if not name.startswith("_")},  # where it came from
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "device": parameter.device.type,
        "threads": torch.get_num_threads(),
        "channels_last": network.conv_in.weight.is_contiguous(memory_format=torch.channels_last),
    }


def name_of(told: dict[str, Any], recipe: int) -> str:
    """Another one for another `likeness`, or what else is told with it, and for each processor, version of the
    libraries, and recipe, which is the number of how what is kept was made."""
    versions = {name: version(name) for name in ("torch", "diffusers")}
    text = json.dumps([recipe, told, _processor(told["device"]), versions], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def _processor(device: str) -> str:
    """What code for a device may run on: a GPU's name, or what a CPU can."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text().splitlines() if facts.exists() else []
    return next((line for line in lines if line.startswith("flags")), torch.backends.cpu.get_cpu_capability())
