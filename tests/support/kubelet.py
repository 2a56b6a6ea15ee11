"""A node without containers: registers itself, and runs the pods that are bound to it as processes of this machine.

::

    control_plane.start_controllers(); control_plane.start_scheduler()
    async with KubeClient(control_plane.kubeconfig) as kube, Kubelet(kube, namespace) as node:
        ...                               # pods of the namespace are scheduled here, run, and become Ready
        node.pods["tiny-gateway-…"].ip    # an address of its own in 127.0.0.0/8, where its ports listen
        node.pods["tiny-worker-0"].log, .kill(), .restarts

It takes pods of one namespace (`control_plane.new_namespace` keeps them away from other nodes). What is real: binding
by the scheduler, capacity, ConfigMaps and Secrets as files that follow their objects, commands, environment, HTTP
probes, restarts, graceful deletion, status. What is not: images, limits, users, Services' addresses and DNS (tell the
operator to use pods' IPs), and `/models/CLAIM` inside the process. A preStop sleep is cut to `pre_stop_s`.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import secrets
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import aiohttp

from tests.support.control_plane import NAMESPACE_LABEL, Refused
from tests.support.kube_client import STRATEGIC, KubeClient, Manifest, path_of
from tests.support.kubelet_pod import PodProcess

RETRY_S = 0.3
MOUNTED = ("ConfigMap", "Secret")
# Each child has little to do in tests, and there are many: one thread each is kind to the machine.
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


class Kubelet:
    """One node. `gpus` of `nvidia.com/gpu`; `labels` as GPU Feature Discovery gives them; `claims` as folders."""

    def __init__(
        self,
        kube: KubeClient,
        namespace: str,
        *,
        cpu: str = "64",
        memory: str = "256Gi",
        gpus: int = 0,
        labels: Mapping[str, str] | None = None,
        taints: Sequence[Mapping[str, str]] = (),
        environment: Mapping[str, str] | None = None,
        claims: Mapping[str, Path] | None = None,
        pre_stop_s: float = 0.5,
    ) -> None:
        self.kube, self.namespace = kube, namespace
        self.name = f"node-{secrets.token_hex(4)}"
        self.folder = Path(tempfile.mkdtemp(prefix="kubelet-"))
        self.pods: dict[str, PodProcess] = {}
        self._capacity = {
            "cpu": cpu,
            "memory": memory,
            "pods": "250",
            **({"nvidia.com/gpu": str(gpus)} if gpus else {}),
        }
        self._labels, self._taints = dict(labels or {}), [dict(taint) for taint in taints]
        self._environment = {**ONE_THREAD, **(environment or {})}
        self._claims, self._pre_stop_s = claims or {}, pre_stop_s
        self._objects: dict[tuple[str, str], Manifest] = {}
        self._listed = {kind: asyncio.Event() for kind in MOUNTED}
        self._running: dict[str, PodProcess] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._dirty: dict[str, asyncio.Event] = {}
        self._network = f"127.{random.randint(16, 250)}.{random.randint(0, 255)}"
        self._addresses = 0

    async def __aenter__(self) -> Self:
        await self._register()
        for kind in MOUNTED:
            self._spawn(self._follow(kind))
        self._spawn(self._follow_pods())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.cut()
        with contextlib.suppress(aiohttp.ClientError, TimeoutError, Refused):
            await self.kube.delete("Node", "", self.name)
            for pod in await self.kube.list("Pod", self.namespace, fieldSelector=f"spec.nodeName={self.name}"):
                await self.kube.delete("Pod", self.namespace, pod["metadata"]["name"], grace_s=0)
        shutil.rmtree(self.folder, ignore_errors=True)

    async def cut(self) -> None:
        """The node is gone: its processes are killed, nothing is reported and no deletion is acted upon."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(pod.end(0.0) for pod in self._running.values()))
        self._running, self.pods = {}, {}

    async def _register(self) -> None:
        labels = {"kubernetes.io/hostname": self.name, NAMESPACE_LABEL: self.namespace, **self._labels}
        metadata = {"name": self.name, "labels": labels}
        await self.kube.create({"kind": "Node", "apiVersion": "v1", "metadata": metadata})
        ready = {"type": "Ready", "status": "True", "reason": "KubeletReady"}
        status = {"capacity": self._capacity, "allocatable": self._capacity, "conditions": [ready]}
        await self.kube.patch("Node", "", self.name, {"status": status}, "status")
        # Admission taints a new node as not ready.
        await self.kube.patch("Node", "", self.name, {"spec": {"taints": self._taints}})

    async def _follow(self, kind: str) -> None:
        """Keep the namespace's ConfigMaps or Secrets, and tell the pods."""
        while True:
            with contextlib.suppress(aiohttp.ClientError, TimeoutError, Refused):
                async for event, found in self.kube.watch(kind, self.namespace):
                    if event == "LISTED":
                        for key in [key for key in self._objects if key[0] == kind]:
                            del self._objects[key]
                        self._objects |= {(kind, item["metadata"]["name"]): item for item in found["items"]}
                        self._listed[kind].set()
                    elif event == "DELETED":
                        self._objects.pop((kind, found["metadata"]["name"]), None)
                    else:
                        self._objects[kind, found["metadata"]["name"]] = found
                    for pod in self._running.values():
                        pod.objects_changed(self._objects)
            await asyncio.sleep(RETRY_S)

    async def _follow_pods(self) -> None:
        for listed in self._listed.values():
            await listed.wait()
        while True:
            with contextlib.suppress(aiohttp.ClientError, TimeoutError, Refused):
                where = f"spec.nodeName={self.name}"
                async for event, found in self.kube.watch("Pod", self.namespace, fieldSelector=where):
                    if event == "LISTED":
                        present = {pod["metadata"]["uid"] for pod in found["items"]}
                        for uid in set(self._running) - present:
                            self._forget(uid)
                        for pod in found["items"]:
                            self._seen(pod)
                    elif event == "DELETED":
                        self._forget(found["metadata"]["uid"])
                    else:
                        self._seen(found)
            await asyncio.sleep(RETRY_S)

    def _seen(self, manifest: Manifest) -> None:
        metadata = manifest["metadata"]
        pod = self._running.get(metadata["uid"])
        if pod is None and metadata.get("deletionTimestamp"):
            self._spawn(self._remove(metadata["name"], metadata["uid"]))
        elif pod is None:
            self._start(manifest)
        elif metadata.get("deletionTimestamp") and "deletionTimestamp" not in pod.pod["metadata"]:
            pod.pod = manifest
            self._spawn(self._end(pod, float(metadata.get("deletionGracePeriodSeconds", 0))))

    def _start(self, manifest: Manifest) -> None:
        self._addresses += 1
        folder = self.folder / f"{self._addresses}"
        pod = PodProcess(manifest, f"{self._network}.{self._addresses}", folder, self._environment, self._claims)
        dirty = self._dirty[pod.uid] = asyncio.Event()
        pod.changed = dirty.set
        self._running[pod.uid] = self.pods[pod.name] = pod
        pod.start(lambda: self._objects)
        dirty.set()
        self._spawn(self._report(pod, dirty))

    async def _report(self, pod: PodProcess, dirty: asyncio.Event) -> None:
        path = path_of("Pod", self.namespace, pod.name, "status")
        while pod.uid in self._running:
            await dirty.wait()
            dirty.clear()
            patch = {"metadata": {"uid": pod.uid}, "status": pod.status()}
            try:
                await self.kube.ask("PATCH", path, patch, STRATEGIC)
            except (aiohttp.ClientError, TimeoutError, Refused):
                # Others write to it, too; a pod that is gone is forgotten when its deletion is seen.
                dirty.set()
                await asyncio.sleep(RETRY_S)

    async def _end(self, pod: PodProcess, grace_s: float) -> None:
        await pod.end(grace_s, self._pre_stop_s)
        self._drop(pod)
        await self._remove(pod.name, pod.uid)

    async def _remove(self, name: str, uid: str) -> None:
        """Tell the API server that the pod's processes are gone, which removes the object."""
        while True:
            with contextlib.suppress(aiohttp.ClientError, TimeoutError, Refused):
                await self.kube.delete("Pod", self.namespace, name, grace_s=0, uid=uid)
                return
            await asyncio.sleep(RETRY_S)

    def _forget(self, uid: str) -> None:
        """The object is gone, by force: what is left of the pod is killed."""
        pod = self._running.get(uid)
        if pod is not None:
            self._drop(pod)
            self._spawn(pod.end(0.0))

    def _drop(self, pod: PodProcess) -> None:
        self._running.pop(pod.uid, None)
        if self.pods.get(pod.name) is pod:
            del self.pods[pod.name]

    def _spawn(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
