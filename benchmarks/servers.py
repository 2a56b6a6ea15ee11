"""Servers under test: started as a user starts them, awaited until they answer, ended with all their processes."""

from __future__ import annotations

import contextlib
import http.client
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import psutil

from benchmarks.answers import Target, v2_target
from benchmarks.children import ROOT, ChildFailed, last_words

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from benchmarks.loads import Load
    from benchmarks.peers.mosec_server import MosecSettings
    from benchmarks.workloads import Workload

READY_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 20.0
# 1,024 rows of the largest input, and room for more.
MAX_BODY_BYTES = 512 << 20
REQUEST_TIMEOUT_MS = 300_000
# What the processes of `ensemble serve` are, by the module in their command line.
PARTS = {"ensemble_gateway": "gateway", "ensemble_worker": "workers"}


class ServerProcess:
    """A server in a process group of its own; its output goes to `log`."""

    def __init__(
        self, target: Target, arguments: Sequence[str], log: Path, environ: Mapping[str, str] | None = None
    ) -> None:
        self.target = target
        self._log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                arguments,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(environ or {})},
                cwd=ROOT,
                start_new_session=True,
            )

    def await_ready(self, ready: Callable[[], bool], timeout_s: float = READY_TIMEOUT_S) -> None:
        """Poll until the server is ready.

        Raises ChildFailed with the end of the log if the server ends or is not ready in time. It is stopped then, and
        whatever else ends the wait.
        """
        try:
            self._poll(ready, timeout_s)
        except BaseException:
            self.stop()
            raise

    def _poll(self, ready: Callable[[], bool], timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise ChildFailed(
                    f"{self.target.name} ended with exit code {self._process.returncode}; {last_words(self._log)}"
                )
            if ready():
                return
            time.sleep(0.1)
        raise ChildFailed(f"{self.target.name} was not ready within {timeout_s:g} s; {last_words(self._log)}")

    def status(self, path: str) -> int:
        """The HTTP status of a GET, 0 if there is none."""
        connection = http.client.HTTPConnection(self.target.host, self.target.port, timeout=5)
        try:
            connection.request("GET", path)
            return connection.getresponse().status
        except (OSError, http.client.HTTPException):
            return 0
        finally:
            connection.close()

    def memory_bytes(self) -> int:
        """Memory of the server and its children, shared pages divided among those that share them (PSS)."""
        total = 0
        for process in self._tree():
            with contextlib.suppress(psutil.Error):
                total += process.memory_full_info().pss
        return total

    def cpu_s(self) -> dict[str, float]:
        """Seconds of CPU that the server has taken so far, by its processes' part in it."""
        total: dict[str, float] = {}
        for process in self._tree():
            with contextlib.suppress(psutil.Error):
                command, times = process.cmdline(), process.cpu_times()
                part = next((name for module, name in PARTS.items() if module in command), "rest")
                total[part] = total.get(part, 0.0) + times.user + times.system
        return total

    def stop(self) -> None:
        """SIGTERM, and SIGKILL to whatever is left of the tree after a while."""
        tree = self._tree()
        if self._process.poll() is None:
            self._process.terminate()
        _, alive = psutil.wait_procs(tree, timeout=STOP_TIMEOUT_S)
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.wait()

    def _tree(self) -> list[psutil.Process]:
        try:
            parent = psutil.Process(self._process.pid)
            return [parent, *parent.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []


def start_ours(workload: Workload, name: str, options: Sequence[str], logs: Path) -> ServerProcess:
    """`ensemble serve` of the workload's resource, ready.

    Members are measured anew, as profiles of earlier runs may be of a busy machine.
    """
    target = v2_target(name, free_port(), workload.model)
    arguments = [sys.executable, "-m", "ensemble_operator", "serve", str(workload.resource), "--port", str(target.port)]
    words = name.replace(",", "").replace(" ", "-")
    cache = Path(workload.folder) / f"cache-{words}"
    shutil.rmtree(cache, ignore_errors=True)
    server = ServerProcess(target, [*arguments, "--cache-dir", str(cache), *options], logs / f"{words}.log")
    server.await_ready(lambda: server.status("/v2/health/ready") == 200)
    return server


def start_mosec(settings: MosecSettings, logs: Path) -> ServerProcess:
    """Mosec with these settings; ready when all its workers have loaded."""
    from benchmarks.peers.mosec_server import READY_VARIABLE, SETTINGS_VARIABLE

    target = Target("mosec", free_port(), "/inference", form="raw")
    arguments = [sys.executable, "-m", "benchmarks.peers.mosec_server", "--port", str(target.port)]
    arguments += [
        "--address",
        target.host,
        "--timeout",
        str(REQUEST_TIMEOUT_MS),
        "--max-request-size",
        str(MAX_BODY_BYTES),
    ]
    arguments += ["--log-level", "warning"]
    log = logs / f"mosec-{str(settings).replace(',', '').replace(' ', '-')}.log"
    with tempfile.TemporaryDirectory() as folder:
        environ = {SETTINGS_VARIABLE: msgspec.json.encode(settings).decode(), READY_VARIABLE: folder}
        server = ServerProcess(target, arguments, log, environ)
        server.await_ready(
            lambda: len(list(Path(folder).iterdir())) == settings.processes and server.status("/") == 200
        )
    return server


def mosec_candidates(
    workload: Workload, load: Load, cores: Sequence[int], *, plain: bool = False
) -> list[MosecSettings]:
    """Settings that may be mosec's best for a load: layouts of the cores, no batches or those that it can fill."""
    from benchmarks.peers.mosec_server import MosecSettings

    count = len(cores)
    found = []
    for processes, threads in dict.fromkeys([(1, 1), (1, count), (count, 1)]):
        sizes = {1, -(-load.connections // processes)} if load.connections > 1 else {1}
        if load.connections == 1 and processes > 1:
            continue
        found += [
            MosecSettings(workload.folder, processes, threads, size, 1, tuple(cores), plain) for size in sorted(sizes)
        ]
    return found


def free_port() -> int:
    """A TCP port of this machine that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
