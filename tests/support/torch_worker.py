"""A worker in the test's own process: a real link, the executor behind it, and real models of `link_members`."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ensemble_contract import wire
from ensemble_contract.layout import StoreLayout
from ensemble_contract.plan import ModelSource
from ensemble_contract.wire import LiveInstance, State
from ensemble_worker import devices, predictor
from ensemble_worker.links import LinkServer, Rows, StateMaker
from ensemble_worker.links.shared import SharedServer
from ensemble_worker.loop import Executor, Running
from ensemble_worker.predictor import Predictor
from tests.support.link_members import INPUTS, OUTPUTS, Array
from tests.support.link_pairs import DEADLINE_S, NAME
from tests.support.link_strangers import SharedStranger
from tests.support.models import export_module

BATCH_SIZES = {1: 32, 2: 16, 3: 8, 4: 32}
TOUCHY = 4


class Member(nn.Module):
    """What `link_members.model` computes; fails on a batch with a negative tag if it is the touchy one."""

    def __init__(self, instance: int) -> None:
        super().__init__()
        self.instance = instance
        self.fields = nn.Parameter(torch.tensor([0, 1, 6, 7]), requires_grad=False)
        self.marks = nn.Parameter(torch.tensor([instance, 100, 200]), requires_grad=False)

    def forward(self, x: torch.Tensor, tag: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if self.instance == TOUCHY:
            tag = tag + torch.index_select(torch.zeros(4, dtype=torch.int64), 0, (tag[:, 0] < 0).long() * 9)[:, None]
        y = x.index_select(1, self.fields) * 2 + self.instance * tag
        return y, ((tag + self.marks) % 251).to(torch.uint8), tag * self.instance


def load_members(folder: Path) -> dict[int, Predictor]:
    """Four members, the fourth touchy, by the id of their instance."""
    torch.set_num_threads(1)
    example = (torch.zeros(2, 8), torch.ones(2, 1, dtype=torch.int64))
    loaded = {}
    for one, batch_size in BATCH_SIZES.items():
        path = export_module(folder / f"m{one}.pt", Member(one).eval(), example)
        source = ModelSource(f"m{one}", "d", path.as_uri(), "torchscript")
        loaded[one] = predictor.load(path, source, INPUTS, OUTPUTS, devices.cpu_device(0, (0,), 1 << 30), batch_size)
    return loaded


class Worker:
    """A server and the executor behind it."""

    def __init__(
        self, make_server: Callable[[StateMaker], LinkServer], members: Mapping[int, Predictor], *, serial: bool = True
    ) -> None:
        self.gateways = 0
        self.serial = serial
        self.lost: list[str] = []
        self.server = make_server(self._state_for)
        self.executor = Executor(self.server, serial=serial, lost=self.lost.append)
        self.running = {one: Running(one, f"m{one}", "d", made, 0.001) for one, made in members.items()}
        for running in self.running.values():
            self.executor.add(running)

    def _state_for(self, gateways: int, cache_rows: int) -> State:
        self.gateways = gateways
        live = tuple(
            LiveInstance(one.id, one.member, one.digest, one.predictor.batch_size, one.latency_s)
            for one in self.executor.instances()
        )
        return State(NAME, 1, live, self.serial, 2, cache_rows)


@contextlib.asynccontextmanager
async def working(worker: Worker) -> AsyncIterator[Worker]:
    worker.server.start()
    worker.executor.start()
    try:
        yield worker
    finally:
        worker.executor.stop()
        await asyncio.to_thread(worker.executor.join, DEADLINE_S)
        assert not worker.executor.is_alive()
        for one in worker.running:
            worker.executor.remove(one)
        worker.server.close()


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not condition():
            await asyncio.sleep(0.005)


def shared(path: Path, make_rows: Callable[[int], Rows] | None = None) -> Callable[[StateMaker], LinkServer]:
    return lambda state_for: SharedServer(path, INPUTS, OUTPUTS, state_for, make_rows, 64)


def rows_to_see(count: int) -> list[Array]:
    x = np.random.default_rng(7).integers(-99, 99, (count, 8)).astype(np.float32)
    return [x, np.arange(1, count + 1, dtype=np.int64)[:, None]]


async def greeted(other: SharedStranger) -> list[Array]:
    """Fill the stranger's store and greet; the rows by slot."""
    rows = rows_to_see(64)
    for slots, array in zip(StoreLayout(INPUTS, 64).arrays(other.store.memory), rows, strict=True):
        slots[:] = array
    other.greet()
    assert isinstance(await other.welcome(), State)
    return rows


def run(instances: Sequence[int], *ranges: tuple[int, int], at: int = 0) -> bytes:
    return wire.encode_run(5, instances, sum(count for _, count in ranges), at, ranges)
