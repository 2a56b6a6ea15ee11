"""The children alone, without an operator: pods that find their plan in the ConfigMap serve, and go on serving."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from ensemble_contract.keys import OWN_PUBLIC, OWN_SECRET, PEER_PUBLIC
from ensemble_contract.plan import EnsemblePlan, GatewayPlan, ServedMember, WorkerAddress, encode_plan
from ensemble_contract.pod import DATA_PORT, HTTP_PORT, TOKEN_FILE
from ensemble_operator.api import parse
from ensemble_operator.keys import new_pair
from ensemble_operator.manifests import Children, ChildSettings, children, plan_config_map
from tests.support.control_plane import ControlPlane
from tests.support.kube_client import KubeClient, Manifest, is_ready
from tests.support.kubelet import Kubelet
from tests.support.plane_members import X, Y, write_models

WITHIN_S = 90.0
MEMBERS = ("times1", "times2", "times3")
ROW = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]
DOUBLED = [2.0 * value for value in ROW]
TRIPLED = [3.0 * value for value in ROW]


pytestmark = pytest.mark.timeout(400)


@pytest.fixture
async def kube(control_plane: ControlPlane) -> AsyncIterator[KubeClient]:
    control_plane.start_controllers()
    control_plane.start_scheduler()
    async with KubeClient(control_plane.kubeconfig) as client:
        yield client


def resource(namespace: str, folder: Path, encryption: str) -> Manifest:
    return {
        "apiVersion": "ensemble-operator.io/v1alpha1",
        "kind": "InferenceEnsemble",
        "metadata": {"name": "tiny", "namespace": namespace},
        "spec": {
            "members": [{"name": name, "model": {"uri": f"file:{folder / name}.pt"}} for name in MEMBERS],
            "devices": {"count": 2, "resource": "cpu", "cores": "500m", "memory": "1Gi"},
            "transport": {"encryption": encryption},
        },
    }


def secrets(encryption: str) -> tuple[dict[str, str], dict[str, str]]:
    token = {TOKEN_FILE: "the-token-of-this-test"}
    if encryption == "none":
        return token, token
    (worker, worker_secret), (gateway, gateway_secret) = new_pair(), new_pair()
    return (
        {OWN_PUBLIC: worker, OWN_SECRET: worker_secret, PEER_PUBLIC: gateway, **token},
        {OWN_PUBLIC: gateway, OWN_SECRET: gateway_secret, PEER_PUBLIC: worker, **token},
    )


def plan(node: Kubelet, folder: Path, generation: int, served: str, *placed: str) -> str:
    """The plan that serves one member, and has some on every worker, at the addresses that the pods have now."""
    models = write_models(folder)
    workers = [name for name in node.pods if "worker" in name]
    gateway = GatewayPlan(
        generation,
        "tiny",
        X,
        Y,
        (ServedMember(served, models[served].digest),),
        tuple(WorkerAddress(name, f"tcp://{node.pods[name].ip}:{DATA_PORT}") for name in workers),
    )
    row = tuple((index, 8) for index in range(len(placed)))
    sources = tuple(models[name] for name in placed)
    return encode_plan(EnsemblePlan(gateway, sources, dict.fromkeys(workers, row), 1 << 20)).decode()


async def answer(ip: str) -> list[float]:
    url = f"http://{ip}:{HTTP_PORT}/v2/models/tiny/infer"
    tensor = {"name": "x", "datatype": "FP32", "shape": [1, 8], "data": ROW}
    async with aiohttp.ClientSession() as session, session.post(url, json={"inputs": [tensor]}) as response:
        body = await response.json()
        assert response.status == 200, body
        return list(body["outputs"][0]["data"])


async def ready_gateway(kube: KubeClient, namespace: str) -> str:
    """The name of a gateway's pod that is Ready."""
    deadline = time.monotonic() + WITHIN_S
    while True:
        for pod in await kube.list("Pod", namespace, labelSelector="app.kubernetes.io/component=gateway"):
            if is_ready(pod):
                return str(pod["metadata"]["name"])
        assert time.monotonic() < deadline
        await asyncio.sleep(0.1)


@contextlib.asynccontextmanager
async def deployed(
    kube: KubeClient, namespace: str, folder: Path, encryption: str
) -> AsyncIterator[tuple[Kubelet, Any]]:
    """The children of the ensemble `tiny`, with its workers Ready and without a plan."""
    owner = await kube.create(resource(namespace, folder, encryption))
    ensemble, uid = parse(resource(namespace, folder, encryption)), owner["metadata"]["uid"]
    held = secrets(encryption)
    async with Kubelet(kube, namespace) as node:
        for manifest in children(Children(ensemble, uid, ChildSettings("w", "g"), (2,), *held)):
            await kube.apply(manifest, "ensemble-operator")
        for ordinal in range(2):
            await kube.wait_for("Pod", namespace, f"tiny-worker-{ordinal}", is_ready, WITHIN_S)

        async def write(text: str) -> None:
            await kube.apply(plan_config_map(ensemble, uid, text), "ensemble-operator")

        yield node, write


@pytest.mark.parametrize("encryption", ["curve", "none"])
async def test_a_plan_in_the_config_map_is_all_that_pods_need(
    kube: KubeClient, namespace: str, tmp_path: Path, encryption: str
) -> None:
    async with deployed(kube, namespace, tmp_path, encryption) as (node, write):
        await write(plan(node, tmp_path, 1, "times3", "times3"))
        name = await ready_gateway(kube, namespace)
        assert await answer(node.pods[name].ip) == TRIPLED

        node.pods[name].kill()  # a new process has nothing but its folders
        await kube.wait_for("Pod", namespace, name, lambda p: not is_ready(p), WITHIN_S)
        await kube.wait_for("Pod", namespace, name, is_ready, WITHIN_S)
        assert await answer(node.pods[name].ip) == TRIPLED

        await write(plan(node, tmp_path, 2, "times2", "times3", "times2"))
        deadline = time.monotonic() + WITHIN_S
        while (got := await answer(node.pods[name].ip)) != DOUBLED:
            assert got == TRIPLED
            assert time.monotonic() < deadline
            await asyncio.sleep(0.1)
