"""The pipeline of one plan: takes its requests, and answers them from what the engine has gathered.

Light, because every new plan gets one: models that clients can name, counters, the combination. Rows, batches and
workers are the engine's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from ensemble_contract.plan import GatewayPlan
from ensemble_gateway.answers import Answers
from ensemble_gateway.metrics import ENSEMBLE, Failure, Gauges, Metrics, model_index
from ensemble_gateway.queues import Request
from ensemble_gateway.request import Answer, Array, InferHeader, Model, RequestError
from ensemble_gateway.rowstore import Ranges
from ensemble_gateway.served import served_models
from ensemble_gateway.sinks import FutureSink, Sink

if TYPE_CHECKING:
    from ensemble_gateway.engine import Engine

RETRY_AFTER_S = 1

_REASONS = {499: Failure.CANCELED, 500: Failure.BACKEND, 503: Failure.REJECTED, 504: Failure.TIMEOUT}


class Pipeline:
    """What serves one plan on an engine, whose `columns` its members have, in the plan's order.

    It counts on where `former` has, and is as ready. `serving`: requests come, or have come, through it.
    """

    def __init__(
        self, plan: GatewayPlan, engine: Engine, columns: tuple[int, ...], former: Pipeline | None = None
    ) -> None:
        self.plan = plan
        self.engine = engine
        self.columns = columns
        self.models = served_models(plan)
        self.metrics: Metrics = Metrics(self.models.values(), self._gauges(), former.metrics if former else None)
        self.draining = False
        self.serving = False
        self.leaving = False
        self.in_flight = 0
        self._loop = asyncio.get_running_loop()
        self._store = engine.store
        self._dispatcher = engine.dispatcher
        self._everyone = sum(1 << column for column in columns)
        self._member = {column: index for index, column in enumerate(columns)}
        self._quorum = plan.quorum or len(columns)
        self._max_rows = min(
            engine.store.layout.slots, plan.max_queue_bytes // engine.store.bytes_per_row(len(columns))
        )
        self._answers = Answers(plan, columns, engine.store, self.metrics)
        self._was_ready = former is not None and former.was_ready

    @property
    def was_ready(self) -> bool:
        """Whether as many members as the quorum wants have been live at once; stays so: then quorum or 503 answer."""
        if not self._was_ready:
            self._was_ready = self.answerable
        return self._was_ready

    @property
    def ready(self) -> bool:
        """Whether requests shall come here."""
        return self.was_ready and not self.draining

    @property
    def answerable(self) -> bool:
        """Whether as many members are live as the quorum wants."""
        return len(self.columns) - self._dispatcher.missing(self.columns) >= self._quorum

    @property
    def whole(self) -> bool:
        """Whether every member has a live instance on the workers of this plan: others may be about to leave."""
        return not self._dispatcher.missing(self.columns, [worker.name for worker in self.plan.workers])

    def member_live(self, index: int) -> bool:
        """Whether a worker reports an instance of this member live."""
        return self._dispatcher.alive(self.columns[index])

    def max_rows(self, _model: Model) -> int:
        """The most rows that a request can have: the store's."""
        return max(1, self._max_rows)

    # -- requests -------------------------------------------------------------------------------------------------

    def submit(self, sink: Sink, binary: memoryview) -> Request:
        """Take a request's rows and queue them; its sink hears later, never during this call.

        Raises RequestError if it cannot be taken: 400 for an impossible quorum, 413 for more rows than the store has,
        503 for a full store.
        """
        header = sink.header
        member = header.model.member
        if member is not None:
            wanted, quorum = 1 << self.columns[member], 1
        else:
            wanted = self._everyone
            quorum = self._quorum if header.quorum is None else header.quorum
            if not 1 <= quorum <= len(self.columns):
                raise RequestError(400, f"parameter 'quorum': {quorum} is not in 1..{len(self.columns)}")
        ranges = self._store.allocator.take(header.rows)
        if ranges is None:
            raise self._no_room(header)
        self._store.write(ranges, [_bytes_of(part.array) if part.array is not None else binary[part.start : part.stop]
                                   for part in header.inputs])  # fmt: skip
        request = Request(header.rows, ranges, wanted, quorum, sink, self)
        now = self._loop.time()
        timeout_s = self.plan.timeout_s if header.timeout_s is None else header.timeout_s
        self._dispatcher.admit(request, now + timeout_s, now)
        self.in_flight += 1
        self.engine.wake(header.rows)
        return request

    def infer(self, header: InferHeader, binary: memoryview) -> Awaitable[Answer]:
        """The answer to one request, whose rows are taken at once; cancelled when the client leaves.

        Raises RequestError, now or when it is awaited.
        """
        sink = FutureSink(header, self._loop.create_future())
        request = self.submit(sink, binary)
        # The rows are in the store: what came as JSON need not wait beside them.
        sink.header = replace(header, inputs=())
        return self._answer_to(sink, request)

    async def _answer_to(self, sink: FutureSink, request: Request) -> Answer:
        try:
            return await sink.future
        finally:
            self.cancel(request)

    def cancel(self, request: Request) -> None:
        """The client has left: forget its rows. Nothing happens if it was answered."""
        if not request.closed:
            self._dispatcher.cancel(request)
            waited = self._loop.time() - request.admitted_at
            self.metrics.failed(model_index(request.sink.header.model), Failure.CANCELED, waited)
            self._release(request.ranges, 1)

    def leave(self) -> None:
        """No more requests will come; the engine hears when the last one is answered."""
        self.leaving = True
        if not self.in_flight:
            self.engine.ended()

    def _no_room(self, header: InferHeader) -> RequestError:
        self.metrics.failed(model_index(header.model), Failure.REJECTED)
        most = self.max_rows(header.model)
        if header.rows > most:
            return RequestError(413, f"{header.rows} rows are over the {most} that the queue holds: send fewer at once")
        full = f"({self._store.used_rows} of {self._store.allocator.capacity} rows)"
        return RequestError(503, f"the queue is full {full}: try again", RETRY_AFTER_S)

    # -- what the engine tells ------------------------------------------------------------------------------------

    def batch_done(self, column: int, rows: int, queue_s: float, compute_s: float, requests: int) -> None:
        """A member has run a batch of `rows` rows with parts of so many requests."""
        self.metrics.batch_done(self._member[column], rows, queue_s, compute_s, requests)

    def batch_failed(self, column: int) -> None:
        """A member has failed on a batch."""
        self.metrics.failed(self._member[column] + 1, Failure.BACKEND)

    def answer_together(self, requests: list[Request], now: float) -> None:
        """Answer requests for one model that all their members have answered: combined as one batch."""
        member = requests[0].sink.header.model.member
        ranges = [one for request in requests for one in request.ranges]
        outputs = self._answers.outputs(member, ranges)
        # Outputs may be views of these slots: nobody gets the slots before this turn has ended.
        self._release(ranges, len(requests))
        index = ENSEMBLE if member is None else member + 1
        at = 0
        for request in requests:
            end = at + request.rows
            self.metrics.request_done(index, request.rows, now - request.admitted_at)
            request.sink.answered([output[at:end] for output in outputs])
            at = end

    def answer_in_full(self, request: Request, now: float) -> None:
        """Answer a request by those members that have answered it, and say which."""
        answer = self._answers.in_full(request)
        self._release(request.ranges, 1)
        self.metrics.request_done(model_index(request.sink.header.model), request.rows, now - request.admitted_at)
        if answer.missing:
            missing = request.wanted & ~request.done
            self.metrics.answered_by_quorum([i for i, column in enumerate(self.columns) if missing >> column & 1])
        request.sink.answered_in_full(answer)

    def refuse(self, request: Request, now: float) -> None:
        """Answer a request that has failed."""
        failure = request.failure
        if failure is None:
            raise AssertionError("only failed requests are refused")
        self._release(request.ranges, 1)
        reason = _REASONS.get(failure.status, Failure.OTHER)
        self.metrics.failed(model_index(request.sink.header.model), reason, now - request.admitted_at)
        retry_after_s = RETRY_AFTER_S if failure.status == 503 else 0
        request.sink.refused(RequestError(failure.status, failure.message, retry_after_s))

    def refuse_at_end(self, request: Request) -> None:
        """Refuse a request because the gateway stops."""
        self._release(request.ranges, 1)
        request.sink.refused(RequestError(503, "the gateway is stopping", RETRY_AFTER_S))

    def _release(self, ranges: Sequence[tuple[int, int]] | Ranges, requests: int) -> None:
        self.engine.release(ranges)
        self.in_flight -= requests
        if self.leaving and not self.in_flight:
            self.engine.ended()

    # -- figures --------------------------------------------------------------------------------------------------

    def _pending(self, index: int) -> int:
        if index == ENSEMBLE:
            return sum(1 for _ in self._dispatcher.deadlines)
        return self._dispatcher.waiting_entries(self.columns[index - 1])

    def _gauges(self) -> Gauges:
        engine = self.engine
        return Gauges(
            store_rows=lambda: engine.store.used_rows,
            store_bytes=lambda: engine.used_bytes,
            store_capacity_bytes=lambda: engine.store.allocator.capacity * engine.bytes_per_row,
            pending_requests=self._pending,
            live_instances=lambda index: engine.dispatcher.hosts(self.columns[index]),
        )


def _bytes_of(array: Array) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
