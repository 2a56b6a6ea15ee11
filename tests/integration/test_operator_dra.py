"""Devices that drivers publish (DRA): a claim a worker, one device each, and what is said when there are too few.

API server, scheduler and the controller of claims are real. The driver is this test, and no device is behind what it
publishes: workers take CPU cores instead.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ensemble_contract.pod import CPU_INSTEAD_OF_GPU
from tests.support.control_plane import ControlPlane
from tests.support.kube_client import KubeClient, Manifest, condition_of
from tests.support.mlp_answers import check_answer
from tests.support.models import export_mlp
from tests.support.operating import KIND, READY_S, Operating, member, operating, resource

API_VERSION = "resource.k8s.io/v1"

pytestmark = pytest.mark.timeout(400)


class Driver:
    """Publishes devices of a class that has its name."""

    def __init__(self, kube: KubeClient) -> None:
        self.name = f"gpu-{secrets.token_hex(4)}.example.com"
        self._kube = kube
        self._slices: list[str] = []

    async def install(self) -> None:
        selector = {"cel": {"expression": f"device.driver == '{self.name}'"}}
        await self._kube.create(
            {
                "apiVersion": API_VERSION,
                "kind": "DeviceClass",
                "metadata": {"name": self.name},
                "spec": {"selectors": [selector]},
            }
        )

    async def publish(self, node: str, *devices: str) -> None:
        """Devices of a node, in a pool of their own."""
        name = f"{node}-{len(self._slices)}"
        self._slices.append(name)
        spec = {
            "driver": self.name,
            "nodeName": node,
            "pool": {"name": name, "generation": 1, "resourceSliceCount": 1},
            "devices": [
                {
                    "name": device,
                    "attributes": {"productName": {"string": "H100"}},
                    "capacity": {"memory": {"value": "81559Mi"}},
                }
                for device in devices
            ],
        }
        manifest = {"apiVersion": API_VERSION, "kind": "ResourceSlice", "metadata": {"name": name}, "spec": spec}
        await self._kube.create(manifest)

    async def remove(self) -> None:
        for name in self._slices:
            await self._kube.delete("ResourceSlice", "", name)
        await self._kube.delete("DeviceClass", "", self.name)


@contextlib.asynccontextmanager
async def driven(world: Operating) -> AsyncIterator[Driver]:
    driver = Driver(world.kube)
    await driver.install()
    try:
        yield driver
    finally:
        await driver.remove()


def devices_of(claim: Manifest) -> list[str]:
    allocation = (claim.get("status") or {}).get("allocation") or {}
    return [result["device"] for result in (allocation.get("devices") or {}).get("results") or ()]


def holders_of(claim: Manifest) -> list[str]:
    return [consumer["name"] for consumer in (claim.get("status") or {}).get("reservedFor") or ()]


async def test_each_worker_claims_a_device_and_too_few_are_told_with_their_class_and_memory(
    control_plane: ControlPlane, namespace: str, tmp_path: Path
) -> None:
    members = [member(name, export_mlp(tmp_path / f"{name}.pt2", seed=seed)) for seed, name in enumerate("ab")]
    node = {"environment": {CPU_INSTEAD_OF_GPU: "1"}}
    async with operating(control_plane, namespace, start=False, node=node) as world, driven(world) as driver:
        # Only with rights in the whole cluster is it known what drivers publish.
        world.settings = replace(world.settings, namespace="")
        await driver.publish(world.kubelet.name, "gpu-0", "gpu-1")
        await world.start_operator()

        def wanted(count: int) -> dict[str, Any]:
            return resource("tiny", members, devices={"count": count, "deviceClass": driver.name})

        await world.apply(wanted(2))
        status = await world.until_ready("tiny")
        assert status["devices"]["summary"] == "2/2"
        await check_answer(world, "tiny", 0, 1)
        await check_claims(world, {"gpu-0", "gpu-1"})

        await world.apply(wanted(3))
        what = f"devices of class {driver.name}"
        lack = (
            f"2 of 3 devices held; none of 2 {what} that may be used is free (H100 (81559 MiB)); 1 more {what} needed"
        )
        status = await world.until("tiny", lambda s: lack in said(s, "DevicesAcquired"))
        assert "the scheduler says: " in said(status, "DevicesAcquired")
        await check_answer(world, "tiny", 0, 1)

        await driver.publish(world.kubelet.name, "gpu-2")
        await world.until("tiny", lambda s: s["devices"]["summary"] == "3/3")
        await check_claims(world, {"gpu-0", "gpu-1", "gpu-2"})
        await world.until_ready("tiny")

        await world.kube.delete(KIND, namespace, "tiny")
        async with asyncio.timeout(READY_S):
            while await world.kube.list("ResourceClaim", namespace):
                await asyncio.sleep(0.1)


async def check_claims(world: Operating, devices: set[str]) -> None:
    """One claim of our template for each worker, one device in each, and each device once."""
    claims = await world.kube.list("ResourceClaim", world.namespace)
    assert all(len(devices_of(claim)) == 1 for claim in claims), claims
    assert sorted(device for claim in claims for device in devices_of(claim)) == sorted(devices)
    workers = [name for name in world.kubelet.pods if "-worker-" in name]
    assert sorted(holder for claim in claims for holder in holders_of(claim)) == sorted(workers)
    templates = await world.children("ResourceClaimTemplate", "tiny")
    pods = await world.children("Pod", "tiny")
    named = {claim["resourceClaimTemplateName"] for pod in pods for claim in pod["spec"].get("resourceClaims") or ()}
    assert named == {template["metadata"]["name"] for template in templates}


def said(status: dict[str, Any], type_: str) -> str:
    return str(condition_of({"status": status}, type_).get("message", ""))
