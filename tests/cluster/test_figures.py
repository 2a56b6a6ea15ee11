"""The figures of docs/operating.md, measured anew: `make cluster-test ARGS="-k figures"` prints them at its end.

How long it takes from `helm install` to the first Ready ensemble, and what the operator's pod takes while ten are idle.
"""

from __future__ import annotations

import datetime
import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import pytest

from tests.cluster.cluster import Cluster, until
from tests.cluster.conftest import released, restricted_namespace
from tests.cluster.serving import Ensemble, serve_models, spec_of

READY_S = 90.0
IDLE_BYTES = 120 << 20
PROFILE = {"measurements": [{"batchSize": 1, "memory": "16Mi", "latency": "1ms"}]}
IDLE_CORES = 0.01
ENSEMBLES = 10
SETTLED_S = 300.0
WINDOW_S = 60.0
# The planning process ends 30 s after the last plan.
IDLE_WITHIN_S = 300.0
# A kubelet looks this often, and the page of metrics costs the operator something too.
BETWEEN_S = 10.0
MIB = 1 << 20

pytestmark = pytest.mark.timeout(700)


@dataclass(frozen=True, slots=True)
class Installed:
    """A release of the chart with its first ensemble, and how long it took from `helm install` until that was Ready."""

    system: str
    ensemble: Ensemble
    ready_s: float


@dataclass(frozen=True, slots=True)
class Reading:
    """What a pod has taken until `at_s`, by its node's kubelet, and its process's resident memory, by its metrics.

    `memory_bytes` is the pod's own memory; `with_files_bytes` is what `kubectl top` shows, with files read from disk.
    """

    at_s: float
    cpu_s: float
    memory_bytes: int
    with_files_bytes: int
    process_bytes: int


@dataclass(frozen=True, slots=True)
class Window:
    """What a pod took from the first to the last of several readings."""

    readings: tuple[Reading, ...]

    @property
    def seconds(self) -> float:
        """How long it is."""
        return self.readings[-1].at_s - self.readings[0].at_s

    @property
    def cores(self) -> float:
        """CPU seconds per second."""
        return (self.readings[-1].cpu_s - self.readings[0].cpu_s) / self.seconds

    @property
    def memory_bytes(self) -> int:
        """The most at any time, by whoever counts more."""
        return max(max(one.memory_bytes, one.process_bytes) for one in self.readings)

    def __str__(self) -> str:
        last = self.readings[-1]
        own, process, whole = (n / MIB for n in (last.memory_bytes, last.process_bytes, last.with_files_bytes))
        memory = f"{own:.0f} MiB of its own, process {process:.0f} MiB, with files {whole:.0f} MiB"
        return f"{self.seconds:.0f} s: {100 * self.cores:.2f} % of a core; {memory}"


@pytest.fixture(scope="module")
def installed(cluster: Cluster, namespace: str) -> Iterator[Installed]:
    """The chart as installed by default, and one ensemble whose model is in the cluster."""
    serve_models(cluster, namespace, {"two": 2.0})
    system = restricted_namespace(cluster, "system")
    began = time.monotonic()
    with released(cluster, system):
        first = applied(cluster, namespace, 0)
        first.settled(1)
        yield Installed(system, first, time.monotonic() - began)
        cluster.kubectl("delete", "inferenceensembles", "--all", "-n", namespace)


def applied(cluster: Cluster, namespace: str, index: int) -> Ensemble:
    """One more ensemble: one member, one device, one gateway. Only the first one's member is measured."""
    spec = spec_of({"two": "http://models:8080/two.onnx"}, {"two": 1.0}, 1)
    small = {"devices": {**spec["devices"], "cores": "20m"}, "gateway": {"replicas": 1}}
    if index:
        spec["batching"]["sizes"] = [1]
        spec["members"][0]["profile"] = PROFILE
    found = Ensemble(cluster, namespace, f"idle-{index}")
    found.apply({**spec, **small})
    return found


def reading(cluster: Cluster, namespace: str, pod: str) -> Reading:
    """What the pod of one container has taken until now."""
    node = cluster.get("pod", pod, "-n", namespace)["spec"]["nodeName"]
    summary = json.loads(cluster.kubectl("get", "--raw", f"/api/v1/nodes/{node}/proxy/stats/summary"))
    [found] = [
        one for one in summary["pods"] if (one["podRef"]["namespace"], one["podRef"]["name"]) == (namespace, pod)
    ]
    [container] = found["containers"]
    page = cluster.kubectl("get", "--raw", f"/api/v1/namespaces/{namespace}/pods/{pod}:9090/proxy/metrics")
    resident = re.search(r"^process_resident_memory_bytes (\S+)$", page, re.MULTILINE)
    assert resident is not None, page
    return Reading(
        datetime.datetime.fromisoformat(container["cpu"]["time"]).timestamp(),
        container["cpu"]["usageCoreNanoSeconds"] * 1e-9,
        container["memory"]["rssBytes"],
        container["memory"]["workingSetBytes"],
        int(float(resident[1])),
    )


def latest_window(readings: Sequence[Reading]) -> Window | None:
    """The readings of the last WINDOW_S or a little more; None before so much time has passed."""
    for index in reversed(range(len(readings))):
        if readings[-1].at_s - readings[index].at_s >= WINDOW_S:
            return Window(tuple(readings[index:]))
    return None


def test_the_first_ensemble_is_ready_in_time(installed: Installed, record: Callable[[str], None]) -> None:
    record(f"from helm install to the first Ready ensemble: {installed.ready_s:.1f} s")
    assert installed.ready_s < READY_S


def test_the_operator_idles_beside_ten_ensembles(
    cluster: Cluster, installed: Installed, record: Callable[[str], None]
) -> None:
    namespace, system = installed.ensemble.namespace, installed.system
    for ensemble in [applied(cluster, namespace, index) for index in range(1, ENSEMBLES)]:
        ensemble.settled(1, SETTLED_S)
    [operator] = cluster.get("pods", "-n", system, "-l", "app.kubernetes.io/component=operator")["items"]
    readings: list[Reading] = []

    def idle() -> Window | None:
        time.sleep(BETWEEN_S)
        readings.append(reading(cluster, system, operator["metadata"]["name"]))
        found = latest_window(readings)
        return found if found and found.cores < IDLE_CORES and found.memory_bytes < IDLE_BYTES else None

    found = until(idle, IDLE_WITHIN_S, "the operator idles", lambda: latest_window(readings))
    record(f"the operator beside {ENSEMBLES} idle ensembles, {found}")
