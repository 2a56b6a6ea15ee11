"""PUT, GET and DELETE of /v1/profile: real measuring processes beside a worker that serves."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support import models
from tests.support.data_plane import wait_until
from tests.support.pod_worker import PodWorker

MEASURED_S = 90.0


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[PodWorker]:
    found = PodWorker(tmp_path, "pod-0", device=("cpu-0", "--threads", "1", "--memory", str(4 << 30)))
    try:
        found.wait_up()
        yield found
    finally:
        found.end()
    assert "Traceback" not in found.text()


def task(path: Path, *sizes: int, name: str = "cat", budget_s: float = 1.0, **more: Any) -> dict[str, Any]:
    model_format = {".pt2": "torch-export", ".pt": "torchscript"}[path.suffix]
    source = {"name": name, "digest": f"digest-{name}", "uri": path.as_uri(), "format": model_format}
    return {"source": source, "inputs": [], "outputs": [], "sizes": sizes, "budgetS": budget_s, **more}


def done(worker: PodWorker) -> list[dict[str, Any]]:
    """The results, when there are all."""
    wait_until(lambda: worker.ask("GET", "/v1/profile")[1]["state"] == "done", MEASURED_S)
    found: list[dict[str, Any]] = worker.ask("GET", "/v1/profile")[1]["results"]
    assert all(one["finished"] for one in found)
    return found


def children(worker: PodWorker) -> list[psutil.Process]:
    return psutil.Process(worker.process.pid).children()


def test_first_the_smallest_size_then_the_others_and_nothing_twice(worker: PodWorker, tmp_path: Path) -> None:
    assert worker.ask("GET", "/v1/profile")[1] == {"id": "", "state": "idle", "results": []}
    path = models.export_mlp(tmp_path / "m.pt2", seed=1)
    quick = {"id": "quick", "tasks": [task(path, 1)]}
    status, begun = worker.ask("PUT", "/v1/profile", quick)
    assert (status, begun["id"], begun["state"]) == (202, "quick", "running")
    assert worker.ask("PUT", "/v1/profile", quick)[1]["state"] == "running"
    assert len(children(worker)) <= 1
    (first,) = done(worker)
    assert (first["member"], first["digest"], first["error"]) == ("cat", "digest-cat", None)
    assert first["signature"]["inputs"] == [{"name": "input", "datatype": "FP32", "shape": [64]}]
    assert first["overheadBytes"] > 50 << 20
    (point,) = first["points"]
    assert point["batchSize"] == 1
    assert min(point["rowsPerS"], point["latencyS"], point["memoryBytes"]) > 0

    worker.ask("PUT", "/v1/profile", {"id": "all", "tasks": [task(path, 1, 8, 4)]})
    (whole,) = done(worker)
    assert [one["batchSize"] for one in whole["points"]] == [1, 4, 8]
    assert whole["points"][0] == point
    metrics = worker.ask("GET", "/metrics")[1]
    assert 'ensemble_worker_profile_points_total{device="cpu-0"} 3' in metrics


def test_a_restarted_worker_knows_what_was_measured(worker: PodWorker, tmp_path: Path) -> None:
    path = models.export_mlp(tmp_path / "m.pt2", seed=1)
    order = {"id": "a", "tasks": [task(path, 1, 4)]}
    worker.ask("PUT", "/v1/profile", order)
    before = done(worker)
    worker.end()
    again = PodWorker(tmp_path, "pod-0", device=("cpu-0", "--threads", "1", "--memory", str(4 << 30)))
    try:
        again.wait_up()
        again.ask("PUT", "/v1/profile", order)
        assert [one | {"downloadedBytes": None} for one in done(again)] == before
        # Both write to one log.
        assert again.text().count("measuring cat") == 1
    finally:
        again.end()


def test_what_goes_wrong_is_a_result_and_the_others_go_on(worker: PodWorker, tmp_path: Path) -> None:
    bad = tmp_path / "bad.pt2"
    bad.write_text("no model")
    missing = tmp_path / "missing.pt2"
    tasks = [task(bad, 1, name="bad"), task(missing, 1, name="missing")]
    worker.ask("PUT", "/v1/profile", {"id": "a", "tasks": tasks})
    results = {one["member"]: one for one in done(worker)}
    assert "member 'bad'" in results["bad"]["error"]
    assert "there is no file" in results["missing"]["error"]
    assert results["bad"]["points"] == results["missing"]["points"] == []
    # Asked for again by another name, what failed is tried again.
    missing.write_bytes(models.export_mlp(tmp_path / "m.pt2", seed=1).read_bytes())
    worker.ask("PUT", "/v1/profile", {"id": "a", "tasks": tasks})
    assert worker.ask("GET", "/v1/profile")[1]["state"] == "done"
    worker.ask("PUT", "/v1/profile", {"id": "b", "tasks": tasks})
    assert {one["member"]: one for one in done(worker)}["missing"]["points"]


def test_a_job_that_is_ended_or_replaced_leaves_no_process(worker: PodWorker, tmp_path: Path) -> None:
    """The measuring process hangs on a server that does not answer; it runs at the least priority."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(MEASURED_S)
        uri = f"http://127.0.0.1:{server.getsockname()[1]}/m.pt2"
        hanging = task(tmp_path / "m.pt2", 1)
        hanging["source"]["uri"] = uri
        worker.ask("PUT", "/v1/profile", {"id": "a", "tasks": [hanging]})
        connection, _ = server.accept()
        with connection:
            (child,) = children(worker)
            assert child.nice() == 19
            path = models.export_mlp(tmp_path / "n.pt2", seed=1)
            worker.ask("PUT", "/v1/profile", {"id": "b", "tasks": [task(path, 1, name="other")]})
            assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE
            assert [one["member"] for one in done(worker)] == ["other"]
            worker.ask("PUT", "/v1/profile", {"id": "c", "tasks": [hanging]})
            again, _ = server.accept()
            with again:
                (child,) = children(worker)
                assert worker.ask("DELETE", "/v1/profile")[1] == {"id": "", "state": "idle", "results": []}
                assert children(worker) == []
            worker.ask("PUT", "/v1/profile", {"id": "d", "tasks": [hanging]})
            last, _ = server.accept()
            with last:
                (child,) = children(worker)
                worker.process.terminate()
                assert worker.wait() == 0
            wait_until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)


def test_too_little_memory_beside_what_runs_is_a_result(tmp_path: Path) -> None:
    worker = PodWorker(tmp_path, "pod-0", device=("cpu-0", "--threads", "1", "--memory", str(64 << 20)))
    try:
        worker.wait_up()
        path = models.export_mlp(tmp_path / "m.pt2", seed=1)
        worker.ask("PUT", "/v1/profile", {"id": "a", "tasks": [task(path, 1)]})
        (found,) = done(worker)
        assert "give the device more memory, or the member a profile" in found["error"]
    finally:
        worker.end()


@pytest.mark.parametrize(
    ("order", "text"),
    [
        (b"{", "truncated"),
        ({}, "required field `tasks`"),
        ({"tasks": [{"source": {"name": "a"}, "sizes": [1]}]}, "$.tasks[0].source"),
        ({"tasks": [task(Path("/m.pt2"))]}, "sizes of 'cat': at least one"),
        ({"tasks": [task(Path("/m.pt2"), 0)]}, "each in 1..65536"),
        ({"tasks": [task(Path("/m.pt2"), 1, budget_s=-1.0)]}, "budgetS of 'cat'"),
    ],
)
def test_what_is_no_order_is_refused(refusing: PodWorker, order: Any, text: str) -> None:
    status, answer = refusing.ask("PUT", "/v1/profile", order)
    assert (status, text in answer["error"]) == (400, True), answer
    assert refusing.ask("GET", "/v1/profile")[1]["state"] == "idle"


@pytest.fixture(scope="module")
def refusing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PodWorker]:
    found = PodWorker(tmp_path_factory.mktemp("refusing"), "pod-0")
    try:
        found.wait_up()
        yield found
    finally:
        found.end()
