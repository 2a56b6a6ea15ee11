"""What others do to children is repaired; what users add to them stays; an operator that was killed goes on."""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from ensemble_contract.pod import PLAN_FILE
from tests.support.control_plane import ControlPlane
from tests.support.kube_client import path_of
from tests.support.models import export_mlp
from tests.support.operating import OWNED, Operating, member, operating, resource

WITHIN_S = 60.0
# Most repairs; a single one may meet a busy moment of this machine.
SOON_S = 5.0
CHILDREN = [
    ("Service", "tiny"),
    ("Service", "tiny-worker"),
    ("ServiceAccount", "tiny-worker"),
    ("ServiceAccount", "tiny-gateway"),
    ("NetworkPolicy", "tiny-worker"),
    ("NetworkPolicy", "tiny-gateway"),
    ("PodDisruptionBudget", "tiny-worker"),
    ("ConfigMap", "tiny-plan"),
    ("ConfigMap", "tiny-profiles"),
    ("Deployment", "tiny-gateway"),
    ("StatefulSet", "tiny-worker"),
]
# Read again at a resync, or by the next operator: a test of their own.
SECRETS = [("Secret", "tiny-worker"), ("Secret", "tiny-gateway")]


pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    return {name: export_mlp(tmp_path / f"{name}.pt2", seed=seed) for seed, name in enumerate("ab")}


async def until(check: Callable[[], Awaitable[object]], what: str) -> float:
    """Wait until it holds; how long that took, in seconds."""
    began = time.monotonic()
    while not await check():
        assert time.monotonic() - began < WITHIN_S, what
        await asyncio.sleep(0.1)
    return time.monotonic() - began


async def test_drift_is_repaired_and_what_users_add_stays(
    control_plane: ControlPlane, namespace: str, files: dict[str, Path]
) -> None:
    async with operating(control_plane, namespace, resync_s=300.0) as world:
        await world.apply(resource("tiny", [member(name, files[name]) for name in "ab"]))
        await world.until_ready("tiny")
        kube, took_s = world.kube, list[float]()
        found = {(kind, m["metadata"]["name"]) for kind in OWNED for m in await world.children(kind, "tiny")}
        assert {child for child in found if child[0] != "Pod"} == {*CHILDREN, *SECRETS}
        for kind, name in CHILDREN:
            before = await kube.get(kind, namespace, name)
            assert before is not None, (kind, name)
            await kube.ask("DELETE", path_of(kind, namespace, name))

            async def is_back(kind: str = kind, name: str = name, uid: str = before["metadata"]["uid"]) -> bool:
                found = await kube.get(kind, namespace, name)
                return found is not None and found["metadata"]["uid"] != uid

            took_s.append(await until(is_back, f"{kind} {name} did not return"))
        await kube.patch("Service", namespace, "tiny", {"metadata": {"labels": {"team": "vision"}}})
        await kube.patch("StatefulSet", namespace, "tiny-worker", {"spec": {"replicas": 5}})
        await kube.patch(
            "Deployment", namespace, "tiny-gateway", {"metadata": {"labels": {"app.kubernetes.io/part-of": "x"}}}
        )

        async def is_repaired() -> bool:
            workers = await kube.get("StatefulSet", namespace, "tiny-worker")
            gateway = await kube.get("Deployment", namespace, "tiny-gateway")
            assert workers is not None
            assert gateway is not None
            owned = gateway["metadata"]["labels"]["app.kubernetes.io/part-of"] == "tiny"
            return bool(workers["spec"]["replicas"] == 2 and owned)

        took_s.append(await until(is_repaired, "edits of children were not repaired"))
        await kube.patch("Service", namespace, "tiny", {"spec": {"selector": {"x": "y"}}})

        async def selects() -> bool:
            found = await kube.get("Service", namespace, "tiny") or {}
            return "ensemble-operator.io/ensemble" in found["spec"]["selector"]

        took_s.append(await until(selects, "the Service's selector was not repaired"))
        assert statistics.median(took_s) < SOON_S, took_s
        service = await kube.get("Service", namespace, "tiny") or {}
        assert service["metadata"]["labels"]["team"] == "vision"
        await world.until_ready("tiny")
        answer = await world.ask("tiny", [[0.5] * 64])
        assert "outputs" in answer, answer
        await check_idle(world)


async def test_edited_config_maps_are_written_anew(
    control_plane: ControlPlane, namespace: str, files: dict[str, Path]
) -> None:
    """What somebody has written there is neither served nor planned with."""
    async with operating(control_plane, namespace, resync_s=300.0) as world:
        await world.apply(resource("tiny", [member("a", files["a"])]))
        await world.until_ready("tiny")
        profiles = await world.kube.get("ConfigMap", namespace, "tiny-profiles") or {}
        plan = await world.plan("tiny")
        digest = plan["sources"][0]["digest"]
        cheap = profiles["data"][digest].replace('"memoryBytes":', '"memoryBytes":1')
        assert cheap != profiles["data"][digest]
        await world.kube.patch("ConfigMap", namespace, "tiny-profiles", {"data": {digest: cheap}})
        evil = json.dumps(plan).replace("a.pt2", "evil.pt2")
        await world.kube.patch("ConfigMap", namespace, "tiny-plan", {"data": {PLAN_FILE: evil}})

        async def is_repaired() -> bool:
            found = await world.kube.get("ConfigMap", namespace, "tiny-profiles") or {}
            now = await world.plan("tiny")
            return bool(found["data"] == profiles["data"] and now["sources"] == plan["sources"])

        await until(is_repaired, "edits of ConfigMaps were not repaired")
        await world.until_ready("tiny")
        assert (await world.plan("tiny"))["rows"] == plan["rows"]


async def test_a_plan_from_a_backup_gives_way_to_what_is_wanted(
    control_plane: ControlPlane, namespace: str, files: dict[str, Path]
) -> None:
    async with operating(control_plane, namespace) as world:
        device = {"count": 1, "resource": "cpu", "cores": "500m", "memory": "1Gi"}
        both = [member(name, files[name]) for name in "ab"]
        await world.apply(resource("tiny", both[:1], devices=device))
        await world.until_ready("tiny")
        old = await world.kube.get("ConfigMap", namespace, "tiny-plan") or {}
        await world.apply(resource("tiny", both, devices=device))
        await world.until_ready("tiny")
        newest = (await world.plan("tiny"))["gateway"]
        backup = {"data": old["data"], "metadata": {"annotations": old["metadata"]["annotations"]}}
        await world.kube.patch("ConfigMap", namespace, "tiny-plan", backup)

        async def is_newest() -> bool:
            return bool((await world.plan("tiny"))["gateway"]["generation"] > newest["generation"])

        await until(is_newest, "a former plan stays")
        await world.until_ready("tiny")
        assert (await world.plan("tiny"))["gateway"]["members"] == newest["members"]
        assert "outputs" in await world.ask("tiny", [[0.5] * 64])


async def test_secrets_return_with_new_keys_and_serving_goes_on(
    control_plane: ControlPlane, namespace: str, files: dict[str, Path]
) -> None:
    async with operating(control_plane, namespace) as world:
        await world.apply(resource("tiny", [member("a", files["a"])]))
        await world.until_ready("tiny")
        before = await world.kube.get("Secret", namespace, "tiny-worker") or {}
        await world.end_operator()
        await world.kube.ask("DELETE", path_of("Secret", namespace, "tiny-worker"))
        # A new operator looks at Secrets at once; one that runs, at its next resync.
        await world.start_operator()

        async def is_new() -> bool:
            found = await world.kube.get("Secret", namespace, "tiny-worker")
            other = await world.kube.get("Secret", namespace, "tiny-gateway")
            if found is None or other is None:
                return False
            paired = other["data"]["peer.public"] == found["data"]["own.public"]
            return bool(paired and found["data"]["own.secret"] != before["data"]["own.secret"])

        await until(is_new, "the Secret did not return")

        async def answers() -> bool:
            return "outputs" in await world.ask("tiny", [[0.5] * 64])

        await until(answers, "nobody answers with the new keys")


@pytest.mark.slow
async def test_killed_at_every_stage_it_ends_in_the_same_state(
    control_plane: ControlPlane, namespace: str, files: dict[str, Path]
) -> None:
    async with operating(control_plane, namespace, start=False) as world:
        await world.apply(resource("tiny", [member("a", files["a"]), member("b", files["b"], profiled=False)]))
        for life_s in (0.3, 0.6, 1.0, 1.5, 2.0, 3.0):
            await world.start_operator()
            await asyncio.sleep(life_s)
            await world.kill_operator()
        await world.start_operator()
        await world.until_ready("tiny")
        await world.until_answered("tiny", [[0.5] * 64])
        counts = {
            kind: len(await world.children(kind, "tiny"))
            for kind in ("StatefulSet", "Deployment", "Service", "ConfigMap", "Secret", "NetworkPolicy", "Pod")
        }
        assert counts == {
            "StatefulSet": 1,
            "Deployment": 1,
            "Service": 2,
            "ConfigMap": 2,
            "Secret": 2,
            "NetworkPolicy": 2,
            "Pod": 3,
        }
        reasons = [reason for reason, _ in await world.until_told("tiny", "Ready")]
        assert reasons.count("Ready") == 1, reasons


async def check_idle(world: Operating) -> None:
    """It comes to rest: then nothing is asked of the API server but for the lease."""
    assert world.cluster is not None
    deadline = time.monotonic() + WITHIN_S
    others: dict[tuple[str, str, int], int] = {("", "", 0): 0}
    while others:
        assert time.monotonic() < deadline, others
        before = dict(world.cluster.request_counts)
        await asyncio.sleep(5)
        after = world.cluster.request_counts
        asked = {key: count - before.get(key, 0) for key, count in after.items() if count != before.get(key, 0)}
        others = {key: count for key, count in asked.items() if key[1] != "leases"}
