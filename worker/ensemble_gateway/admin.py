"""The gateway's admin API: take a plan, tell the state. For the operator or the local runner, never for clients."""

from __future__ import annotations

import hmac
from typing import Any, Protocol

import msgspec
from aiohttp import web

from ensemble_contract.errors import InvalidPlan
from ensemble_contract.plan import GatewayPlan, decode_plan, encode_plan
from ensemble_gateway.pipeline import Pipeline


class Served(Protocol):
    """What the admin API needs of the gateway."""

    @property
    def pipeline(self) -> Pipeline:
        """What serves now."""

    @property
    def url(self) -> str:
        """Where clients reach it."""

    def adopt(self, plan: GatewayPlan) -> bool:
        """Serve a newer plan; False if it is older than the one served."""


def make_admin(gateway: Served, token: str = "") -> web.Application:
    """The admin application; with a token, every request must carry it (`Authorization: Bearer …`)."""

    async def get_plan(_request: web.Request) -> web.Response:
        return web.Response(body=encode_plan(gateway.pipeline.plan), content_type="application/json")

    async def put_plan(request: web.Request) -> web.Response:
        try:
            plan = decode_plan(await request.read(), GatewayPlan)
        except InvalidPlan as error:
            return _json({"error": str(error)}, 400)
        served = gateway.pipeline.plan.generation
        if not gateway.adopt(plan):
            return _json({"error": f"generation {plan.generation} is older than {served}"}, 409)
        return _json({"generation": plan.generation}, 202)

    async def get_state(_request: web.Request) -> web.Response:
        return _json(state_of(gateway))

    async def get_health(_request: web.Request) -> web.Response:
        return _json({"status": "ok"})

    app = web.Application(client_max_size=1 << 20, middlewares=[require(token)])
    app.add_routes(
        [
            web.get("/v1/health", get_health),
            web.get("/v1/plan", get_plan),
            web.put("/v1/plan", put_plan),
            web.get("/v1/state", get_state),
        ]
    )
    return app


def require(token: str) -> Any:
    """A middleware that lets only requests with this token pass; every request, if it is empty."""

    @web.middleware
    async def check(request: web.Request, handler: Any) -> web.StreamResponse:
        given = request.headers.get("Authorization", "").removeprefix("Bearer ").encode(errors="surrogateescape")
        if token and not hmac.compare_digest(given, token.encode()):
            return _json({"error": "this API wants the admin token: Authorization: Bearer TOKEN"}, 401)
        response: web.StreamResponse = await handler(request)
        return response

    return check


def state_of(gateway: Served) -> dict[str, Any]:
    """What the gateway serves, from where, and how much, as JSON."""
    pipeline = gateway.pipeline
    dispatcher, store, counters = pipeline.dispatcher, pipeline.store, pipeline.metrics.models[0]
    names = [member.name for member in pipeline.plan.members]
    live = list(dispatcher.instances())
    return {
        "generation": pipeline.plan.generation,
        "ready": pipeline.ready,
        "url": gateway.url,
        "members": [
            {
                "name": name,
                "live": dispatcher.alive(index),
                "instances": sum(1 for _, instance in live if instance.member == index),
                "waitingRows": dispatcher.waiting_rows(index),
                "rows": pipeline.metrics.models[index + 1].rows,
            }
            for index, name in enumerate(names)
        ],
        "workers": [
            {
                "name": link.worker,
                "connected": link.connected,
                "inFlight": dispatcher.in_flight(link.worker),
                "instances": [
                    {"member": names[i.member], "batchSize": i.batch_size}
                    for worker, i in live
                    if worker == link.worker
                ],
            }
            for link in pipeline.links.values()
        ],
        "rows": counters.rows,
        "requests": counters.requests,
        "failures": {str(reason): times for reason, times in counters.failures.items()},
        "requestSeconds": counters.success_s,
        "storeBytes": store.used_rows * store.bytes_per_row,
        "storeCapacityBytes": store.layout.slots * store.bytes_per_row,
    }


def _json(content: object, status: int = 200) -> web.Response:
    return web.Response(body=msgspec.json.encode(content), status=status, content_type="application/json")
