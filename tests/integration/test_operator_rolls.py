"""Pods restart only when their template changes: one at a time, emptied first, without a failed request."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from ensemble_contract.pod import CPU_INSTEAD_OF_GPU
from ensemble_operator.control.rbac import own_rules, rules
from tests.support.control_plane import ControlPlane
from tests.support.models import export_mlp
from tests.support.operating import Operating, member, operating, resource
from tests.support.steady_asking import asking

ROW = [0.5] * 64

pytestmark = pytest.mark.timeout(400)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    return {name: export_mlp(tmp_path / f"{name}.pt2", seed=seed) for seed, name in enumerate("ab")}


def workers(world: Operating) -> dict[str, str]:
    return {name: process.uid for name, process in world.kubelet.pods.items() if "-worker-" in name}


async def test_an_upgrade_restarts_nothing_and_a_changed_template_each_worker_in_turn(
    control_plane: ControlPlane, namespace: str, files: dict[str, Path]
) -> None:
    rights = rules(cluster_wide=False) + own_rules()
    kubeconfig = control_plane.kubeconfig_for("operator", rights, namespace=namespace, narrow=True)
    async with operating(control_plane, namespace, start=False, allow_overrides=True) as world:
        await world.start_operator(kubeconfig)
        tiny = resource("tiny", [member(name, files[name]) for name in "ab"])
        await world.apply(tiny)
        await world.until_ready("tiny")
        before = workers(world)
        await world.end_operator()
        world.settings = type(world.settings)(**{**as_dict(world), "worker_image": "worker:2", "gateway_image": "g:2"})
        await world.start_operator(kubeconfig)
        await world.until_ready("tiny")
        await asyncio.sleep(2)
        assert workers(world) == before, "an operator upgrade restarts no pod"

        changed = {**tiny, "spec": {**tiny["spec"], "podTemplate": {"worker": {"annotations": {"note": "x"}}}}}
        async with asking(world, "tiny", ROW) as answers:
            await world.apply(changed)
            least = 2
            async with asyncio.timeout(180):
                while set(workers(world).values()) & set(before.values()) or least_ready(world) < 2:
                    least = min(least, least_ready(world))
                    await asyncio.sleep(0.05)
            await world.until_ready("tiny")
        assert answers.failed == []
        assert answers.count > 20
        assert least >= 1, "never both at once"


async def test_without_room_a_worker_is_replaced_only_while_requests_may_wait(
    control_plane: ControlPlane, namespace: str, files: dict[str, Path]
) -> None:
    async with operating(control_plane, namespace, allow_overrides=True) as world:
        one = {"count": 1, "resource": "cpu", "cores": "500m", "memory": "1Gi"}
        tiny = resource("tiny", [member("a", files["a"])], devices=one, gateway={"timeout": "60s"})
        await world.apply(tiny)
        await world.until_ready("tiny")
        before = workers(world)
        changed = {**tiny["spec"], "podTemplate": {"worker": {"annotations": {"note": "x"}}}}
        await world.apply({**tiny, "spec": changed})
        status = await world.until("tiny", lambda s: blocked(s)["status"] == "True")
        assert "spec.rollout: Pause" in blocked(status)["message"]
        assert "outputs" in await world.ask("tiny", [ROW])
        assert workers(world) == before

        await world.apply({**tiny, "spec": {**changed, "rollout": "Pause"}})
        async with asyncio.timeout(120):
            while set(workers(world).values()) & set(before.values()) or not workers(world):
                await asyncio.sleep(0.05)
        # Asked in the middle of it, a request waits for its answer.
        assert "outputs" in await world.ask("tiny", [ROW])
        await world.until_ready("tiny")


async def test_with_fewer_devices_than_wanted_each_worker_is_replaced_all_the_same(
    control_plane: ControlPlane, namespace: str, files: dict[str, Path]
) -> None:
    node = {"gpus": 2, "environment": {CPU_INSTEAD_OF_GPU: "1"}}
    async with operating(control_plane, namespace, node=node, allow_overrides=True) as world:
        gpus = {"count": 3, "resource": "nvidia.com/gpu"}
        tiny = resource("tiny", [member(name, files[name]) for name in "ab"], devices=gpus)
        await world.apply(tiny)
        await world.until_ready("tiny")
        await world.until("tiny", lambda status: status["devices"]["summary"] == "2/3")
        before = set(workers(world).values())
        changed = {**tiny["spec"], "podTemplate": {"worker": {"annotations": {"note": "x"}}}}
        async with asking(world, "tiny", ROW) as answers:
            await world.apply({**tiny, "spec": changed})
            least = 2
            async with asyncio.timeout(180):
                while set(workers(world).values()) & before or least_ready(world) < 2:
                    least = min(least, least_ready(world))
                    await asyncio.sleep(0.05)
            await world.until_ready("tiny")
        assert answers.failed == []
        assert least >= 1, "never both at once"


def blocked(status: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = next((c for c in status.get("conditions", ()) if c["type"] == "RolloutBlocked"), {})
    return {"status": "", "message": "", **found}


def least_ready(world: Operating) -> int:
    return sum(1 for name in workers(world) if world.kubelet.pods[name].status()["containerStatuses"][0]["ready"])


def as_dict(world: Operating) -> dict[str, Any]:
    settings = world.settings
    return {name: getattr(settings, name) for name in settings.__slots__}
