"""Devices: half of what is needed, several pools, other counts, and ends that nobody saw to."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from ensemble_operator.control.acquire import pause_s
from tests.support.control_plane import ControlPlane
from tests.support.kube_client import condition_of
from tests.support.kubelet import Kubelet
from tests.support.models import export_mlp
from tests.support.operating import API_VERSION, KIND, OWNED, Operating, member, operating, resource

ROW = [0.5] * 64
CPU = {"resource": "cpu", "cores": "500m", "memory": "1Gi"}

pytestmark = pytest.mark.timeout(400)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    return {name: export_mlp(tmp_path / f"{name}.pt2", seed=seed) for seed, name in enumerate("ab")}


def large(name: str, path: Path, memory_bytes: int) -> dict[str, Any]:
    """A member that says it needs so much memory at batch size 1."""
    profile = {"measurements": [{"batchSize": 1, "memory": str(memory_bytes), "latency": "1ms"}]}
    return {**member(name, path), "profile": profile}


async def owned(world: Operating, name: str) -> list[tuple[str, str]]:
    """What there is of an ensemble's children."""
    return [(kind, child["metadata"]["name"]) for kind in OWNED for child in await world.children(kind, name)]


async def until_gone(world: Operating, name: str) -> None:
    left: list[tuple[str, str]] = []
    try:
        async with asyncio.timeout(60):
            while left := await owned(world, name):
                await asyncio.sleep(0.1)
    except TimeoutError:
        raise AssertionError(f"not collected: {left}") from None


async def check_answers(world: Operating, name: str) -> None:
    answer = await world.ask(name, [ROW])
    assert "outputs" in answer, answer


def two_that_differ(namespace: str, timeout_s: float) -> tuple[str, str]:
    """Names of two ensembles that give devices back for unlike times: the first one's is short, the other's long."""
    pauses = {name: pause_s(0, f"{namespace}/{name}", timeout_s) for name in (f"e{number}" for number in range(40))}
    return min(pauses, key=lambda name: pauses[name]), max(pauses, key=lambda name: pauses[name])


async def test_two_that_each_hold_half_do_not_wait_for_ever(
    control_plane: ControlPlane, namespace: str, files: dict[str, Path]
) -> None:
    """One device each and no plan on it: both give back, one comes first and serves, then the other."""
    timeout_s = 30.0
    early, late = two_that_differ(namespace, timeout_s)
    # The two members do not fit on one device, and the node has cores for two devices and the gateways.
    members = [large(name, files[name], 2 << 30) for name in "ab"]
    devices = {"resource": "cpu", "cores": "1", "memory": "4Gi"}
    batching = {"sizes": [1], "maxQueueBytes": "16Mi"}
    async with operating(control_plane, namespace, node={"cpu": "2500m"}) as world:
        for name in (early, late):
            await world.apply(resource(name, members, devices={**devices, "count": 1}, batching=batching))
        for name in (early, late):
            await world.until(name, lambda s: reason(s, "Planned") == "DoesNotFit")
        for name in (early, late):
            both = {**devices, "count": 2, "acquireTimeout": f"{timeout_s:g}s"}
            await world.apply(resource(name, members, devices=both, batching=batching))
        for name in (early, late):
            await world.until(name, lambda s: reason(s, "DevicesAcquired") == "AcquireTimeout")
        await world.until_ready(early)
        await check_answers(world, early)
        await world.kube.delete(KIND, namespace, early)
        await world.until_ready(late)
        await check_answers(world, late)


async def test_pools_counts_and_autoscaling(
    control_plane: ControlPlane, namespace: str, files: dict[str, Path]
) -> None:
    """A member fits only on the second pool's device; later pools and counts come and go without an interruption."""
    a, b = member("a", files["a"]), large("b", files["b"], 1536 << 20)
    small = member("b", files["b"])
    async with operating(control_plane, namespace) as world:
        extra = [{**CPU, "count": 1, "memory": "3Gi"}]
        one: dict[str, Any] = {"devices": {"count": 1, **CPU}, "batching": {"sizes": [1], "maxQueueBytes": "16Mi"}}
        await world.apply(resource("tiny", [a, b], **one, extraDevices=extra))
        status = await world.until_ready("tiny")
        assert status["devices"]["summary"] == "2/2"
        placed = {w["worker"]: [i["member"] for i in w["instances"]] for w in status["allocation"]["rows"]}
        assert "b" in placed["tiny-worker-x1-0"]
        assert "b" not in placed.get("tiny-worker-0", [])
        await check_answers(world, "tiny")

        await world.apply(resource("tiny", [a, small], **one))
        await world.until_ready("tiny")
        await world.kube.wait_for("StatefulSet", namespace, "tiny-worker-x1", lambda found: found is None)
        await check_answers(world, "tiny")

        await scale(control_plane, namespace, "tiny", 2)
        await world.until("tiny", lambda s: s["devices"]["summary"] == "2/2" and s["replicas"] == 2)
        await scale(control_plane, namespace, "tiny", 1)
        await world.until("tiny", lambda s: s["devices"]["summary"] == "1/1" and s["replicas"] == 1)
        await check_answers(world, "tiny")

        await world.kube.create(autoscaler(namespace, "tiny", 2))
        await world.until("tiny", lambda s: s["devices"]["summary"] == "2/2" and s["replicas"] == 2)
        await world.kube.delete("HorizontalPodAutoscaler", namespace, "tiny")
        await check_answers(world, "tiny")

        # `count` belongs to whoever scales now, who gives it up for autoscaling to have it.
        await world.kube.patch(KIND, namespace, "tiny", {"spec": {"devices": {"count": None}, **between(2, 3)}})
        await world.until("tiny", lambda s: "2 devices are held" in message(s, "Accepted"))
        await world.until("tiny", lambda s: s["devices"]["summary"] == "2/2")
        await check_answers(world, "tiny")


def autoscaler(namespace: str, name: str, least: int) -> dict[str, Any]:
    """A HorizontalPodAutoscaler on the resource. Nobody measures load here: it holds the least."""
    target = {"apiVersion": API_VERSION, "kind": KIND, "name": name}
    load = {"name": "cpu", "target": {"type": "Utilization", "averageUtilization": 80}}
    return {
        "apiVersion": "autoscaling/v2",
        "kind": "HorizontalPodAutoscaler",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {
            "scaleTargetRef": target,
            "minReplicas": least,
            "maxReplicas": least + 1,
            "metrics": [{"type": "Resource", "resource": load}],
        },
    }


def between(least: int, most: int) -> dict[str, Any]:
    return {"autoscaling": {"min": least, "max": most}}


async def scale(plane: ControlPlane, namespace: str, name: str, count: int) -> None:
    """`kubectl scale`."""
    command = [str(plane.binaries / "kubectl"), f"--kubeconfig={plane.kubeconfig}", f"--namespace={namespace}"]
    scaling = ["scale", f"--replicas={count}", f"inferenceensembles.ensemble-operator.io/{name}"]
    async with asyncio.timeout(60):
        done = await asyncio.create_subprocess_exec(*command, *scaling, stderr=asyncio.subprocess.PIPE)
        _, said = await done.communicate()
    assert done.returncode == 0, said.decode()


async def test_deleted_while_nobody_looks_and_made_again(
    control_plane: ControlPlane, namespace: str, files: dict[str, Path]
) -> None:
    """The garbage collector takes the children by their owner; one of the same name gets its own. Then all must go."""
    own = control_plane.new_namespace("operator")
    async with operating(control_plane, namespace, pod_namespace=own) as world:
        wanted = resource("tiny", [member("a", files["a"])], devices={"count": 1, **CPU})
        await world.apply(wanted)
        await world.until_ready("tiny")
        await world.end_operator()
        await world.kube.delete(KIND, namespace, "tiny")
        await until_gone(world, "tiny")
        await world.start_operator()
        await world.apply(wanted)
        await world.until_ready("tiny")
        await check_answers(world, "tiny")

        await world.kube.delete("Namespace", "", namespace)
        await world.kube.wait_for("Namespace", "", namespace, lambda found: found is None, 60)
        assert world.operator is not None
        assert not world.operator.done(), "a namespace that goes takes no operator with it"


async def test_a_node_that_is_gone_keeps_no_worker(
    control_plane: ControlPlane, namespace: str, files: dict[str, Path]
) -> None:
    """Nobody there confirms that its worker's pod ended, and no other may have its name: the operator forces it."""
    async with operating(control_plane, namespace) as world:
        await world.apply(resource("tiny", [member("a", files["a"])], devices={"count": 1, **CPU}))
        await world.until_ready("tiny")
        lost = world.kubelet
        pods = list(lost.pods)
        async with Kubelet(world.kube, namespace) as node:
            world.kubelet = node
            await lost.cut()
            await world.kube.patch("Node", "", lost.name, {"spec": {"unschedulable": True}})
            # As whoever evicts the pods of a lost node does.
            for pod in pods:
                await world.kube.delete("Pod", namespace, pod, grace_s=1)
            status = await world.until("tiny", lambda s: reason(s, "Ready") != "Ready")
            assert message(status, "Ready")
            await world.until("tiny", lambda s: reason(s, "Ready") == "Ready")
            await check_answers(world, "tiny")
            assert "tiny-worker-0" in node.pods


def reason(status: dict[str, Any], type_: str) -> str:
    return str(condition_of({"status": status}, type_).get("reason", ""))


def message(status: dict[str, Any], type_: str) -> str:
    return str(condition_of({"status": status}, type_).get("message", ""))
