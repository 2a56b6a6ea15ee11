"""Answers the admin protocol of all workers and gateways of a cluster whose pods do not run.

An operator with the setting `admin_url` at `http://HOST:PORT/{namespace}/{component}/{pod}` finds them here: a worker
owns an idle GPU and has each instance of its plan ready at once; a gateway sees what these workers have. Nothing is
measured here: ensembles must declare their profiles, and members are said to share a GPU perfectly.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections import Counter
from collections.abc import Awaitable, Callable

import msgspec
from aiohttp import web

from ensemble_contract.orphan import die_with_parent
from ensemble_contract.plan import GatewayPlan, WorkerPlan, decode_plan, source_of
from ensemble_operator.fleet import (
    ColocationResult,
    DeviceReport,
    GatewayState,
    InstanceReport,
    MemberState,
    ProfileJob,
    ProfileReport,
    WorkerReport,
    WorkerState,
)

DEVICE = DeviceReport(
    name="cuda-0",
    kind="cuda",
    device_class="NVIDIA-H100-80GB-HBM3",
    capacity_bytes=80 << 30,
    overhead_bytes=1 << 30,
)
INSTANCE_BYTES = 1 << 30
ADMIN_PATH = "/{namespace}/{component}/{pod}"
PodKey = tuple[str, str]


class PretendFleet:
    """What every worker and gateway was told last, by namespace and pod."""

    def __init__(self) -> None:
        self.requests: Counter[str] = Counter()
        self._workers: dict[PodKey, WorkerReport] = {}
        self._profiles: dict[PodKey, ProfileReport] = {}
        self._gateways: dict[PodKey, GatewayPlan] = {}

    def application(self) -> web.Application:
        """Its admin APIs."""
        worker, gateway = "/{namespace}/worker/{pod}/v1", "/{namespace}/gateway/{pod}/v1"
        application = web.Application(client_max_size=1 << 20)
        application.add_routes(
            [
                web.get(f"{worker}/device", self._counted(self._device)),
                web.get(f"{worker}/plan", self._counted(self._worker_report)),
                web.put(f"{worker}/plan", self._counted(self._take_worker_plan)),
                web.get(f"{worker}/profile", self._counted(self._profile)),
                web.put(f"{worker}/profile", self._counted(self._measure)),
                web.get(f"{gateway}/state", self._counted(self._gateway_state)),
                web.put(f"{gateway}/plan", self._counted(self._take_gateway_plan)),
                web.get("/requests", self._request_counts),
            ]
        )
        return application

    def _counted(
        self, answer: Callable[[web.Request], Awaitable[web.Response]]
    ) -> Callable[..., Awaitable[web.Response]]:
        async def handle(request: web.Request) -> web.Response:
            self.requests[f"{request.method} {request.path.rsplit('/', 1)[1]}"] += 1
            if not request.headers.get("Authorization", "").startswith("Bearer "):
                raise web.HTTPUnauthorized
            return await answer(request)

        return handle

    async def _device(self, _: web.Request) -> web.Response:
        return _json(DEVICE)

    async def _worker_report(self, request: web.Request) -> web.Response:
        return _json(self._workers.get(_pod(request), WorkerReport(0)))

    async def _take_worker_plan(self, request: web.Request) -> web.Response:
        plan = decode_plan(await request.read(), WorkerPlan)
        _refuse_older(plan.generation, self._workers.get(_pod(request), WorkerReport(0)).generation)
        self._workers[_pod(request)] = WorkerReport(
            plan.generation,
            tuple(
                InstanceReport(
                    i.member, source_of(plan.members, i).digest, i.batch_size, "ready", memory_bytes=INSTANCE_BYTES
                )
                for i in plan.instances
            ),
        )
        return web.Response(status=202)

    async def _profile(self, request: web.Request) -> web.Response:
        return _json(self._profiles.get(_pod(request), ProfileReport()))

    async def _measure(self, request: web.Request) -> web.Response:
        job = msgspec.json.decode(await request.read(), type=ProfileJob)
        shared = ColocationResult(factor=1.0, finished=True) if job.colocation is not None else None
        self._profiles[_pod(request)] = ProfileReport(job.id, "done", colocation=shared)
        return web.Response(status=202)

    async def _gateway_state(self, request: web.Request) -> web.Response:
        plan = self._gateways.get(_pod(request))
        if plan is None:
            return _json(GatewayState(generation=0, ready=False, url=""))
        namespace = request.match_info["namespace"]
        reports = [self._workers.get((namespace, worker.name), WorkerReport(0)) for worker in plan.workers]
        ready = Counter((i.member, i.digest) for report in reports for i in report.instances)
        members = tuple(
            MemberState(m.name, ready[m.name, m.digest] > 0, ready[m.name, m.digest], m.digest) for m in plan.members
        )
        workers = tuple(WorkerState(worker.name, connected=True) for worker in plan.workers)
        live = all(member.live for member in members)
        return _json(GatewayState(plan.generation, live, "http://pretended", members, workers, newest=plan.generation))

    async def _take_gateway_plan(self, request: web.Request) -> web.Response:
        plan = decode_plan(await request.read(), GatewayPlan)
        known = self._gateways.get(_pod(request))
        _refuse_older(plan.generation, known.generation if known is not None else 0)
        self._gateways[_pod(request)] = plan
        return web.Response(status=202)

    async def _request_counts(self, _: web.Request) -> web.Response:
        return _json(dict(self.requests))


async def serve() -> None:
    """Listen on a free port of 127.0.0.1, say which in one line, and answer until killed."""
    runner = web.AppRunner(PretendFleet().application(), access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    print(runner.addresses[0][1], flush=True)
    await asyncio.Event().wait()


def _pod(request: web.Request) -> PodKey:
    return request.match_info["namespace"], request.match_info["pod"]


def _refuse_older(generation: int, known: int) -> None:
    if generation < known:
        raise web.HTTPConflict(text=f"generation {known} is known")


def _json(answer: object) -> web.Response:
    return web.Response(body=msgspec.json.encode(answer), content_type="application/json")


def main(arguments: list[str]) -> int:
    """`python -m benchmarks.pretend_fleet PARENT`: ends with the process PARENT."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parent", type=int)
    die_with_parent(parser.parse_args(arguments).parent)
    asyncio.run(serve())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
