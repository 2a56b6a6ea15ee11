"""Lanes: what can run batches, how many at a time, and how long that is expected to take.

A lane runs one batch after another. A serial worker (a CPU device) is one lane with all its instances; on a parallel
worker (a GPU) each instance is a lane of its own. Pure: the clock is an argument, nothing is sent from here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ensemble_contract.wire import LiveInstance, State

if TYPE_CHECKING:
    from ensemble_gateway.dispatcher import Batch

# A lane that is expected to be free sooner than this is given its next batch already: it never waits for the network.
HORIZON_S = 0.005
# A worker is lost when a batch takes longer than this, and longer than so many times what was expected.
PATIENCE_S = 3.0
PATIENCE_FACTOR = 10.0

_SMOOTHING = 0.2


class Latency:
    """Expected seconds of a batch by its rows: smoothed measurements in buckets of powers of two."""

    __slots__ = ("_by_bucket",)

    def __init__(self, rows: int, seconds: float) -> None:
        self._by_bucket = {rows.bit_length(): (seconds, float(rows))}

    def observe(self, rows: int, seconds: float) -> None:
        """A batch of `rows` took this long."""
        bucket = rows.bit_length()
        known = self._by_bucket.get(bucket)
        if known is None:
            self._by_bucket[bucket] = (seconds, float(rows))
            return
        smooth, at = known
        self._by_bucket[bucket] = (smooth + _SMOOTHING * (seconds - smooth), at + _SMOOTHING * (rows - at))

    def expect(self, rows: int) -> float:
        """Seconds for `rows`: the bucket's, else in proportion from the nearest bucket that was seen."""
        bucket = rows.bit_length()
        known = self._by_bucket.get(bucket)
        if known is None:
            known = self._by_bucket[min(self._by_bucket, key=lambda seen: (abs(seen - bucket), seen))]
        seconds, at = known
        return seconds * rows / at


@dataclass(slots=True, eq=False)
class Instance:
    """A member live on a worker."""

    id: int
    member: int
    batch_size: int
    latency: Latency


@dataclass(slots=True, eq=False)
class Lane:
    """Something that runs one batch after another: the instances it can run, and the batches given to it, oldest first."""

    worker: str
    device_class: str
    credits: int
    instances: dict[int, Instance]
    batches: dict[int, Batch] = field(default_factory=dict)
    busy_until: float = 0.0
    freed_at: float = 0.0

    def open(self, now: float) -> bool:
        """Whether it may be given another batch now."""
        held = len(self.batches)
        return held == 0 or (held < self.credits and self.busy_until - now < HORIZON_S)

    def backlog(self, now: float) -> float:
        """Seconds until it is expected to be free."""
        return max(0.0, self.busy_until - now) if self.batches else 0.0

    def start(self, batch: Batch, now: float) -> None:
        """Give it a batch."""
        self.busy_until = max(now, self.busy_until if self.batches else now) + batch.expected_s
        self.batches[batch.id] = batch

    def finish(self, batch: Batch, now: float) -> None:
        """A batch is no longer with it."""
        del self.batches[batch.id]
        self.freed_at = now
        self.busy_until = now + sum(other.expected_s for other in self.batches.values())

    def overdue(self, now: float) -> bool:
        """Whether its oldest batch takes so long that the worker must be taken for lost."""
        for batch in self.batches.values():
            began = max(batch.dispatched_at, self.freed_at)
            return now - began > max(PATIENCE_S, PATIENCE_FACTOR * batch.expected_s)
        return False


def lanes_of(state: State, members: dict[tuple[str, str], int], known: dict[int, Instance]) -> list[Lane]:
    """The lanes of a worker by its State, for the (member, digest) pairs that are served; measurements are kept."""
    instances = [
        known.get(live.id) or _instance(live, members[live.member, live.digest])
        for live in state.instances
        if (live.member, live.digest) in members
    ]
    if not instances:
        return []
    if state.serial:
        return [Lane(state.worker, state.device_class, state.credits, {i.member: i for i in instances})]
    return [Lane(state.worker, state.device_class, state.credits, {i.member: i}) for i in instances]


def _instance(live: LiveInstance, member: int) -> Instance:
    return Instance(live.id, member, live.batch_size, Latency(live.batch_size, live.latency_s))
