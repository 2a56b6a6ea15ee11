"""GPUs that nodes offer and no container has, as on nodes whose container runtime lacks NVIDIA's toolkit: pods are
placed one a GPU, and the conditions say what is missing. Where GPUs are real, the tests are skipped.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from ensemble_contract.pod import CPU_INSTEAD_OF_GPU
from tests.cluster.cluster import ROOT, Cluster, Manifest, pod, until
from tests.cluster.serving import Ensemble, factor_of, serve_models, spec_of, start_client

GPU = "nvidia.com/gpu"
FACTORS = {"two": 2.0, "four": 4.0}
EQUAL = {"two": 1.0, "four": 1.0}
URIS = {name: f"http://models:8080/{name}.onnx" for name in FACTORS}
SMALL = {"requests": {"cpu": "50m", "memory": "256Mi"}}
SAID_S = 180.0

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def node(cluster: Cluster, namespace: str) -> tuple[str, int]:
    """The node that offers the most GPUs, and how many; they are pretended."""
    found = max(
        (int(node["status"]["allocatable"].get(GPU, 0)), node["metadata"]["name"])
        for node in cluster.get("nodes")["items"]
    )
    if found[0] < 2:
        pytest.skip(f"needs a node with two {GPU}")
    if sees_gpu(cluster, namespace):
        pytest.skip("a pod that requests a GPU sees one here: this is about those that do not")
    return found[1], found[0]


def sees_gpu(cluster: Cluster, namespace: str) -> bool:
    manifest = pod("probe", cluster.image("worker"), ("python", "-m", "ensemble_worker", "devices"))
    manifest["spec"]["containers"][0]["resources"]["limits"] = {GPU: "1"}
    answer = next(line for line in cluster.run(namespace, manifest).splitlines() if line.startswith("{"))
    return any(device["kind"] == "cuda" for device in json.loads(answer)["devices"])


def spec(count: int, node: str, **worker: object) -> Manifest:
    """Of an ensemble on so many GPUs of one node; `worker` is its pod template's."""
    devices = {"count": count, "resource": GPU, "nodeSelector": {"kubernetes.io/hostname": node}}
    return {
        **spec_of(URIS, EQUAL, count),
        "devices": devices,
        "podTemplate": {"worker": {"resources": SMALL, **worker}},
    }


def on_cpu(count: int, node: str) -> Manifest:
    """The same, whose workers may take CPU cores where they see no GPU."""
    return spec(count, node, env=[{"name": CPU_INSTEAD_OF_GPU, "value": "1"}])


def said(ensemble: Ensemble, condition: str) -> Any:
    """A condition; empty before it is there."""
    found = [c for c in ensemble.status().get("conditions", []) if c["type"] == condition]
    return found[0] if found else {}


def until_said(ensemble: Ensemble, condition: str, reason: str) -> str:
    """The message of a condition as soon as it has this reason."""

    def message() -> str | None:
        found = said(ensemble, condition)
        return str(found["message"]) if found.get("reason") == reason else None

    return until(message, SAID_S, f"{condition} {reason}", ensemble.explanation)


@pytest.fixture(scope="module")
def ensemble(cluster: Cluster, system: str, namespace: str, node: tuple[str, int]) -> Iterator[Ensemble]:
    """On two GPUs that its workers do not see."""
    found = Ensemble(cluster, namespace, "accelerated")
    serve_models(cluster, namespace, FACTORS)
    found.apply(spec(2, node[0]))
    yield found
    cluster.kubectl("delete", "inferenceensemble", found.name, "-n", namespace)


def test_a_worker_that_sees_no_gpu_says_so_and_what_to_do(ensemble: Ensemble) -> None:
    message = until_said(ensemble, "DevicesAcquired", "NoDeviceVisible")
    assert message.startswith(f"0 of 2 devices held; {ensemble.name}-worker-")
    for remedy in ("device plugin", "podTemplate.worker.runtimeClassName", CPU_INSTEAD_OF_GPU):
        assert remedy in message, message
    assert said(ensemble, "Ready")["status"] == "False"
    assert "| DevicesAcquired | NoDeviceVisible |" in (ROOT / "docs/troubleshooting.md").read_text()

    def told() -> bool:
        described = ensemble.cluster.kubectl("describe", "ie", ensemble.name, "-n", ensemble.namespace)
        return "NoDeviceVisible" in described.partition("Events:")[2]

    until(told, SAID_S, "an event that tells it", ensemble.explanation)


def test_a_pod_has_one_gpu(ensemble: Ensemble, node: tuple[str, int]) -> None:
    workers = until(lambda: placed(ensemble, 2), SAID_S, "two placed pods", ensemble.explanation)
    for worker in workers:
        assert worker["spec"]["nodeName"] == node[0]
        assert [c["resources"]["limits"] for c in worker["spec"]["containers"]] == [{GPU: "1"}]


def placed(ensemble: Ensemble, count: int) -> list[Manifest]:
    """Its workers, once so many are on nodes."""
    found = [pod for pod in ensemble.pods("worker").values() if pod["spec"].get("nodeName")]
    return found if len(found) == count else []


def test_a_worker_that_may_take_cpu_cores_serves(ensemble: Ensemble, node: tuple[str, int]) -> None:
    ensemble.apply(on_cpu(2, node[0]))
    ensemble.settled(2)
    client = start_client(ensemble, node[0])
    client.hears(factor_of(FACTORS, EQUAL), 60)
    found = client.goes_on()
    assert not found.harms, found


def test_too_many_asked_for_is_said_while_those_held_serve(ensemble: Ensemble, node: tuple[str, int]) -> None:
    name, offered = node
    ensemble.apply(on_cpu(offered + 1, name))

    def complaint() -> str | None:
        found = said(ensemble, "DevicesAcquired")
        all_held = str(found.get("message", "")).startswith(f"{offered} of {offered + 1} devices held; ")
        return str(found["message"]) if all_held and found["reason"] == "TooFewDevices" else None

    message = until(complaint, SAID_S, f"{offered} of {offered + 1} devices", ensemble.explanation)
    assert f"none of {offered} {GPU} that may be used is free" in message
    assert f"1 more {GPU} needed: add nodes, free some, or lower spec.devices.count" in message
    assert f"Insufficient {GPU}" in message
    assert len(placed(ensemble, offered)) == offered
    assert said(ensemble, "Ready")["status"] == "True"
    ensemble.apply(on_cpu(2, name))
    ensemble.settled(2)
