"""The pipeline of one plan: rows in, batches to workers, outputs back, combined answers out.

Glue of the pure cores (row store, dispatcher, combiner) and the links, on one event loop. Requests that arrive in one
turn of the loop are dispatched together, and requests that finish together are combined together.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence

import numpy as np

from ensemble_contract import wire
from ensemble_contract.layout import StoreLayout
from ensemble_contract.plan import GatewayPlan, WorkerAddress
from ensemble_gateway.answers import Answers
from ensemble_gateway.dispatcher import Dispatcher
from ensemble_gateway.links import Link, LinkOwner
from ensemble_gateway.links.shared import SharedMemory
from ensemble_gateway.metrics import ENSEMBLE, Failure, Gauges, Metrics, model_index
from ensemble_gateway.queues import Entry, Request, bits
from ensemble_gateway.request import Answer, Array, InferHeader, Model, RequestError
from ensemble_gateway.rowstore import Ranges, RowStore, slots_within
from ensemble_gateway.served import served_models
from ensemble_gateway.sinks import FutureSink, Sink

OVERDUE_CHECK_S = 0.5
RETRY_AFTER_S = 1

_REASONS = {499: Failure.CANCELED, 500: Failure.BACKEND, 503: Failure.REJECTED, 504: Failure.TIMEOUT}


LinkMaker = Callable[[WorkerAddress, SharedMemory, RowStore, LinkOwner], Link]


class Pipeline:
    """What serves one plan. `make_link` opens the link to a worker."""

    def __init__(self, plan: GatewayPlan, make_link: LinkMaker, former: Metrics | None = None) -> None:
        self.plan = plan
        self.draining = False
        self.models = served_models(plan)
        self._loop = asyncio.get_running_loop()
        self._carried = tuple(spec.carried for spec in plan.outputs)
        members = len(plan.members)
        layout = StoreLayout(plan.inputs, slots_within(plan.max_queue_bytes, plan.inputs, self._carried, members))
        self._memory = SharedMemory("ensemble-store", layout.total_bytes)
        self.store = RowStore(layout, self._memory.memory, self._carried, members)
        self.dispatcher = Dispatcher([(m.name, m.digest) for m in plan.members], plan.max_delay_s)
        self._everyone = (1 << members) - 1
        self._quorum = plan.quorum or members
        self.metrics = Metrics(self.models.values(), self._gauges(), former)
        self._answers = Answers(plan, self.store, self.metrics)
        self.links: dict[str, Link] = {}
        self._links = [make_link(worker, self._memory, self.store, self) for worker in plan.workers]
        self._finished: list[Request] = []
        self._turning = False
        self._seen_all = False
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = math.inf
        self._watch: asyncio.TimerHandle | None = None

    # -- life -----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Connect to the workers."""
        self.links = {link.worker: link for link in self._links}
        for link in self._links:
            link.start()
        self._watch = self._loop.call_later(OVERDUE_CHECK_S, self._check_overdue)

    @property
    def idle(self) -> bool:
        """Whether no request is in flight."""
        return self.store.used_rows == 0

    @property
    def ready(self) -> bool:
        """Whether a live instance of every member has been seen; stays so until it drains: quorum or 503 answer."""
        if not self._seen_all:
            self._seen_all = all(self.member_live(member) for member in range(len(self.plan.members)))
        return self._seen_all and not self.draining

    def member_live(self, index: int) -> bool:
        """Whether a worker reports an instance of this member live."""
        return self.dispatcher.alive(index)

    def max_rows(self, _model: Model) -> int:
        """The most rows that a request can have: the store's."""
        return self.store.layout.slots

    def close(self) -> None:
        """Refuse what is in flight and leave the workers."""
        for request in list(self.dispatcher.deadlines):
            self.dispatcher.cancel(request)
            self._release(request.ranges)
            request.sink.refused(RequestError(503, "the gateway is stopping", RETRY_AFTER_S))
        for link in self._links:
            link.close()
        for timer in (self._timer, self._watch):
            if timer is not None:
                timer.cancel()
        self._memory.close()

    # -- requests -------------------------------------------------------------------------------------------------

    def submit(self, sink: Sink, binary: memoryview) -> Request:
        """Take a request's rows and queue them; its sink hears later, never during this call.

        Raises RequestError if it cannot be taken: 400 for an impossible quorum, 413 for more rows than the store has,
        503 for a full store.
        """
        header = sink.header
        wanted = self._everyone if header.model.member is None else 1 << header.model.member
        quorum = self._quorum if header.quorum is None else header.quorum
        if header.model.member is not None:
            quorum = 1
        elif not 1 <= quorum <= len(self.plan.members):
            raise RequestError(400, f"parameter 'quorum': {quorum} is not in 1..{len(self.plan.members)}")
        ranges = self._slots_for(header)
        self.store.write(ranges, [_bytes_of(part.array) if part.array is not None else binary[part.start : part.stop]
                                  for part in header.inputs])  # fmt: skip
        request = Request(header.rows, ranges, wanted, quorum, sink)
        now = self._loop.time()
        timeout_s = self.plan.timeout_s if header.timeout_s is None else header.timeout_s
        self.dispatcher.admit(request, now + timeout_s, now)
        if not self._turning:
            self._turning = True
            self._loop.call_soon(self._turn)
        return request

    async def infer(self, header: InferHeader, binary: memoryview) -> Answer:
        """The answer to one request; cancelled when the client leaves.

        Raises RequestError.
        """
        sink = FutureSink(header, self._loop.create_future())
        request = self.submit(sink, binary)
        try:
            return await sink.future
        finally:
            self.cancel(request)

    def cancel(self, request: Request) -> None:
        """The client has left: forget its rows. Nothing happens if it was answered."""
        if not request.closed:
            self.dispatcher.cancel(request)
            self._release(request.ranges)
            waited = self._loop.time() - request.admitted_at
            self.metrics.failed(model_index(request.sink.header.model), Failure.CANCELED, waited)

    def _slots_for(self, header: InferHeader) -> Ranges:
        store = self.store
        ranges = store.allocator.take(header.rows)
        if ranges is not None:
            return ranges
        index = model_index(header.model)
        self.metrics.failed(index, Failure.REJECTED)
        slots = store.layout.slots
        if header.rows > slots:
            raise RequestError(413, f"{header.rows} rows are over the {slots} that the queue holds: send fewer at once")
        raise RequestError(503, f"the queue is full ({store.used_rows} of {slots} rows): try again", RETRY_AFTER_S)

    # -- what links tell ------------------------------------------------------------------------------------------

    def worker_state(self, state: wire.State) -> None:
        """A worker says what it can run."""
        self._finished += self.dispatcher.update(state)

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
        for instance, seconds in zip(batch.instances, compute_s, strict=True):
            self.metrics.batch_done(instance.member, batch.rows, batch.waited_s, seconds, len(entries))
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
            self.metrics.failed(batch.instances[0].member + 1, Failure.BACKEND)
        self._finished += self.dispatcher.fail(batch, failed.text)

    def worker_lost(self, worker: str, reason: str) -> None:  # noqa: ARG002  # the link logs the reason
        """A worker is gone: its rows go elsewhere."""
        self._finished += self.dispatcher.lost(worker)

    def settled(self) -> None:
        """Links have told everything there was: go on."""
        self._turn()

    # -- turns ----------------------------------------------------------------------------------------------------

    def _turn(self) -> None:
        """Give open lanes their next batches, then answer what is finished: workers shall not wait for answers."""
        self._turning = False
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
        self._set_timer()

    def _set_timer(self) -> None:
        at = self.dispatcher.next_at()
        if at is None or at >= self._timer_at:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer_at = at
        self._timer = self._loop.call_at(at, self._on_time)

    def _on_time(self) -> None:
        self._timer, self._timer_at = None, math.inf
        self._finished += self.dispatcher.expire(self._loop.time())
        self._turn()

    def _check_overdue(self) -> None:
        for worker in self.dispatcher.overdue(self._loop.time()):
            self.links[worker].reset("a batch takes far longer than expected")
        self._watch = self._loop.call_later(OVERDUE_CHECK_S, self._check_overdue)

    # -- answers --------------------------------------------------------------------------------------------------

    def _answer(self, finished: list[Request], now: float) -> None:
        groups: dict[int | None, list[Request]] = {}
        for request in finished:
            if request.failure is not None:
                self._refuse(request, now)
            elif request.done == request.wanted and not request.sink.header.members:
                groups.setdefault(request.sink.header.model.member, []).append(request)
            else:
                self._answer_in_full(request, now)
        for member, requests in groups.items():
            self._answer_together(member, requests, now)

    def _answer_together(self, member: int | None, requests: list[Request], now: float) -> None:
        """Answer requests that all their members have answered: combined as one batch."""
        ranges = [one for request in requests for one in request.ranges]
        outputs = self._answers.outputs(member, ranges)
        # Outputs may be views of these slots: nobody gets the slots before this turn has ended.
        self._release(ranges)
        index = ENSEMBLE if member is None else member + 1
        at = 0
        for request in requests:
            end = at + request.rows
            self.metrics.request_done(index, request.rows, now - request.admitted_at)
            request.sink.answered([output[at:end] for output in outputs])
            at = end

    def _answer_in_full(self, request: Request, now: float) -> None:
        answer = self._answers.in_full(request)
        self._release(request.ranges)
        self.metrics.request_done(model_index(request.sink.header.model), request.rows, now - request.admitted_at)
        if answer.missing:
            self.metrics.answered_by_quorum(bits(request.wanted & ~request.done))
        request.sink.answered_in_full(answer)

    def _refuse(self, request: Request, now: float) -> None:
        failure = request.failure
        if failure is None:
            raise AssertionError("only failed requests are refused")
        self._release(request.ranges)
        reason = _REASONS.get(failure.status, Failure.OTHER)
        self.metrics.failed(model_index(request.sink.header.model), reason, now - request.admitted_at)
        retry_after_s = RETRY_AFTER_S if failure.status == 503 else 0
        request.sink.refused(RequestError(failure.status, failure.message, retry_after_s))

    def _release(self, ranges: Sequence[tuple[int, int]]) -> None:
        self.store.allocator.give(ranges)
        for link in self._links:
            link.forget(ranges)

    def _pending(self, index: int) -> int:
        if index == ENSEMBLE:
            return sum(1 for _ in self.dispatcher.deadlines)
        return self.dispatcher.waiting_entries(index - 1)

    def _gauges(self) -> Gauges:
        return Gauges(
            store_rows=lambda: self.store.used_rows,
            store_bytes=lambda: self.store.used_rows * self.store.bytes_per_row,
            store_capacity_bytes=lambda: self.store.layout.slots * self.store.bytes_per_row,
            pending_requests=self._pending,
            live_instances=lambda index: sum(1 for _, i in self.dispatcher.instances() if i.member == index),
        )


def _bytes_of(array: Array) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _of_the_living(entries: Sequence[Entry], outputs: Sequence[Array]) -> tuple[list[Array], list[tuple[int, int]]]:
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
