"""Both ends of a link with real sockets: a worker that computes with numpy, a gateway that checks every answer.

`python -m tests.support.link_pairs ADDRESS` runs the worker alone, until it is killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from itertools import count
from math import inf
from pathlib import Path

import numpy as np

from ensemble_contract.keys import KeyFiles
from ensemble_contract.layout import StoreLayout
from ensemble_contract.tensors import TensorSpec
from ensemble_contract.wire import Failed, FailureCode, LiveInstance, Result, State
from ensemble_gateway.batches import Batch
from ensemble_gateway.lanes import Instance, Lane, Latency
from ensemble_gateway.links import Link
from ensemble_gateway.links.memory import SharedMemory
from ensemble_gateway.queues import Entry, Request
from ensemble_gateway.rowstore import RowStore
from ensemble_worker.gather import HostRows
from ensemble_worker.links import LinkServer, Rows, StateMaker, Work
from ensemble_worker.links.shared import SharedServer
from ensemble_worker.links.zeromq import ZeroMQServer
from tests.support.link_members import INPUTS, INSTANCES, OUTPUTS, Array, model, stacked

ROOT = Path(__file__).resolve().parents[2]
DEADLINE_S = 60.0
NAME = "worker-0"
BATCH_ROWS = 32


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


class NumpyWorker:
    """A server and the thread that runs its batches, one after the other; `gate` holds them up while it is cleared."""

    def __init__(self, make_server: Callable[[StateMaker], LinkServer]) -> None:
        self.gateways = 0
        self.batches = 0
        self.credits = 2
        self.gate = threading.Event()
        self.gate.set()
        self.server = make_server(self._state_for)
        self._stopped = False
        # Kept until the next batch, as a thread's own variables would.
        self._newest: Work | None = None
        self._thread = threading.Thread(target=self._run, name="numpy-worker", daemon=True)

    def start(self) -> None:
        self.server.start()
        self._thread.start()

    def stop(self) -> None:
        self._stopped = True
        self.gate.set()
        self.server.wake()
        self._thread.join(DEADLINE_S)
        assert not self._thread.is_alive()
        self.server.close()

    def _state_for(self, gateways: int, cache_rows: int) -> State:
        self.gateways = gateways
        live = tuple(LiveInstance(one, f"m{one}", "d", BATCH_ROWS, 0.001) for one in INSTANCES)
        return State(NAME, 1, live, True, self.credits, cache_rows, put_with_run=True)

    def _run(self) -> None:
        waiting: list[Work] = []
        while not self._stopped:
            waiting += self.server.receive(block=not (waiting and self.gate.is_set()))
            if waiting and self.gate.is_set():
                self._execute(waiting.pop(0))

    def _execute(self, work: Work) -> None:
        self._newest = work
        run, peer = work.run, work.peer
        end = max(map(int.__add__, run.ranges.starts, run.ranges.counts))
        if end > peer.rows.slots:
            peer.fail(run, FailureCode.BAD_REQUEST, f"a range ends at {end}, beyond slot {peer.rows.slots}")
            return
        self.batches += 1
        rows = peer.rows.gather(run.ranges)
        peer.answer(run, [model(rows, one) for one in run.instances], [1000 * one for one in run.instances], 1)

    def open_gate(self) -> None:
        self.gate.set()
        self.server.wake()


def worker_at(
    address: str, *, inputs: Sequence[TensorSpec] = INPUTS, cache_rows: int = 256,
    keys: KeyFiles | None = None, copies: bool = False,
) -> NumpyWorker:  # fmt: skip
    """A worker at `unix:PATH` or `tcp://HOST:PORT`; `copies`: with a cache also in shared memory, as on a GPU."""

    def make_rows(rows: int) -> Rows:
        return HostRows.cache(inputs, rows)

    def make_server(state_for: StateMaker) -> LinkServer:
        if address.startswith("unix:"):
            path = Path(address.removeprefix("unix:"))
            return SharedServer(path, inputs, OUTPUTS, state_for, make_rows if copies else None, cache_rows)
        return ZeroMQServer(address, inputs, state_for, make_rows, cache_rows, keys)

    return NumpyWorker(make_server)


@contextlib.asynccontextmanager
async def running(worker: NumpyWorker) -> AsyncIterator[NumpyWorker]:
    worker.start()
    try:
        yield worker
    finally:
        worker.stop()


@contextlib.contextmanager
def worker_process(address: str) -> Iterator[subprocess.Popen[bytes]]:
    """The worker in a process of its own; killed at the end if it still runs."""
    process = subprocess.Popen([sys.executable, "-m", "tests.support.link_pairs", address], cwd=ROOT)
    try:
        yield process
    finally:
        process.kill()
        process.wait(DEADLINE_S)


class Gateway:
    """The owner of a link: writes rows, sends them in batches, and checks the answers row by row."""

    def __init__(self, slots: int = 256, inputs: Sequence[TensorSpec] = INPUTS, seed: int = 0) -> None:
        layout = StoreLayout(tuple(inputs), slots)
        self.memory = SharedMemory("ensemble-store", layout.total_bytes)
        self.store = RowStore(layout, self.memory.memory, OUTPUTS, len(INSTANCES))
        self.link: Link | None = None
        self.states: list[State] = []
        self.lost: list[str] = []
        self.well_until = inf
        self.failed: list[Failed] = []
        self.answered = 0
        self.checked_rows = 0
        self.wrong: list[str] = []
        self.in_flight: dict[int, tuple[Batch, list[Array]]] = {}
        self.rng = np.random.default_rng(seed)
        self._ids = count(1)
        self._tags = count(1)
        self._changed = asyncio.Event()
        self._instances = [Instance(one, 0, BATCH_ROWS, Latency(BATCH_ROWS, 0.001)) for one in INSTANCES]

    # -- what the link tells --------------------------------------------------------------------------------------

    def worker_state(self, state: State) -> None:
        self.states.append(state)
        self._changed.set()

    def worker_result(self, result: Result, outputs: Sequence[Array]) -> None:
        batch, wanted = self.in_flight.pop(result.batch)
        self.answered += 1
        if result.compute_ns != tuple(1000 * one.id for one in batch.instances):
            self.wrong.append(f"batch {batch.id}: {result.compute_ns} for {batch.instances}")
        at = 0
        for entry in batch.entries:
            rows = slice(at, at + entry.rows)
            at += entry.rows
            if entry.request.closed:
                continue
            self.checked_rows += entry.rows
            for got, want in zip(outputs, wanted, strict=True):
                if got.dtype != want.dtype or not np.array_equal(got[:, rows], want[:, rows]):
                    self.wrong.append(
                        f"batch {batch.id}, slots {entry.start}+{entry.rows}: {got[:, rows]} for {want[:, rows]}"
                    )
        self._free_all(batch)

    def worker_failed(self, failed: Failed) -> None:
        batch, _ = self.in_flight.pop(failed.batch)
        self.failed.append(failed)
        self._free_all(batch)

    def worker_lost(self, worker: str, reason: str, *, blame: bool, well_until: float = inf) -> None:
        assert worker == NAME
        self.lost.append(reason)
        self.well_until = well_until
        for batch, _ in list(self.in_flight.values()):
            self._free_all(batch)
        self.in_flight.clear()

    def settled(self) -> None:
        self._changed.set()

    # -- what the test does ---------------------------------------------------------------------------------------

    def make_batch(self, *row_counts: int, instances: Sequence[int] = (1,)) -> Batch | None:
        """A batch of one request of each count, with new rows, for these instances; None if the store is full."""
        entries: list[Entry] = []
        for rows in row_counts:
            ranges = self.store.allocator.take(rows)
            if ranges is None:
                for entry in entries:
                    self.free(entry.request)
                return None
            request = Request(rows, ranges, 1, 1, None)
            self._fill(ranges, rows)
            entries += [Entry(request, start, length) for start, length in ranges]
        lane = Lane(NAME, "", 2, {})
        chosen = tuple(self._instances[one - 1] for one in instances)
        return Batch(next(self._ids), lane, chosen, entries, sum(row_counts), 0.001, 0.0, 0.0)

    def send(self, *row_counts: int, instances: Sequence[int] = (1,), flush: bool = True) -> Batch | None:
        assert self.link is not None
        batch = self.make_batch(*row_counts, instances=instances)
        if batch is not None:
            self.in_flight[batch.id] = (batch, stacked(self.store.read(batch.ranges), instances))
            self.link.send(batch)
            if flush:
                self.link.flush()
        return batch

    def free(self, request: Request) -> None:
        """The request is finished: others may have its slots at once."""
        assert self.link is not None
        if not request.closed:
            request.closed = True
            self.store.allocator.give(request.ranges)
            self.link.forget(request.ranges)

    async def until(self, condition: Callable[[], bool], timeout_s: float = DEADLINE_S) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            left = deadline - time.monotonic()
            if left <= 0:
                raise AssertionError(
                    f"not within {timeout_s} s; answered {self.answered}, lost {self.lost}, {self.wrong}"
                )
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), min(left, 0.02))

    async def connect(self, link: Link) -> None:
        self.link = link
        link.start()
        await self.until(lambda: bool(self.states))

    async def run(
        self,
        batches: int,
        *,
        in_flight: int = 4,
        cancel: float = 0.0,
        most_rows: int = BATCH_ROWS,
        most_members: int = 1,
    ) -> None:
        """Random batches, so many in flight; a share of requests is given up meanwhile, and their slots reused."""
        goal = self.answered + batches
        sent = 0
        while self.answered < goal:
            while sent < batches and len(self.in_flight) < in_flight:
                members = self.rng.permutation(INSTANCES)[: self.rng.integers(1, most_members + 1)].tolist()
                if self.send(*self._row_counts(most_rows), instances=members) is None:
                    break
                sent += 1
            if cancel and self.in_flight:
                for entry in next(reversed(self.in_flight.values()))[0].entries:
                    if self.rng.random() < cancel:
                        self.free(entry.request)
            seen = self.answered
            await self.until(lambda seen=seen: self.answered > seen)  # type: ignore[misc]
        assert self.wrong == []
        assert self.failed == []

    def close(self) -> None:
        if self.link is not None:
            self.link.close()
        self.memory.close()

    def _free_all(self, batch: Batch) -> None:
        for entry in batch.entries:
            self.free(entry.request)

    def _row_counts(self, most: int) -> list[int]:
        counts = []
        left = int(self.rng.integers(1, most + 1))
        while left:
            counts.append(min(left, int(self.rng.integers(1, 6))))
            left -= counts[-1]
        return counts

    def _fill(self, ranges: Sequence[tuple[int, int]], rows: int) -> None:
        inputs = self.store.layout.inputs
        tags = np.array([[next(self._tags)] for _ in range(rows)], np.int64)
        x = np.zeros((rows, *inputs[0].shape), np.float32)
        x.reshape(rows, -1)[:] = self.rng.normal(size=(rows, 1)).astype(np.float32)
        x.reshape(rows, -1)[:, -1] = tags[:, 0]
        self.store.write(tuple(ranges), [x.reshape(-1).view(np.uint8).data, tags.reshape(-1).view(np.uint8).data])


@contextlib.asynccontextmanager
async def gateway(
    make_link: Callable[[Gateway], Link], slots: int = 256, inputs: Sequence[TensorSpec] = INPUTS, seed: int = 0
) -> AsyncIterator[Gateway]:
    """A gateway that has heard its worker's State."""
    made = Gateway(slots, inputs, seed)
    try:
        await made.connect(make_link(made))
        yield made
    finally:
        made.close()


def mapped(name: str) -> int:
    """How many mappings of memory with this name the process has."""
    return Path("/proc/self/maps").read_text().count(f"memfd:{name}")


async def _serve_until_killed(address: str) -> None:
    worker_at(address).start()
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(_serve_until_killed(sys.argv[1]))
