"""A network compiled by Inductor, in a thread of its own, while it serves as it is.

What is compiled is kept in a folder (torch's own cache), so that the next start finds it there.
"""

import logging
import os
import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch

from models.forward import leaves

SHAPES = 64  # that are compiled at most
_compiled: ContextVar[bool] = ContextVar("compiled", default=False)
_log = logging.getLogger(__name__)


class Compiled:
    """Gives a network a second forward, which is called within `used`; the first call of a shape compiles it.

    `prepare` has such a call made in the thread. The number of rows is a variable of what is compiled, the shape of the
    latents is not.
    """

    def __init__(self, network: torch.nn.Module, cache: Path):
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache)
        torch._dynamo.config.recompile_limit = SHAPES
        plain = network.forward
        fused = torch.compile(plain, fullgraph=True)  # what it cannot take whole is refused, and stays as it is

        def forward(*given: Any, **named: Any) -> Any:
            if not _compiled.get():
                return plain(*given, **named)
            for _, tensor in leaves((given, named)):
                torch._dynamo.maybe_mark_dynamic(tensor, 0)
            return fused(*given, **named)

        network.forward = forward
        self._calls: queue.Queue[tuple[Callable[[], object], Future[None]]] = queue.Queue()
        threading.Thread(target=self._prepare_all, name="compiling", daemon=True).start()

    @property
    def idle(self) -> bool:
        """Whether nothing is being compiled now."""
        return self._calls.unfinished_tasks == 0

    def prepare(self, call: Callable[[], object]) -> Future[None]:
        """Done when such a call no longer compiles anything, with an exception where it cannot be compiled."""
        prepared: Future[None] = Future()
        self._calls.put((call, prepared))
        return prepared

    @contextmanager
    def used(self) -> Iterator[None]:
        """While it lasts the network's forward in this thread is the compiled one."""
        token = _compiled.set(True)
        try:
            yield
        finally:
            _compiled.reset(token)

    def _prepare_all(self) -> None:
        while True:
            call, prepared = self._calls.get()
            try:
                with torch.inference_mode():
                    call()
                prepared.set_result(None)
            except Exception as fault:  # of a compiler: anything
                _log.warning("a forward is not compiled: %s", fault)
                prepared.set_exception(fault)
            finally:
                del call, prepared  # which hold all of a denoiser that may have been given up
                self._calls.task_done()
