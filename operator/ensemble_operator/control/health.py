"""The operator's two ports: health for the kubelet, metrics for Prometheus."""

from __future__ import annotations

import os
from collections.abc import Callable

from aiohttp import web
from aiohttp.typedefs import Handler

from ensemble_operator.addresses import AddressUnavailable

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
Problems = Callable[[], list[str]]


class Doors:
    """Serves /healthz and /readyz on one port and /metrics on the other; 503 comes with the problems, a line each."""

    def __init__(self, sick: Problems, unready: Problems, exposition: Callable[[], str]) -> None:
        self._sick, self._unready, self._exposition = sick, unready, exposition
        self._runners: list[web.AppRunner] = []

    async def open(self, host: str | None, health_port: int, metrics_port: int) -> tuple[int, int]:
        """Listen; `host` None is every address, and port 0 any free one. The two ports.

        Raises AddressUnavailable.
        """
        health = {"/healthz": self._answer(self._sick), "/readyz": self._answer(self._unready)}
        return (
            await self._listen(host, health_port, health, "ENSEMBLE_OPERATOR_HEALTH_PORT"),
            await self._listen(host, metrics_port, {"/metrics": self._metrics}, "ENSEMBLE_OPERATOR_METRICS_PORT"),
        )

    async def close(self) -> None:
        """Stop listening."""
        for runner in self._runners:
            await runner.cleanup()

    async def _listen(self, host: str | None, port: int, routes: dict[str, Handler], setting: str) -> int:
        app = web.Application()
        app.add_routes([web.get(path, handler) for path, handler in routes.items()])
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
        await runner.setup()
        self._runners.append(runner)
        try:
            await web.TCPSite(runner, host, port).start()
        except OSError as error:
            raise AddressUnavailable(
                f"port {port}: {os.strerror(error.errno or 0)}: choose another with {setting}"
            ) from error
        return int(runner.addresses[0][1])

    def _answer(self, problems: Problems) -> Handler:
        async def handle(_: web.Request) -> web.Response:
            found = problems()
            return web.Response(text="\n".join(found or ["ok"]) + "\n", status=503 if found else 200)

        return handle

    async def _metrics(self, _: web.Request) -> web.Response:
        return web.Response(body=self._exposition().encode(), headers={"Content-Type": METRICS_TYPE})
