"""The gateway process: one event loop with the public port, the admin API and the gateway behind them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from dataclasses import dataclass
from pathlib import Path

from aiohttp import web

from ensemble_contract import planfile
from ensemble_contract.keys import Credentials
from ensemble_contract.orphan import die_with_parent
from ensemble_contract.plan import GatewayPlan
from ensemble_gateway.admin import make_admin
from ensemble_gateway.admission import Limits, body_limit
from ensemble_gateway.edge import Edge
from ensemble_gateway.folders import KeysFolder, Token, follow_folders
from ensemble_gateway.gateway import Gateway
from ensemble_gateway.routes import make_app, make_runner

_LOG = logging.getLogger(__name__)

BACKLOG = 4096
SWEEP_S = 5.0
# Below the 30 s that Kubernetes gives a pod by default.
DRAIN_S = 25.0
# In the folder of state: the newest plan taken.
KEPT_FILE = "gateway-plan.json"


@dataclass(frozen=True, slots=True)
class Options:
    """How a gateway is started. `admin` is `unix:PATH` or `tcp://HOST:PORT`.

    The newest plan of `plan`, `mirror` and `state_dir` is served first; without any, the first that comes. `token` is
    that of the admin API where the folder of `keys` has none.
    """

    host: str
    port: int
    admin: str
    plan: GatewayPlan | None = None
    mirror: Path | None = None
    state_dir: Path | None = None
    keys: KeysFolder | None = None
    token: str = ""
    drain_delay_s: float = 0.0
    parent_pid: int = 0


class Port:
    """The public port: the edge, and behind it the aiohttp application for what the edge does not answer itself.

    Bodies are limited as the plan allows, or to `max_body_bytes`.
    """

    def __init__(self, gateway: Gateway, max_body_bytes: int | None = None, limits: Limits | None = None) -> None:
        def most() -> int:
            pipeline = gateway.pipeline_or_none
            return max_body_bytes or body_limit(pipeline.plan if pipeline else None)

        self.edge = Edge(lambda: gateway.pipeline, most, limits)
        app = make_app(lambda: gateway.pipeline, max_body_bytes=most)
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
    first = options.keys.first if options.keys else Credentials()
    token = Token(options.token, first.token)
    mirror = planfile.Mirror(options.mirror, lambda plan: plan.gateway) if options.mirror else None
    kept = options.state_dir / KEPT_FILE if options.state_dir else None
    gateway = Gateway(first.keys, lambda plan: planfile.keep(plan, kept) if kept else None)
    port = Port(gateway)
    admin = web.AppRunner(make_admin(gateway, token), access_log=None)
    await admin.setup()
    following = None
    try:
        gateway.url = await port.open(options.host, options.port)
        await _site(admin, options.admin).start()
        stored = planfile.read_kept(kept, GatewayPlan) if kept else None
        plan = planfile.newest([mirror.look() if mirror else None, options.plan, stored])
        if plan is not None:
            gateway.adopt(plan)
        _LOG.info("serving %s at %s", plan.ensemble if plan else "as soon as a plan comes,", gateway.url)
        if mirror or options.keys:
            following = loop.create_task(follow_folders(gateway, token, mirror, options.keys))
        await stop.wait()
        gateway.drain()
        await asyncio.sleep(options.drain_delay_s)
        if not await port.drain(DRAIN_S):
            _LOG.warning("requests were still in flight after %.0f s", DRAIN_S)
    finally:
        if following is not None:
            following.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await following
        await port.close()
        gateway.close()
        await admin.cleanup()


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
    return web.TCPSite(runner, host.strip("[]"), int(port))
