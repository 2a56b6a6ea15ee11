"""The engine: the row store, the dispatcher and the links to workers that all plans of a gateway share.

Glue of the pure cores and the links, on one event loop. Requests that arrive close together are dispatched together,
and requests that finish together are combined together. A plan is served by a pipeline; while one plan replaces another
both have one here, so that neither rows nor connections nor workers' caches are there twice.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from ensemble_contract import wire
from ensemble_contract.layout import StoreLayout
from ensemble_contract.plan import GatewayPlan, WorkerAddress
from ensemble_gateway.columns import MAX_COLUMNS
from ensemble_gateway.dispatcher import Dispatcher
from ensemble_gateway.links import Link, LinkOwner
from ensemble_gateway.links.memory import SharedMemory
from ensemble_gateway.pipeline import Pipeline
from ensemble_gateway.queues import Entry, Request
from ensemble_gateway.request import Array
from ensemble_gateway.rowstore import RowStore, slots_within
from ensemble_gateway.turns import Alarm, Turns

OVERDUE_CHECK_S = 0.5

LinkMaker = Callable[[WorkerAddress, SharedMemory, RowStore, LinkOwner], Link]


class Engine:
    """What serves plans with the tensors and the store of `plan`, one after the other.

    `make_link` opens the link to a worker; `changed` is called when what workers can run has changed, and when a former
    plan has answered its last request.
    """

    def __init__(self, plan: GatewayPlan, make_link: LinkMaker, changed: Callable[[], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._make_link = make_link
        self._changed = changed
        self._telling = False
        self._signature = _signature(plan)
        self._max_bytes = plan.max_queue_bytes
        self._carried = tuple(spec.carried for spec in plan.outputs)
        layout = StoreLayout(plan.inputs, slots_within(self._max_bytes, plan.inputs, self._carried, len(plan.members)))
        self._memory = SharedMemory("ensemble-store", layout.total_bytes)
        self.store = RowStore(layout, self._memory.memory, self._carried, MAX_COLUMNS)
        self.dispatcher = Dispatcher()
        self.links: dict[str, Link] = {}
        self.pipelines: list[Pipeline] = []
        self._addresses: dict[str, WorkerAddress] = {}
        self._columns_used = len(plan.members)
        self._finished: list[Request] = []
        self._turns = Turns(self._turn)
        self._alarm = Alarm(self._on_time)
        self._watch = self._loop.call_later(OVERDUE_CHECK_S, self._look_after)

    # -- plans ----------------------------------------------------------------------------------------------------

    def fits(self, plan: GatewayPlan) -> bool:
        """Whether a plan can be served from this store."""
        return _signature(plan) == self._signature

    def has_room_for(self, plan: GatewayPlan) -> bool:
        """Whether there are columns for its members now; more come free when former plans have ended."""
        return self.dispatcher.room_for([(m.name, m.digest) for m in plan.members])

    def open(self, plan: GatewayPlan, former: Pipeline | None) -> Pipeline:
        """A pipeline for a plan; its workers are connected, and requests may be sent through it after `prefer`."""
        columns = self.dispatcher.columns_of([(m.name, m.digest) for m in plan.members])
        pipeline = Pipeline(plan, self, columns, former)
        self.pipelines.append(pipeline)
        self._connect()
        return pipeline

    def prefer(self, pipeline: Pipeline, *, waiting: bool) -> None:
        """Requests come through this pipeline from now on; `waiting`: they wait for members that are not live yet."""
        pipeline.serving = True
        self.dispatcher.prefer(pipeline.columns, pipeline.plan.max_delay_s)
        if waiting:
            self.dispatcher.expect(pipeline.columns)
        self.share_store()

    def end(self, pipeline: Pipeline) -> None:
        """A pipeline has answered its last request, or was never used: workers that only it needs are left."""
        self.pipelines.remove(pipeline)
        self._connect()
        self.share_store()

    def share_store(self, others_bytes: int = 0) -> None:
        """Keep within the memory that the plan allows; rows of several plans may have outputs of all their columns."""
        used = {column for pipeline in self.pipelines if pipeline.serving for column in pipeline.columns}
        self._columns_used = len(used) or self._columns_used
        left = max(0, self._max_bytes - others_bytes)
        # By itself it takes one row, however large.
        least = 0 if others_bytes else 1
        self.store.allocator.limit(max(least, left // self.bytes_per_row))

    def address_of(self, worker: str) -> str:
        """Where a connected worker is, as its plan says."""
        return self._addresses[worker].address

    @property
    def bytes_per_row(self) -> int:
        """What a row may take in the store."""
        return self.store.bytes_per_row(self._columns_used)

    @property
    def used_bytes(self) -> int:
        """What the rows in the store take."""
        return self.store.used_rows * self.bytes_per_row

    def ended(self) -> None:
        """A pipeline that is no longer preferred has answered its last request."""
        self._tell()

    def close(self) -> None:
        """Refuse what is in flight and leave the workers."""
        for request in list(self.dispatcher.deadlines):
            self.dispatcher.cancel(request)
            request.owner.refuse_at_end(request)
        for link in self.links.values():
            link.close()
        self._alarm.stop()
        self._watch.cancel()
        self._memory.close()

    def _connect(self) -> None:
        """Have a link to each worker of the open plans, at the address that the newest of them names."""
        wanted = {worker.name: worker for pipeline in self.pipelines for worker in pipeline.plan.workers}
        for name, address in list(self._addresses.items()):
            if wanted.get(name) != address:
                self.links.pop(name).close()
                del self._addresses[name]
                # Nothing is wrong with its rows: others get them.
                self._finished += self.dispatcher.lost(name, blame=False)
        for name, address in wanted.items():
            if name not in self.links:
                self.links[name] = self._make_link(address, self._memory, self.store, self)
                self._addresses[name] = address
                self.links[name].start()
        self.wake()

    # -- what links tell ------------------------------------------------------------------------------------------

    def worker_state(self, state: wire.State) -> None:
        """A worker says what it can run."""
        self._finished += self.dispatcher.update(state)
        self._tell()

    def worker_result(self, result: wire.Result, outputs: Sequence[Array]) -> None:
        """A batch is answered: keep its outputs."""
        batch = self.dispatcher.take(result.batch, self._loop.time())
        if batch is None:
            return
        entries = batch.entries
        if any(entry.request.closed for entry in entries):
            outputs, ranges = _of_the_living(entries, outputs)
        else:
            ranges = batch.ranges
        if ranges:
            self.store.keep([one.member for one in batch.instances], ranges, outputs)
        compute_s = [ns * 1e-9 for ns in result.compute_ns]
        # Of several plans the first request's: counters of a version are the same in all.
        owner = entries[0].request.owner
        for instance, seconds in zip(batch.instances, compute_s, strict=True):
            owner.batch_done(instance.member, batch.rows, batch.waited_s, seconds, len(entries))
        self._finished += self.dispatcher.settle(batch, compute_s)

    def worker_failed(self, failed: wire.Failed) -> None:
        """A batch could not be run."""
        batch = self.dispatcher.take(failed.batch, self._loop.time())
        if batch is None:
            return
        if failed.code in (wire.FailureCode.UNKNOWN_INSTANCE, wire.FailureCode.DEVICE_LOST):
            # The worker's State, or the end of its link, follows.
            self._finished += self.dispatcher.retry(batch, blame=failed.code is wire.FailureCode.DEVICE_LOST)
            return
        if len(batch.instances) == 1:
            # One of several is not said to have failed before it has failed alone.
            batch.entries[0].request.owner.batch_failed(batch.instances[0].member)
        self._finished += self.dispatcher.fail(batch, failed.text)

    def worker_lost(
        self,
        worker: str,
        reason: str,  # noqa: ARG002  # the link logs it
        *,
        blame: bool,
        well_until: float = math.inf,
    ) -> None:
        """A worker is gone: its rows go elsewhere."""
        self._finished += self.dispatcher.lost(worker, blame=blame, well_until=well_until)
        self._tell()

    def settled(self) -> None:
        """Links have told everything there was: go on."""
        self._turn()

    # -- turns ----------------------------------------------------------------------------------------------------

    def wake(self, rows: int = 0) -> None:
        """Something has come, maybe a request of so many rows: go on soon, with what comes close behind."""
        self._turns.wake(rows)

    def _turn(self) -> None:
        """Give open lanes their next batches, then answer what is finished: workers shall not wait for answers."""
        now = self._loop.time()
        touched = set()
        for batch in self.dispatcher.assign(now):
            link = self.links[batch.lane.worker]
            link.send(batch)
            touched.add(link)
        for link in touched:
            link.flush()
        if self._finished:
            finished, self._finished = self._finished, []
            self._answer(finished, now)
        at = self.dispatcher.next_at()
        if at is not None:
            self._alarm.set(at)

    def _answer(self, finished: list[Request], now: float) -> None:
        groups: dict[int, list[Request]] = {}
        for request in finished:
            header = request.sink.header
            if request.failure is not None:
                request.owner.refuse(request, now)
            elif request.done == request.wanted and not header.members:
                # Every plan has models of its own; hashing one would cost more than all the rest.
                groups.setdefault(id(header.model), []).append(request)
            else:
                request.owner.answer_in_full(request, now)
        for requests in groups.values():
            requests[0].owner.answer_together(requests, now)

    def release(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Free slots of the store; nobody gets them before this turn has ended."""
        self.store.allocator.give(ranges)
        for link in self.links.values():
            link.forget(ranges)

    def _tell(self) -> None:
        """Something has changed, and maybe more in this turn of the loop."""
        if not self._telling:
            self._telling = True
            self._loop.call_soon(self._told)

    def _told(self) -> None:
        self._telling = False
        self._changed()

    def _on_time(self) -> None:
        self._finished += self.dispatcher.expire(self._loop.time())
        self._turn()

    def _look_after(self) -> None:
        """Give up workers that take far too long, and give back the columns that no plan needs any more."""
        for worker in self.dispatcher.overdue(self._loop.time()):
            self.links[worker].reset("a batch takes far longer than expected")
        gone = self.dispatcher.keep_only({column for pipeline in self.pipelines for column in pipeline.columns})
        if gone:
            self.store.give_back(gone)
            self._tell()
        if all(pipeline.leaving for pipeline in self.pipelines):
            # Another engine may use the memory that has come free here.
            self._tell()
        self._watch = self._loop.call_later(OVERDUE_CHECK_S, self._look_after)


def _signature(plan: GatewayPlan) -> tuple[object, ...]:
    """What the store is made for: it never changes, nor do the links' rings and caches."""
    return plan.inputs, tuple(spec.carried for spec in plan.outputs), plan.max_queue_bytes


def _of_the_living(entries: Iterable[Entry], outputs: Sequence[Array]) -> tuple[list[Array], list[tuple[int, int]]]:
    """The outputs and slots of a batch without the rows of requests that are finished already."""
    keep: list[bool] = []
    ranges: list[tuple[int, int]] = []
    for entry in entries:
        alive = not entry.request.closed
        keep += [alive] * entry.rows
        if alive:
            ranges.append((entry.start, entry.rows))
    mask = np.array(keep)
    return [output[:, mask] for output in outputs], ranges
