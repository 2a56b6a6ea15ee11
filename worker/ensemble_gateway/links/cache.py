"""Which rows of the store a worker has in its cache, and where. Pure: decides what must be put before a batch can run.

A worker's cache may be smaller than the store. Rows of batches on their way are pinned; others make room when needed,
and are put again if a later batch wants them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from ensemble_gateway.batches import Batch
from ensemble_gateway.rowstore import count_of, slots_of

Slots = np.ndarray[Any, np.dtype[np.int64]]
# Rows of a cache that a batch reads: few in a list, many in an array.
Pinned = Slots | list[int]
RangeList = list[tuple[int, int]]

# Up to so many rows are looked at one by one: numpy's calls, of which a batch takes dozens, cost more for so few.
FEW_ROWS = 32
# Rows of the cache that are looked at together when room is needed.
WINDOW = 4096


class Placement(NamedTuple):
    """Where a batch's rows are in the cache, and which rows of the store must be put there first."""

    pinned: Pinned
    rows: RangeList
    missing_cache: RangeList
    missing_store: RangeList


class CacheMap:
    """The cache of one worker, of `capacity` rows, for a store of `slots` rows.

    A row is put again only if it was forgotten or evicted: a slot of the store keeps its row until it is forgotten.
    """

    def __init__(self, slots: int, capacity: int) -> None:
        # More room than the store has rows is never needed.
        capacity = min(slots, capacity)
        self._where = np.full(slots, -1, np.int64)
        self._owner = np.full(capacity, -1, np.int64)
        self._pins = np.zeros(capacity, np.int32)
        self._free = np.arange(capacity - 1, -1, -1, dtype=np.int64)
        # The same, for a row at a time.
        self._where_at = self._where.data
        self._owner_at = self._owner.data
        self._pins_at = self._pins.data
        self._free_at = self._free.data
        self._top = capacity
        self._hand = 0
        self._orphans = 0

    def place(self, ranges: Sequence[tuple[int, int]]) -> Placement | None:
        """Pin a batch's rows, all different, and find room for those not there; None when pinned rows fill it."""
        # Counted as if none were there: if they fit even so, no room has to be made.
        if count_of(ranges) <= min(FEW_ROWS, self._top):
            return self._place_few(ranges)
        return self._place_many(slots_of(ranges))

    def _place_few(self, ranges: Sequence[tuple[int, int]]) -> Placement:
        where, owner, pins, free, top = self._where_at, self._owner_at, self._pins_at, self._free_at, self._top
        placement = Placement(pinned := [], [], [], [])
        for start, count in ranges:
            for slot in range(start, start + count):
                at = where[slot]
                if at < 0:
                    top -= 1
                    at = free[top]
                    where[slot] = at
                    owner[at] = slot
                    _extend(placement.missing_cache, at)
                    _extend(placement.missing_store, slot)
                pins[at] += 1
                pinned.append(at)
                _extend(placement.rows, at)
        self._top = top
        return placement

    def _place_many(self, slots: Slots) -> Placement | None:
        where = self._where[slots]
        present = where[where >= 0]
        missing = slots[where < 0]
        self._pins[present] += 1
        if len(missing) > self._top and not self._evict(len(missing) - self._top):
            self._pins[present] -= 1
            return None
        if len(missing):
            self._top -= len(missing)
            fresh = self._free[self._top : self._top + len(missing)][::-1]
            self._where[missing] = fresh
            self._owner[fresh] = missing
            self._pins[fresh] += 1
            where = self._where[slots]
        return Placement(where, ranges_of(where), ranges_of(self._where[missing]), ranges_of(missing))

    def unpin(self, pinned: Pinned) -> None:
        """A batch is done with these rows of the cache."""
        if isinstance(pinned, list):
            self._unpin_few(pinned)
        else:
            self._unpin_many(pinned)

    def _unpin_few(self, pinned: list[int]) -> None:
        pins = self._pins_at
        for at in pinned:
            pins[at] -= 1
            if self._orphans and not pins[at] and self._owner_at[at] < 0:
                self._orphans -= 1
                self._give_one(at)

    def _unpin_many(self, pinned: Slots) -> None:
        self._pins[pinned] -= 1
        if self._orphans:
            idle = pinned[(self._owner[pinned] < 0) & (self._pins[pinned] == 0)]
            self._orphans -= len(idle)
            self._give(idle)

    def forget(self, ranges: Sequence[tuple[int, int]]) -> None:
        """These slots of the store are free: what the cache has of them is worthless.

        Room that a batch on its way still reads is used again only when that batch is done.
        """
        if count_of(ranges) <= FEW_ROWS:
            self._forget_few(ranges)
        else:
            self._forget_many(slots_of(ranges))

    def _forget_few(self, ranges: Sequence[tuple[int, int]]) -> None:
        where, owner, pins = self._where_at, self._owner_at, self._pins_at
        for start, count in ranges:
            for slot in range(start, start + count):
                at = where[slot]
                if at < 0:
                    continue
                where[slot] = owner[at] = -1
                if pins[at]:
                    self._orphans += 1
                else:
                    self._give_one(at)

    def _forget_many(self, slots: Slots) -> None:
        cached = self._where[slots]
        cached = cached[cached >= 0]
        if len(cached) == 0:
            return
        self._where[slots] = -1
        self._owner[cached] = -1
        idle = cached[self._pins[cached] == 0]
        self._orphans += len(cached) - len(idle)
        self._give(idle)

    def _evict(self, rows: int) -> bool:
        """Make room for `rows` more, walking round the cache; False, and nothing is lost, if too many are pinned."""
        found, left = [], rows
        for start, stop in self._windows():
            idle = (self._owner[start:stop] >= 0) & (self._pins[start:stop] == 0)
            victims = np.flatnonzero(idle)[:left] + start
            found.append(victims)
            left -= len(victims)
            if not left:
                break
        else:
            return False
        victims = np.concatenate(found)
        self._hand = int(victims[-1]) + 1
        self._where[self._owner[victims]] = -1
        self._owner[victims] = -1
        self._give(victims)
        return True

    def _windows(self) -> Iterator[tuple[int, int]]:
        """The whole cache once, in parts, beginning where the last eviction ended: what came first leaves first."""
        for begin, end in ((self._hand, len(self._owner)), (0, self._hand)):
            for start in range(begin, end, WINDOW):
                yield start, min(start + WINDOW, end)

    def _give(self, cached: Slots) -> None:
        self._free[self._top : self._top + len(cached)] = cached
        self._top += len(cached)

    def _give_one(self, cached: int) -> None:
        self._free_at[self._top] = cached
        self._top += 1


def freed_ranges(batch: Batch) -> RangeList:
    """Slots of a batch's rows whose request is finished: they may have other rows since, and again later."""
    return [(entry.start, entry.rows) for entry in batch.entries if entry.request.closed]


def ranges_of(slots: Slots) -> RangeList:
    """Runs of consecutive slots, in order, as (start, count)."""
    if len(slots) == 0:
        return []
    breaks = np.flatnonzero(np.diff(slots) != 1) + 1
    starts = np.concatenate(([0], breaks))
    ends = np.concatenate((breaks, [len(slots)]))
    return list(zip(slots[starts].tolist(), (ends - starts).tolist(), strict=True))


def _extend(ranges: RangeList, slot: int) -> None:
    """One more slot, in the last range if it follows it."""
    if ranges:
        start, count = ranges[-1]
        if start + count == slot:
            ranges[-1] = start, count + 1
            return
    ranges.append((slot, 1))
