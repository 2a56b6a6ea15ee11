"""The worker's admin API: take a plan, tell what runs. For the operator or the local runner, never for clients."""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

import msgspec
from aiohttp import web

from ensemble_contract.errors import InvalidPlan
from ensemble_contract.plan import WorkerPlan, decode_plan
from ensemble_worker.devices import Device
from ensemble_worker.exposition import exposition
from ensemble_worker.loop import Running

STUCK_S = 120.0


class Managed(Protocol):
    """What the admin API needs of the worker."""

    device: Device
    overhead_bytes: int

    @property
    def generation(self) -> int:
        """The plan's generation; 0 without a plan."""

    def adopt(self, plan: WorkerPlan) -> bool:
        """Run a newer plan; False if it is older than the present one."""

    def instance_states(self) -> list[dict[str, Any]]:
        """Every instance of the plan with its state, as JSON."""

    def running(self) -> list[Running]:
        """The instances that accept batches."""

    def busy_s(self) -> float:
        """For how long the batch that runs now has been running."""


def make_admin(worker: Managed, token: str = "") -> web.Application:
    """The admin application; with a token, every request but the health must carry it (`Authorization: Bearer …`)."""

    async def get_health(_request: web.Request) -> web.Response:
        busy_s = worker.busy_s()
        if busy_s > STUCK_S:
            return _json({"status": "stuck", "error": f"one batch has been running for {busy_s:.0f} s"}, 503)
        return _json({"status": "ok"})

    async def get_device(_request: web.Request) -> web.Response:
        return _json({**worker.device.as_json(), "overheadBytes": worker.overhead_bytes})

    async def get_plan(_request: web.Request) -> web.Response:
        return _json({"generation": worker.generation, "instances": worker.instance_states()})

    async def put_plan(request: web.Request) -> web.Response:
        try:
            plan = decode_plan(await request.read(), WorkerPlan)
        except InvalidPlan as error:
            return _json({"error": str(error)}, 400)
        if not worker.adopt(plan):
            return _json({"error": f"generation {plan.generation} is older than {worker.generation}"}, 409)
        return _json({"generation": plan.generation}, 202)

    async def get_metrics(_request: web.Request) -> web.Response:
        return web.Response(text=exposition(worker.device, worker.running(), worker.instance_states()))

    app = web.Application(client_max_size=1 << 20, middlewares=[_require(token)])
    app.add_routes(
        [
            web.get("/v1/health", get_health),
            web.get("/v1/device", get_device),
            web.get("/v1/plan", get_plan),
            web.put("/v1/plan", put_plan),
            web.get("/metrics", get_metrics),
        ]
    )
    return app


def _require(token: str) -> Any:
    @web.middleware
    async def check(
        request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        given = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if (
            token
            and request.path != "/v1/health"
            and not hmac.compare_digest(given.encode(errors="surrogateescape"), token.encode())
        ):
            return _json({"error": "this API wants the admin token: Authorization: Bearer TOKEN"}, 401)
        return await handler(request)

    return check


def _json(content: object, status: int = 200) -> web.Response:
    return web.Response(body=msgspec.json.encode(content), status=status, content_type="application/json")
