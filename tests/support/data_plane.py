"""A real data plane without a runner: worker processes with small models, gateways as processes or in the test's loop.

All members take `x` (8 FP32) and give `y` (8 FP32), so that two workers host all that the cheap tests need, and
each gateway's plan picks some of them.
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
import urllib.request
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from torch import nn

from ensemble_contract.plan import (
    GatewayPlan,
    Instance,
    ModelSource,
    ServedMember,
    WorkerAddress,
    WorkerPlan,
    encode_plan,
)
from ensemble_contract.tensors import TensorSpec
from ensemble_gateway.admission import Limits
from ensemble_gateway.app import Gateway, Options, Port
from tests.support.models import export_mlp, export_module, make_mlp

Array = np.ndarray[Any, np.dtype[Any]]

WIDTH = 8
START_S = 90.0
STOP_S = 20.0
X = (TensorSpec("x", "FP32", (WIDTH,)),)
Y = (TensorSpec("y", "FP32", (WIDTH,)),)
UNLUCKY, POISON = 1313.0, 6666.0
MLPS = ("mlp1", "mlp2", "mlp3")
TIMES = ("times1", "times2", "times3")


class Times(nn.Module):
    """`x` times a number: rows can be recognised in the answer."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.factor


class Touchy(nn.Module):
    """`x`, but fails on a batch with a row that begins with UNLUCKY."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        unlucky = (x[:, 0] == UNLUCKY).long()
        return x + torch.index_select(torch.zeros(4), 0, unlucky * 9)[:, None]


class Poisonable(nn.Module):
    """`x`, but the process dies of SIGFPE on a batch with a row that begins with POISON (the least INT64 by -1)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        poisoned = x[:, 0] == POISON
        dividend = torch.where(poisoned, torch.full_like(x[:, 0], 0, dtype=torch.int64) - 2**63, 1)
        quotient = torch.div(dividend, torch.full_like(dividend, -1), rounding_mode="trunc")
        return x + 0 * quotient.float()[:, None]


class Tired(nn.Module):
    """`x`, after a few milliseconds of work whatever the number of rows."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        work = torch.eye(256) + 0 * x[0, 0]
        for _ in range(12):
            work = work @ work
        return x * work[0, 0]


def write_models(folder: Path) -> dict[str, ModelSource]:
    """Every member as a TorchScript file in `folder`, by name."""
    example = (torch.zeros(2, WIDTH),)
    modules: dict[str, nn.Module] = {name: Times(float(name[-1])) for name in TIMES}
    modules |= {"touchy": Touchy(), "poisonable": Poisonable(), "tired": Tired()}
    for name, module in modules.items():
        export_module(folder / f"{name}.pt", module.eval(), example)
    for name in MLPS:
        export_mlp(folder / f"{name}.pt", seed=int(name[-1]), inputs=WIDTH, hidden=32, classes=WIDTH)
    return {
        name: ModelSource(
            name,
            f"digest-{name}",
            f"file:{folder / name}.pt",
            "torchscript",
            activation="softmax" if name in MLPS else "none",
        )
        for name in (*modules, *MLPS)
    }


def mlp_outputs(x: Array) -> Array:
    """What the MLP members answer, computed in this process: of shape (members, rows, classes)."""
    with torch.inference_mode():
        outputs = [
            torch.softmax(make_mlp(seed=int(name[-1]), inputs=WIDTH, hidden=32, classes=WIDTH)(torch.from_numpy(x)), -1)
            for name in MLPS
        ]
    return torch.stack(outputs).numpy()


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


def ask_unix(path: Path, method: str, target: str, body: bytes = b"") -> tuple[int, bytes]:
    """One request to an admin API; status and body."""
    connection = http.client.HTTPConnection("admin", timeout=10)
    connection.sock = socket.socket(socket.AF_UNIX)
    connection.sock.settimeout(10)
    try:
        connection.sock.connect(str(path))
        connection.request(method, target, body)
        with connection.getresponse() as response:
            return response.status, response.read()
    finally:
        connection.close()


class Worker(Child):
    """A worker process on one core."""

    def __init__(self, folder: Path, plan: WorkerPlan, *, data: str = "", options: Sequence[str] = ()) -> None:
        name = plan.worker
        self.plan = plan
        self.admin = folder / f"{name}.admin"
        self.address = WorkerAddress(name, data or f"unix:{folder / name}.data")
        file = folder / f"{name}.json"
        file.write_bytes(encode_plan(plan))
        arguments = ["ensemble_worker", "serve", "--name", name, "--device", "cpu-0", "--cores", "0"]
        arguments += ["--admin", f"unix:{self.admin}", "--data", self.address.address, "--plan", str(file), *options]
        super().__init__(arguments, folder / f"{name}.log")

    def states(self) -> dict[str, str]:
        """The state of each instance, as the admin API tells it."""
        found = json.loads(ask_unix(self.admin, "GET", "/v1/plan")[1])
        return {instance["member"]: instance["state"] for instance in found["instances"]}

    def wait_ready(self) -> None:
        """Wait until every instance is ready or has failed."""

        def settled() -> bool:
            assert self.process.poll() is None, self.text()
            with contextlib.suppress(OSError):
                states = self.states()
                return bool(states) and set(states.values()) <= {"ready", "failed"}
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
    plan: GatewayPlan, limits: Limits | None = None, max_body_bytes: int = 1 << 20
) -> AsyncIterator[LocalGateway]:
    """Serve a plan in this event loop, on a free port, once every member is live."""
    gateway = Gateway(Options("127.0.0.1", 0, "", plan))
    port = Port(gateway, max_body_bytes, limits)
    clients: list[Client] = []
    try:
        url = await port.open("127.0.0.1", 0)
        async with asyncio.timeout(STOP_S):
            while plan.workers and not gateway.pipeline.ready:
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

    def peak_bytes(self) -> int:
        """The most memory that it ever had resident, private and shared."""
        return self._status("VmHWM")

    def resident_bytes(self) -> int:
        """The private memory that it has resident now."""
        return self._status("RssAnon")

    def _status(self, field: str) -> int:
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) << 10
        raise AssertionError(field)

    async def connect(self) -> Client:
        return Client(*await asyncio.open_connection("127.0.0.1", self.number))

    def get(self, target: str) -> bytes:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.number}{target}", timeout=10) as answer:
            found: bytes = answer.read()
            return found


@contextlib.contextmanager
def gateway_process(folder: Path, plan: GatewayPlan, name: str = "gateway") -> Iterator[GatewayProcess]:
    """A gateway process that is ready."""
    gateway = GatewayProcess(folder, plan, name)
    try:
        gateway.wait_ready()
        yield gateway
    finally:
        gateway.end()


@dataclass(frozen=True)
class Reply:
    """An HTTP answer."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def error(self) -> str:
        """V2's error message."""
        assert self.headers["content-type"].startswith("application/json"), self
        found: str = json.loads(self.body)["error"]
        return found

    def y(self, name: str = "y") -> Array:
        """An output, binary or JSON."""
        assert self.status == 200, self
        length = self.headers.get("inference-header-content-length")
        text, binary = (self.body[: int(length)], self.body[int(length) :]) if length else (self.body, b"")
        at = 0
        for output in json.loads(text)["outputs"]:
            size = output.get("parameters", {}).get("binary_data_size", 0)
            if output["name"] == name:
                flat = np.frombuffer(binary[at : at + size], "<f4") if size else np.array(output["data"], np.float32)
                return flat.reshape(output["shape"])
            at += size
        raise AssertionError(f"no output {name}")


class Client:
    """A connection to the public port that speaks HTTP by the byte."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    def send(self, request: bytes) -> None:
        self.writer.write(request)

    def close(self) -> None:
        self.writer.close()

    async def reply(self, within_s: float = STOP_S, *, bodiless: bool = False) -> Reply:
        """The next answer."""
        async with asyncio.timeout(within_s):
            head = await self.reader.readuntil(b"\r\n\r\n")
            first, *lines = head.decode().rstrip("\r\n").split("\r\n")
            headers = {k.strip().lower(): v.strip() for k, _, v in (line.partition(":") for line in lines)}
            size = 0 if bodiless else int(headers.get("content-length", 0))
            return Reply(int(first.split()[1]), headers, await self.reader.readexactly(size))

    async def ask(self, request: bytes, within_s: float = STOP_S) -> Reply:
        self.send(request)
        return await self.reply(within_s)

    async def ended(self, within_s: float = STOP_S) -> bool:
        """Whether the server closes the connection without another byte."""
        async with asyncio.timeout(within_s):
            try:
                return await self.reader.read(1) == b""
            except ConnectionError:
                return True


def post(body: bytes, *, target: str = "/v2/models/echo/infer", **headers: object) -> bytes:
    """A POST; headers by name with underscores for dashes, None to leave one out."""
    fields = {"Host": "x", "Content-Length": len(body), **{k.replace("_", "-"): v for k, v in headers.items()}}
    lines = "".join(f"{name}: {value}\r\n" for name, value in fields.items() if value is not None)
    return f"POST {target} HTTP/1.1\r\n{lines}\r\n".encode() + body


def infer(x: Array, *, parameters: Mapping[str, Any] | None = None, model: str = "echo", **headers: object) -> bytes:
    """An inference in binary, in and out."""
    tensor = {"name": "x", "datatype": "FP32", "shape": x.shape, "parameters": {"binary_data_size": x.nbytes}}
    text = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True, **(parameters or {})}}).encode()
    target = f"/v2/models/{model}/infer"
    return post(text + x.tobytes(), target=target, Inference_Header_Content_Length=len(text), **headers)


def infer_json(x: Array, **more: Any) -> bytes:
    """The JSON body of an inference."""
    tensor = {"name": "x", "datatype": "FP32", "shape": x.shape, "data": x.ravel().tolist()}
    return json.dumps({"inputs": [tensor], **more}).encode()


def get(target: str, method: str = "GET", **headers: object) -> bytes:
    lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
    return f"{method} {target} HTTP/1.1\r\nHost: x\r\n{lines}\r\n".encode()


def rows(count: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(size=(count, WIDTH)).astype(np.float32)
