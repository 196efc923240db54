"""`heliograph serve` as a process of its own, for as long as a block lasts."""

import asyncio
import re
import signal
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx2
import yaml

PROJECT = Path(__file__).resolve().parents[1]
READY_TIMEOUT_S = 280.0
STOP_TIMEOUT_S = 90.0
TELL_TIMEOUT_S = 30.0
HELIOGRAPH = ("-c", "from app.cli import main; main()", "serve")  # arguments of Python

Configure = Callable[[str], dict[str, Any]]  # from the address that the server will have


class Serving:
    """A server with a configuration, on a port of its own of this machine."""

    def __init__(
        self,
        folder: Path,
        config: Configure,
        environment: Mapping[str, str] | None = None,
        program: Sequence[str] = HELIOGRAPH,
    ):
        """The folder takes the configuration and the log; without `environment` the server has this process's.

        `program` is given `--config` and `--port` as `heliograph serve` is.
        """
        self._port = free_port()
        self.address = f"http://127.0.0.1:{self._port}"
        self.config = config(self.address)
        self._file, self._log = folder / "serve_config.yaml", folder / "server.log"
        self._environment, self._program = environment, program

    async def __aenter__(self) -> Self:
        """Raises RuntimeError where the server ends instead, TimeoutError where it is not ready in time."""
        self._file.write_text(yaml.safe_dump(self.config))
        command = (*self._program, "--config", str(self._file), "--port", str(self._port))
        with self._log.open("wb") as said:
            # A session of its own: a terminal's Ctrl-C is for whoever started the server, who then stops it.
            self._process = await asyncio.create_subprocess_exec(
                sys.executable, *command, cwd=PROJECT, env=self._environment, stdout=said, stderr=said,
                start_new_session=True,
            )  # fmt: skip
        try:
            await self._wait_until_ready()
        except BaseException:
            await self.__aexit__(None, None, None)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process.returncode is None:
            self._process.send_signal(signal.SIGTERM)
            with suppress(TimeoutError):
                await asyncio.wait_for(self._process.wait(), STOP_TIMEOUT_S)
        if self._process.returncode is None:
            self._process.kill()
            await self._process.wait()

    @property
    def pid(self) -> int:
        """The process that everything else belongs to."""
        return self._process.pid

    async def dashboard(self) -> str:
        """The address of Ray's dashboard, which the server tells a moment after it is ready."""
        async with asyncio.timeout(TELL_TIMEOUT_S):
            while not (told := re.findall(r"serve status -a (http://\S+)", self._log.read_text())):
                self.check_is_alive()
                await asyncio.sleep(0.1)
        return told[0]

    def check_is_alive(self) -> None:
        """Raises RuntimeError, with the end of the log, where the server has ended."""
        if self._process.returncode is not None:
            raise RuntimeError(f"heliograph serve ended:\n{self._log.read_text()[-2000:]}")

    async def _wait_until_ready(self) -> None:
        async with asyncio.timeout(READY_TIMEOUT_S), httpx2.AsyncClient(base_url=self.address) as client:
            while True:
                self.check_is_alive()
                with suppress(httpx2.TransportError):  # nobody listens yet
                    if (await client.get("/readyz", timeout=10)).status_code == 200:
                        return
                await asyncio.sleep(0.5)


def end_on_sigterm() -> None:
    """Has SIGTERM cancel the current task: its blocks end, and stop the servers that they have started."""
    stopping = asyncio.current_task()
    assert stopping is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.cancel)


def free_port() -> int:
    """A port of this machine that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
