"""The device of a worker in a pod: a share of CPU cores, a GPU that is not there, and IPv6."""

from __future__ import annotations

import contextlib
import socket
from pathlib import Path

import pytest
import torch

from ensemble_contract.plan import Instance, WorkerPlan, encode_plan
from ensemble_contract.pod import CPU_INSTEAD_OF_GPU
from tests.support.plane_members import X, Y, write_models
from tests.support.pod_worker import PodWorker


def test_a_share_of_cores_is_what_the_arguments_say(tmp_path: Path) -> None:
    """Equal pods have one class, wherever they run."""
    worker = PodWorker(tmp_path, "pod-0", device=("cpu-0", "--threads", "3", "--memory", str(1 << 30)))
    try:
        worker.wait_up()
        status, device = worker.ask("GET", "/v1/device")
        assert status == 200
        assert device.pop("overheadBytes") > 50 << 20
        assert device.pop("libraries").startswith(f"torch {torch.__version__.partition('+')[0]}")
        assert device == {
            "name": "cpu-0", "kind": "cpu", "index": 0, "deviceClass": "cpu-3", "cores": [], "threads": 3,
            "capacityBytes": 1 << 30, "uuid": "", "error": None,
        }  # fmt: skip
    finally:
        worker.end()


def test_a_gpu_that_is_not_there_is_said_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pod does not crash again and again: who asks learns what to do."""
    monkeypatch.delenv(CPU_INSTEAD_OF_GPU, raising=False)
    models = write_models(tmp_path)
    worker = PodWorker(tmp_path, "pod-0", device=("cuda-77",))
    try:
        worker.wait_up()
        device = worker.ask("GET", "/v1/device")[1]
        assert (device["name"], device["kind"], device["capacityBytes"]) == ("cuda-77", "none", 0)
        for remedy in ("device plugin", "runtimeClassName", "NVIDIA container toolkit", CPU_INSTEAD_OF_GPU):
            assert remedy in device["error"]
        plan = WorkerPlan(1, "any", "pod-0", X, Y, (models["times1"],), (Instance("times1", 8),))
        assert worker.ask("PUT", "/v1/plan", encode_plan(plan))[0] == 202
        worker.wait_states({"times1": "failed"})
        assert "no GPU is visible" in worker.plan()["instances"][0]["error"]
        status, refused = worker.ask("PUT", "/v1/profile", {"tasks": []})
        assert (status, "no GPU is visible" in refused["error"]) == (409, True)
        assert worker.ask("GET", "/metrics")[0] == 200
        worker.process.terminate()
        assert worker.wait() == 0
    finally:
        worker.end()
    assert "Traceback" not in worker.text()


def test_cpu_cores_instead_of_a_gpu_where_that_is_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CPU_INSTEAD_OF_GPU, "1")
    models = write_models(tmp_path)
    worker = PodWorker(tmp_path, "pod-0", device=("cuda-77",))
    try:
        worker.wait_up()
        device = worker.ask("GET", "/v1/device")[1]
        assert (device["kind"], device["error"]) == ("cpu", None)
        assert device["deviceClass"] == f"cpu-{device['threads']}"
        assert "CPU cores are taken instead" in worker.text()
        plan = WorkerPlan(1, "any", "pod-0", X, Y, (models["times1"],), (Instance("times1", 8),))
        assert worker.ask("PUT", "/v1/plan", encode_plan(plan))[0] == 202
        worker.wait_states({"times1": "ready"})
    finally:
        worker.end()


def has_ipv6() -> bool:
    with contextlib.suppress(OSError), socket.create_server(("::1", 0), family=socket.AF_INET6):
        return True
    return False


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6 loopback")
def test_ipv6_addresses(tmp_path: Path) -> None:
    models = write_models(tmp_path)
    worker = PodWorker(tmp_path, "pod-0", host="::1")
    try:
        worker.wait_up()
        plan = WorkerPlan(1, "any", "pod-0", X, Y, (models["times1"],), (Instance("times1", 8),))
        assert worker.ask("PUT", "/v1/plan", encode_plan(plan))[0] == 202
        worker.wait_states({"times1": "ready"})
        with socket.create_connection(("::1", worker.ports[1]), 5) as connection:
            assert connection.recv(10)[:1] == b"\xff"  # ZMTP's greeting (RFC 23)
    finally:
        worker.end()
