"""What the gateway counts, with plain additions on the hot path. Read by `exposition` (Prometheus) and `statistics_v2`.

Times are wall time. An ensemble's duration is that of its request, never a sum over members, which run in parallel. A
member's requests are the parts of requests that ran in its batches: of the ensemble's requests and of its own.
One event loop owns an object; nothing here locks.
"""

from __future__ import annotations

import enum
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from ensemble_gateway.request import Model

ENSEMBLE = 0

DURATION_BUCKETS_S = (
    *(0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075),
    *(0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0, 60.0),
)
BATCH_BUCKETS_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


class Failure(enum.StrEnum):
    """Why a request got no answer. The names are Triton's, but for TIMEOUT, which it counts among OTHER."""

    REJECTED = "REJECTED"  # the store is full, or no instance is live
    CANCELED = "CANCELED"  # the client left
    TIMEOUT = "TIMEOUT"  # fewer than the quorum answered in time
    BACKEND = "BACKEND"  # a member or its worker failed
    OTHER = "OTHER"


def model_index(model: Model) -> int:
    """The index of a model among the counters."""
    return ENSEMBLE if model.member is None else model.member + 1


class Histogram:
    """Counts of values by bucket; a value equal to a bound belongs to that bound's bucket, as Prometheus has it."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def add(self, value: float, times: int = 1) -> None:
        """Count `value`, `times` times."""
        self.counts[bisect_left(self.bounds, value)] += times
        self.total += value * times


@dataclass(slots=True)
class BatchSize:
    """How often a member ran batches of one size, and how long they took together."""

    executions: int = 0
    compute_s: float = 0.0


class ModelCounters:
    """The counters of one model that clients can name.

    `compute_s` and `queue_s` are summed over the requests in a batch, so that divided by `requests` they are the mean
    of a request; `batches` has each batch once. `durations` are those of requests that clients sent to this model.
    """

    __slots__ = (
        *("batches", "compute_s", "durations", "executions", "failed_s", "failures", "last_inference_s", "missing"),
        *("name", "queue_s", "requests", "rows", "success_s", "version"),
    )

    def __init__(self, name: str, version: str) -> None:
        self.name = name
        self.version = version
        self.requests = 0
        self.rows = 0
        self.executions = 0
        self.success_s = 0.0
        self.queue_s = 0.0
        self.compute_s = 0.0
        self.failures = dict.fromkeys(Failure, 0)
        self.failed_s = 0.0
        self.missing = 0
        self.last_inference_s = 0.0
        self.batches: dict[int, BatchSize] = {}
        self.durations = Histogram(DURATION_BUCKETS_S)


@dataclass(frozen=True, slots=True)
class Gauges:
    """Figures that others keep, read when someone asks.

    `pending_requests` takes a model's index: requests (or parts, for a member) that wait to be run. `live_instances`
    takes a member's index.
    """

    store_rows: Callable[[], int]
    store_bytes: Callable[[], int]
    store_capacity_bytes: Callable[[], int]
    pending_requests: Callable[[int], int]
    live_instances: Callable[[int], int]


class GatewayCounters:
    """The counters of the gateway as a whole."""

    __slots__ = ("combine_s", "combined_rows", "quorum_answers")

    def __init__(self) -> None:
        self.combine_s = 0.0
        self.combined_rows = 0
        self.quorum_answers = 0


class Metrics:
    """All that is counted while one plan is served. A model's index is 0 for the ensemble, else 1 + the member's.

    `models` begin with the ensemble. The metrics of a new plan go on where those of the `previous` one are: both count
    into the same counters of a model (by name and version), so that a plan may be replaced while its requests finish.
    `clock` gives seconds since the epoch.
    """

    __slots__ = ("_clock", "gateway", "gauges", "models")

    def __init__(
        self,
        models: Iterable[Model],
        gauges: Gauges,
        previous: Metrics | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        known = {} if previous is None else {(model.name, model.version): model for model in previous.models}
        self.models: list[ModelCounters] = [
            known.get((model.name, model.version)) or ModelCounters(model.name, model.version) for model in models
        ]
        self.gateway: GatewayCounters = GatewayCounters() if previous is None else previous.gateway
        self.gauges = gauges
        self._clock = clock

    def request_done(self, model_index: int, rows: int, duration_s: float) -> None:
        """A request that a client sent to this model was answered."""
        counters = self.models[model_index]
        counters.durations.add(duration_s)
        if model_index == ENSEMBLE:
            counters.requests += 1
            counters.executions += 1
            counters.rows += rows
            counters.success_s += duration_s
            counters.last_inference_s = self._clock()

    def batch_done(self, member_index: int, rows: int, queue_s: float, compute_s: float, requests: int = 1) -> None:
        """A member ran one batch of `rows` rows, which hold parts of so many `requests`.

        `queue_s` is how long those parts waited for it, summed over them; `compute_s` is the time of the batch itself.
        """
        counters = self.models[member_index + 1]
        counters.requests += requests
        counters.executions += 1
        counters.rows += rows
        counters.queue_s += queue_s
        counters.compute_s += compute_s * requests
        counters.success_s += queue_s + compute_s * requests
        counters.last_inference_s = self._clock()
        size = counters.batches.get(rows)
        if size is None:
            size = counters.batches[rows] = BatchSize()
        size.executions += 1
        size.compute_s += compute_s

    def failed(self, model_index: int, reason: Failure, duration_s: float = 0.0) -> None:
        """A request got no answer after `duration_s`; or, for a member, a part of one was lost for good."""
        counters = self.models[model_index]
        counters.failures[reason] += 1
        counters.failed_s += duration_s

    def combined(self, rows: int, duration_s: float) -> None:
        """So many rows were combined, in one go."""
        self.gateway.combined_rows += rows
        self.gateway.combine_s += duration_s

    def answered_by_quorum(self, missing: Iterable[int]) -> None:
        """A request of the ensemble was answered without the members of these indices."""
        self.gateway.quorum_answers += 1
        for member_index in missing:
            self.models[member_index + 1].missing += 1
