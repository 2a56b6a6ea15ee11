"""Nodes that exist in the API only, whose pods are said to run at once and to be gone when they are deleted."""

from __future__ import annotations

import asyncio
import contextlib
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Self

import aiohttp
from tests.support.control_plane import Refused
from tests.support.kube_client import STRATEGIC, KubeClient, Manifest, path_of

GPU = "nvidia.com/gpu"
LABELS = {"nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3", "nvidia.com/gpu.memory": "81559"}
AT_ONCE = 16
RETRY_S = 0.5


class PretendNodes:
    """`count` nodes with `gpus` each, for the whole cluster that the client is for."""

    def __init__(self, kube: KubeClient, count: int, gpus: int) -> None:
        self._kube, self._count, self._gpus = kube, count, gpus
        self._places = asyncio.Semaphore(AT_ONCE)
        self._started: set[str] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._addresses = 0

    async def __aenter__(self) -> Self:
        await asyncio.gather(*(self._register(f"pretended-{index}") for index in range(self._count)))
        self._spawn(self._follow())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _register(self, name: str) -> None:
        labels = {"kubernetes.io/hostname": name, **LABELS, "nvidia.com/gpu.count": str(self._gpus)}
        size = {"cpu": "64", "memory": "512Gi", "pods": "250", GPU: str(self._gpus)}
        status = {"capacity": size, "allocatable": size, "conditions": [{"type": "Ready", "status": "True"}]}
        async with self._places:
            await self._kube.create({"kind": "Node", "apiVersion": "v1", "metadata": {"name": name, "labels": labels}})
            await self._kube.patch("Node", "", name, {"status": status}, "status")
            # Admission taints a new node as not ready.
            await self._kube.patch("Node", "", name, {"spec": {"taints": []}})

    async def _follow(self) -> None:
        while True:
            with contextlib.suppress(aiohttp.ClientError, TimeoutError, Refused):
                async for event, found in self._kube.watch("Pod", fieldSelector="spec.nodeName!="):
                    for pod in found["items"] if event == "LISTED" else [found]:
                        self._seen(event, pod)
            await asyncio.sleep(RETRY_S)

    def _seen(self, event: str, pod: Manifest) -> None:
        metadata = pod["metadata"]
        if event == "DELETED":
            self._started.discard(metadata["uid"])
        elif metadata.get("deletionTimestamp"):
            self._spawn(self._remove(pod))
        elif metadata["uid"] not in self._started:
            self._started.add(metadata["uid"])
            self._spawn(self._say_it_runs(pod))

    async def _say_it_runs(self, pod: Manifest) -> None:
        metadata = pod["metadata"]
        self._addresses += 1
        patch = {"metadata": {"uid": metadata["uid"]}, "status": running(pod, _address(self._addresses))}
        path = path_of("Pod", metadata["namespace"], metadata["name"], "status")
        with contextlib.suppress(aiohttp.ClientError, TimeoutError, Refused):
            async with self._places:
                await self._kube.ask("PATCH", path, patch, STRATEGIC)
            return
        # The next event of the pod, or the next list, tries again.
        self._started.discard(metadata["uid"])

    async def _remove(self, pod: Manifest) -> None:
        metadata = pod["metadata"]
        with contextlib.suppress(aiohttp.ClientError, TimeoutError, Refused):
            async with self._places:
                await self._kube.delete("Pod", metadata["namespace"], metadata["name"], grace_s=0, uid=metadata["uid"])

    def _spawn(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def running(pod: Manifest, address: str) -> Manifest:
    """The status of a pod that runs and is ready."""
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return {
        "phase": "Running",
        "startTime": now,
        "podIP": address,
        "podIPs": [{"ip": address}],
        "conditions": [
            {"type": kind, "status": "True", "lastTransitionTime": now}
            for kind in ("Initialized", "ContainersReady", "Ready")
        ],
        "containerStatuses": [
            {
                "name": container["name"],
                "image": container.get("image", ""),
                "imageID": "",
                "containerID": f"pretended://{pod['metadata']['uid']}",
                "ready": True,
                "started": True,
                "restartCount": 0,
                "state": {"running": {"startedAt": now}},
            }
            for container in pod["spec"]["containers"]
        ],
    }


def _address(number: int) -> str:
    return f"10.{128 + number // 65_536}.{number // 256 % 256}.{number % 256}"
