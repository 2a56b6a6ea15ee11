"""The admin APIs of workers and gateways, JSON over HTTP on Unix sockets or TCP: the only file that talks to them."""

from __future__ import annotations

import asyncio
from typing import TypeVar

import aiohttp
import msgspec

from ensemble_contract.plan import GatewayPlan, ModelSource, WorkerPlan, encode_plan
from ensemble_contract.tensors import TensorSpec
from ensemble_operator.errors import EnsembleError
from ensemble_operator.profiles.measurements import Point, Signature

# A worker that loads a model may hold its interpreter for seconds.
TIMEOUT_S = 5.0
# A plan may have 900 kB.
PUT_TIMEOUT_S = 10.0
MAX_AT_ONCE = 64
# Longer than the pause between two looks at a change under way.
KEEP_ALIVE_S = 30.0


class Unreachable(EnsembleError):
    """An admin API does not answer, or not as agreed. The message names the address and the cause."""


class Refused(Unreachable):
    """An admin API answered with an error; `status` is HTTP's: 401 wrong token, 409 an older plan, 400 a bad one."""

    def __init__(self, status: int, message: str) -> None:
        self.status = status
        super().__init__(message)


class InstanceReport(msgspec.Struct, frozen=True, rename="camel"):
    """An instance as its worker sees it: `state` is fetching, loading, ready or failed, and then `error` says why."""

    member: str
    digest: str
    batch_size: int
    state: str
    error: str | None = None
    memory_bytes: int = 0


class WorkerReport(msgspec.Struct, frozen=True, rename="camel"):
    """What a worker runs, and of which generation."""

    generation: int
    instances: tuple[InstanceReport, ...] = ()


class DeviceReport(msgspec.Struct, frozen=True, rename="camel"):
    """The device that a worker owns; kind `none` where it sees none, and then `error` has the remedy.

    `libraries` run models there, with their versions; empty where a worker does not say.
    """

    name: str
    kind: str
    device_class: str
    capacity_bytes: int
    overhead_bytes: int = 0
    libraries: str = ""
    error: str | None = None


class ProfileTask(msgspec.Struct, frozen=True, rename="camel"):
    """A member to measure at some batch sizes; empty inputs or outputs: the model tells."""

    source: ModelSource
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    sizes: tuple[int, ...]
    budget_s: float


class SharedMember(msgspec.Struct, frozen=True, rename="camel"):
    """A member to run beside others, and its batch size there."""

    source: ModelSource
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    batch_size: int


class ColocationTask(msgspec.Struct, frozen=True, rename="camel"):
    """Members to run on the device alone and together, for so long once they are loaded."""

    members: tuple[SharedMember, ...]
    budget_s: float


class ProfileJob(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a worker shall measure, in this order, `colocation` last. The same job twice is one."""

    id: str
    tasks: tuple[ProfileTask, ...]
    colocation: ColocationTask | None = None


class ProfileResult(msgspec.Struct, frozen=True, rename="camel"):
    """What a worker has found out of one task so far; with `finished`, all that it will.

    `sizes` are those that the task asks for; empty of a worker too old to tell.
    """

    member: str
    digest: str
    signature: Signature | None = None
    overhead_bytes: int = 0
    points: tuple[Point, ...] = ()
    error: str | None = None
    finished: bool = False
    sizes: tuple[int, ...] = ()


class ColocationResult(msgspec.Struct, frozen=True, rename="camel"):
    """The co-location factor of the worker's device; None while it is not known."""

    factor: float | None = None
    error: str | None = None
    finished: bool = False


class ProfileReport(msgspec.Struct, frozen=True, rename="camel"):
    """A worker's measuring: `state` is idle, running or done; `results` of the job named by `id`.

    `colocation` is None where the job has none, or the worker is too old to know of it.
    """

    id: str | None = None
    state: str = "idle"
    results: tuple[ProfileResult, ...] = ()
    colocation: ColocationResult | None = None


class MemberState(msgspec.Struct, frozen=True, rename="camel"):
    """A member as the gateway sees it: whether this version of it answers now, and from how many instances."""

    name: str
    live: bool
    instances: int = 0
    digest: str = ""


class WorkerState(msgspec.Struct, frozen=True, rename="camel"):
    """A worker as the gateway sees it. `in_flight` counts batches."""

    name: str
    connected: bool
    in_flight: int = 0


class GatewayState(msgspec.Struct, frozen=True, rename="camel"):
    """A gateway's figures.

    `generation` is the plan that it serves, `newest` the newest that it has adopted, `retiring` how many former plans
    still have requests. Since its start: `rows` and `requests` answered, the seconds these took together, how many took
    up to each of some durations (the last: longer than all), and `failures` by reason. Now: `store_bytes` in its row
    store.
    """

    generation: int
    ready: bool
    url: str
    members: tuple[MemberState, ...] = ()
    workers: tuple[WorkerState, ...] = ()
    rows: int = 0
    requests: int = 0
    duration_bounds_s: tuple[float, ...] = ()
    duration_counts: tuple[int, ...] = ()
    failures: dict[str, int] = {}
    store_bytes: int = 0
    newest: int = 0
    retiring: int = 0


ReportT = TypeVar("ReportT", WorkerReport, GatewayState, DeviceReport, ProfileReport)


class Fleet:
    """A client for the admin APIs, by address: `unix:PATH`, `tcp://HOST:PORT` or an `http://` URL to put paths behind.

    `close` it at the end. Every call may take the API's token, and raises Unreachable or, of that, Refused.
    """

    def __init__(self) -> None:
        self._sessions: dict[str, aiohttp.ClientSession] = {}
        self._places = asyncio.Semaphore(MAX_AT_ONCE)

    async def close(self) -> None:
        """Release the connections."""
        for session in self._sessions.values():
            await session.close()

    async def worker(self, address: str, token: str = "") -> WorkerReport:
        """What the worker at this address runs."""
        return await self._get(address, "/v1/plan", WorkerReport, token)

    async def gateway(self, address: str, token: str = "") -> GatewayState:
        """The state of the gateway at this address."""
        return await self._get(address, "/v1/state", GatewayState, token)

    async def device(self, address: str, token: str = "") -> DeviceReport:
        """The device of the worker at this address."""
        return await self._get(address, "/v1/device", DeviceReport, token)

    async def profile(self, address: str, token: str = "") -> ProfileReport:
        """What the worker at this address measures or has measured."""
        return await self._get(address, "/v1/profile", ProfileReport, token)

    async def put_plan(self, address: str, plan: WorkerPlan | GatewayPlan, token: str = "") -> None:
        """Give a worker or a gateway its plan."""
        await self._ask("PUT", address, "/v1/plan", token, encode_plan(plan))

    async def put_profile(self, address: str, job: ProfileJob, token: str = "") -> None:
        """Have the worker at this address measure."""
        await self._ask("PUT", address, "/v1/profile", token, msgspec.json.encode(job))

    async def end_profile(self, address: str, token: str = "") -> None:
        """End the worker's measuring."""
        await self._ask("DELETE", address, "/v1/profile", token)

    async def _get(self, address: str, path: str, form: type[ReportT], token: str) -> ReportT:
        body = await self._ask("GET", address, path, token)
        try:
            return msgspec.json.decode(body, type=form)
        except (msgspec.DecodeError, ValueError) as error:
            raise Unreachable(f"{address}{path} answered something else: {error}") from error

    async def _ask(self, method: str, address: str, path: str, token: str, body: bytes | None = None) -> bytes:
        session, base = self._session(address)
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        timeout = aiohttp.ClientTimeout(total=TIMEOUT_S if body is None else PUT_TIMEOUT_S)
        try:
            async with (
                self._places,
                session.request(method, base + path, data=body, headers=headers, timeout=timeout) as response,
            ):
                answer = await response.read()
                if response.status >= 300:
                    text = answer[:500].decode(errors="replace")
                    raise Refused(response.status, f"{address}{path} answered {response.status}: {text}")
                return answer
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise Unreachable(f"{address}{path}: {error or type(error).__name__}") from error

    def _session(self, address: str) -> tuple[aiohttp.ClientSession, str]:
        """The session that reaches an address, and what its paths are put behind."""
        if address.startswith("unix:"):
            if address not in self._sessions:
                connector = aiohttp.UnixConnector(address.removeprefix("unix:"))
                self._sessions[address] = aiohttp.ClientSession(connector=connector)
            return self._sessions[address], "http://localhost"
        if "" not in self._sessions:
            tcp = aiohttp.TCPConnector(limit=MAX_AT_ONCE, keepalive_timeout=KEEP_ALIVE_S)
            self._sessions[""] = aiohttp.ClientSession(connector=tcp)
        base = f"http://{address.removeprefix('tcp://')}" if address.startswith("tcp://") else address.rstrip("/")
        return self._sessions[""], base
