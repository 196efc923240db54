"""A Ray cluster on this machine: each node is `ray start` with ports of its own and GPUs that are not there."""

import asyncio
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx2
import psutil

from app.settings import RAY_ENVIRONMENT
from bench.serving import PROJECT, free_port

HEAD = "head"
MARK = "HELIOGRAPH_NODE"  # in the environment of every process of a node: the cluster's folder and the node's name
START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 30.0
OBJECT_STORE_BYTES = 100 * 2**20  # /dev/shm is shared by all nodes
LOOK_S = 0.2


class Cluster:
    """A head and workers, for as long as the block lasts. Whatever was started ends with it."""

    def __init__(self, environment: Mapping[str, str] | None = None, folder: Path | None = None):
        """`environment` is for every node, beside what the project's image sets; `folder` takes all files."""
        self.folder = folder or folder_of_its_own()
        self.port, self._dashboard_port = free_port(), free_port()
        self.dashboard = f"http://127.0.0.1:{self._dashboard_port}"
        token = self.folder / "token"
        token.write_text(secrets.token_hex(32))
        self.headers = {"Authorization": f"Bearer {token.read_text()}"}
        self._environment = os.environ | RAY_ENVIRONMENT | {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "PYTHONPATH": str(PROJECT),
            "OMP_NUM_THREADS": "1",
            **(environment or {}),
        }  # fmt: skip
        self._nodes: dict[str, subprocess.Popen[bytes]] = {}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        left = [process for name in self._nodes for process in self.processes(name)]
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        await asyncio.to_thread(psutil.wait_procs, left, STOP_TIMEOUT_S)
        for node in self._nodes.values():
            node.wait(STOP_TIMEOUT_S)
        if error is None:
            shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def names(self) -> tuple[str, ...]:
        """The nodes that were started, the dead ones among them."""
        return tuple(self._nodes)

    async def start_head(self) -> None:
        """A head that keeps its state on the disk, so that the next one takes it up. It draws nothing."""
        words = (
            "--head", f"--port={self.port}", "--dashboard-host=127.0.0.1", f"--dashboard-port={self._dashboard_port}",
            f"--ray-client-server-port={free_port()}", f"--temp-dir={self.folder / 'ray'}", "--num-gpus=0",
            "--labels=heliograph/role=gateway",
        )  # fmt: skip
        # Ray would take the workers, which have this head's address on their command lines, for a head that runs.
        (self.folder / "ray" / "ray_current_cluster").unlink(missing_ok=True)
        kept = {"RAY_gcs_storage": "rocksdb", "RAY_gcs_storage_path": str(self.folder / "gcs")}
        await self._start(HEAD, words, kept)
        await self._until_answers(f"{self.dashboard}/api/gcs_healthz", HEAD)

    async def start_worker(self, name: str, label: str, gpus: int) -> None:
        """A worker with a label, and with so many GPUs, which Ray believes."""
        words = (f"--address=127.0.0.1:{self.port}", f"--num-gpus={gpus}", f"--labels={label}")
        agent = await self._start(name, words, {})
        await self._until_answers(f"http://127.0.0.1:{agent}/api/local_raylet_healthz", name)

    async def _start(self, name: str, words: tuple[str, ...], environment: Mapping[str, str]) -> int:
        """Gives the port of the node's agent, which tells whether it lives."""
        agent = free_port()
        command = (
            Path(sys.executable).parent / "ray", "start", "--block", "--node-ip-address=127.0.0.1",
            "--num-cpus=1",  # as many processes a node starts in advance
            f"--dashboard-agent-listen-port={agent}", f"--metrics-export-port={free_port()}",
            "--min-worker-port=0", "--max-worker-port=0", f"--object-store-memory={OBJECT_STORE_BYTES}",
            "--include-log-monitor=false", *words,
        )  # fmt: skip
        environment = self._environment | dict(environment) | {MARK: self._mark(name)}
        with self._log(name).open("ab") as said:
            options = {"cwd": PROJECT, "env": environment, "stdout": said, "stderr": said, "start_new_session": True}
            self._nodes[name] = await asyncio.to_thread(subprocess.Popen, command, **options)
        return agent

    def _log(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def _mark(self, name: str) -> str:
        return f"{self.folder}:{name}"

    async def _until_answers(self, address: str, name: str) -> None:
        async with asyncio.timeout(START_TIMEOUT_S), httpx2.AsyncClient() as client:
            while True:
                if self._nodes[name].poll() is not None:
                    raise RuntimeError(f"the node {name} ended:\n{self._log(name).read_text()[-2000:]}")
                with suppress(httpx2.TransportError):  # nobody listens yet
                    if (await client.get(address, timeout=5)).status_code == 200:
                        return
                await asyncio.sleep(LOOK_S)

    def processes(self, name: str) -> list[psutil.Process]:
        """All processes of a node that live."""
        mark = self._mark(name)
        return [process for process in psutil.process_iter() if _mark_of(process) == mark]

    def node_of(self, pid: int) -> str:
        """The node that a process belongs to; empty where it is gone."""
        with suppress(psutil.NoSuchProcess):
            return _mark_of(psutil.Process(pid)).removeprefix(f"{self.folder}:")
        return ""

    async def kill(self, name: str) -> None:
        """As if its power were cut: SIGKILL for every process at once, with no time to say goodbye."""
        victims = self.processes(name)
        for process in victims:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        await asyncio.to_thread(psutil.wait_procs, victims, STOP_TIMEOUT_S)
        self._nodes[name].wait(STOP_TIMEOUT_S)

    async def stop(self, name: str) -> None:
        """SIGTERM for `ray start`, which ends its node's processes."""
        self._nodes[name].send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            await asyncio.to_thread(self._nodes[name].wait, STOP_TIMEOUT_S)
        await self.kill(name)

    async def drain(self, node_id: str, deadline_s: int) -> None:
        """Tells Ray that the node is about to go: Serve starts its replicas elsewhere, then stops them here."""
        options = {
            "address": f"127.0.0.1:{self.port}",
            "node-id": node_id,
            "reason": "DRAIN_NODE_REASON_PREEMPTION",
            "reason-message": "a test",
            "deadline-remaining-seconds": str(deadline_s),
        }
        words = [word for name, value in options.items() for word in (f"--{name}", value)]
        command = (str(Path(sys.executable).parent / "ray"), "drain-node", *words)
        process = await asyncio.create_subprocess_exec(
            *command, env=self._environment, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
        )
        said, _ = await asyncio.wait_for(process.communicate(), START_TIMEOUT_S)
        if process.returncode:
            raise RuntimeError(f"ray drain-node: {said.decode()}")

    async def deploy(self, config: Mapping[str, Any]) -> None:
        """PUTs a configuration, as `serve deploy` does."""
        async with httpx2.AsyncClient(headers=self.headers) as client:
            answer = await client.put(f"{self.dashboard}/api/serve/applications/", json=config, timeout=60)
        if answer.status_code != 200:
            raise RuntimeError(f"Serve refuses the configuration: {answer.text}")

    async def applications(self) -> dict[str, Any]:
        """What Serve says of each application; empty where it does not answer."""
        with suppress(httpx2.TransportError, ValueError):
            async with httpx2.AsyncClient(headers=self.headers) as client:
                answer = await client.get(f"{self.dashboard}/api/serve/applications/", timeout=10)
            if answer.status_code == 200:
                return answer.json()["applications"]
        return {}


def folder_of_its_own() -> Path:
    """Not below pytest's folders: the path of a Unix socket has 107 bytes at most."""
    return Path(tempfile.mkdtemp(prefix="hn-"))


def _mark_of(process: psutil.Process) -> str:
    try:
        return "" if process.status() == psutil.STATUS_ZOMBIE else process.environ().get(MARK, "")
    except (psutil.Error, OSError):
        return ""
