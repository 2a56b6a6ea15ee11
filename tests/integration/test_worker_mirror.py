"""A worker in a pod: plans from the mirror, from its state folder and pushed; the highest generation wins."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest

from ensemble_contract.plan import EnsemblePlan, ModelSource, WorkerAddress, encode_plan
from tests.support.data_plane import gateway_plan, serving, wait_until
from tests.support.http_client import infer, rows
from tests.support.plane_members import write_models
from tests.support.pod_worker import PodWorker


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelSource]:
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[PodWorker]:
    found = PodWorker(tmp_path, "pets-worker-0")
    try:
        yield found
    finally:
        found.end()


def ensemble(generation: int, models: dict[str, ModelSource], **placed: tuple[str, ...]) -> EnsemblePlan:
    """A plan that places members on workers, by the workers' last word."""
    gateway = gateway_plan([WorkerAddress("x", "tcp://127.0.0.1:1")], models, "times1", "times2", generation=generation)
    names = tuple(dict.fromkeys(["times1", "times2", *(name for row in placed.values() for name in row)]))
    sources = tuple(models[name] for name in names)
    placed_rows = {
        f"pets-worker-{worker[1:]}": tuple((names.index(name), 8) for name in row) for worker, row in placed.items()
    }
    return EnsemblePlan(gateway, sources, placed_rows, 1 << 20)


def write(path: Path, text: bytes) -> None:
    """Replace a mounted file as the kubelet does: a new folder, and a symbolic link that is switched over."""
    folder = path.parent / f"..{os.urandom(4).hex()}"
    folder.mkdir()
    (folder / path.name).write_bytes(text)
    link = path.parent / "..new"
    link.symlink_to(folder.name)
    link.rename(path.parent / "..data")
    if not path.is_symlink():
        path.symlink_to(Path("..data") / path.name)


async def test_a_worker_waits_for_its_first_plan_then_follows_the_mirror(
    worker: PodWorker, models: dict[str, ModelSource]
) -> None:
    worker.wait_up()
    assert worker.plan() == {"generation": 0, "instances": []}
    write(worker.mirror, encode_plan(ensemble(3, models, w0=("times1", "times2"))))
    worker.wait_states({"times1": "ready", "times2": "ready"})
    assert worker.plan()["generation"] == 3
    async with (
        serving(gateway_plan([worker.address], models, "times1", "times2")) as local,
        await local.connect() as client,
    ):
        x = rows(9)
        np.testing.assert_allclose((await client.ask(infer(x))).y(), 1.5 * x, rtol=1e-5)
    # A pushed plan is ahead of the mirror, which then catches up, and is not loaded twice.
    pushed = ensemble(5, models, w0=("times3",))
    row = pushed.worker("pets-worker-0")
    assert row is not None
    assert worker.ask("PUT", "/v1/plan", encode_plan(row))[0] == 202
    worker.wait_states({"times3": "ready"})
    write(worker.mirror, encode_plan(ensemble(4, models, w0=("times1",))))
    write(worker.mirror, encode_plan(pushed))
    write(worker.mirror, b"{")
    wait_until(lambda: "cannot be used" in worker.text())
    assert worker.states() == {"times3": "ready"}
    assert worker.text().count("cannot be used") == 1
    # A newer plan without a row for it.
    write(worker.mirror, encode_plan(ensemble(6, models, w1=("times1",))))
    worker.wait_states({})
    assert worker.plan()["generation"] == 6


def test_a_restarted_worker_takes_the_newest_of_mirror_and_state(
    worker: PodWorker, models: dict[str, ModelSource], tmp_path: Path
) -> None:
    write(worker.mirror, encode_plan(ensemble(3, models, w0=("times1",))))
    worker.wait_up()
    worker.wait_states({"times1": "ready"})
    row = ensemble(4, models, w0=("times2",)).worker("pets-worker-0")
    assert row is not None
    assert worker.ask("PUT", "/v1/plan", encode_plan(row))[0] == 202
    worker.end()
    for mirrored, wanted in ((3, "times2"), (5, "times3")):
        if mirrored == 5:
            write(worker.mirror, encode_plan(ensemble(5, models, w0=("times3",))))
        again = PodWorker(tmp_path, "pets-worker-0")
        try:
            again.wait_up()
            again.wait_states({wanted: "ready"})
        finally:
            again.end()


def test_plans_that_are_refused(worker: PodWorker, models: dict[str, ModelSource]) -> None:
    worker.wait_up()
    plan = ensemble(4, models, w0=("times1",)).row("pets-worker-0")
    assert worker.ask("PUT", "/v1/plan", encode_plan(plan))[0] == 202
    for changed, status, text in (
        (msgspec.structs.replace(plan, worker="pets-worker-1", generation=9), 400, "this is 'pets-worker-0', not"),
        (msgspec.structs.replace(plan, generation=3), 409, "generation 3 is older than 4"),
        (msgspec.structs.replace(plan, row_cache_bytes=5), 409, "generation 4 is another plan already"),
    ):
        found = worker.ask("PUT", "/v1/plan", encode_plan(changed))
        assert (found[0], text in found[1]["error"]) == (status, True), found
    assert worker.plan()["generation"] == 4


def test_another_workers_plan_in_the_state_folder_is_passed_over(
    models: dict[str, ModelSource], tmp_path: Path
) -> None:
    state = tmp_path / "pets-worker-0-state"
    state.mkdir()
    (state / "plan.json").write_bytes(encode_plan(ensemble(4, models, w1=("times1",)).row("pets-worker-1")))
    worker = PodWorker(tmp_path, "pets-worker-0")
    try:
        worker.wait_up()
        assert worker.plan() == {"generation": 0, "instances": []}
        assert "it is the plan of worker 'pets-worker-1'" in worker.text()
    finally:
        worker.end()


def test_one_that_replaces_another_has_loaded_when_all_that_may_come_is_there(
    models: dict[str, ModelSource], tmp_path: Path
) -> None:
    """What is asked before a drain goes on: a file that is away may come, and later plans are later ones."""
    away = tmp_path / "away.pt"
    there = Path(models["times1"].uri.removeprefix("file:"))
    late = msgspec.structs.replace(models["times1"], uri=f"file:{away}")
    plan = ensemble(3, {**models, "times1": late}, w0=("times1", "times2"))
    write(tmp_path / "plan.json", encode_plan(plan))
    worker = PodWorker(tmp_path, "pets-worker-0")
    try:
        worker.wait_up()
        worker.wait_states({"times1": "failed", "times2": "ready"})
        assert worker.ask("GET", "/v1/health?loaded")[0] == 503
        assert worker.ask("GET", "/v1/health")[0] == 200
        away.symlink_to(there)
        wait_until(lambda: worker.ask("GET", "/v1/health?loaded")[0] == 200, 60)
        assert worker.states() == {"times1": "ready", "times2": "ready"}
        away.unlink()
        gone = msgspec.structs.replace(late, digest="other")
        row = ensemble(4, {**models, "times1": gone}, w0=("times1",)).worker("pets-worker-0")
        assert row is not None
        assert worker.ask("PUT", "/v1/plan", encode_plan(row))[0] == 202
        worker.wait_states({"times1": "failed"})
        assert worker.ask("GET", "/v1/health?loaded")[0] == 200
    finally:
        worker.end()


def test_one_without_a_plan_has_nothing_to_load(worker: PodWorker) -> None:
    worker.wait_up()
    assert worker.ask("GET", "/v1/health?loaded")[0] == 200
