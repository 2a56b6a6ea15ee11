"""The gateway's admin API: take a plan, tell the state. For the operator or the local runner, never for clients."""

from __future__ import annotations

import hmac
from collections.abc import Callable
from typing import Any

import msgspec
from aiohttp import web

from ensemble_contract.errors import InvalidPlan
from ensemble_contract.plan import MAX_PLAN_BYTES, GatewayPlan, decode_plan, encode_plan
from ensemble_gateway.gateway import Gateway, StalePlan
from ensemble_gateway.pipeline import Pipeline

# What a kubelet asks, without a token.
OPEN_PATHS = frozenset({"/v1/health", "/v1/ready"})


def make_admin(gateway: Gateway, token: Callable[[], str]) -> web.Application:
    """The admin application; while `token` says one, requests must carry it (`Authorization: Bearer …`)."""

    async def get_plan(_request: web.Request) -> web.Response:
        pipeline = gateway.pipeline_or_none
        if pipeline is None:
            return _json({"error": "this gateway has no plan yet"}, 404)
        return web.Response(body=encode_plan(pipeline.plan), content_type="application/json")

    async def put_plan(request: web.Request) -> web.Response:
        try:
            plan = decode_plan(await request.read(), GatewayPlan)
            gateway.adopt(plan)
        except InvalidPlan as error:
            return _json({"error": str(error)}, 400)
        except StalePlan as error:
            return _json({"error": str(error)}, 409)
        return _json({"generation": plan.generation}, 202)

    async def get_state(_request: web.Request) -> web.Response:
        return _json(state_of(gateway))

    async def get_health(_request: web.Request) -> web.Response:
        return _json({"status": "ok"})

    async def get_ready(_request: web.Request) -> web.Response:
        if gateway.ready:
            return _json({"status": "ready"})
        return _json({"status": "not ready", "error": "too few members have been live yet, or it is draining"}, 503)

    app = web.Application(client_max_size=MAX_PLAN_BYTES + 1024, middlewares=[require(token)])
    app.add_routes(
        [
            web.get("/v1/health", get_health),
            web.get("/v1/ready", get_ready),
            web.get("/v1/plan", get_plan),
            web.put("/v1/plan", put_plan),
            web.get("/v1/state", get_state),
        ]
    )
    return app


def require(token: Callable[[], str]) -> Any:
    """A middleware that lets requests pass that have this token, or a kubelet's; all of them, while it is empty."""

    @web.middleware
    async def check(request: web.Request, handler: Any) -> web.StreamResponse:
        given = request.headers.get("Authorization", "").removeprefix("Bearer ").encode(errors="surrogateescape")
        wanted = token()
        if wanted and request.path not in OPEN_PATHS and not hmac.compare_digest(given, wanted.encode()):
            return _json({"error": "this API wants the admin token: Authorization: Bearer TOKEN"}, 401)
        response: web.StreamResponse = await handler(request)
        return response

    return check


def state_of(gateway: Gateway) -> dict[str, Any]:
    """What the gateway serves, from where, and how much, as JSON.

    `generation` is the plan that is served, `newest` the newest adopted, `retiring` how many changes of plan are under
    way or have requests of the former plan in flight: a change is over when the two are equal and it is 0.
    """
    pipeline, newest = gateway.pipeline_or_none, gateway.newest
    state: dict[str, Any] = {
        "generation": pipeline.plan.generation if pipeline else 0,
        "newest": newest.generation if newest else 0,
        "retiring": gateway.retiring,
        "ready": gateway.ready,
        "url": gateway.url,
        "members": [],
        "memberDigests": {},
        "workers": [],
    }
    return state | _serving(pipeline) if pipeline else state


def _serving(pipeline: Pipeline) -> dict[str, Any]:
    engine, counters = pipeline.engine, pipeline.metrics.models[0]
    return {
        "members": _members(pipeline),
        "memberDigests": {member.name: member.digest for member in pipeline.plan.members},
        "workers": _workers(pipeline),
        "rows": counters.rows,
        "requests": counters.requests,
        "failures": {str(reason): times for reason, times in counters.failures.items()},
        "requestSeconds": counters.success_s,
        "durationBoundsS": counters.durations.bounds,
        "durationCounts": counters.durations.counts,
        "storeBytes": engine.used_bytes,
        "storeCapacityBytes": engine.store.allocator.capacity * engine.bytes_per_row,
    }


def _members(pipeline: Pipeline) -> list[dict[str, Any]]:
    dispatcher = pipeline.engine.dispatcher
    served = zip(pipeline.plan.members, pipeline.columns, pipeline.metrics.models[1:], strict=True)
    return [
        {
            "name": member.name,
            "digest": member.digest,
            "live": dispatcher.alive(column),
            "instances": dispatcher.hosts(column),
            "waitingRows": dispatcher.waiting_rows(column),
            "rows": counters.rows,
        }
        for member, column, counters in served
    ]


def _workers(pipeline: Pipeline) -> list[dict[str, Any]]:
    """Every worker with all that it reports live, of whatever version."""
    engine = pipeline.engine
    states = engine.dispatcher.states()
    return [
        {
            "name": link.worker,
            "address": engine.address_of(link.worker),
            "connected": link.connected,
            "inFlight": engine.dispatcher.in_flight(link.worker),
            "generation": states[link.worker].generation if link.worker in states else 0,
            "instances": [
                {"member": live.member, "digest": live.digest, "batchSize": live.batch_size}
                for live in (states[link.worker].instances if link.worker in states else ())
            ],
        }
        for link in engine.links.values()
    ]


def _json(content: object, status: int = 200) -> web.Response:
    return web.Response(body=msgspec.json.encode(content), status=status, content_type="application/json")
