"""Whatever the API server lets through, the operator lives on, says what is wrong with it, and sees to the others."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from ensemble_operator.api import InvalidSpec, parse
from ensemble_operator.control.overrides import check_allowed
from tests.support.control_plane import ControlPlane, Refused
from tests.support.kube_client import KubeClient, Manifest, condition_of, path_of
from tests.support.models import export_mlp
from tests.support.mutants import mutant, put
from tests.support.operating import KIND, Operating, member, operating, resource
from tests.support.operator_process import OperatorProcess, operator_process

SEED = 20
MADE, CHANGED, STEPS = 30, 15, 12
# Each is an object of the API server.
MOST_PODS = 8
# What no schema can tell, and the operator must.
HIDDEN: tuple[tuple[tuple[str | int, ...], object], ...] = (
    (("members", 0, "model", "uri"), "file://host/x.pt2"),
    (("members", 0, "model", "uri"), "https://user:word@host/x.pt2"),
    (("members", 1, "model", "uri"), "pvc://claim/../x.pt2"),
    (("input", "shape"), [1 << 31, 1 << 31]),
    (("output", "labels"), "https://host/labels.txt"),
)
JUDGED_S = 60.0
SOON_S, TRIES = 8.0, 4

pytestmark = pytest.mark.timeout(400)


def rich(name: str) -> dict[str, Any]:
    """A resource that uses most fields."""
    found = resource(
        name,
        [member("a", Path("/models/a.pt2"), weight=2.0, activation="softmax"), member("b", Path("/models/b.pt2"))],
        combine={"rule": "weightedMean", "quorum": 1},
        devices={
            "count": 1,
            "resource": "cpu",
            "cores": "500m",
            "memory": "1Gi",
            "memoryHeadroom": "10%",
            "acquireTimeout": "2s",
            "nodeSelector": {"zone": "a"},
            "tolerations": [{"key": "k", "operator": "Equal", "value": "v", "effect": "NoSchedule"}],
        },
        extraDevices=[{"count": 1, "resource": "example.com/gpu"}],
        batching={"sizes": [1, 8, 16], "maxDelay": "5ms", "maxQueueBytes": "16Mi"},
        planning={"objective": "devices", "targetThroughput": 5, "strategy": "greedy", "maxIterations": 5, "seed": 1},
        gateway={"replicas": 2, "timeout": "10s", "serviceType": "ClusterIP"},
        transport={"encryption": "curve"},
        rollout="Online",
        podTemplate={
            "worker": {
                "env": [{"name": "X", "value": "1"}],
                "volumes": [{"name": "v", "emptyDir": {"sizeLimit": "1Gi"}}],
                "volumeMounts": [{"name": "v", "mountPath": "/v"}],
                "resources": {"requests": {"cpu": "1"}, "limits": {"memory": "1Gi"}},
                "affinity": {"nodeAffinity": {}},
                "labels": {"team": "x"},
                "priorityClassName": "",
            },
            "gateway": {"annotations": {"a": "b"}, "nodeSelector": {"zone": "b"}, "resources": {"limits": {"cpu": 1}}},
        },
    )
    found["spec"]["input"]["name"] = "x"
    return found


def pods_of(document: Manifest) -> int:
    spec = document["spec"]
    try:
        pools = [spec.get("devices") or {}, *(spec.get("extraDevices") or ())]
        counts = [*pools, {"count": (spec.get("gateway") or {}).get("replicas")}, spec.get("autoscaling") or {}]
        return sum(int(one.get("count") or one.get("min") or 1) for one in counts)
    except (AttributeError, TypeError, ValueError):
        # The schema refuses these.
        return 0


async def offer(kube: KubeClient, namespace: str, document: Manifest) -> Manifest | None:
    """Create or replace a resource; None if the API server refuses it."""
    name = document["metadata"]["name"]
    deadline = time.monotonic() + JUDGED_S
    while True:
        live = await kube.get(KIND, namespace, name)
        metadata: dict[str, Any] = {"name": name, "namespace": namespace}
        if live is not None:
            metadata["resourceVersion"] = live["metadata"]["resourceVersion"]
        path = path_of(KIND, namespace, name if live is not None else "")
        try:
            return dict(await kube.ask("POST" if live is None else "PUT", path, {**document, "metadata": metadata}))
        except Refused as refused:
            if refused.status in (400, 422):
                return None
            # The operator wrote its status in between.
            if refused.status != 409 or time.monotonic() > deadline:
                raise


async def mutants_of(kube: KubeClient, namespace: str, rng: random.Random, names: Sequence[str]) -> list[str]:
    """For each name a resource, with as many tries as it takes to be let through; the names of those that were not."""
    refused = []
    for name in names:
        for _ in range(40):
            base = rich(name)
            if rng.random() < 0.3:
                path, value = rng.choice(HIDDEN)
                put(base["spec"], path, value)
            document = mutant(rng, base)
            if pods_of(document) <= MOST_PODS and await offer(kube, namespace, document) is not None:
                break
        else:
            refused.append(name)
    return refused


async def judged(kube: KubeClient, namespace: str, name: str, operator: OperatorProcess) -> Manifest:
    """The resource, when its status is about what it says now."""
    deadline = time.monotonic() + JUDGED_S
    while True:
        assert operator.runs, operator.text()[-4000:]
        found = await kube.get(KIND, namespace, name)
        assert found is not None
        if (found.get("status") or {}).get("observedGeneration") == found["metadata"]["generation"]:
            return found
        assert time.monotonic() < deadline, f"no word about {name}: {found}\n{operator.text()[-4000:]}"
        await asyncio.sleep(0.1)


def why_not(found: Manifest, *, allow_overrides: bool = True) -> str:
    """The first field that is wrong with a resource; empty if it is valid."""
    try:
        check_allowed(parse(found), allow_overrides=allow_overrides)
    except InvalidSpec as error:
        return error.problems[0].path
    return ""


def check_told(found: Manifest) -> None:
    """Where a resource is invalid its status names the field; else it says what is in the way, as nothing can run."""
    accepted, invalid = condition_of(found, "Accepted"), why_not(found)
    if invalid:
        assert accepted["status"] == "False", found
        assert invalid in accepted["message"], (invalid, accepted)
        return
    assert accepted["status"] == "True", found
    obstacles = [condition_of(found, "DevicesAcquired"), condition_of(found, "Degraded")]
    assert obstacles[0]["status"] == "False" or obstacles[1]["status"] == "True", found
    assert any(one["message"] for one in obstacles), found


async def test_what_the_schema_admits_wedges_nobody(
    control_plane: ControlPlane, namespace: str, tmp_path: Path
) -> None:
    """No node can run them, and each has a status that says why; a good one is seen to at once."""
    control_plane.start_controllers()
    control_plane.start_scheduler()
    rng = random.Random(SEED)
    names = [f"m{number}" for number in range(MADE)]
    folder = {"kubeconfig": control_plane.kubeconfig, "namespace": namespace, "folder": tmp_path}
    async with KubeClient(control_plane.kubeconfig) as kube:
        with operator_process(**folder, allow_overrides=True) as operator:  # type: ignore[arg-type]
            refused = await mutants_of(kube, namespace, rng, names)
            assert len(refused) < MADE / 4
            made = [name for name in names if name not in refused]
            invalid = await check_all(kube, namespace, made, operator)
            # Some become others while their children are there.
            await mutants_of(kube, namespace, rng, made[:CHANGED])
            invalid += await check_all(kube, namespace, made[:CHANGED], operator)
            assert invalid > 3, "too little is put before the operator's own judgement"

            # The quickest of a few: what else this machine does only adds to it.
            took_s: list[float] = []
            while not took_s or took_s[-1] >= SOON_S:
                assert len(took_s) < TRIES, took_s
                took_s.append(await seen_to_s(kube, namespace, f"good{len(took_s)}", operator))
            assert operator.defects() == []
            assert operator.end() == 0


async def seen_to_s(kube: KubeClient, namespace: str, name: str, operator: OperatorProcess) -> float:
    """Apply a good one; how long until it has workers and a status, in seconds."""
    began = time.monotonic()
    good = resource(name, [member("a", Path("/models/a.pt2"))])
    await kube.apply({**good, "metadata": {"name": name, "namespace": namespace}})
    await kube.wait_for("StatefulSet", namespace, f"{name}-worker", lambda found: found is not None, JUDGED_S)
    await judged(kube, namespace, name, operator)
    return time.monotonic() - began


async def check_all(kube: KubeClient, namespace: str, names: Sequence[str], operator: OperatorProcess) -> int:
    """Check the status of each; how many are invalid."""
    found = [await judged(kube, namespace, name, operator) for name in names]
    for one in found:
        check_told(one)
    return sum(bool(why_not(one)) for one in found)


def workers(world: Operating) -> dict[str, str]:
    return {name: pod.uid for name, pod in world.kubelet.pods.items() if "-worker-" in name}


async def test_what_runs_survives_whatever_it_is_turned_into(
    control_plane: ControlPlane, namespace: str, tmp_path: Path
) -> None:
    """Its members, rule, batches and plan change at random while it runs; what it was told last, it does."""
    rng = random.Random(SEED)
    members = [member(name, export_mlp(tmp_path / f"{name}.pt2", seed=seed)) for seed, name in enumerate("ab")]
    good = resource(
        "tiny",
        members,
        combine={"rule": "mean", "quorum": 1},
        planning={"objective": "throughput", "strategy": "greedy", "maxIterations": 5},
        gateway={"timeout": "20s"},
        rollout="Online",
    )
    async with operating(control_plane, namespace, start=False) as world:
        with operator_process(control_plane.kubeconfig, namespace, tmp_path) as operator:
            await world.apply(good)
            await world.until_ready("tiny")
            before = workers(world)
            admitted = 0
            for _ in range(200):
                roots = ("members", "combine", "batching", "planning", "rollout")
                if await offer(world.kube, namespace, mutant(rng, good, roots)) is None:
                    continue
                found = await judged(world.kube, namespace, "tiny", operator)
                assert condition_of(found, "Accepted")["message"]
                invalid = bool(why_not(found, allow_overrides=False))
                assert (condition_of(found, "Accepted")["status"] == "False") == invalid, found
                await asyncio.sleep(rng.choice((0.0, 0.2, 1.0)))
                admitted += 1
                if admitted == STEPS:
                    break
            assert admitted == STEPS
            assert await offer(world.kube, namespace, good) is not None
            await world.until_ready("tiny")
            # Another size of the gateway's store is another gateway: the last one is to be asked.
            async with asyncio.timeout(60):
                while sum("-gateway-" in name for name in world.kubelet.pods) != 1:
                    await asyncio.sleep(0.1)
            await world.until_answered("tiny", [[0.5] * 64])
            assert workers(world) == before, "no change of this kind restarts a worker"
            assert operator.defects() == []
            assert operator.end() == 0
