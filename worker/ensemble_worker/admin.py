"""The worker's admin API: plans, figures, measuring. For the operator or the local runner, never for clients."""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

import msgspec
from aiohttp import web

from ensemble_contract.errors import ContractError, InvalidPlan
from ensemble_contract.libraries import libraries_text
from ensemble_contract.plan import WorkerPlan, decode_plan
from ensemble_worker.devices import Device
from ensemble_worker.errors import PlanRefused
from ensemble_worker.exposition import Figures, exposition
from ensemble_worker.profile_job import ProfileJob, ProfileOrder

STUCK_S = 120.0
# Asked with this, health includes that a worker which replaces another has loaded what that one had.
LOADED = "loaded"


class Managed(Protocol):
    """What the admin API needs of the worker."""

    device: Device
    overhead_bytes: int
    profiling: ProfileJob

    @property
    def generation(self) -> int:
        """The plan's generation; 0 without a plan."""

    @property
    def has_loaded(self) -> bool:
        """Whether the plan that it started with is loaded, as far as it can be; from then on it stays so."""

    @property
    def token(self) -> str:
        """What requests must carry now; empty if anyone may ask."""

    def adopt(self, plan: WorkerPlan) -> None:
        """Run a plan. Raises InvalidPlan if it is another worker's, PlanRefused."""

    def instance_states(self) -> list[dict[str, Any]]:
        """Every instance of the plan with its state, as JSON."""

    def busy_s(self) -> float:
        """For how long the batch that runs now has been running."""

    def figures(self) -> Figures:
        """What /metrics shows."""


def make_admin(worker: Managed) -> web.Application:
    """The admin application; while there is a token, every request but the health must carry it."""
    app = web.Application(client_max_size=1 << 20, middlewares=[_require(worker)])
    app.add_routes([*_plan_routes(worker), *_profile_routes(worker)])
    return app


def _plan_routes(worker: Managed) -> list[web.RouteDef]:
    async def get_health(request: web.Request) -> web.Response:
        busy_s = worker.busy_s()
        if busy_s > STUCK_S:
            return _json({"status": "stuck", "error": f"one batch has been running for {busy_s:.0f} s"}, 503)
        if LOADED in request.query and not worker.has_loaded:
            return _json({"status": "loading", "error": "the plan that it started with is not loaded yet"}, 503)
        return _json({"status": "ok"})

    async def get_device(_request: web.Request) -> web.Response:
        shown = {
            "overheadBytes": worker.overhead_bytes,
            "threads": worker.device.threads,
            "libraries": libraries_text(),
        }
        return _json({**worker.device.as_json(), **shown, "error": worker.device.error or None})

    async def get_plan(_request: web.Request) -> web.Response:
        return _json({"generation": worker.generation, "instances": worker.instance_states()})

    async def put_plan(request: web.Request) -> web.Response:
        try:
            plan = decode_plan(await request.read(), WorkerPlan)
            worker.adopt(plan)
        except InvalidPlan as error:
            return _json({"error": str(error)}, 400)
        except PlanRefused as error:
            return _json({"error": str(error)}, 409)
        return _json({"generation": plan.generation}, 202)

    async def get_metrics(_request: web.Request) -> web.Response:
        return web.Response(text=exposition(worker.figures()))

    return [
        web.get("/v1/health", get_health),
        web.get("/v1/device", get_device),
        web.get("/v1/plan", get_plan),
        web.put("/v1/plan", put_plan),
        web.get("/metrics", get_metrics),
    ]


def _profile_routes(worker: Managed) -> list[web.RouteDef]:
    job = worker.profiling

    async def get_profile(_request: web.Request) -> web.Response:
        return _json(job.as_json())

    async def put_profile(request: web.Request) -> web.Response:
        if worker.device.error:
            return _json({"error": worker.device.error}, 409)
        try:
            order = msgspec.json.decode(await request.read(), type=ProfileOrder)
        except (msgspec.DecodeError, ContractError, ValueError, RecursionError) as error:
            return _json({"error": str(error)}, 400)
        await job.start(order)
        return _json(job.as_json(), 202)

    async def delete_profile(_request: web.Request) -> web.Response:
        await job.end()
        return _json(job.as_json())

    return [
        web.get("/v1/profile", get_profile),
        web.put("/v1/profile", put_profile),
        web.delete("/v1/profile", delete_profile),
    ]


def _require(worker: Managed) -> Any:
    @web.middleware
    async def check(
        request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        token = worker.token
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
