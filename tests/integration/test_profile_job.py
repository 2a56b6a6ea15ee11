"""PUT, GET and DELETE of /v1/profile: real measuring processes beside a worker that serves."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
import torch

from ensemble_contract.plan import ModelSource
from ensemble_contract.tensors import TensorSpec
from ensemble_operator.control.book import Book
from ensemble_operator.control.colocation import assign_sharing, learn_sharing
from ensemble_operator.control.profiling import Measurer
from ensemble_operator.fleet import Fleet, ProfileReport, Unreachable
from ensemble_operator.plans import Tensors
from tests.integration.test_profiler import Wide
from tests.support import models
from tests.support.data_plane import wait_until
from tests.support.pod_worker import PodWorker

# A machine that does other things besides measures for minutes.
pytestmark = pytest.mark.timeout(900)
MEASURED_S = 280.0
IDLE: dict[str, Any] = {"id": "", "state": "idle", "results": [], "colocation": None}

X = {"name": "input", "datatype": "FP32", "shape": [64]}
Y = {"name": "output", "datatype": "FP32", "shape": [10]}


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
    assert worker.ask("GET", "/v1/profile")[1] == IDLE
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


def test_further_sizes_are_told_by_what_is_known(worker: PodWorker, tmp_path: Path) -> None:
    path = models.export_mlp(tmp_path / "m.pt2", seed=1)
    worker.ask("PUT", "/v1/profile", {"id": "quick", "tasks": [task(path, 1, 8)]})
    (first,) = done(worker)
    worker.end()
    (file,) = (file for file in tmp_path.rglob("profiles/*.json") if b'"points"' in file.read_bytes())
    kept = msgspec.json.decode(file.read_bytes())
    # As if the machine had been a thousand times slower, at the size next to the one that is measured now.
    kept["points"][1]["latencyS"] *= 1000
    file.write_bytes(msgspec.json.encode(kept))
    again = PodWorker(tmp_path, "pod-0", device=("cpu-0", "--threads", "1", "--memory", str(4 << 30)))
    try:
        again.wait_up()
        again.ask("PUT", "/v1/profile", {"id": "all", "tasks": [task(path, 1, 8, 16)]})
        (whole,) = done(again)
    finally:
        again.end()
    assert [point["batchSize"] for point in whole["points"]] == [1, 8, 16]
    assert 100 < whole["points"][2]["latencyS"] / first["points"][1]["latencyS"] < 10_000


def sharing(*paths: Path, budget_s: float = 1.0, size: int = 8) -> dict[str, Any]:
    """Members to run together. Budget and size as the order's."""
    members = [
        {"source": task(path, 1, name=path.stem)["source"], "inputs": [X], "outputs": [Y], "batchSize": size}
        for path in paths
    ]
    return {"members": members, "budgetS": budget_s}


def shared(worker: PodWorker) -> dict[str, Any]:
    done(worker)
    found: dict[str, Any] = worker.ask("GET", "/v1/profile")[1]["colocation"]
    assert found["finished"]
    return found


def test_members_are_run_together_after_the_others_and_once(worker: PodWorker, tmp_path: Path) -> None:
    paths = [models.export_mlp(tmp_path / f"{name}.pt2", seed=seed) for seed, name in enumerate("ab")]
    order = {"id": "a", "tasks": [task(paths[0], 1)], "colocation": sharing(*paths)}
    status, begun = worker.ask("PUT", "/v1/profile", order)
    assert (status, begun["colocation"]["factor"], begun["colocation"]["finished"]) == (202, None, False)
    found = shared(worker)
    assert (found["error"], len(found["alone"]), len(found["together"])) == (None, 2, 2)
    assert found["factor"] > 0
    assert worker.ask("GET", "/v1/profile")[1]["results"][0]["points"]
    # Of a class it is known once: another pair, or after a restart.
    worker.ask("PUT", "/v1/profile", {"id": "b", "tasks": [], "colocation": sharing(*reversed(paths))})
    assert shared(worker) == found
    worker.end()
    again = PodWorker(tmp_path, "pod-0", device=("cpu-0", "--threads", "1", "--memory", str(4 << 30)))
    try:
        again.wait_up()
        again.ask("PUT", "/v1/profile", order)
        assert shared(again) == found
        # Both write to one log.
        assert again.text().count("measuring a, b together") == 1
    finally:
        again.end()


async def test_the_operator_has_it_measured_and_learns_the_factor(worker: PodWorker, tmp_path: Path) -> None:
    """With the operator's own client and job; on a share of CPU cores, of which it would not ask it."""
    sources = {
        name: ModelSource(name, name, models.export_mlp(tmp_path / f"{name}.pt2", seed=1).as_uri(), "torch-export")
        for name in "ab"
    }
    tensors = Tensors((TensorSpec("input", "FP32", (64,)),), (TensorSpec("output", "FP32", (10,)),), {})
    address, fleet = f"tcp://127.0.0.1:{worker.admin_port}", Fleet()
    try:
        device = worker.ask("GET", "/v1/device")[1]
        device_class, libraries = device["deviceClass"], device["libraries"]
        book = Book().with_running([(device_class, libraries)])
        idle = Measurer("pod-0", device_class, ProfileReport(), libraries)
        rows = {device_class: {"a": 1, "b": 4}}
        job = assign_sharing(rows, sources, tensors, [idle], {}, book)["pod-0"]
        assert job.colocation is not None
        quick = msgspec.structs.replace(job.colocation, budget_s=1.0)
        await fleet.put_profile(address, msgspec.structs.replace(job, colocation=quick))
        async with asyncio.timeout(MEASURED_S):
            while not book.sharing:
                await asyncio.sleep(0.2)
                # It may take longer to answer than the operator waits, and is asked again.
                with contextlib.suppress(Unreachable):
                    seen = replace(idle, report=await fleet.profile(address))
                    book = learn_sharing(book, [seen], 0.0)
    finally:
        await fleet.close()
    assert book.factors()[device_class] > 0, book.sharing


def test_members_that_cannot_be_run_together_are_a_result_and_tried_again(worker: PodWorker, tmp_path: Path) -> None:
    good, missing = models.export_mlp(tmp_path / "good.pt2", seed=1), tmp_path / "missing.pt2"
    order = {"tasks": [], "colocation": sharing(good, missing)}
    worker.ask("PUT", "/v1/profile", {"id": "a", **order})
    found = shared(worker)
    assert found["factor"] is None
    assert "member 'missing'" in found["error"]
    missing.write_bytes(good.read_bytes())
    worker.ask("PUT", "/v1/profile", {"id": "a", **order})
    assert shared(worker) == found
    worker.ask("PUT", "/v1/profile", {"id": "b", **order})
    assert shared(worker)["factor"] > 0


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
                assert worker.ask("DELETE", "/v1/profile")[1] == IDLE
                assert children(worker) == []
            worker.ask("PUT", "/v1/profile", {"id": "d", "tasks": [hanging]})
            last, _ = server.accept()
            with last:
                (child,) = children(worker)
                worker.process.terminate()
                assert worker.wait() == 0
            wait_until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)


def test_a_size_that_ran_out_of_memory_is_not_run_again(tmp_path: Path) -> None:
    path = models.export_module(tmp_path / "wide.pt2", Wide().eval(), [torch.zeros(2, 1)])
    order = {"id": "a", "tasks": [task(path, 1, 128, budget_s=60.0)]}
    worker = PodWorker(tmp_path, "pod-0", device=("cpu-0", "--threads", "1", "--memory", str(800 << 20)))
    try:
        worker.wait_up()
        worker.ask("PUT", "/v1/profile", order)
        (before,) = done(worker)
        assert "does not fit in memory with 128 rows" in before["error"]
        assert ([one["batchSize"] for one in before["points"]], before["sizes"]) == ([1], [1, 128])
        worker.ask("PUT", "/v1/profile", order | {"id": "b"})
        (after,) = done(worker)
        assert after | {"downloadedBytes": None} == before | {"downloadedBytes": None}
        assert worker.text().count("measuring cat") == 1
    finally:
        worker.end()


def test_too_little_memory_beside_what_runs_is_a_result(tmp_path: Path) -> None:
    worker = PodWorker(tmp_path, "pod-0", device=("cpu-0", "--threads", "1", "--memory", str(64 << 20)))
    try:
        worker.wait_up()
        path = models.export_mlp(tmp_path / "m.pt2", seed=1)
        worker.ask("PUT", "/v1/profile", {"id": "a", "tasks": [task(path, 1)]})
        (found,) = done(worker)
        assert "give the device more memory, or the member a profile" in found["error"]
        worker.ask("PUT", "/v1/profile", {"id": "b", "tasks": [], "colocation": sharing(path, path)})
        assert "m, m cannot be run together: beside what runs here" in shared(worker)["error"]
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
        ({"tasks": [], "colocation": sharing(Path("/m.pt2"))}, "colocation.members: 2 to 256 share a device, got 1"),
        ({"tasks": [], "colocation": sharing(Path("/m.pt2"), Path("/m.pt2"), size=0)}, "batchSize of 'm': not in 1.."),
        ({"tasks": [], "colocation": sharing(Path("/m.pt2"), Path("/m.pt2"), budget_s=61)}, "colocation.budgetS: 61"),
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
