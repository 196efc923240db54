"""A denoising network compiled by AOTInductor, beside the serving and by a process of its own, and kept in a folder.

It is not done in this process: while torch.fx traces, it replaces the call of every module in it, the serving one's
too. What is compiled knows the network's shape and not its weights, so all models of one architecture share it. It is
native code: nobody else may write to the folder.
"""

import hashlib
import json
import logging
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

MOST_ROWS = 63  # from 64 on diffusers' Upsample2D takes another way
COMPILING_S = 1800.0
TOLERANCE = 0.05  # relative L2 distance between what is compiled and what is not: bfloat16 alone makes a hundredth

_log = logging.getLogger(__name__)
_one_at_a_time = threading.Lock()  # a compiler takes many cores


class Package:
    """The network compiled for inputs of one form; a call of it answers as the network's own forward does."""

    def __init__(self, network: torch.nn.Module, path: Path, example: Mapping[str, Any]):
        self._network = network
        self._path = path
        self._example: Mapping[str, Any] | None = example
        self._model: Any = None
        self.failed = False
        if not path.exists():
            job = json.dumps(_job(network, example))
            threading.Thread(target=self._compile, args=(job,), name="compiling", daemon=True).start()

    def ready(self) -> bool:
        """Whether it can be called. Once it is there it is loaded, and tried."""
        if self._model is None and not self.failed and self._path.exists():
            try:
                self._load()
            except RuntimeError as fault:
                self._fail(f"it cannot be loaded: {fault}")
        return self._model is not None

    def __call__(self, **named: Any) -> Any:
        return self._model(**named)

    def _compile(self, job: str) -> None:
        """Has a process do it, which ends when this one does."""
        with _one_at_a_time, tempfile.TemporaryFile("w+") as told:
            if self._path.exists():  # another model of the same architecture needed it
                return
            began = time.monotonic()
            # Finds what this process finds, wherever it was started.
            program = f"import sys; sys.path[:] = {sys.path!r}; from models.compiling import main; main()"
            command = [sys.executable, "-c", program, str(self._path)]
            try:
                with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=told, stderr=told, text=True) as process:
                    _have_done(process, job)
            except (OSError, subprocess.SubprocessError) as fault:
                told.seek(0)
                self._fail(f"{fault}\n{told.read()[-2000:]}")
            else:
                _log.info("compiled %s in %.0f s", self._path.name, time.monotonic() - began)

    def _load(self) -> None:
        """Takes it into use with the network's own weights, if it answers as the network does."""
        assert self._example is not None
        example, self._example = self._example, None
        # Graphs are captured around it, which its own locks would stand in the way of.
        model: Any = torch._inductor.aoti_load_package(str(self._path), run_single_threaded=True)
        model.load_constants(dict(self._network.state_dict()), check_full_update=True, user_managed=True)
        expected, found = self._network(**example)[0].float(), model(**example)[0].float()
        distance = ((found - expected).norm() / expected.norm()).item()
        if distance <= TOLERANCE:
            self._model = model
        else:
            self._fail(f"its answer is {distance:.3g} from the network's")

    def _fail(self, why: str) -> None:
        _log.warning("the network serves as it is, %s is not used: %s", self._path, why)
        self.failed = True


def _have_done(process: subprocess.Popen[str], job: str) -> None:
    """Raises OSError or SubprocessError where the process does not do it, or not in time."""
    assert process.stdin is not None
    try:
        process.stdin.write(job + "\n")
        process.stdin.flush()
        code = process.wait(COMPILING_S)
    except BaseException:
        process.kill()
        raise
    if code:
        raise subprocess.CalledProcessError(code, "models.compiling")


_mode: ContextVar[Package | list[Mapping[str, Any]] | None] = ContextVar("mode", default=None)


class _Forward:
    """A network's forward, for which a package stands in where one is used."""

    def __init__(self, plain: Callable[..., Any]):
        self._plain = plain

    def __call__(self, *given: Any, **named: Any) -> Any:
        mode = _mode.get()
        if isinstance(mode, Package):
            return mode(**named)
        if mode is not None:
            mode.append(named)
        return self._plain(*given, **named)


class Compiled:
    """Packages of one network by the form of its inputs: what they are and their shapes, but for the number of rows."""

    def __init__(self, network: torch.nn.Module, folder: Path):
        self._network = network
        self._folder = folder
        self._packages: dict[str, Package] = {}
        if not isinstance(network.forward, _Forward):  # of another engine with the same network
            network.forward = _Forward(network.forward)

    def package(self, call: Callable[[], object]) -> Package | None:
        """For such calls of the network, of which one is made; compiled where it is not yet. None where the network has
        hooks, which a compiled one would not have."""
        if any(module._forward_hooks or module._forward_pre_hooks for module in self._network.modules()):
            return None
        seen: list[Mapping[str, Any]] = []
        token = _mode.set(seen)
        try:
            call()
        finally:
            _mode.reset(token)
        [example] = seen
        key = _key(self._network, example)
        if key not in self._packages:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._packages[key] = Package(self._network, self._folder / f"{key}.pt2", example)
        return self._packages[key]

    @staticmethod
    @contextmanager
    def used(package: Package) -> Iterator[None]:
        """While it lasts the network's forward is the compiled one, in this thread."""
        token = _mode.set(package)
        try:
            yield
        finally:
            _mode.reset(token)


def _job(network: Any, example: Mapping[str, Any]) -> dict[str, Any]:
    """What the process has to know, in plain data."""
    parameter = next(network.parameters())
    return {
        "network": type(network).__name__,
        "config": json.loads(network.to_json_string()),
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "device": parameter.device.type,
        "channels_last": network.conv_in.weight.is_contiguous(memory_format=torch.channels_last),
        "example": {name: _told(value) for name, value in example.items()},
    }


def _key(network: Any, example: Mapping[str, Any]) -> str:
    """The name of a package: another one wherever another one is needed."""
    job = _job(network, example)
    device = torch.cuda.get_device_name() if job["device"] == "cuda" else torch.backends.cpu.get_cpu_capability()
    versions = {name: version(name) for name in ("torch", "diffusers")}
    text = json.dumps([job, device, versions], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def _told(value: Any) -> Any:
    """An argument as plain data, which models.compiling reads: tensors by their dtype and shape without the rows."""
    if isinstance(value, torch.Tensor):
        return {"tensor": str(value.dtype).removeprefix("torch."), "shape": list(value.shape[1:])}
    if isinstance(value, Mapping):
        return {"items": {name: _told(each) for name, each in value.items()}}
    return [_told(each) for each in value] if isinstance(value, list | tuple) else value
