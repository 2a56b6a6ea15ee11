"""A worker whose plan changes while it serves: nothing is lost, and memory is given back."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from itertools import count
from pathlib import Path

import msgspec
import numpy as np
import psutil
import pytest
import torch
from torch import nn

from ensemble_contract.plan import Instance, ModelSource, WorkerPlan, encode_plan
from tests.support.data_plane import Worker, ask_unix, gateway_plan, serving, wait_until
from tests.support.http_client import WIDTH, infer, rows
from tests.support.link_pairs import free_port
from tests.support.models import export_module
from tests.support.plane_members import X, Y, write_models
from tests.support.steady_load import steady_load


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelSource]:
    """Two versions of one member (digests `digest-times1`, `other`), and others."""
    found = write_models(tmp_path_factory.mktemp("models"))
    return {**found, "other": msgspec.structs.replace(found["times3"], name="times1", digest="other")}


def plan(
    generation: int,
    models: dict[str, ModelSource],
    *placed: tuple[str, int],
    worker: str = "solo",
    cache: int = 1 << 20,
) -> WorkerPlan:
    """A plan of (key in `models`, batch size)."""
    sources = tuple(dict.fromkeys(models[key] for key, _ in placed))
    instances = tuple(Instance(models[key].name, size, models[key].digest) for key, size in placed)
    return WorkerPlan(generation, "any", worker, X, Y, sources, instances, cache)


def put(worker: Worker, newer: WorkerPlan) -> None:
    status, text = ask_unix(worker.admin, "PUT", "/v1/plan", encode_plan(newer))
    assert status == 202, text


def cells(worker: Worker) -> list[tuple[str, int, str]]:
    """Every instance as (digest, batch size, state)."""
    shown = json.loads(ask_unix(worker.admin, "GET", "/v1/plan")[1])["instances"]
    return sorted((one["digest"], one["batchSize"], one["state"]) for one in shown)


def settled(worker: Worker, *wanted: tuple[str, int]) -> bool:
    return cells(worker) == sorted((digest, size, "ready") for digest, size in wanted)


async def until_settled(worker: Worker, *wanted: tuple[str, int]) -> None:
    async with asyncio.timeout(30):
        while not await asyncio.to_thread(settled, worker, *wanted):
            await asyncio.sleep(0.02)


async def test_two_versions_and_two_batch_sizes_of_a_member_at_once(
    tmp_path: Path, models: dict[str, ModelSource]
) -> None:
    worker = Worker(tmp_path, plan(1, models, ("times1", 4), ("times1", 16), ("other", 8)))
    try:
        worker.wait_ready()
        assert settled(worker, ("digest-times1", 4), ("digest-times1", 16), ("other", 8))
        x = rows(50)
        served = {"times1": models["times1"]}
        async with (
            serving(gateway_plan([worker.address], served, "times1")) as old,
            serving(gateway_plan([worker.address], {"times1": models["other"]}, "times1")) as new,
            await old.connect() as asks_old,
            await new.connect() as asks_new,
        ):
            for _ in range(5):
                np.testing.assert_allclose((await asks_old.ask(infer(x))).y(), x, rtol=1e-5)
                np.testing.assert_allclose((await asks_new.ask(infer(x))).y(), 3 * x, rtol=1e-5)
        text = ask_unix(worker.admin, "GET", "/metrics")[1].decode()
        samples = [line for line in text.splitlines() if line.startswith("ensemble_worker_rows_total")]
        assert samples == ['ensemble_worker_rows_total{device="cpu-0",member="times1"} 500']
    finally:
        worker.end()


CHANGES: list[Sequence[tuple[str, int]]] = [
    [("times1", 4), ("times1", 16), ("times2", 4)],
    [("times2", 8), ("times1", 4)],
    [("times1", 4)],
    [],
]


@pytest.mark.parametrize("over", ["unix", "tcp"])
async def test_changes_under_load_cost_no_request(tmp_path: Path, models: dict[str, ModelSource], over: str) -> None:
    """One worker after the other is given each of the plans, also none; the other one serves meanwhile."""
    full, generations = (("times1", 8), ("times2", 16)), count(2)
    workers = [
        Worker(
            tmp_path,
            plan(1, models, *full, worker=name),
            data=f"tcp://127.0.0.1:{free_port()}" if over == "tcp" else "",
        )
        for name in ("left", "right")
    ]
    try:
        for worker in workers:
            worker.wait_ready()
        plan_ = gateway_plan([worker.address for worker in workers], models, "times1", "times2")
        async with serving(plan_) as local, steady_load(local, lambda x: 1.5 * x) as load:
            for placed in CHANGES:
                for worker in workers:
                    for cells_ in (placed, full):
                        newer = plan(next(generations), models, *cells_, worker=worker.address.name)
                        await asyncio.to_thread(put, worker, newer)
                        await until_settled(worker, *[(models[key].digest, size) for key, size in cells_])
                        await load.answered(20)
            assert load.right > 300
    finally:
        for worker in workers:
            worker.end()
        for worker in workers:
            assert "Traceback" not in worker.text(), worker.text()


async def test_a_larger_batch_than_the_row_cache_has_room_for(tmp_path: Path, models: dict[str, ModelSource]) -> None:
    """Links are replaced under load: gateways come again, and what was in flight is answered."""
    row_bytes = 4 * WIDTH
    small, large = ([("times1", 2)], [("times1", 64)])
    workers = [
        Worker(
            tmp_path, plan(1, models, *small, worker=name, cache=4 * row_bytes), data=f"tcp://127.0.0.1:{free_port()}"
        )
        for name in ("left", "right")
    ]
    try:
        for worker in workers:
            worker.wait_ready()
        plan_ = gateway_plan([worker.address for worker in workers], models, "times1")
        async with serving(plan_) as local, steady_load(local, lambda x: x) as load, await local.connect() as client:
            await load.answered(50)
            # Both at once: rows that leave one may just have come from the other.
            for worker in workers:
                newer = plan(2, models, *large, worker=worker.address.name, cache=4 * row_bytes)
                await asyncio.to_thread(put, worker, newer)
            for worker in workers:
                await until_settled(worker, ("digest-times1", 64))
            await load.answered(200)
            x = rows(300)
            np.testing.assert_allclose((await client.ask(infer(x))).y(), x, rtol=1e-5)
        for worker in workers:
            assert "links to gateways are replaced" in worker.text()
    finally:
        for worker in workers:
            worker.end()


class Heavy(nn.Module):
    """`x`, and 128 MiB of weights that have a part in it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4 << 20, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + nn.functional.linear(x, self.weight).sum(-1, keepdim=True)


@pytest.mark.parametrize("suffix", [".pt", ".pt2"])
def test_memory_of_an_instance_that_has_left_is_given_back(
    tmp_path: Path, models: dict[str, ModelSource], suffix: str
) -> None:
    """And two batch sizes of one model have its weights once."""
    path = export_module(tmp_path / f"heavy{suffix}", Heavy().eval(), (torch.zeros(2, WIDTH),))
    model_format = "torchscript" if suffix == ".pt" else "torch-export"
    heavy = {**models, "heavy": ModelSource("heavy", "h", path.as_uri(), model_format)}
    worker = Worker(tmp_path, plan(1, heavy, ("times1", 4)))
    resident = psutil.Process(worker.process.pid).memory_info
    try:
        worker.wait_ready()
        before = resident().rss
        put(worker, plan(2, heavy, ("times1", 4), ("heavy", 1)))
        wait_until(lambda: settled(worker, ("digest-times1", 4), ("h", 1)))
        one = resident().rss - before
        assert one > 120 << 20
        put(worker, plan(3, heavy, ("times1", 4), ("heavy", 1), ("heavy", 2)))
        wait_until(lambda: settled(worker, ("digest-times1", 4), ("h", 1), ("h", 2)))
        assert resident().rss - before < one + (100 << 20)
        put(worker, plan(4, heavy, ("times1", 4)))
        wait_until(lambda: settled(worker, ("digest-times1", 4)))
        assert resident().rss - before < 64 << 20, worker.text()
    finally:
        worker.end()


async def test_a_worker_that_is_stopped_answers_what_it_runs_and_returns_the_rest(
    tmp_path: Path, models: dict[str, ModelSource]
) -> None:
    """Two workers stop one after the other while requests run: none of these has lost two workers."""
    workers = [Worker(tmp_path, plan(1, models, ("times1", 4), worker=name)) for name in ("left", "right")]
    try:
        for worker in workers:
            worker.wait_ready()
        plan_ = gateway_plan([worker.address for worker in workers], models, "times1")
        async with serving(plan_) as local, steady_load(local, lambda x: x) as load:
            await load.answered(50)
            for i, worker in enumerate(workers):
                worker.process.terminate()
                assert await asyncio.to_thread(worker.wait) == 0
                workers[i] = worker.restarted()
                await asyncio.to_thread(workers[i].wait_ready)
                await load.answered(20)
    finally:
        for worker in workers:
            worker.end()
