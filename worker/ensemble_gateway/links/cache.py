"""Which rows of the store a worker has in its cache, and where. Pure: it decides what must be put before a batch can run.

A worker's cache may be smaller than the store. Rows of batches on their way are pinned; others make room when needed,
and are put again if a later batch wants them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ensemble_gateway.rowstore import slots_of

Slots = np.ndarray[Any, np.dtype[np.int64]]
RangeList = list[tuple[int, int]]


class Placement(NamedTuple):
    """Where a batch's rows are in the cache, and which rows of the store must be put there first."""

    pinned: Slots
    rows: RangeList
    missing_cache: RangeList
    missing_store: RangeList


class CacheMap:
    """The cache of one worker, of `capacity` rows, for a store of `slots` rows."""

    def __init__(self, slots: int, capacity: int) -> None:
        self._where = np.full(slots, -1, np.int64)
        self._pins = np.zeros(capacity, np.int32)
        self._free = np.arange(capacity - 1, -1, -1, dtype=np.int64)
        self._top = capacity

    def place(self, ranges: Sequence[tuple[int, int]]) -> Placement | None:
        """Pin a batch's rows and find room for those not there; None when pinned rows fill the cache."""
        slots = slots_of(ranges)
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
            self._pins[fresh] += 1
            where = self._where[slots]
        return Placement(where, ranges_of(where), ranges_of(self._where[missing]), ranges_of(missing))

    def unpin(self, pinned: Slots) -> None:
        """A batch is done with these rows of the cache."""
        self._pins[pinned] -= 1

    def forget(self, ranges: Sequence[tuple[int, int]]) -> None:
        """These slots of the store are free: what the cache has of them is worthless."""
        slots = slots_of(ranges)
        self._release(slots[self._where[slots] >= 0])

    def _evict(self, rows: int) -> bool:
        kept = np.flatnonzero(self._where >= 0)
        victims = kept[self._pins[self._where[kept]] == 0][:rows]
        self._release(victims)
        return len(victims) == rows

    def _release(self, slots: Slots) -> None:
        self._free[self._top : self._top + len(slots)] = self._where[slots]
        self._top += len(slots)
        self._where[slots] = -1


def ranges_of(slots: Slots) -> RangeList:
    """Runs of consecutive slots, in order, as (start, count)."""
    if len(slots) == 0:
        return []
    breaks = np.flatnonzero(np.diff(slots) != 1) + 1
    starts = np.concatenate(([0], breaks))
    ends = np.concatenate((breaks, [len(slots)]))
    return list(zip(slots[starts].tolist(), (ends - starts).tolist(), strict=True))
