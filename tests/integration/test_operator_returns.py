"""A worker that is away for a moment: no other plan is made meanwhile, and no second one may be taken away before."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from tests.support.control_plane import ControlPlane, Refused
from tests.support.kube_client import Manifest, is_ready, path_of
from tests.support.models import export_mlp
from tests.support.operating import READY_S, Operating, member, operating, resource
from tests.support.steady_asking import asking

ROW = [0.5] * 64
NAMES = ("tiny-worker-0", "tiny-worker-1")
TOO_MANY_REQUESTS = 429

pytestmark = pytest.mark.timeout(400)


@contextlib.asynccontextmanager
async def matrices(world: Operating) -> AsyncIterator[list[dict[str, Any]]]:
    """The rows of every matrix that is planned from now on, the present one first."""
    found: list[dict[str, Any]] = []

    async def follow() -> None:
        name = "metadata.name=tiny-plan"
        async for event, document in world.kube.watch("ConfigMap", world.namespace, fieldSelector=name):
            documents = document["items"] if event == "LISTED" else [document]
            found.extend(json.loads(one["data"]["target.json"])["rows"] for one in documents)

    following = asyncio.create_task(follow())
    try:
        async with asyncio.timeout(READY_S):
            while not found:
                await asyncio.sleep(0.05)
        yield found
        assert not following.done(), following
    finally:
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)


async def uid_of(world: Operating, name: str) -> str:
    pod = await world.kube.get("Pod", world.namespace, name)
    return str(pod["metadata"]["uid"]) if pod is not None else ""


async def until_back(world: Operating, name: str, former: str) -> None:
    """Wait until a pod is another one, is Ready, and everything is as wanted."""

    def is_back(pod: Manifest | None) -> bool:
        return pod is not None and pod["metadata"]["uid"] != former and is_ready(pod)

    await world.kube.wait_for("Pod", world.namespace, name, is_back, READY_S)
    await world.until("tiny", lambda status: status["devices"]["summary"] == "2/2")
    await world.until_ready("tiny")


async def test_a_pod_that_is_made_again_changes_no_plan(
    control_plane: ControlPlane, namespace: str, tmp_path: Path
) -> None:
    """Deleted, and killed: the others answer meanwhile, and it gets its part again."""
    members = [member(name, export_mlp(tmp_path / f"{name}.pt2", seed=seed)) for seed, name in enumerate("ab")]
    async with operating(control_plane, namespace) as world:
        await world.apply(resource("tiny", members))
        await world.until_ready("tiny")
        await world.until_told("tiny", "PlanChanged")
        before = await uid_of(world, NAMES[0])
        async with matrices(world) as planned, asking(world, "tiny", ROW) as answers:
            await world.kube.delete("Pod", namespace, NAMES[0])
            await until_back(world, NAMES[0], before)
            process = world.kubelet.pods[NAMES[1]]
            restarts = process.restarts
            process.kill()
            async with asyncio.timeout(READY_S):
                while process.restarts == restarts or not process.status()["containerStatuses"][0]["ready"]:
                    await asyncio.sleep(0.05)
            await world.until("tiny", lambda status: status["devices"]["summary"] == "2/2")
            await world.until_ready("tiny")
        assert answers.failed == []
        assert answers.count > 0
        assert all(sorted(rows) == list(NAMES) and all(rows.values()) for rows in planned), planned
        reasons = [reason for reason, _ in await world.events("tiny")]
        assert reasons.count("PlanChanged") == 1, reasons


class Models:
    """Serves model files over HTTP; while `closed`, whoever asks waits."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._open = asyncio.Event()
        self._open.set()
        self.waiting = 0

    def close(self) -> None:
        self._open.clear()

    def open(self) -> None:
        self._open.set()

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self.waiting += 1
        await self._open.wait()
        return web.FileResponse(self._folder / request.match_info["name"])


@contextlib.asynccontextmanager
async def served(models: Models) -> AsyncIterator[str]:
    """Their URL."""
    application = web.Application()
    application.add_routes([web.get("/{name}", models.answer)])
    runner = web.AppRunner(application, access_log=None)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        models.open()
        await runner.cleanup()


async def evict(world: Operating, name: str) -> bool:
    """As `kubectl drain` does; False if the PodDisruptionBudget forbids it."""
    eviction = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": name, "namespace": world.namespace}}
    try:
        await world.kube.ask("POST", path_of("Pod", world.namespace, name, "eviction"), eviction)
    except Refused as refused:
        if refused.status != TOO_MANY_REQUESTS:
            raise
        return False
    return True


async def until_evicted(world: Operating, name: str) -> None:
    async with asyncio.timeout(READY_S):
        while not await evict(world, name):
            await asyncio.sleep(0.2)


async def test_a_drain_goes_on_when_the_first_worker_has_its_members_again(
    control_plane: ControlPlane, namespace: str, tmp_path: Path
) -> None:
    """While the new pod still loads, the other one must stay: nobody else would answer."""
    for seed, name in enumerate("ab"):
        export_mlp(tmp_path / f"{name}.pt2", seed=seed)
    models = Models(tmp_path)
    async with served(models) as url, operating(control_plane, namespace) as world:
        members = [{**member(n, tmp_path / n), "model": {"uri": f"{url}/{n}.pt2"}} for n in "ab"]
        await world.apply(resource("tiny", members))
        await world.until_ready("tiny")
        before = await uid_of(world, NAMES[0])
        async with asking(world, "tiny", ROW) as answers:
            models.close()
            fetched = models.waiting
            await until_evicted(world, NAMES[0])
            async with asyncio.timeout(READY_S):
                while models.waiting == fetched:
                    await asyncio.sleep(0.05)
            # It answers by now, and its startup probe has succeeded or soon will.
            async with asyncio.timeout(READY_S):
                while not world.kubelet.pods[NAMES[0]].status()["containerStatuses"][0]["started"]:
                    await asyncio.sleep(0.05)
            for _ in range(5):
                assert not await evict(world, NAMES[1])
                await asyncio.sleep(0.3)
            assert not is_ready(await world.kube.get("Pod", namespace, NAMES[0]))
            models.open()
            await until_back(world, NAMES[0], before)
            await until_evicted(world, NAMES[1])
        assert answers.failed == []
        assert answers.count > 0
