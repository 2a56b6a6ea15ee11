"""What a worker offers its gateways: links at its data address, and the executor behind them.

Links are made for some tensors, keys and size of the row cache. When a plan or new keys ask for others, they are
replaced as a whole: gateways take back what they have in flight, come again within a second, and lose nothing.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ensemble_contract.keys import KeyFiles
from ensemble_contract.plan import WorkerPlan
from ensemble_contract.tensors import TensorSpec
from ensemble_contract.wire import MAX_SLOTS, LiveInstance, State
from ensemble_worker import predictor
from ensemble_worker.devices import Device
from ensemble_worker.gather import HostRows
from ensemble_worker.links import LinkServer, Rows
from ensemble_worker.links.shared import SharedServer
from ensemble_worker.links.zeromq import ZeroMQServer
from ensemble_worker.loop import Executor, Running
from ensemble_worker.stacks import Stacks

_LOG = logging.getLogger(__name__)

CREDITS = 2
LAST_BATCH_S = 5.0
# How long RUNs that were sent before a gateway heard that an instance leaves are still run by it, and how long one that
# goes on sending may hold it up.
LINGER_S = 0.2
DRAIN_S = 30.0

Tensors = tuple[TensorSpec, ...]


@dataclass(frozen=True, slots=True)
class Terms:
    """What links are made for. `cache_rows` is what each gateway may keep here."""

    inputs: Tensors
    outputs: Tensors
    row_cache_bytes: int
    cache_rows: int
    keys: KeyFiles | None

    @staticmethod
    def of(plan: WorkerPlan, keys: KeyFiles | None) -> Terms:
        """What a plan asks for: a cache of its bytes, but never less than the largest batches on their way."""
        rows = plan.row_cache_bytes // sum(spec.row_bytes for spec in plan.inputs)
        rows = min(MAX_SLOTS, max(rows, CREDITS * _largest(plan)))
        return Terms(plan.inputs, plan.outputs, plan.row_cache_bytes, rows, keys)

    def serve(self, plan: WorkerPlan, keys: KeyFiles | None) -> bool:
        """Whether links made for these terms do for a plan."""
        same = (self.inputs, self.outputs, self.keys) == (plan.inputs, plan.outputs, keys)
        return same and self.row_cache_bytes == plan.row_cache_bytes and self.cache_rows >= CREDITS * _largest(plan)


class Serving:
    """The links of one worker at `address`. `generation` tells that of the plan it runs; `lost` as of Executor."""

    def __init__(
        self, name: str, address: str, device: Device, generation: Callable[[], int], lost: Callable[[str], None]
    ) -> None:
        self.gateways = 0
        self._name = name
        self._address = address
        self._device = device
        self._generation = generation
        self._lost = lost
        self._loop = asyncio.get_running_loop()
        self._changing = asyncio.Lock()
        self._terms: Terms | None = None
        self._server: LinkServer | None = None
        self._executor: Executor | None = None

    # -- links ----------------------------------------------------------------------------------------------------

    async def fit(self, plan: WorkerPlan, keys: KeyFiles | None) -> None:
        """Open links for a plan, or replace those that do not serve it.

        Raises OSError if the address cannot be bound.
        """
        async with self._changing:
            if self._terms is not None and self._terms.serve(plan, keys):
                return
            former = self._executor
            if former is not None:
                _LOG.info("links to gateways are replaced: other keys, tensors or a larger row cache are asked for")
                former.stop()
                await asyncio.to_thread(former.join)
            if self._server is not None:
                self._server.close()
            self._server = self._executor = self._terms = None
            terms = Terms.of(plan, keys)
            server = self._make_server(terms)
            server.start()
            self._server, self._terms = server, terms
            self._executor = Executor(server, serial=self._device.kind == "cpu", lost=self._lost)
            if former is not None:
                for running in former.instances():
                    self._executor.add(running)
                self._executor.stacks = former.stacks
            self._executor.start()

    async def close(self) -> bool:
        """Finish the batches that run, say goodbye to gateways; False if one does not end."""
        executor, server = self._executor, self._server
        self._executor = self._server = None
        ended = True
        if executor is not None:
            executor.stop()
            # Meanwhile heartbeats go on.
            await asyncio.to_thread(executor.join, LAST_BATCH_S)
            ended = not executor.is_alive()
        if server is not None:
            server.close()
        return ended

    def _make_server(self, terms: Terms) -> LinkServer:
        scheme, _, path = self._address.partition(":")
        on_gpu = self._device.kind != "cpu"

        def make_rows(rows: int) -> Rows:
            if on_gpu:
                return predictor.device_rows(self._device, terms.inputs, rows)
            return HostRows.cache(terms.inputs, rows)

        if scheme == "unix":
            return SharedServer(
                Path(path), terms.inputs, [spec.carried for spec in terms.outputs], self._state_for,
                make_rows if on_gpu else None, terms.cache_rows,
            )  # fmt: skip
        return ZeroMQServer(self._address, terms.inputs, self._state_for, make_rows, terms.cache_rows, terms.keys)

    def _state_for(self, gateways: int, cache_rows: int) -> State:
        self.gateways = gateways
        live = tuple(
            LiveInstance(one.id, one.member, one.digest, one.predictor.batch_size, one.latency_s)
            for one in self.running()
        )
        granted = max(1, CREDITS // max(1, gateways))
        serial = self._device.kind == "cpu"
        return State(
            self._name, self._generation(), live, serial, granted, cache_rows, self._device.device_class,
            put_with_run=True,
        )  # fmt: skip

    # -- instances ------------------------------------------------------------------------------------------------

    def running(self) -> list[Running]:
        """The instances that gateways are told of."""
        return self._executor.instances() if self._executor is not None else []

    def busy_s(self) -> float:
        """For how long the oldest batch that runs now has been running; 0 when none does."""
        return self._executor.busy_s() if self._executor is not None else 0.0

    def waiting_batches(self) -> int:
        """Batches received that have not begun."""
        return self._executor.waiting_batches() if self._executor is not None else 0

    def add(self, running: Running) -> None:
        """Offer an instance to gateways."""
        if self._executor is not None:
            self._executor.add(running)
        self.tell()

    async def restack(self) -> None:
        """Have those members run as one for which that is quicker, now that instances have come or gone."""
        async with self._changing:
            executor = self._executor
            if executor is None or self._device.kind != "cpu":
                return
            predictors = {one.id: one.predictor for one in executor.instances()}
            if predictors.keys() == executor.stacks.instances:
                return
            executor.stacks = await asyncio.to_thread(_stacks_of, predictors)

    def tell(self) -> None:
        """Tell gateways the State again."""
        if self._server is not None:
            self._server.broadcast()

    async def part_with(self, running: Running) -> None:
        """Let go of an instance that was withdrawn, when the batches that gateways have sent it are answered."""
        await asyncio.sleep(LINGER_S)
        gone = asyncio.Event()
        async with self._changing:
            executor = self._executor
            if executor is None:
                return
            executor.remove(running.id, lambda: _from_thread(self._loop, gone.set))
        try:
            await asyncio.wait_for(gone.wait(), DRAIN_S)
        except TimeoutError:
            _LOG.warning("member %s: batches still come for an instance that has left", running.member)
            executor.discard(running.id)


def _stacks_of(predictors: dict[int, predictor.Predictor]) -> Stacks:
    with predictor.running_models():
        return Stacks(predictors)


def _largest(plan: WorkerPlan) -> int:
    return max((instance.batch_size for instance in plan.instances), default=1)


def _from_thread(loop: asyncio.AbstractEventLoop, call: Callable[[], None]) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(call)
