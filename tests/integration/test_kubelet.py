"""The node without containers that other tests stand on: scheduling, files, probes, restarts, deletion."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import aiohttp
import pytest

from tests.support.control_plane import ControlPlane
from tests.support.kube_client import KubeClient, Manifest, condition_of, is_ready
from tests.support.kubelet import Kubelet

WITHIN_S = 60.0
SERVER = """
import http.server, os, pathlib, sys
host, folder = sys.argv[1].split(":")[0], pathlib.Path(sys.argv[2])
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/die":
            os._exit(3)
        file = folder / "said"
        body = f"{os.environ['POD_NAME']} {file.read_text() if file.exists() else None}".encode()
        self.send_response(503 if b"sick" in body else 200)
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *_): pass
print("serving", flush=True)
http.server.HTTPServer((host, 8000), Handler).serve_forever()
"""


def stateful_set(namespace: str, replicas: int, **pod: object) -> Manifest:
    probe = {"httpGet": {"path": "/", "port": "http"}, "periodSeconds": 1}
    container = {
        "name": "server",
        "image": "none",
        "command": ["python", "-c", SERVER, "0.0.0.0:8000", "/etc/said"],
        "env": [{"name": "POD_NAME", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}}],
        "ports": [{"name": "http", "containerPort": 8000}],
        "volumeMounts": [{"name": "said", "mountPath": "/etc/said"}],
        "readinessProbe": {**probe, "failureThreshold": 1},
        "livenessProbe": {**probe, "failureThreshold": 60},
        "resources": {"limits": {"nvidia.com/gpu": "1"}},
    }
    volumes = [{"name": "said", "configMap": {"name": "said", "optional": True}}]
    template = {"metadata": {"labels": {"app": "s"}}, "spec": {"containers": [container], "volumes": volumes, **pod}}
    return {
        "apiVersion": "apps/v1",
        "kind": "StatefulSet",
        "metadata": {"name": "s", "namespace": namespace},
        "spec": {
            "replicas": replicas,
            "podManagementPolicy": "Parallel",
            "selector": {"matchLabels": {"app": "s"}},
            "template": template,
        },
    }


pytestmark = pytest.mark.timeout(300)


@pytest.fixture
async def kube(control_plane: ControlPlane) -> AsyncIterator[KubeClient]:
    control_plane.start_controllers()
    control_plane.start_scheduler()
    async with KubeClient(control_plane.kubeconfig) as client:
        yield client


async def fetch(ip: str, path: str = "/") -> str:
    async with aiohttp.ClientSession() as session, session.get(f"http://{ip}:8000{path}") as response:
        return await response.text()


async def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WITHIN_S
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.05)


async def test_pods_run_where_they_fit_and_are_told_what_their_objects_hold(kube: KubeClient, namespace: str) -> None:
    async with Kubelet(kube, namespace, gpus=1) as node:
        await kube.apply(stateful_set(namespace, 2))
        first = await kube.wait_for("Pod", namespace, "s-0", is_ready, WITHIN_S)
        assert first is not None
        assert await fetch(first["status"]["podIP"]) == "s-0 None"
        waiting = await kube.wait_for(
            "Pod", namespace, "s-1", lambda p: "GPU" in condition_of(p, "PodScheduled").get("message", "").upper()
        )
        assert condition_of(waiting, "PodScheduled")["reason"] == "Unschedulable"

        said = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "said", "namespace": namespace}}
        await kube.apply({**said, "data": {"said": "hello"}})
        ip = node.pods["s-0"].ip
        deadline = time.monotonic() + WITHIN_S
        while await fetch(ip) != "s-0 hello":
            assert time.monotonic() < deadline
            await asyncio.sleep(0.05)

        await kube.apply({**said, "data": {"said": "sick"}})
        await kube.wait_for("Pod", namespace, "s-0", lambda p: not is_ready(p))
        await kube.apply({**said, "data": {"said": "well"}})
        await kube.wait_for("Pod", namespace, "s-0", is_ready)


async def test_a_process_that_ends_is_started_again_and_its_last_words_are_kept(
    kube: KubeClient, namespace: str
) -> None:
    async with Kubelet(kube, namespace, gpus=1) as node:
        await kube.apply(stateful_set(namespace, 1))
        await kube.wait_for("Pod", namespace, "s-0", is_ready, WITHIN_S)
        with pytest.raises(aiohttp.ClientError):
            await fetch(node.pods["s-0"].ip, "/die")
        pod = await kube.wait_for(
            "Pod", namespace, "s-0", lambda p: bool(p and p["status"]["containerStatuses"][0]["restartCount"])
        )
        assert pod is not None
        ended = pod["status"]["containerStatuses"][0]["lastState"]["terminated"]
        assert (ended["exitCode"], ended["message"]) == (3, "serving\n")
        await kube.wait_for("Pod", namespace, "s-0", is_ready)


async def test_a_deleted_pod_ends_within_its_grace_and_is_replaced(kube: KubeClient, namespace: str) -> None:
    async with Kubelet(kube, namespace, gpus=1) as node:
        await kube.apply(stateful_set(namespace, 1))
        before = await kube.wait_for("Pod", namespace, "s-0", is_ready, WITHIN_S)
        assert before is not None
        process = node.pods["s-0"].process
        assert process is not None
        await kube.delete("Pod", namespace, "s-0")
        uid = before["metadata"]["uid"]
        await kube.wait_for("Pod", namespace, "s-0", lambda p: is_ready(p) and p["metadata"]["uid"] != uid, WITHIN_S)  # type: ignore[index]
        assert process.returncode is not None
        assert not Path(f"/proc/{process.pid}").exists()


async def test_a_node_that_is_gone_leaves_its_pods_behind(kube: KubeClient, namespace: str) -> None:
    async with Kubelet(kube, namespace, gpus=1) as node:
        await kube.apply(stateful_set(namespace, 1))
        await kube.wait_for("Pod", namespace, "s-0", is_ready, WITHIN_S)
        process = node.pods["s-0"].process
        assert process is not None
        await node.cut()
        await until(lambda: process.returncode is not None)
        await kube.delete("Pod", namespace, "s-0")
        stuck = await kube.get("Pod", namespace, "s-0")
        assert stuck is not None
        assert stuck["metadata"]["deletionTimestamp"]


async def test_pods_outlive_the_api_server_and_its_history(
    control_plane: ControlPlane, kube: KubeClient, namespace: str
) -> None:
    async with Kubelet(kube, namespace, gpus=2) as node:
        await kube.apply(stateful_set(namespace, 1))
        before = await kube.wait_for("Pod", namespace, "s-0", is_ready, WITHIN_S)
        assert before is not None
        control_plane.kill_api_server()
        assert await fetch(node.pods["s-0"].ip) == "s-0 None"
        control_plane.start_api_server()
        control_plane.compact()
        control_plane.restart_api_server()
        await kube.apply(stateful_set(namespace, 2))
        await kube.wait_for("Pod", namespace, "s-1", is_ready, WITHIN_S)
        after = await kube.get("Pod", namespace, "s-0")
        assert after is not None
        assert after["metadata"]["uid"] == before["metadata"]["uid"]
        assert node.pods["s-0"].restarts == 0
        await kube.delete("Pod", namespace, "s-1")
        await kube.delete("StatefulSet", namespace, "s")
        await until(lambda: not node.pods)
