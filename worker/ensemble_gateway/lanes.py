"""Lanes: what can run batches, how many at a time, and how long that is expected to take.

A lane runs one batch after another. A serial worker (a CPU device) is one lane with all its instances; on a parallel
worker (a GPU) each instance is a lane of its own. Pure: the clock is an argument, nothing is sent from here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf
from typing import TYPE_CHECKING

from ensemble_contract.wire import LiveInstance, State

if TYPE_CHECKING:
    from ensemble_gateway.batches import Batch

# A worker is lost when a batch takes longer than this, and longer than so many times what was expected.
PATIENCE_S = 3.0
PATIENCE_FACTOR = 10.0

_SMOOTHING = 0.2
_OUTLIER = 4.0
# A larger batch may cost at most so many times more for each row, by what it needs of a processor's cache.
_LARGER = 2.0
_BUCKETS = 40


class Latency:
    """Expected seconds of a batch by its rows: smoothed seconds per row in buckets of powers of two.

    What is expected to take long is not tried again. So no bucket is believed to be slower than its neighbours allow:
    fewer rows take no longer, and more of them hardly longer for each row.
    """

    __slots__ = ("_above", "_below", "_nearest", "_pace", "_seen")

    def __init__(self, rows: int, seconds: float) -> None:
        self._pace = [0.0] * _BUCKETS
        self._seen: list[int] = []
        self._nearest = [0] * _BUCKETS
        # The next ones that were seen, itself where there is none.
        self._below = list(range(_BUCKETS))
        self._above = list(range(_BUCKETS))
        self._first(rows.bit_length(), seconds / rows)

    def observe(self, rows: int, seconds: float) -> None:
        """A batch of `rows` took this long.

        A single outlier counts as 4 times what was known, and the first of a bucket, where a model may compile itself,
        as what its neighbours allow.
        """
        bucket = rows.bit_length()
        pace = seconds / rows
        nearest = self._nearest[bucket]
        if nearest != bucket:
            known = self._pace[nearest]
            allowed = known * (_LARGER if nearest < bucket else 2.0 ** (nearest - bucket))
            self._first(bucket, min(pace, allowed) if known else pace)
        else:
            known = self._pace[bucket]
            if known and pace > _OUTLIER * known:
                pace = _OUTLIER * known
            self._pace[bucket] = known + _SMOOTHING * (pace - known)
        pace = self._pace[bucket]
        below, above = self._below[bucket], self._above[bucket]
        self._pace[below] = min(self._pace[below], pace * 2.0 ** (bucket - below))
        if above != bucket:
            self._pace[above] = min(self._pace[above], pace * _LARGER)

    def expect(self, rows: int) -> float:
        """Seconds for `rows`: the bucket's, else in proportion from the nearest bucket that was seen."""
        return self._pace[self._nearest[rows.bit_length()]] * rows

    def _first(self, bucket: int, pace: float) -> None:
        self._pace[bucket] = pace
        self._seen.append(bucket)
        self._nearest = [min(self._seen, key=lambda seen: (abs(seen - at), seen)) for at in range(_BUCKETS)]
        self._below = [max([seen for seen in self._seen if seen < at], default=at) for at in range(_BUCKETS)]
        self._above = [min([seen for seen in self._seen if seen > at], default=at) for at in range(_BUCKETS)]


@dataclass(slots=True, eq=False)
class Instance:
    """A member live on a worker."""

    id: int
    member: int
    batch_size: int
    latency: Latency


@dataclass(slots=True, eq=False)
class Lane:
    """Something that runs one batch after another: the instances it can run, and the batches given to it, oldest first.

    `open`, `opens_at`, `reserved_s` (work that waits for it although others are open) and `listed` (where its members
    list it while it is open) are kept by `Lanes`.
    """

    worker: str
    device_class: str
    credits: int
    instances: dict[int, Instance]
    batches: dict[int, Batch] = field(default_factory=dict)
    busy_until: float = 0.0
    freed_at: float = 0.0
    open: bool = False
    opens_at: float = inf
    reserved_s: float = 0.0
    listed: list[tuple[dict[Lane, Instance], Instance]] = field(default_factory=list)

    def backlog(self, now: float) -> float:
        """Seconds until it is expected to be free; one that is late is expected to be late by as much again."""
        return abs(self.busy_until - now) if self.batches else 0.0

    def start(self, batch: Batch, now: float) -> None:
        """Give it a batch."""
        self.busy_until = now + self.backlog(now) + batch.expected_s
        self.batches[batch.id] = batch

    def finish(self, batch: Batch, now: float) -> None:
        """A batch is no longer with it."""
        del self.batches[batch.id]
        self.freed_at = now
        self.busy_until = now
        for other in self.batches.values():
            self.busy_until += other.expected_s

    def inherit(self, old: Lane) -> None:
        """Take over the batches of the lane that this one replaces, where their instance still lives."""
        living = {instance.id for instance in self.instances.values()}
        for batch in old.batches.values():
            if all(instance.id in living for instance in batch.instances):
                batch.lane = self
                self.batches[batch.id] = batch
                self.busy_until = max(self.busy_until, old.busy_until)
                self.freed_at = max(self.freed_at, old.freed_at)

    def overdue(self, now: float) -> bool:
        """Whether its oldest batch takes so long that the worker must be taken for lost."""
        for batch in self.batches.values():
            began = max(batch.dispatched_at, self.freed_at)
            return now - began > max(PATIENCE_S, PATIENCE_FACTOR * batch.expected_s)
        return False


def lanes_of(state: State, members: dict[tuple[str, str], int], known: dict[int, Instance]) -> list[Lane]:
    """The lanes of a worker by its State, for the (member, digest) pairs that are served; measurements are kept."""
    instances = []
    # By id: of two instances of a version, which it has while a batch size changes, a serial worker runs the newer.
    for live in sorted(state.instances, key=lambda live: live.id):
        member = members.get((live.member, live.digest))
        if member is not None:
            before = known.get(live.id)
            same = before is not None and (before.member, before.batch_size) == (member, live.batch_size)
            instances.append(before if before is not None and same else _instance(live, member))
    if not instances:
        return []
    if state.serial:
        return [Lane(state.worker, state.device_class, state.credits, {i.member: i for i in instances})]
    return [Lane(state.worker, state.device_class, state.credits, {i.member: i}) for i in instances]


def _instance(live: LiveInstance, member: int) -> Instance:
    return Instance(live.id, member, live.batch_size, Latency(live.batch_size, live.latency_s))
