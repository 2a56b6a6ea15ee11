"""A real data plane without a runner: worker processes with small models, gateways as processes or in the test's loop.

All members have the same input and output (`plane_members`), so that two workers host all that the cheap tests need,
and each gateway's plan picks some of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest

from ensemble_contract.plan import (
    GatewayPlan,
    Instance,
    ModelSource,
    ServedMember,
    WorkerAddress,
    WorkerPlan,
    encode_plan,
)
from ensemble_gateway.admission import Limits
from ensemble_gateway.app import Port
from ensemble_gateway.gateway import Gateway
from tests.support.http_client import Client
from tests.support.plane_members import MLPS, TIMES, X, Y, write_models

START_S = 90.0
ADMIN_S = 30.0
STOP_S = 60.0


class Child:
    """A process of ours that writes its log to a file; ended by its owner whatever happens."""

    def __init__(self, arguments: Sequence[str], log: Path) -> None:
        self.log = log
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        with log.open("ab") as stream:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *arguments, "--parent-pid", str(os.getpid())], stderr=stream, env=environment
            )

    def text(self) -> str:
        """Its log so far."""
        return self.log.read_text(errors="replace")

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def wait(self, within_s: float = STOP_S) -> int:
        return self.process.wait(within_s)

    def end(self) -> None:
        """Kill it if it still runs, even stopped."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(STOP_S)


def ask_unix(
    path: Path, method: str, target: str, body: bytes = b"", *, authorization: str | None = None
) -> tuple[int, bytes]:
    """One request to an admin API; status and body."""
    connection = http.client.HTTPConnection("admin", timeout=ADMIN_S)
    connection.sock = socket.socket(socket.AF_UNIX)
    connection.sock.settimeout(ADMIN_S)
    try:
        connection.sock.connect(str(path))
        connection.request(method, target, body, {} if authorization is None else {"Authorization": authorization})
        with connection.getresponse() as response:
            return response.status, response.read()
    finally:
        connection.close()


class Worker(Child):
    """A worker process on one core."""

    def __init__(self, folder: Path, plan: WorkerPlan, *, data: str = "", options: Sequence[str] = ()) -> None:
        name = plan.worker
        self.folder, self.plan, self.options = folder, plan, options
        self.admin = folder / f"{name}.admin"
        self.address = WorkerAddress(name, data or f"unix:{folder / name}.data")
        file = folder / f"{name}.json"
        file.write_bytes(encode_plan(plan))
        arguments = ["ensemble_worker", "serve", "--name", name, "--device", "cpu-0", "--cores", "0"]
        arguments += ["--admin", f"unix:{self.admin}", "--data", self.address.address, "--plan", str(file), *options]
        super().__init__(arguments, folder / f"{name}.log")

    def restarted(self) -> Worker:
        """The same worker as a new process, as a runner would start it when this one has ended."""
        return Worker(self.folder, self.plan, data=self.address.address, options=self.options)

    def instances(self) -> list[dict[str, Any]]:
        """Every instance, as the admin API tells it."""
        found: list[dict[str, Any]] = json.loads(ask_unix(self.admin, "GET", "/v1/plan")[1])["instances"]
        return found

    def states(self) -> dict[str, str]:
        """The state of each member that has one instance."""
        return {instance["member"]: instance["state"] for instance in self.instances()}

    def wait_ready(self) -> None:
        """Wait until every instance is ready or has failed."""

        def settled() -> bool:
            assert self.process.poll() is None, self.text()
            with contextlib.suppress(OSError):
                states = {instance["state"] for instance in self.instances()}
                return bool(states) and states <= {"ready", "failed"}
            return False

        wait_until(settled, START_S)


def wait_until(condition: Any, within_s: float = STOP_S) -> None:
    """Wait until `condition()` holds; AssertionError if it does not in time."""
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {within_s} s"
        time.sleep(0.02)


def worker_plan(name: str, models: Mapping[str, ModelSource], members: Sequence[str], *, batch: int = 32) -> WorkerPlan:
    """A plan that places these members on one worker."""
    sources = tuple(models[member] for member in members)
    return WorkerPlan(1, "any", name, X, Y, sources, tuple(Instance(member, batch) for member in members))


def gateway_plan(
    workers: Sequence[WorkerAddress], models: Mapping[str, ModelSource], *members: str, **more: Any
) -> GatewayPlan:
    """The plan of the ensemble `echo` of these members."""
    served = tuple(ServedMember(m, models[m].digest, activation=models[m].activation) for m in members)
    plan = GatewayPlan(1, "echo", X, Y, served, tuple(workers), max_queue_bytes=4 << 20, timeout_s=10.0)
    return msgspec.structs.replace(plan, **more)


@dataclass(frozen=True)
class Workers:
    """Live workers, and the models that they host."""

    folder: Path
    models: dict[str, ModelSource]
    processes: list[Worker]

    def plan(self, *members: str, **more: Any) -> GatewayPlan:
        return gateway_plan([worker.address for worker in self.processes], self.models, *members, **more)


@contextlib.contextmanager
def running_workers(folder: Path, placed: Mapping[str, Sequence[str]], *, batch: int = 32) -> Iterator[Workers]:
    """Workers by name with the members of each, ready."""
    models = write_models(folder)
    processes: list[Worker] = []
    try:
        processes += [
            Worker(folder, worker_plan(name, models, members, batch=batch)) for name, members in placed.items()
        ]
        for worker in processes:
            worker.wait_ready()
        yield Workers(folder, models, processes)
    finally:
        for worker in processes:
            worker.end()


@pytest.fixture(scope="session")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    """Two workers for all tests that leave them alone, each with every harmless member."""
    members = (*TIMES, *MLPS, "touchy")
    with running_workers(tmp_path_factory.mktemp("plane"), {"w0": members, "w1": members}) as found:
        yield found


@dataclass(frozen=True)
class LocalGateway:
    """A gateway in the test's own event loop, with its public port."""

    gateway: Gateway
    port: Port
    number: int
    clients: list[Client] = field(default_factory=list)

    async def connect(self) -> Client:
        """A client, closed with the gateway at the latest."""
        client = Client(*await asyncio.open_connection("127.0.0.1", self.number))
        self.clients.append(client)
        return client


@contextlib.asynccontextmanager
async def serving(
    plan: GatewayPlan, limits: Limits | None = None, max_body_bytes: int = 1 << 20, wait: bool = True
) -> AsyncIterator[LocalGateway]:
    """Serve a plan in this event loop, on a free port; `wait`: until every member is live."""
    gateway = Gateway()
    gateway.adopt(plan)
    port = Port(gateway, max_body_bytes, limits)
    clients: list[Client] = []
    try:
        url = await port.open("127.0.0.1", 0)
        async with asyncio.timeout(STOP_S):
            while wait and not gateway.pipeline.ready:
                await asyncio.sleep(0.01)
        yield LocalGateway(gateway, port, int(url.rpartition(":")[2]), clients)
    finally:
        for client in clients:
            client.close()
        await port.close()
        gateway.close()


class GatewayProcess(Child):
    """A gateway as a process."""

    def __init__(self, folder: Path, plan: GatewayPlan, name: str = "gateway") -> None:
        self.admin = folder / f"{name}.admin"
        file = folder / f"{name}.json"
        file.write_bytes(encode_plan(plan))
        arguments = ["ensemble_gateway", "--http", "127.0.0.1:0", "--admin", f"unix:{self.admin}", "--plan", str(file)]
        super().__init__(arguments, folder / f"{name}.log")
        self.number = 0

    def state(self) -> dict[str, Any]:
        """What the admin API tells."""
        found: dict[str, Any] = json.loads(ask_unix(self.admin, "GET", "/v1/state")[1])
        return found

    def wait_ready(self) -> None:
        """Wait until every member has been seen live."""

        def ready() -> bool:
            assert self.process.poll() is None, self.text()
            with contextlib.suppress(OSError):
                return bool(self.state()["ready"])
            return False

        wait_until(ready, START_S)
        self.number = int(self.state()["url"].rpartition(":")[2])

    @property
    def proc(self) -> Path:
        """What the kernel tells about it."""
        return Path(f"/proc/{self.process.pid}")

    def peak_bytes(self) -> int:
        """The most memory that it ever had resident, private and shared."""
        return self._status("VmHWM")

    def resident_bytes(self) -> int:
        """The private memory that it has resident now."""
        return self._status("RssAnon")

    def _status(self, field: str) -> int:
        for line in (self.proc / "status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) << 10
        raise AssertionError(field)

    async def connect(self) -> Client:
        return Client(*await asyncio.open_connection("127.0.0.1", self.number))


@contextlib.contextmanager
def gateway_process(folder: Path, plan: GatewayPlan, name: str = "gateway") -> Iterator[GatewayProcess]:
    """A gateway process that is ready."""
    gateway = GatewayProcess(folder, plan, name)
    try:
        gateway.wait_ready()
        yield gateway
    finally:
        gateway.end()
