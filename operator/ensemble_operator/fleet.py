"""The admin APIs of workers and gateways, JSON over HTTP on Unix sockets or TCP: the only file that talks to them."""

from __future__ import annotations

from typing import TypeVar

import aiohttp
import msgspec

from ensemble_operator.errors import EnsembleError

TIMEOUT_S = 2.0


class Unreachable(EnsembleError):
    """An admin API does not answer, or not as agreed. The message names the address and the cause."""


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


class MemberState(msgspec.Struct, frozen=True, rename="camel"):
    """A member as the gateway sees it: whether it answers now, and from how many instances."""

    name: str
    live: bool
    instances: int = 0


class WorkerState(msgspec.Struct, frozen=True, rename="camel"):
    """A worker as the gateway sees it. `in_flight` counts batches."""

    name: str
    connected: bool
    in_flight: int = 0


class GatewayState(msgspec.Struct, frozen=True, rename="camel"):
    """A gateway's figures.

    Since its start: `rows` and `requests` answered, the seconds these took together, and `failures` by reason. Now:
    `store_bytes` in its row store.
    """

    generation: int
    ready: bool
    url: str
    members: tuple[MemberState, ...] = ()
    workers: tuple[WorkerState, ...] = ()
    rows: int = 0
    requests: int = 0
    request_seconds: float = 0.0
    failures: dict[str, int] = {}
    store_bytes: int = 0


ReportT = TypeVar("ReportT", WorkerReport, GatewayState)


class Fleet:
    """A client for the admin APIs, by address: `unix:PATH` or `tcp://HOST:PORT`. `close` it at the end."""

    def __init__(self) -> None:
        self._sessions: dict[str, aiohttp.ClientSession] = {}

    async def close(self) -> None:
        """Release the connections."""
        for session in self._sessions.values():
            await session.close()

    async def worker(self, address: str) -> WorkerReport:
        """What the worker at this address runs.

        Raises Unreachable.
        """
        return await self._get(address, "/v1/plan", WorkerReport)

    async def gateway(self, address: str) -> GatewayState:
        """The state of the gateway at this address.

        Raises Unreachable.
        """
        return await self._get(address, "/v1/state", GatewayState)

    async def _get(self, address: str, path: str, form: type[ReportT]) -> ReportT:
        try:
            async with self._session(address).get(path) as response:
                body = await response.read()
                if response.status != 200:
                    text = body[:200].decode(errors="replace")
                    raise Unreachable(f"{address}{path} answered {response.status}: {text}")
                return msgspec.json.decode(body, type=form)
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise Unreachable(f"{address}{path}: {error or type(error).__name__}") from error
        except msgspec.DecodeError as error:
            raise Unreachable(f"{address}{path} answered something else: {error}") from error

    def _session(self, address: str) -> aiohttp.ClientSession:
        if address not in self._sessions:
            timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
            if address.startswith("unix:"):
                connector = aiohttp.UnixConnector(address.removeprefix("unix:"))
                session = aiohttp.ClientSession("http://localhost", connector=connector, timeout=timeout)
            else:
                session = aiohttp.ClientSession(f"http://{address.removeprefix('tcp://')}", timeout=timeout)
            self._sessions[address] = session
        return self._sessions[address]
