"""The gateway process: one event loop with the public port, the admin API and the pipeline of the current plan."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import uuid
from dataclasses import dataclass
from pathlib import Path

import zmq
from aiohttp import web
from ensemble_contract.keys import KeyFiles
from ensemble_contract.orphan import die_with_parent
from ensemble_contract.plan import GatewayPlan, WorkerAddress

from ensemble_gateway.admin import make_admin
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
DRAIN_S = 30.0
# JSON and framing around the rows of the largest request that a store can take.
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
        if plan.generation < self.pipeline.plan.generation:
            return False
        if plan != self.pipeline.plan:
            task = asyncio.get_running_loop().create_task(self._change(plan))
            self._retiring.add(task)
            task.add_done_callback(self._retiring.discard)
        return True

    async def _change(self, plan: GatewayPlan) -> None:
        following = Pipeline(plan, self._make_link, self.pipeline.metrics)
        following.start()
        deadline = asyncio.get_running_loop().time() + plan.timeout_s
        while not following.ready and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.02)
        if self.pipeline.plan.generation > plan.generation:
            following.close()
            return
        former, self.pipeline = self.pipeline, following
        while not former.idle:
            await asyncio.sleep(0.02)
        former.close()

    def drain(self) -> None:
        """Say that no new requests shall come."""
        self.pipeline.draining = True

    async def idle(self, within_s: float) -> bool:
        """Wait until no request is in flight; False if that takes too long."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                while not self.pipeline.idle:
                    await asyncio.sleep(0.01)
        return self.pipeline.idle

    def close(self) -> None:
        """Leave the workers."""
        for task in self._retiring:
            task.cancel()
        self.pipeline.close()
        self._context.destroy(linger=0)


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
    max_body_bytes = options.plan.max_queue_bytes + BODY_MARGIN_BYTES
    edge = Edge(lambda: gateway.pipeline, max_body_bytes)
    app = make_app(lambda: gateway.pipeline, max_body_bytes=max_body_bytes)
    app.middlewares.insert(0, edge.announce)
    runner = make_runner(app, shutdown_timeout_s=DRAIN_S)
    await runner.setup()
    if runner.server is None:
        raise AssertionError("a runner that is set up has a server")
    edge.serve_others(runner.server)
    admin = web.AppRunner(make_admin(gateway, options.token), access_log=None)
    await admin.setup()
    try:
        server = await loop.create_server(edge.new_connection, options.host, options.port, backlog=BACKLOG)
        host, port = server.sockets[0].getsockname()[:2]
        gateway.url = f"http://{host}:{port}"
        await _site(admin, options.admin).start()
        sweeper = loop.create_task(_sweep(edge))
        _LOG.info("serving %s at %s", options.plan.ensemble, gateway.url)
        await stop.wait()
        gateway.drain()
        server.close()
        edge.drain()
        if not await gateway.idle(DRAIN_S):
            _LOG.warning("requests were still in flight after %.0f s", DRAIN_S)
        sweeper.cancel()
    finally:
        gateway.close()
        await admin.cleanup()
        await runner.cleanup()


async def _sweep(edge: Edge) -> None:
    while True:
        await asyncio.sleep(SWEEP_S)
        edge.sweep(asyncio.get_running_loop().time())


def _site(runner: web.AppRunner, address: str) -> web.BaseSite:
    scheme, _, rest = address.partition(":")
    if scheme == "unix":
        Path(rest).unlink(missing_ok=True)
        return web.UnixSite(runner, rest)
    host, _, port = rest.removeprefix("//").rpartition(":")
    return web.TCPSite(runner, host, int(port))
