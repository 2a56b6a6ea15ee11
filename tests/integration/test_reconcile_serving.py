"""From apply to answers on a real control plane, and through changes: real workers and gateways as local processes."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from ensemble_contract.libraries import libraries_text
from ensemble_operator.control.book import HASHES_ANNOTATION, hashes_of
from tests.support.control_plane import ControlPlane
from tests.support.kube_client import Manifest
from tests.support.mlp_answers import check_answer
from tests.support.models import export_mlp
from tests.support.operating import READY_S, Operating, member, operating, resource

pytestmark = pytest.mark.timeout(400)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    return {name: export_mlp(tmp_path / f"{name}.pt2", seed=seed) for seed, name in enumerate("abc")}


async def test_profiles_given_and_changes_of_weights_members_and_devices(
    control_plane: ControlPlane, namespace: str, files: dict[str, Path]
) -> None:
    async with operating(control_plane, namespace) as world:
        a, b, c = (member(name, files[name]) for name in "abc")
        await world.apply(resource("tiny", [a, b]))
        status = await world.until_ready("tiny")
        assert status["devices"]["summary"] == "2/2"
        assert status["members"]["summary"] == "2/2"
        assert status["throughput"]["predicted"] > 0
        await check_answer(world, "tiny", 0, 1)
        pods = {name: process.uid for name, process in world.kubelet.pods.items()}

        rule = {"rule": "weightedMean"}
        await world.apply(resource("tiny", [a | {"weight": 3}, b], combine=rule))
        await world.until_ready("tiny")
        await check_answer(world, "tiny", 0, 1, weights=[3, 1])

        await world.apply(resource("tiny", [a, b, c], combine=rule))
        await world.until_ready("tiny")
        await check_answer(world, "tiny", 0, 1, 2)

        await world.apply(resource("tiny", [a, c], combine=rule))
        await world.until_ready("tiny")
        await check_answer(world, "tiny", 0, 2)

        one_device = {"count": 1, "resource": "cpu", "cores": "500m", "memory": "1Gi"}
        await world.apply(resource("tiny", [a, c], combine=rule, devices=one_device))
        await world.until("tiny", lambda s: s["replicas"] == 1 and s["devices"]["summary"] == "1/1")
        await check_answer(world, "tiny", 0, 2)
        kept = {name: process.uid for name, process in world.kubelet.pods.items()}
        assert kept.items() <= pods.items(), "a change of the plan restarts no pod"

        await world.apply(resource("tiny", [a, c], combine=rule))
        await world.until("tiny", lambda s: s["replicas"] == 2 and s["devices"]["summary"] == "2/2")
        await check_answer(world, "tiny", 0, 2)
        reasons = [reason for reason, _ in await world.until_told("tiny", "Ready", "PlanChanged")]
        assert reasons.count("PlanChanged") >= 3
        assert reasons.count("Ready") == 1, await world.events("tiny")
        assert "Degraded" not in reasons


async def test_no_profile_given(control_plane: ControlPlane, namespace: str, files: dict[str, Path]) -> None:
    async with operating(control_plane, namespace) as world:
        measured = resource("tiny", [member(name, files[name], profiled=False) for name in "ab"])
        # The models tell their inputs and outputs, too.
        del measured["spec"]["input"], measured["spec"]["output"]
        await world.apply(measured)
        status = await world.until_ready("tiny")
        assert status["throughput"]["predicted"] > 0
        book = await world.kube.get("ConfigMap", namespace, "tiny-profiles")
        assert book is not None
        assert len([name for name in book["data"] if len(name) == 16]) == 2
        found = await world.kube.get("ConfigMap", namespace, "tiny-plan")
        assert found is not None
        await world.until("tiny", lambda s: "background" not in said(s, "Profiled")["message"])
        # Restarted, the operator knows all of it and measures nothing again.
        await world.end_operator()
        before = (await world.kube.get("ConfigMap", namespace, "tiny-profiles") or {})["data"]
        await world.start_operator()
        await world.until_ready("tiny")
        await asyncio.sleep(1)
        after = (await world.kube.get("ConfigMap", namespace, "tiny-profiles") or {})["data"]
        assert after == before
        await check_another_torch(world, before)


async def check_another_torch(world: Operating, known: dict[str, str]) -> None:
    """What was measured with other libraries than the workers have now is measured anew, and then goes."""
    ours = libraries_text()
    assert all(ours in text for text in known.values())
    await world.end_operator()
    data = {name: text.replace(ours, "torch 1.0") for name, text in known.items()}
    annotations = {HASHES_ANNOTATION: hashes_of(data)}
    written = {"data": data, "metadata": {"annotations": annotations}}
    await world.kube.patch("ConfigMap", world.namespace, "tiny-profiles", written)
    await world.start_operator()

    def is_anew(book: Manifest | None) -> bool:
        texts = list(book["data"].values()) if book is not None else []
        return bool(texts) and all(ours in text and "torch 1.0" not in text for text in texts)

    await world.kube.wait_for("ConfigMap", world.namespace, "tiny-profiles", is_anew, READY_S)
    await world.until_ready("tiny")


def said(status: dict[str, Any], type_: str) -> dict[str, Any]:
    found: dict[str, Any] = next(c for c in status["conditions"] if c["type"] == type_)
    return found
