"""The API server goes away in the middle of a rollout: serving goes on, and the end is as if it had not.

It is started in the test's own thread: a process that is started in another ends with that thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.support.control_plane import ControlPlane, Refused
from tests.support.kube_client import Manifest
from tests.support.models import export_mlp
from tests.support.operating import OWNED, Operating, member, operating, resource
from tests.support.steady_asking import asking

ROW = [0.5] * 64
# Keys are drawn anew each time, and the plan is compared by its parts.
KINDS = tuple(kind for kind in OWNED if kind not in ("Secret", "ConfigMap"))
# Longer than the lease, and than every time limit of one request.
AWAY_S = 60.0
RECOVERY_S = 120.0
# So long without another plan, and nothing is under way any more.
REST_S = 3.0

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture
def versions(tmp_path: Path) -> list[dict[str, Any]]:
    """Two resources: from the first to the second a member is replaced, one is added and the rule changes."""
    a, b, c, d = (member(name, export_mlp(tmp_path / f"{name}.pt2", seed=seed)) for seed, name in enumerate("abcd"))
    return [resource("tiny", [a, b]), resource("tiny", [a, c, d], combine={"rule": "median"})]


async def state_of(world: Operating) -> dict[str, Any]:
    """All that should be the same after every way to the same resource: what is wanted of each child, and the plan."""
    found: dict[str, Any] = {}
    for kind in KINDS:
        found[kind] = sorted((_wanted(kind, child) for child in await world.children(kind, "tiny")), key=str)
    plan = await world.plan("tiny")
    gateway = {key: part for key, part in plan["gateway"].items() if key not in ("generation", "workers")}
    workers = sorted(worker["name"] for worker in plan["gateway"]["workers"])
    found["plan"] = [gateway, workers, plan["sources"], plan["rows"]]
    status = await world.status("tiny")
    found["conditions"] = [(c["type"], c["status"], c["reason"]) for c in status["conditions"]]
    found["status"] = [status["phase"], status["replicas"], status["devices"], status["members"]]
    return found


def _wanted(kind: str, child: Manifest) -> Any:
    if kind == "Pod":
        return child["metadata"]["labels"]["app.kubernetes.io/component"]
    spec = {key: part for key, part in child.get("spec", {}).items() if not key.startswith("clusterIP")}
    return [child["metadata"]["name"], spec]


async def undisturbed(world: Operating, versions: list[dict[str, Any]]) -> dict[str, Any]:
    """The state after the same change without an outage; then all of it is deleted."""
    await world.apply(versions[0])
    await world.until_ready("tiny")
    await world.apply(versions[1])
    await world.until_ready("tiny")
    await until_at_rest(world)
    state = await state_of(world)
    await world.kube.delete("InferenceEnsemble", world.namespace, "tiny")
    for kind in ("Pod", "ConfigMap", "StatefulSet", "Deployment", "Secret"):
        await until_none(world, kind)
    return state


async def until_none(world: Operating, kind: str) -> None:
    async with asyncio.timeout(RECOVERY_S):
        while await world.children(kind, "tiny"):
            await asyncio.sleep(0.1)


async def until_rolling(world: Operating, first: int) -> None:
    """Wait until the change is under way: a plan beyond the first one is written."""
    async with asyncio.timeout(RECOVERY_S):
        while (await world.plan("tiny"))["gateway"]["generation"] <= first:
            await asyncio.sleep(0.01)


async def through(world: Operating, versions: list[dict[str, Any]], outage: Callable[[], Any]) -> None:
    """Make the change with an outage in the middle of it; the end must be as without, and no request may fail."""
    expected = await undisturbed(world, versions)
    await world.apply(versions[0])
    await world.until_ready("tiny")
    first = (await world.plan("tiny"))["gateway"]["generation"]
    async with asking(world, "tiny", ROW) as answers:
        await world.apply(versions[1])
        await until_rolling(world, first)
        await outage()
        during = answers.count
        await until_ready_again(world)
    assert during > AWAY_S, "requests are answered while the API server is away"
    assert answers.failed == []
    await until_same(world, expected)
    await until_at_rest(world)
    await until_same(world, expected)


async def until_same(world: Operating, expected: dict[str, Any]) -> None:
    """Wait until everything is as it would be without an outage: what was told last may lag behind."""
    deadline = time.monotonic() + RECOVERY_S
    while (found := await state_of(world)) != expected:
        assert time.monotonic() < deadline, {k: (found[k], expected[k]) for k in found if found[k] != expected[k]}
        await asyncio.sleep(0.5)


async def until_at_rest(world: Operating) -> None:
    """Wait until no new plan is written any more."""
    async with asyncio.timeout(RECOVERY_S):
        before = -1
        while (generation := (await world.plan("tiny"))["gateway"]["generation"]) != before:
            before = generation
            await asyncio.sleep(REST_S)


async def until_ready_again(world: Operating) -> None:
    """As `until_ready`, with a server that may still be on its way."""
    async with asyncio.timeout(RECOVERY_S):
        while True:
            with contextlib.suppress(aiohttp.ClientError, TimeoutError, Refused):
                await world.until_ready("tiny", RECOVERY_S)
                return
            await asyncio.sleep(0.2)


async def test_killed_in_a_rollout_with_its_history_compacted(
    own_plane: ControlPlane, versions: list[dict[str, Any]]
) -> None:
    async def killed() -> None:
        own_plane.kill_api_server()
        own_plane.compact()
        await asyncio.sleep(AWAY_S)
        own_plane.start_api_server()

    async with operating(own_plane, own_plane.new_namespace()) as world:
        await through(world, versions, killed)


async def test_frozen_in_a_rollout(own_plane: ControlPlane, versions: list[dict[str, Any]]) -> None:
    async def frozen() -> None:
        own_plane.freeze_api_server()
        await asyncio.sleep(AWAY_S)
        own_plane.thaw_api_server()

    async with operating(own_plane, own_plane.new_namespace()) as world:
        await through(world, versions, frozen)


async def test_away_before_the_first_plan(own_plane: ControlPlane, versions: list[dict[str, Any]]) -> None:
    """Killed while the children are made, and again while the pods start: each child is there once in the end."""
    async with operating(own_plane, own_plane.new_namespace()) as world:
        expected = await undisturbed(world, versions)
        await world.apply(versions[1])
        for kind in ("StatefulSet", "Pod"):
            async with asyncio.timeout(RECOVERY_S):
                while not await world.kube.list(kind, world.namespace):
                    await asyncio.sleep(0.01)
            own_plane.kill_api_server()
            await asyncio.sleep(12)
            own_plane.start_api_server()
        await until_ready_again(world)
        await until_same(world, expected)
