"""The gateway process: one event loop with the public port, the admin API and the pipeline of the current plan."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import signal
import socket
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import zmq
from aiohttp import web

from ensemble_contract.keys import KeyFiles
from ensemble_contract.orphan import die_with_parent
from ensemble_contract.plan import GatewayPlan, WorkerAddress
from ensemble_gateway.admin import make_admin
from ensemble_gateway.admission import Limits
from ensemble_gateway.edge import Edge
from ensemble_gateway.links import Link, LinkOwner
from ensemble_gateway.links.shared import SharedLink, SharedMemory
from ensemble_gateway.links.zeromq import ZeroMQLink
from ensemble_gateway.pipeline import Pipeline
from ensemble_gateway.routes import make_app, make_runner
from ensemble_gateway.rowstore import RowStore

_LOG = logging.getLogger(__name__)

BACKLOG = 4096
SWEEP_S = 5.0
# Below the 30 s that Kubernetes gives a pod by default.
DRAIN_S = 25.0
# A body lies in memory beside the rows in the store, and its JSON beside that: larger requests go in parts.
MAX_BODY_BYTES = 64 << 20
# JSON and framing around the rows of the largest request that a small store can take.
BODY_MARGIN_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Options:
    """How a gateway is started. `admin` is `unix:PATH` or `tcp://HOST:PORT`."""

    host: str
    port: int
    admin: str
    plan: GatewayPlan
    keys: KeyFiles | None = None
    token: str = ""
    parent_pid: int = 0


class Gateway:
    """What is served now; a newer plan gets a pipeline of its own, and the former one ends with its last request."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._name = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._retiring: set[asyncio.Task[None]] = set()
        self.url = ""
        self._newest = options.plan
        self.pipeline = Pipeline(options.plan, self._make_link)
        self.pipeline.start()

    def _make_link(self, worker: WorkerAddress, memory: SharedMemory, store: RowStore, owner: LinkOwner) -> Link:
        scheme, _, path = worker.address.partition(":")
        if scheme == "unix":
            return SharedLink(worker.name, path, memory, store, self._name, owner)
        return ZeroMQLink(worker, store, self._name, owner, self._context, self._options.keys)

    def adopt(self, plan: GatewayPlan) -> bool:
        """Serve a newer plan; False if it is older than the one served, True also if it is the same.

        Requests go to the new pipeline as soon as it has a live instance of every member, until then to the former.
        """
        if plan.generation < self._newest.generation:
            return False
        if plan != self._newest:
            self._newest = plan
            task = asyncio.get_running_loop().create_task(self._change(plan))
            self._retiring.add(task)
            task.add_done_callback(self._retiring.discard)
        return True

    async def _change(self, plan: GatewayPlan) -> None:
        following = Pipeline(plan, self._make_link, self.pipeline.metrics)
        following.start()
        await _until(lambda: following.ready or self._newest is not plan, plan.timeout_s)
        if self._newest is not plan:
            following.close()
            return
        former, self.pipeline = self.pipeline, following
        await _until(lambda: former.idle)
        former.close()

    @property
    def retiring(self) -> int:
        """How many changes of plan are under way, or have requests of the former plan in flight."""
        return len(self._retiring)

    def drain(self) -> None:
        """Say that no new requests shall come."""
        self.pipeline.draining = True

    def close(self) -> None:
        """Leave the workers."""
        for task in self._retiring:
            task.cancel()
        self.pipeline.close()
        self._context.destroy(linger=0)


class Port:
    """The public port: the edge, and behind it the aiohttp application for what the edge does not answer itself."""

    def __init__(self, gateway: Gateway, max_body_bytes: int, limits: Limits | None = None) -> None:
        self.edge = Edge(lambda: gateway.pipeline, max_body_bytes, limits)
        app = make_app(lambda: gateway.pipeline, max_body_bytes=max_body_bytes)
        app.middlewares.insert(0, self.edge.announce)
        self._runner = make_runner(app, shutdown_timeout_s=0.1)
        self._server: asyncio.Server | None = None
        self._sweeper: asyncio.Task[None] | None = None

    async def open(self, host: str, port: int) -> str:
        """Accept clients; the URL. Raises OSError when the address cannot be bound."""
        await self._runner.setup()
        if self._runner.server is None:
            raise AssertionError("a runner that is set up has a server")
        self.edge.serve_others(self._runner.server)
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(self.edge.new_connection, host, port, backlog=BACKLOG)
        self._sweeper = loop.create_task(_sweep(self.edge))
        address, number = self._server.sockets[0].getsockname()[:2]
        return f"http://[{address}]:{number}" if ":" in address else f"http://{address}:{number}"

    async def drain(self, within_s: float) -> bool:
        """Accept no more clients and answer what was asked; False if connections had to be broken."""
        if self._server is not None:
            self._server.close()
        return await self.edge.drain(within_s)

    async def close(self) -> None:
        """Break what is left."""
        if self._server is not None:
            self._server.close()
        if self._sweeper is not None:
            self._sweeper.cancel()
        await self._runner.cleanup()


async def serve(options: Options) -> None:
    """Serve until SIGTERM or SIGINT, then answer what is in flight.

    Raises OSError when a port or socket cannot be bound.
    """
    die_with_parent(options.parent_pid)
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    gateway = Gateway(options)
    port = Port(gateway, min(options.plan.max_queue_bytes, MAX_BODY_BYTES) + BODY_MARGIN_BYTES)
    admin = web.AppRunner(make_admin(gateway, options.token), access_log=None)
    await admin.setup()
    try:
        gateway.url = await port.open(options.host, options.port)
        await _site(admin, options.admin).start()
        _LOG.info("serving %s at %s", options.plan.ensemble, gateway.url)
        await stop.wait()
        gateway.drain()
        if not await port.drain(DRAIN_S):
            _LOG.warning("requests were still in flight after %.0f s", DRAIN_S)
    finally:
        await port.close()
        gateway.close()
        await admin.cleanup()


async def _until(condition: Callable[[], bool], within_s: float = math.inf) -> None:
    """Wait until `condition` holds, or the time is over. What it asks changes in many places, and rarely."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + within_s
    while not condition() and loop.time() < deadline:  # noqa: ASYNC110  # no single event to wait for
        await asyncio.sleep(0.02)


async def _sweep(edge: Edge) -> None:
    while True:
        await asyncio.sleep(min(SWEEP_S, edge.limits.linger_s))
        edge.sweep(asyncio.get_running_loop().time())


def _site(runner: web.AppRunner, address: str) -> web.BaseSite:
    scheme, _, rest = address.partition(":")
    if scheme == "unix":
        Path(rest).unlink(missing_ok=True)
        return web.UnixSite(runner, rest)
    host, _, port = rest.removeprefix("//").rpartition(":")
    return web.TCPSite(runner, host, int(port))
