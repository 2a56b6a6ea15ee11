"""The operator at size: many ensembles applied at once to a real API server, and what an idle cluster costs after it.

Nodes, pods, workers and gateways are pretended; the API server, etcd, controllers, scheduler and the operator's
process are real. `python -m benchmarks.control_plane` starts a control plane of its own from KUBEBUILDER_ASSETS, in
which the operator has its own role and nothing more. `--kubeconfig FILE` takes any cluster whose nodes are said to run
their pods (kwok's do), `--toleration KEY` is for their taint.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import msgspec
from tests.support.control_plane import ASSETS, ControlPlane
from tests.support.kube_client import KubeClient

from benchmarks.operator_figures import Cost, Result, table
from benchmarks.operator_process import OperatorProcess
from benchmarks.pretend_fleet import ADMIN_PATH
from benchmarks.pretend_nodes import GPU, PretendNodes
from ensemble_operator.control.cluster import Cluster
from ensemble_operator.control.errors import ClusterError
from ensemble_operator.control.kinds import ENSEMBLE, NAMESPACE, Manifest
from ensemble_operator.control.rbac import own_rules, rules
from ensemble_operator.control.settings import Settings

NAME = "operator-at-size"
APPLY_AT_ONCE = 32
MEASUREMENTS = (
    {"batchSize": 1, "memory": "1Gi", "latency": "2ms"},
    {"batchSize": 8, "memory": "2Gi", "latency": "4ms"},
    {"batchSize": 32, "memory": "4Gi", "latency": "12ms"},
)


@dataclass(frozen=True, slots=True)
class Size:
    """What is applied: how many ensembles, of how many members, on how many devices each; and how."""

    ensembles: int
    members: int
    devices: int
    toleration: str
    within_s: float
    quiet_s: float
    idle_s: float
    workers: int


@dataclass(frozen=True, slots=True)
class Place:
    """Kubeconfigs for us and for the operator, and where logs go."""

    ours: Path
    operators: Path
    folder: Path


def resource(name: str, size: Size) -> Manifest:
    """An ensemble whose profiles are given, so that nothing is measured."""
    tolerations = [{"key": size.toleration, "operator": "Exists"}] if size.toleration else []
    return {
        "apiVersion": ENSEMBLE.api_version,
        "kind": ENSEMBLE.name,
        "metadata": {"name": name, "namespace": NAME},
        "spec": {
            "members": [
                {
                    "name": f"m{i}",
                    "model": {"uri": f"file:///models/m{i}.pt2"},
                    "profile": {"measurements": list(MEASUREMENTS)},
                }
                for i in range(size.members)
            ],
            "input": {"name": "input", "datatype": "FP32", "shape": [3, 224, 224]},
            "output": {"name": "output", "datatype": "FP32", "shape": [1000]},
            "devices": {"count": size.devices, "resource": GPU, "tolerations": tolerations},
            "batching": {"sizes": [m["batchSize"] for m in MEASUREMENTS]},
            "podTemplate": {"gateway": {"tolerations": tolerations}},
        },
    }


class Watcher:
    """Notes when each ensemble has become Ready with the plan that is wanted, and when a status changed last."""

    def __init__(self, cluster: Cluster) -> None:
        self.ready_at: dict[str, float] = {}
        self.changed_at = time.monotonic()
        self._cluster = cluster

    async def run(self) -> None:
        """Follow them until cancelled."""
        while True:
            with contextlib.suppress(ClusterError):
                listed, version = await self._cluster.list_with_version(ENSEMBLE, NAME)
                for found in listed:
                    self._note(found)
                async for change, found in self._cluster.watch(ENSEMBLE, NAME, "", version, 600):
                    if change in ("ADDED", "MODIFIED"):
                        self._note(found)
            await asyncio.sleep(0.5)

    def _note(self, found: Manifest) -> None:
        said = {c["type"]: c for c in (found.get("status") or {}).get("conditions", ())}
        self.changed_at = time.monotonic()
        if said and said["Ready"]["status"] == "True" and said["RolloutBlocked"]["reason"] == "Done":
            self.ready_at.setdefault(found["metadata"]["name"], self.changed_at)


async def measure(place: Place, size: Size) -> Result:
    """Start the operator, apply everything, wait until all is Ready, then watch it idle.

    Raises SystemExit if not all are Ready in time.
    """
    async with AsyncExitStack() as stack:
        cluster = await Cluster.connect(place.ours, None, "benchmark")
        stack.push_async_callback(cluster.close)
        fleet_url = await stack.enter_async_context(_fleet(place.folder))
        await cluster.create({"apiVersion": "v1", "kind": NAMESPACE.name, "metadata": {"name": NAME}})
        stack.push_async_callback(cluster.delete, NAMESPACE, None, NAME)
        operator = OperatorProcess(place.operators, _settings(fleet_url, size.workers), place.folder / "operator.log")
        stack.callback(operator.end)
        await operator.started()
        watcher = Watcher(cluster)
        for background in (operator.sample(), watcher.run()):
            stack.callback(asyncio.create_task(background).cancel)
        first, began = await operator.reading(), time.monotonic()
        await _apply_all(cluster, size)
        applied_s = time.monotonic() - began
        await _until_ready(cluster, watcher, size)
        ready = await operator.reading()
        await _until_quiet(watcher, size)
        quiet = await operator.reading()
        await asyncio.sleep(size.idle_s)
        last = await operator.reading()
        return Result(
            ensembles=size.ensembles,
            members=size.members,
            devices=size.devices,
            applied_s=applied_s,
            ready_s=tuple(sorted(at - began for at in watcher.ready_at.values())),
            start=Cost.between(first, ready),
            idle=Cost.between(quiet, last),
            planning_cpu_s=operator.ended_children_cpu_s(),
            peak_bytes=operator.peak_bytes,
            peak_with_planning_bytes=operator.peak_with_children_bytes,
            idle_bytes=operator.resident_bytes,
            fleet_requests=await _fleet_requests(fleet_url),
        )


def _settings(fleet_url: str, workers: int) -> dict[str, str]:
    return {
        "POD_NAMESPACE": NAME,
        "ADMIN_URL": f"{fleet_url}{ADMIN_PATH}",
        "WORKER_IMAGE": "worker:pretended",
        "GATEWAY_IMAGE": "gateway:pretended",
        "LOG_FORMAT": "text",
        "WORKERS": str(workers),
    }


@contextlib.asynccontextmanager
async def _fleet(folder: Path) -> AsyncIterator[str]:
    """The process that answers for all workers and gateways; its URL."""
    with (folder / "fleet.log").open("wb") as log:
        command = (sys.executable, "-m", "benchmarks.pretend_fleet", str(os.getpid()))
        process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE, stderr=log)
    try:
        assert process.stdout is not None
        async with asyncio.timeout(30):
            port = int(await process.stdout.readline())
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        await process.wait()


async def _fleet_requests(url: str) -> dict[str, int]:
    async with aiohttp.ClientSession() as session, session.get(f"{url}/requests") as answer:
        return msgspec.json.decode(await answer.read(), type=dict[str, int])


async def _apply_all(cluster: Cluster, size: Size) -> None:
    places = asyncio.Semaphore(APPLY_AT_ONCE)

    async def apply(name: str) -> None:
        async with places:
            await cluster.create(resource(name, size))

    await asyncio.gather(*(apply(f"e{index:03}") for index in range(size.ensembles)))


async def _until_ready(cluster: Cluster, watcher: Watcher, size: Size) -> None:
    give_up = time.monotonic() + size.within_s
    while len(watcher.ready_at) < size.ensembles:
        if time.monotonic() > give_up:
            late = [e for e in await cluster.list(ENSEMBLE, NAME) if e["metadata"]["name"] not in watcher.ready_at]
            said = msgspec.yaml.encode(late[0].get("status")).decode()
            raise SystemExit(f"{len(late)} ensembles are not Ready after {size.within_s:g} s; one of them:\n{said}")
        await asyncio.sleep(0.1)


async def _until_quiet(watcher: Watcher, size: Size) -> None:
    give_up = time.monotonic() + size.within_s
    while time.monotonic() < watcher.changed_at + size.quiet_s:
        if time.monotonic() > give_up:
            raise SystemExit(f"statuses still change {size.within_s:g} s after all were Ready")
        await asyncio.sleep(0.5)


async def measure_here(size: Size, nodes: int, gpus: int, folder: Path) -> Result:
    """The same on a control plane that is started for it.

    Raises SystemExit if there are no binaries.
    """
    binaries = os.environ.get(ASSETS, "")
    if not binaries:
        raise SystemExit(f"set {ASSETS} to the folder of etcd and kube-apiserver, or name a cluster with --kubeconfig")
    plane = ControlPlane(Path(binaries), folder / "plane")
    try:
        plane.start()
        plane.start_controllers()
        plane.start_scheduler()
        operators = plane.kubeconfig_for("operator", [*rules(), *own_rules()])
        async with KubeClient(plane.kubeconfig) as kube, PretendNodes(kube, nodes, gpus):
            return await measure(Place(plane.kubeconfig, operators, folder), size)
    finally:
        plane.end()


def main(arguments: Sequence[str]) -> int:
    """Measure, print the table and write the JSON; 0 if the memory stayed under its limit, else 3."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ensembles", type=int, default=200)
    parser.add_argument("--members", type=int, default=4, help="of each ensemble")
    parser.add_argument("--devices", type=int, default=2, help="of each ensemble")
    parser.add_argument("--workers", type=int, default=Settings().workers, help="ensembles reconciled side by side")
    parser.add_argument("--quiet", type=float, default=35.0, metavar="S", help="no news for so long: idle")
    parser.add_argument("--idle", type=float, default=60.0, metavar="S", help="how long the idle cluster is watched")
    parser.add_argument("--within", type=float, default=600.0, metavar="S", help="by when all must be Ready")
    parser.add_argument("--kubeconfig", type=Path, help="a cluster with pretended nodes (default: one is started)")
    parser.add_argument("--toleration", default="", metavar="KEY", help="the taint of its nodes")
    parser.add_argument("--nodes", type=int, default=50, help="nodes of the control plane that is started")
    parser.add_argument("--gpus", type=int, default=8, help="GPUs of each of them")
    parser.add_argument("--folder", type=Path, help="where logs are kept (default: nowhere)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure")
    args = parser.parse_args(arguments)
    size = Size(
        args.ensembles, args.members, args.devices, args.toleration, args.within, args.quiet, args.idle, args.workers
    )
    with tempfile.TemporaryDirectory(prefix="operator-at-size-") as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if args.kubeconfig is None:
            result = asyncio.run(measure_here(size, args.nodes, args.gpus, folder))
        else:
            result = asyncio.run(measure(Place(args.kubeconfig, args.kubeconfig, folder), size))
    print(table(result))
    if args.json is not None:
        args.json.write_bytes(msgspec.json.format(msgspec.json.encode(result)))
    return 0 if result.is_within_memory else 3


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
