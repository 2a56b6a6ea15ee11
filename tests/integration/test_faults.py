"""What the data plane owes its clients while workers die, hang, or are killed by what they are asked."""

import asyncio
import json
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from ensemble_contract.plan import GatewayPlan, Instance, ModelSource, ServedMember, WorkerPlan
from ensemble_contract.tensors import TensorSpec
from tests.support.data_plane import GatewayProcess, LocalGateway, Worker, Workers, running_workers, serving, wait_until
from tests.support.http_client import Reply, infer, rows
from tests.support.models import export_module
from tests.support.plane_members import POISON, Times

CLIENTS = 12
LOST_S = 15.0


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Workers]:
    """Two workers with the same members, for a test to harm."""
    members = ("times1", "tired", "poisonable")
    with running_workers(tmp_path, {"left": members, "right": members}, batch=16) as found:
        yield found


class Load:
    """Clients that ask without a pause, and what they were answered."""

    def __init__(self, local: LocalGateway) -> None:
        self._local = local
        self._stop = False
        self.replies: list[Reply] = []

    async def ask_on(self, seed: int) -> None:
        x = rows(1 + seed % 5, seed)
        async with await self._local.connect() as client:
            while not self._stop:
                reply = await client.ask(infer(x))
                self.replies.append(reply)
                if reply.status == 200:
                    np.testing.assert_allclose(reply.y(), x, rtol=1e-4)

    async def answered(self, more: int) -> None:
        """Wait until so many more requests are answered."""
        wanted = len(self.replies) + more
        async with asyncio.timeout(LOST_S):
            while len(self.replies) < wanted:
                await asyncio.sleep(0.01)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(self.ask_on(seed)) for seed in range(CLIENTS)]
        try:
            await self.answered(50)
            yield
        finally:
            self._stop = True
            await asyncio.gather(*tasks)


async def back(workers: Workers, local: LocalGateway, index: int) -> None:
    """Start a worker again; wait until the gateway has all its instances."""
    dead = workers.processes[index]
    await asyncio.to_thread(dead.end)
    workers.processes[index] = dead.restarted()
    served = {member.name for member in local.gateway.pipeline.plan.members}
    wanted = {instance.member for instance in dead.plan.instances} & served
    async with asyncio.timeout(60):
        while len(instances(local, dead.plan.worker)) < len(wanted):
            await asyncio.sleep(0.02)


def instances(local: LocalGateway, worker: str) -> list[int]:
    """The members that the gateway has live on a worker."""
    return [
        instance.member for name, instance in local.gateway.pipeline.engine.dispatcher.instances() if name == worker
    ]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP])
async def test_a_worker_lost_under_load_costs_no_request(pair: Workers, number: signal.Signals) -> None:
    """The other one answers: at once after a death, within the patience with a batch after a hang."""
    async with serving(pair.plan("times1", "tired")) as local:
        load = Load(local)
        async with load.running():
            pair.processes[0].signal(number)
            await load.answered(50)
            if number == signal.SIGSTOP:
                async with asyncio.timeout(LOST_S):
                    while local.gateway.pipeline.engine.links["left"].connected:
                        await asyncio.sleep(0.02)
                pair.processes[0].signal(signal.SIGCONT)
                async with asyncio.timeout(LOST_S):
                    while not local.gateway.pipeline.engine.links["left"].connected:
                        await asyncio.sleep(0.02)
            else:
                await back(pair, local, 0)
            await load.answered(50)
            assert len(instances(local, "left")) == len(instances(local, "right")) == 2
    assert {reply.status for reply in load.replies} == {200}, [r.body for r in load.replies if r.status != 200][:3]


@pytest.mark.slow
async def test_without_another_instance_a_quorum_answers_or_503(tmp_path: Path) -> None:
    with running_workers(tmp_path, {"one": ["times1"], "two": ["times2"]}) as workers:
        async with serving(workers.plan("times1", "times2")) as local, await local.connect() as client:
            x = rows(2)
            np.testing.assert_allclose((await client.ask(infer(x))).y(), 1.5 * x, rtol=1e-5)
            workers.processes[1].process.kill()
            loop = asyncio.get_running_loop()
            began = loop.time()
            reply = await client.ask(infer(x, parameters={"timeout": 700_000, "quorum": 1}))
            np.testing.assert_allclose(reply.y(), x, rtol=1e-5)
            head = json.loads(reply.body[: int(reply.headers["inference-header-content-length"])])
            assert head["parameters"] == {"members_used": "times1", "members_missing": "times2"}
            reply = await client.ask(infer(x, parameters={"timeout": 700_000}))
            assert reply.status == 503
            assert "times2" in reply.error
            assert int(reply.headers["retry-after"]) >= 1
            reply = await client.ask(infer(x, model="echo.times2", parameters={"timeout": 300_000}))
            assert reply.status == 503
            assert loop.time() - began < 3
            assert local.gateway.pipeline.engine.store.used_rows == 0
            # What waits when the worker comes back is answered.
            waiting = asyncio.create_task(client.ask(infer(x, parameters={"timeout": 40_000_000}), 60))
            await asyncio.sleep(0.1)
            await back(workers, local, 1)
            np.testing.assert_allclose((await waiting).y(), 1.5 * x, rtol=1e-5)


@pytest.mark.slow
async def test_a_poisonous_row_fails_alone(pair: Workers) -> None:
    """It kills two workers and no more; what shared its batches is answered, by them once they are back."""
    bad = rows(2)
    bad[1, 0] = POISON
    async with serving(pair.plan("times1", "poisonable", timeout_s=60.0)) as local:
        load = Load(local)
        async with load.running(), await local.connect() as client:
            reply = await client.ask(infer(bad), 30)
            assert reply.status == 500
            assert "member poisonable: its rows lost two workers, " in reply.error
            assert "left" in reply.error
            assert "right" in reply.error
            codes = [await asyncio.to_thread(worker.wait) for worker in pair.processes]
            assert codes == [-signal.SIGFPE] * 2
            for index in (0, 1):
                await back(pair, local, index)
            await load.answered(CLIENTS * 2)
        assert all(worker.process.poll() is None for worker in pair.processes)
    assert {reply.status for reply in load.replies} == {200}, [r.body for r in load.replies if r.status != 200][:3]


QUEUE_BYTES = 128 << 20
ALLOWANCE_BYTES = 150 << 20


@pytest.mark.slow
@pytest.mark.parametrize(("width", "rows_a_request"), [(64, 4000), (150_000, 3)], ids=["256B", "600kB"])
async def test_peak_memory_under_a_full_store(tmp_path: Path, width: int, rows_a_request: int) -> None:
    """One member answers, the other never does: requests wait until the store is full, and more are refused."""
    with _HalfServed(tmp_path, width) as gateway:
        x = np.ones((rows_a_request, width), np.float32)
        request = infer(x, parameters={"timeout": 6_000_000})
        statuses: list[int] = []

        async def insist() -> None:
            async with await gateway.connect() as client:
                while not statuses.count(503) > 200:
                    statuses.append((await client.ask(request)).status)

        tasks = [asyncio.create_task(insist()) for _ in range(160)]
        await asyncio.to_thread(wait_until, lambda: statuses.count(503) > 60)
        state = await asyncio.to_thread(gateway.state)
        await asyncio.gather(*tasks)
        assert state["storeCapacityBytes"] <= QUEUE_BYTES
        assert state["storeBytes"] > 0.9 * state["storeCapacityBytes"]
        assert set(statuses) <= {503, 504}
        peak = gateway.peak_bytes()
        print(f"peak {peak / 2**20:.0f} MiB with rows of {4 * width} B and a store of {QUEUE_BYTES >> 20} MiB")
        assert peak > QUEUE_BYTES / 2
        assert peak < QUEUE_BYTES + ALLOWANCE_BYTES
        await asyncio.to_thread(wait_until, lambda: gateway.state()["storeBytes"] == 0)


class _HalfServed:
    """A gateway with one live and one absent member, for rows of any width."""

    def __init__(self, folder: Path, width: int) -> None:
        export_module(folder / "present.pt", Times(2.0), (torch.zeros(2, width),))
        tensors = (TensorSpec("x", "FP32", (width,)),), (TensorSpec("y", "FP32", (width,)),)
        source = ModelSource("present", "d", f"file:{folder / 'present.pt'}", "torchscript")
        self.worker = Worker(folder, WorkerPlan(1, "any", "w", *tensors, (source,), (Instance("present", 8),)))
        self.plan = GatewayPlan(
            1,
            "echo",
            *tensors,
            (ServedMember("present", "d"), ServedMember("absent", "other")),
            (self.worker.address,),
            max_queue_bytes=QUEUE_BYTES,
        )
        self.gateway = GatewayProcess(folder, self.plan)

    def __enter__(self) -> GatewayProcess:
        self.worker.wait_ready()

        def connected() -> bool:
            try:
                state = self.gateway.state()
            except OSError:
                return False
            self.gateway.number = int(state["url"].rpartition(":")[2])
            return bool(state["members"][0]["live"])

        wait_until(connected)
        return self.gateway

    def __exit__(self, *_: object) -> None:
        self.gateway.end()
        self.worker.end()
