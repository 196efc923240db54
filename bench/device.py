"""The device that is measured, as torch and nvidia-smi know it."""

import shutil
import subprocess

import torch

_CLOCKS = "clocks.sm,clocks.mem,power.draw,temperature.gpu"


def name(device: torch.device) -> str:
    """A GPU's name, memory, driver and libraries."""
    if device.type != "cuda":
        return "no GPU, which says nothing about GPUs"
    facts = torch.cuda.get_device_properties(device)
    driver = _asked("driver_version") or "unknown"
    libraries = f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
    return f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB, driver {driver}, {libraries}"


def clocks() -> str:
    """Clocks, power and temperature now; empty where nobody tells."""
    return _asked(_CLOCKS)


def _asked(what: str) -> str:
    if not shutil.which("nvidia-smi"):
        return ""
    command = ["nvidia-smi", "-i", "0", f"--query-gpu={what}", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
