"""Which devices are free, and what stands in the way of others."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from ensemble_operator.api import Devices
from ensemble_operator.control.inventory import ClusterView, shortage, supply

GPU = "nvidia.com/gpu"
POOL = Devices(4, GPU, "", None, None, {}, (), 0.1, 600.0)
CPU_POOL = replace(POOL, resource="cpu", cores=2.0, memory_bytes=4 << 30)


def node(name: str, gpus: int = 8, **spec: Any) -> dict[str, Any]:
    labels = {"nvidia.com/gpu.product": "H100", "nvidia.com/gpu.memory": "81559", "zone": "a"}
    allocatable = {"cpu": "15900m", "memory": "64Gi", **({GPU: str(gpus)} if gpus else {})}
    return {"metadata": {"name": name, "labels": labels}, "spec": spec, "status": {"allocatable": allocatable}}


def pod(on: str, gpus: int = 1, phase: str = "Running", **requests: str) -> dict[str, Any]:
    container = {"resources": {"limits": {GPU: str(gpus)}, "requests": requests}}
    return {"spec": {"nodeName": on, "containers": [container]}, "status": {"phase": phase}}


def test_free_is_what_nodes_offer_less_what_pods_request() -> None:
    view = ClusterView([node("n1"), node("n2", 4)], [pod("n1", 3), pod("n1", 2, phase="Succeeded"), pod("n2", 4)])
    found = supply(view, POOL)
    assert found.total == 12
    assert found.free == {"H100 (81559 MiB)": 5}


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        ({"unschedulable": True}, "cordoned"),
        ({"taints": [{"key": "dedicated", "value": "x", "effect": "NoSchedule"}]}, "with taint dedicated"),
        ({"taints": [{"key": "dedicated", "effect": "PreferNoSchedule"}]}, ""),
    ],
)
def test_nodes_that_cannot_be_used_are_left_out_and_told(spec: dict[str, Any], why: str) -> None:
    found = supply(ClusterView([node("n1", **spec)], []), POOL)
    assert found.free_count == (0 if why else 8)
    assert dict(found.left_out) == ({why: 1} if why else {})


def test_tolerations_and_selectors_are_respected() -> None:
    tainted = node("n1", taints=[{"key": "dedicated", "value": "x", "effect": "NoSchedule"}])
    equal = replace(POOL, tolerations=({"key": "dedicated", "operator": "Equal", "value": "x"},))
    other = replace(POOL, tolerations=({"key": "dedicated", "operator": "Equal", "value": "y"},))
    everything = replace(POOL, tolerations=({"operator": "Exists"},))
    view = ClusterView([tainted], [])
    assert [supply(view, pool).free_count for pool in (equal, other, everything)] == [8, 0, 8]
    assert supply(view, replace(everything, node_selector={"zone": "b"})).free_count == 0


def test_a_node_that_is_not_ready_counts_for_nothing() -> None:
    gone = node("n1")
    gone["status"]["conditions"] = [{"type": "Ready", "status": "Unknown"}]
    assert dict(supply(ClusterView([gone], []), POOL).left_out) == {"not ready": 1}


def test_cpu_devices_need_cores_and_memory() -> None:
    view = ClusterView([node("n1")], [pod("n1", cpu="4", memory="1Gi"), pod("n1", cpu="1500m")])
    assert supply(view, CPU_POOL).free_count == 5  # (15.9 - 5.5) / 2
    assert supply(view, replace(CPU_POOL, memory_bytes=60 << 30)).free_count == 1


def test_published_devices_are_counted_by_driver_with_their_memory() -> None:
    devices = [
        {
            "name": f"gpu-{number}",
            "attributes": {"productName": {"string": "H100"}},
            "capacity": {"memory": {"value": "81559Mi"}},
        }
        for number in range(3)
    ]

    def published(driver: str, where: str) -> dict[str, Any]:
        return {"spec": {"driver": driver, "nodeName": where, "pool": {"name": where}, "devices": devices}}

    slices = [
        published("gpu.nvidia.com", "n1"),
        published("gpu.nvidia.com", "n2"),
        published("net.example.com", "n1"),
    ]
    results = [{"driver": driver, "pool": "n1", "device": "gpu-1"} for driver in ("gpu.nvidia.com", "net.example.com")]
    claims: list[dict[str, Any]] = [
        {"status": {"allocation": {"devices": {"results": results}}}},
        {"status": {}},
        {"status": None},
    ]
    nodes = [node("n1"), {**node("n2"), "spec": {"unschedulable": True}}]
    found = supply(ClusterView(nodes, [], slices, claims), replace(POOL, device_class="gpu.nvidia.com"))
    assert found.free == {"H100 (81559 MiB)": 2}
    assert found.total == 3
    assert found.left_out == {"cordoned": 1}


def test_a_shortage_says_held_free_and_needed() -> None:
    found = supply(ClusterView([node("n1", 2)], [pod("n1", 1)]), POOL)
    text = shortage(POOL, 4, 1, found, "0/3 nodes are available")
    assert "1 of 4 devices held" in text
    assert "free: 1 x H100 (81559 MiB)" in text
    assert "2 more nvidia.com/gpu needed" in text
    assert "the scheduler says: 0/3 nodes are available" in text


def test_without_rights_the_scheduler_is_quoted() -> None:
    text = shortage(POOL, 2, 0, None, "0/1 nodes are available: 1 Insufficient nvidia.com/gpu.")
    assert text == ("0 of 2 devices held; the scheduler says: 0/1 nodes are available: 1 Insufficient nvidia.com/gpu.")


def test_no_gpu_nodes_at_all() -> None:
    assert "no node that may be used offers nvidia.com/gpu" in shortage(
        POOL, 2, 0, supply(ClusterView([node("n1", 0)], []), POOL), ""
    )


def test_an_amount_that_cannot_be_read_is_no_reason_to_fail() -> None:
    odd = node("n1")
    odd["status"]["allocatable"]["example.com/odd"] = "-5"
    assert supply(ClusterView([odd], []), POOL).free_count == 8
