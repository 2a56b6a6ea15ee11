"""Resources and observations for the tests of the reconcile's pure parts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ensemble_operator.api import InferenceEnsemble, parse
from ensemble_operator.control.book import Book, Known
from ensemble_operator.control.observe import GatewayView, Observed, WorkerView
from ensemble_operator.control.pods import Pod
from ensemble_operator.control.target import Mirror
from ensemble_operator.fleet import DeviceReport, GatewayState, InstanceReport, MemberState, WorkerReport
from ensemble_operator.profiles.measurements import Point

MIB = 1 << 20
CLASS = "cpu-1"


def ensemble(
    *names: str, inputs: bool = True, metadata: Mapping[str, Any] | None = None, **spec: Any
) -> InferenceEnsemble:
    """An ensemble of members without profiles."""
    document: dict[str, Any] = {
        "apiVersion": "ensemble-operator.io/v1alpha1",
        "kind": "InferenceEnsemble",
        "metadata": {"name": "tiny", "namespace": "default", **(metadata or {})},
        "spec": {
            "members": [{"name": name, "model": {"uri": f"file:///models/{name}.pt2"}} for name in names or ("a", "b")],
            "devices": {"count": 2, "resource": "cpu", "cores": "1", "memory": "1Gi"},
            "batching": {"sizes": [1, 8, 32]},
            **spec,
        },
    }
    if inputs:
        document["spec"] |= {
            "input": {"name": "x", "datatype": "FP32", "shape": [4]},
            "output": {"name": "y", "datatype": "FP32", "shape": [2]},
        }
    return parse(document)


def profiled(name: str, *, latency: str = "1ms", memory: str = "64Mi", version: str = "1") -> dict[str, Any]:
    """A member that declares its profile."""
    return {
        "name": name,
        "model": {"uri": f"file:///models/{name}.pt2", "version": version},
        "profile": {"measurements": [{"batchSize": 1, "memory": memory, "latency": latency}]},
    }


def pod(name: str = "tiny-worker-0", **changes: Any) -> Pod:
    """A pod that is Ready."""
    parts: dict[str, Any] = {
        "name": name,
        "uid": f"uid-{name}",
        "component": "worker",
        "pool": 0,
        "ordinal": int(name.rpartition("-")[2]) if name.rpartition("-")[2].isdigit() else 0,
        "ip": "10.0.0.1",
        "node": "node-1",
        "template": "t1",
        "life": f"{name} 0",
        "ready": True,
        "created": 0.0,
        "away_since": None,
        "leaving_since": None,
    }
    return Pod(**{**parts, **changes})


def worker(name: str = "tiny-worker-0", *instances: tuple[str, str, int, str], **changes: Any) -> WorkerView:
    """A worker that holds a CPU device of 1 GiB; instances as (member, digest, batch size, state)."""
    device = DeviceReport("cpu-0", "cpu", CLASS, 1024 * MIB, 100 * MIB)
    reported = tuple(
        InstanceReport(member, digest, size, state, "it broke" if state == "failed" else None)
        for member, digest, size, state in instances
    )
    parts: dict[str, Any] = {"pod": pod(name), "device": device, "report": WorkerReport(1, reported)}
    return WorkerView(**{**parts, **changes})


def gateway(generation: int, *, retiring: int = 0, members: Iterable[str] = (), **changes: Any) -> GatewayView:
    """A gateway that serves a plan."""
    states = tuple(MemberState(name, live=True, instances=1) for name in members)
    state = GatewayState(generation, True, "http://here", states, newest=generation, retiring=retiring)
    parts: dict[str, Any] = {"pod": pod("tiny-gateway-x", component="gateway"), "state": state}
    return GatewayView(**{**parts, **changes})


def observed(
    workers: Iterable[WorkerView] = (), gateways: Iterable[GatewayView] = (), mirror: Mirror | None = None
) -> Observed:
    """An observation."""
    return Observed(tuple(workers), tuple(gateways), mirror or Mirror(), Book(), {}, {})


def known(*sizes: int, memory_bytes: int = 64 * MIB, **changes: Any) -> Known:
    """What is known of a version that was measured at some batch sizes."""
    points = tuple(Point(size, 1000.0 * size, 1e-3, memory_bytes) for size in sizes)
    return Known(CLASS, points=points, tried=sizes, **changes)
