"""A denoising network compiled by AOTInductor, beside the serving and by a process of its own, and kept in a folder.

It is not done in this process: while torch.fx traces, it replaces the call of every module in it, the serving one's
too. What is compiled knows the network's shape and not its weights, so all models of one architecture share it. It is
native code: nobody else may write to the folder.
"""

import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import IO, Any

import torch

from models.likeness import likeness, name_of

MOST_ROWS = 63  # from 64 on diffusers' Upsample2D takes another way
COMPILING_S = 1800.0
PACKAGES = 16  # of one network at most: clients choose sizes
RECIPE = 1  # another number wherever what is compiled, or how, has changed here
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
            except torch.OutOfMemoryError:
                return False  # another time there may be room
            except (RuntimeError, OSError) as fault:
                self.fail(f"it cannot be loaded: {fault}")
            if self.failed:
                self._path.unlink(missing_ok=True)  # the next start makes it anew
        return self._model is not None

    def __call__(self, **named: Any) -> Any:
        return self._model(**named)

    def fail(self, why: str) -> None:
        """It is not used from now on."""
        _log.warning("the network serves as it is, %s is not used: %s", self._path, why)
        self.failed, self._model, self._example = True, None, None

    def _compile(self, job: str) -> None:
        """Has a process do it, which ends when this one does."""
        began = time.monotonic()
        try:
            with _one_at_a_time, tempfile.TemporaryFile("w+") as said:
                _have_done(job, self._path, said)
        except (OSError, subprocess.SubprocessError) as fault:
            self.fail(f"it was not compiled: {fault}")
        else:
            _log.info("%s is there after %.0f s", self._path.name, time.monotonic() - began)

    @torch.inference_mode()
    def _load(self) -> None:
        """Takes it into use with the network's own weights, if it answers as the network does."""
        assert self._example is not None
        # Graphs are captured around it, which its own locks would stand in the way of.
        model: Any = torch._inductor.aoti_load_package(str(self._path), run_single_threaded=True)
        # It keeps the weights where they are, for as long as this process lives.
        model.load_constants(dict(self._network.state_dict()), check_full_update=True, user_managed=True)
        expected, found = self._network(**self._example)[0].float(), model(**self._example)[0].float()
        distance = ((found - expected).norm() / expected.norm()).item()
        if distance <= TOLERANCE:
            self._model, self._example = model, None
        else:
            self.fail(f"its answer is {distance:.3g} from the network's")


def _have_done(job: str, package: Path, said: IO[str]) -> None:
    """Raises OSError or SubprocessError, with what the process has said, where it does not do it, or not in time."""
    # Finds what this process finds, wherever it was started.
    program = f"import sys; sys.path[:] = {sys.path!r}; from models.compiling import main; main()"
    command = [sys.executable, "-c", program, str(package)]
    # A session of its own, so that the compilers it starts can be ended with it.
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=said, stderr=said, text=True, start_new_session=True
    )
    with process:
        assert process.stdin is not None
        try:
            process.stdin.write(job + "\n")
            process.stdin.flush()
            code = process.wait(COMPILING_S)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    if code:
        said.seek(0)
        raise subprocess.SubprocessError(f"the process ended with {code}: {said.read()[-2000:]}")


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
        """For such calls of the network, of which one is made; compiled where it is not yet.

        None where the network has hooks, which a compiled one would not have, and where it has enough packages.
        """
        if any(module._forward_hooks or module._forward_pre_hooks for module in self._network.modules()):
            return None
        seen: list[Mapping[str, Any]] = []
        token = _mode.set(seen)
        try:
            call()
        finally:
            _mode.reset(token)
        if not seen:  # it was another network
            return None
        key = name_of(_job(self._network, seen[0]), RECIPE)
        if key not in self._packages and len(self._packages) < PACKAGES:
            self._packages[key] = Package(self._network, self._folder / f"{key}.pt2", seen[0])
        return self._packages.get(key)

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
    return likeness(network) | {"example": {name: _told(value) for name, value in example.items()}}


def _told(value: Any) -> Any:
    """An argument as plain data, which models.compiling reads: tensors by their dtype and shape without the rows."""
    if isinstance(value, torch.Tensor):
        return {"tensor": str(value.dtype).removeprefix("torch."), "shape": list(value.shape[1:])}
    if isinstance(value, Mapping):
        return {"items": {name: _told(each) for name, each in value.items()}}
    return [_told(each) for each in value] if isinstance(value, list | tuple) else value
