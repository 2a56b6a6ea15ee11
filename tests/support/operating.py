"""The operator in the test's own process, against a real control plane, with pods that are processes of this machine.

::

    async with operating(control_plane, namespace) as world:
        await world.apply(resource)
        await world.until_ready("tiny")
        answer = await world.ask("tiny", rows)
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from ensemble_contract.pod import PLAN_FILE
from ensemble_operator.control.cluster import Cluster
from ensemble_operator.control.process import Operator
from ensemble_operator.control.rbac import own_rules, rules
from ensemble_operator.control.reconcile import Reconciler
from ensemble_operator.control.settings import Settings
from tests.support.control_plane import ControlPlane
from tests.support.kube_client import KubeClient, Manifest
from tests.support.kubelet import Kubelet

API_VERSION = "ensemble-operator.io/v1alpha1"
KIND = "InferenceEnsemble"
# The kinds of an ensemble's children, but for those that its pods are made of.
OWNED = (
    "Secret",
    "ConfigMap",
    "Service",
    "ServiceAccount",
    "NetworkPolicy",
    "PodDisruptionBudget",
    "StatefulSet",
    "Deployment",
    "Pod",
)
# Deadlines, not expectations: a machine of two cores that does something else besides takes long.
READY_S = 120.0
ASK_S = 60.0
IMAGES = {"worker_image": "worker:test", "gateway_image": "gateway:test"}


@dataclass(slots=True)
class Operating:
    """A namespace with an operator that serves it, and a node."""

    plane: ControlPlane
    namespace: str
    kube: KubeClient
    kubelet: Kubelet
    settings: Settings
    operator: asyncio.Task[None] | None = None
    cluster: Cluster | None = None
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    # A process of its own would end; here all other tests would end with it.
    lost: list[str] = field(default_factory=list)

    async def start_operator(self, kubeconfig: Path | None = None) -> None:
        """Start the operator, with its own role and no more unless there is a kubeconfig."""
        self.stop = asyncio.Event()
        self.cluster = await Cluster.connect(kubeconfig or self._role(), None, "test")
        operator = Operator(self.cluster, self.settings, Reconciler, self.lost.append)
        self.operator = asyncio.create_task(operator.run(self.stop, "127.0.0.1"))

    def _role(self) -> Path:
        own = self.settings.pod_namespace
        wide = self.settings.namespace != own
        granted = rules(cluster_wide=wide) + own_rules()
        return self.plane.kubeconfig_for("operator", granted, namespace=own, narrow=not wide)

    async def end_operator(self) -> None:
        """End it, as SIGTERM would."""
        self.stop.set()
        await self._ended()

    async def kill_operator(self) -> None:
        """End it in the middle of whatever it does."""
        if self.operator is not None:
            self.operator.cancel()
        await self._ended()

    async def _ended(self) -> None:
        if self.operator is not None:
            await asyncio.wait([self.operator], timeout=30)
            with contextlib.suppress(asyncio.CancelledError):
                self.operator.result()
            self.operator = None
        if self.cluster is not None:
            await self.cluster.close()
            self.cluster = None

    async def apply(self, resource: Mapping[str, Any]) -> Manifest:
        """Apply an InferenceEnsemble in the namespace."""
        return await self.kube.apply({**resource, "metadata": {**resource["metadata"], "namespace": self.namespace}})

    async def status(self, name: str) -> dict[str, Any]:
        """The status of an ensemble."""
        found = await self.kube.get(KIND, self.namespace, name)
        return dict((found or {}).get("status") or {})

    async def condition(self, name: str, type_: str) -> dict[str, Any]:
        """One of its conditions; empty while there is none."""
        status = await self.status(name)
        return next((c for c in status.get("conditions", ()) if c["type"] == type_), {})

    async def until(self, name: str, holds: Callable[[dict[str, Any]], object], within_s: float = READY_S) -> Manifest:
        """Wait until something holds of an ensemble's status; AssertionError with the status if it does not."""
        deadline = time.monotonic() + within_s
        while True:
            self._check()
            status = await self.status(name)
            if status and holds(status):
                return status
            if time.monotonic() > deadline:
                logs = {pod: process.log.read_text()[-1500:] for pod, process in self.kubelet.pods.items()}
                raise AssertionError(json.dumps({"status": status, "logs": logs}, indent=1, default=str))
            await asyncio.sleep(0.1)

    async def until_ready(self, name: str, within_s: float = READY_S) -> Manifest:
        """Wait until every member answers and the plan that is wanted runs."""
        found = await self.kube.get(KIND, self.namespace, name)
        assert found is not None
        generation = found["metadata"]["generation"]

        def is_ready(status: dict[str, Any]) -> bool:
            said = {c["type"]: c for c in status.get("conditions", ())}
            now = status.get("observedGeneration") == generation
            return bool(now and said["Ready"]["status"] == "True" and said["RolloutBlocked"]["reason"] == "Done")

        return await self.until(name, is_ready, within_s)

    async def children(self, kind: str, name: str) -> list[Manifest]:
        """What there is of an ensemble's children of a kind."""
        return await self.kube.list(kind, self.namespace, labelSelector=f"ensemble-operator.io/ensemble={name}")

    async def plan(self, name: str) -> dict[str, Any]:
        """The plan of an ensemble that was written last; empty while there is none."""
        found = await self.kube.get("ConfigMap", self.namespace, f"{name}-plan")
        plan: dict[str, Any] = json.loads(found["data"][PLAN_FILE]) if found is not None else {}
        return plan

    def url(self, name: str) -> str:
        """Where a gateway of the ensemble answers."""
        pods = [pod for pod in self.kubelet.pods if pod.startswith(f"{name}-gateway-")]
        return f"http://{self.kubelet.pods[pods[0]].ip}:8000"

    async def until_answered(self, name: str, rows: Sequence[Sequence[float]]) -> dict[str, Any]:
        """The first answer with outputs: gateways come, and go, a moment after the status says so."""
        deadline = time.monotonic() + READY_S
        while True:
            try:
                answer = await self.ask(name, rows)
            except (aiohttp.ClientError, IndexError) as error:
                answer = {"error": repr(error)}
            if "outputs" in answer:
                return answer
            assert time.monotonic() < deadline, answer
            await asyncio.sleep(0.1)

    async def ask(self, name: str, rows: Sequence[Sequence[float]], tensor: str = "input") -> dict[str, Any]:
        """The answer to a V2 request; with `status` where it is an error."""
        body = {"inputs": [{"name": tensor, "datatype": "FP32", "shape": [len(rows), len(rows[0])], "data": rows}]}
        timeout = aiohttp.ClientTimeout(total=ASK_S)
        async with (
            aiohttp.ClientSession(timeout=timeout) as session,
            session.post(f"{self.url(name)}/v2/models/{name}/infer", json=body) as answer,
        ):
            found: dict[str, Any] = await answer.json()
            return found if answer.status == 200 else {**found, "status": answer.status}

    async def events(self, name: str) -> list[tuple[str, str]]:
        """Reason and note of the events about an ensemble."""
        found = await self.kube.list("Event", self.namespace)
        return [(e["reason"], e["note"]) for e in found if e["regarding"]["name"] == name]

    async def until_told(self, name: str, *reasons: str) -> list[tuple[str, str]]:
        """The events, when there is one for each of these reasons: they are posted after the status."""
        deadline = time.monotonic() + READY_S
        while True:
            found = await self.events(name)
            if set(reasons) <= {reason for reason, _ in found}:
                return found
            assert time.monotonic() < deadline, found
            await asyncio.sleep(0.1)

    def _check(self) -> None:
        assert self.lost == []
        if self.operator is not None and self.operator.done():
            self.operator.result()


@contextlib.asynccontextmanager
async def operating(
    plane: ControlPlane,
    namespace: str,
    *,
    start: bool = True,
    node: Mapping[str, Any] | None = None,
    **settings: Any,
) -> AsyncIterator[Operating]:
    """An operator of one namespace, and a node that runs its pods: `node` is what a Kubelet is made with."""
    plane.start_controllers()
    plane.start_scheduler()
    chosen = Settings(
        **{
            "namespace": namespace,
            "pod_namespace": namespace,
            "admin_url": "http://{ip}:8081",
            "worker_host": "{ip}",
            "metrics_port": 0,
            "health_port": 0,
            "log_format": "text",
            **IMAGES,
            **settings,
        }
    )
    async with AsyncExitStack() as stack:
        kube = await stack.enter_async_context(KubeClient(plane.kubeconfig))
        kubelet = await stack.enter_async_context(Kubelet(kube, namespace, **(node or {})))
        world = Operating(plane, namespace, kube, kubelet, chosen)
        if start:
            await world.start_operator()
        try:
            yield world
        finally:
            await world.end_operator()


def resource(name: str, members: Sequence[Mapping[str, Any]], **spec: Any) -> dict[str, Any]:
    """An InferenceEnsemble of MLPs from 64 numbers to 10 classes, on CPU devices."""
    return {
        "apiVersion": API_VERSION,
        "kind": KIND,
        "metadata": {"name": name},
        "spec": {
            "members": list(members),
            "input": {"name": "input", "datatype": "FP32", "shape": [64]},
            "output": {"name": "output", "datatype": "FP32", "shape": [10]},
            "devices": {"count": 2, "resource": "cpu", "cores": "500m", "memory": "1Gi"},
            "batching": {"sizes": [1, 8], "maxQueueBytes": "16Mi"},
            **spec,
        },
    }


def member(name: str, path: Path, *, profiled: bool = True, **more: Any) -> dict[str, Any]:
    """A member in a file, with a profile unless it is to be measured."""
    measurements = [
        {"batchSize": 1, "memory": "8Mi", "latency": "1ms"},
        {"batchSize": 8, "memory": "9Mi", "latency": "2ms"},
    ]
    found: dict[str, Any] = {"name": name, "model": {"uri": path.as_uri()}, **more}
    return {**found, "profile": {"measurements": measurements}} if profiled else found
