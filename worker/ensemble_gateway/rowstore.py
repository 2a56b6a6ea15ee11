"""The row store: fixed-size slots for input rows, and beside them the outputs that members have answered.

Decides which slots a request gets; touches memory, but no socket. Slots are freed in any order, and are given out low
before high so that an idle store stays small. Outputs lie in columns, one a member, so that the outputs of all members
for a range of rows are one strided block, ready to be combined. There is address space for more columns than one plan
has, for those of the next; memory is taken when it is touched, and given back with the column.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import islice
from typing import Any

import numpy as np

from ensemble_contract.layout import LONG_RANGE, StoreLayout, aligned
from ensemble_contract.tensors import TensorSpec

Array = np.ndarray[Any, np.dtype[Any]]
Ranges = tuple[tuple[int, int], ...]
Slots = np.ndarray[Any, np.dtype[np.int64]]
Chosen = slice | Slots

# Linux's number, which Python 3.11 does not name: address space that is not counted as memory before it is touched.
_MAP_NORESERVE = 0x4000
_LAZY = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE

# Runs of at least this many free slots are kept for bulk requests; single rows prefer what lies between.
LONG_RUN = 64
# So many long runs are looked at for one that holds a whole request.
LOOK_AT = 16
CACHED_CHOICES = 1024


class SlotAllocator:
    """Free slots as runs that merge with their neighbours; pure bookkeeping, O(1) for a run.

    No more than `capacity` slots are given out at a time; `free_slots` counts what is left of them.
    """

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.capacity = slots
        self.free_slots = slots
        self._by_end: dict[int, int] = {slots: 0}
        self._long: dict[int, int] = {0: slots}
        self._short: dict[int, int] = {}

    def take(self, rows: int) -> Ranges | None:
        """Ranges of (start, count) for `rows` rows, as few as a short look finds; None when not so many are free.

        Raises ValueError for less than one row.
        """
        if rows < 1:
            raise ValueError(f"{rows} rows cannot be stored: a request has at least one")
        if rows > self.free_slots:
            return None
        self.free_slots -= rows
        if rows == 1:
            return (self._take_one(),)
        taken: list[tuple[int, int]] = []
        while rows:
            start, length = self._run_for(rows)
            count = min(length, rows)
            self._shorten(start, length, count)
            taken.append((start, count))
            rows -= count
        return tuple(taken)

    def give(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Free these ranges again."""
        for start, count in ranges:
            self.free_slots += count
            end = start + count
            before = self._by_end.pop(start, None)
            if before is not None:
                self._forget(before)
                start = before
            after = self._long.pop(end, None) or self._short.pop(end, None)
            if after is not None:
                end += after
            self._insert(start, end - start)

    def limit(self, capacity: int) -> None:
        """Give out so many slots at most; where more are taken already, none until enough of them are free again."""
        capacity = min(capacity, self.slots)
        self.free_slots += capacity - self.capacity
        self.capacity = capacity

    def _take_one(self) -> tuple[int, int]:
        runs = self._short or self._long
        start = next(reversed(runs))
        self._shorten(start, runs[start], 1)
        return start, 1

    def _run_for(self, rows: int) -> tuple[int, int]:
        """One of the oldest long runs that holds all rows, else the newest long one, else any."""
        for start, length in islice(self._long.items(), LOOK_AT):
            if length >= rows:
                return start, length
        runs = self._long or self._short
        start = next(reversed(runs))
        return start, runs[start]

    def _shorten(self, start: int, length: int, count: int) -> None:
        self._forget(start)
        end = start + length
        if count < length:
            self._insert(start + count, length - count)
        else:
            self._by_end.pop(end, None)

    def _forget(self, start: int) -> None:
        if self._long.pop(start, None) is None:
            self._short.pop(start, None)

    def _insert(self, start: int, length: int) -> None:
        (self._long if length >= LONG_RUN else self._short)[start] = length
        self._by_end[start + length] = start


class RowStore:
    """Rows of requests in flight: inputs over the given memory, outputs in `columns` columns of our own."""

    def __init__(self, layout: StoreLayout, memory: memoryview, outputs: Sequence[TensorSpec], columns: int) -> None:
        self.layout = layout
        self.allocator = SlotAllocator(layout.slots)
        self._memory = memory
        self._inputs = layout.arrays(memory)
        self._offsets = layout.offsets
        self.output_specs = tuple(outputs)
        self._row_bytes = tuple(spec.row_bytes for spec in layout.inputs)
        sizes = [columns * layout.slots * spec.row_bytes for spec in outputs]
        self._kept = [mmap.mmap(-1, size, _LAZY) for size in sizes]
        self.outputs = [
            np.frombuffer(kept, spec.dtype).reshape(columns, layout.slots, *spec.shape)
            for kept, spec in zip(self._kept, outputs, strict=True)
        ]

    @property
    def used_rows(self) -> int:
        """Rows admitted and not yet freed."""
        return self.allocator.capacity - self.allocator.free_slots

    def bytes_per_row(self, columns: int) -> int:
        """What a row takes with the outputs of so many columns."""
        return sum(self._row_bytes) + columns * sum(spec.row_bytes for spec in self.output_specs)

    def write(self, ranges: Ranges, inputs: Sequence[memoryview]) -> None:
        """Copy a request's rows, one contiguous buffer an input, into its ranges."""
        for buffer, offset, size in zip(inputs, self._offsets, self._row_bytes, strict=True):
            at = 0
            for start, count in ranges:
                begin, length = offset + start * size, count * size
                self._memory[begin : begin + length] = buffer[at : at + length]
                at += length

    def read(self, ranges: Sequence[tuple[int, int]]) -> list[Array]:
        """The rows in `ranges`, one C-contiguous array an input, copied."""
        where = slots_of(ranges)
        return [rows[where] for rows in self._inputs]

    def keep(self, columns: Sequence[int], ranges: Sequence[tuple[int, int]], results: Sequence[Array]) -> None:
        """Store outputs of members, each of shape (len(columns), rows, *shape), for the rows in `ranges`, in order.

        Raises ValueError where there are outputs of more or fewer members or rows.
        """
        chosen = _chosen(tuple(columns))
        rows = count_of(ranges)
        for kept, result in zip(self.outputs, results, strict=True):
            if result.shape[:2] != (len(columns), rows):
                # One member or row would be taken for all.
                many, given = result.shape[:2]
                raise ValueError(f"outputs of {many} members for {len(columns)} columns, of {given} rows for {rows}")
            if _are_long(ranges):
                at = 0
                for start, count in ranges:
                    kept[chosen, start : start + count] = result[:, at : at + count]
                    at += count
            else:
                kept[_index(chosen, ranges)] = result

    def stack(self, output: int, columns: Sequence[int], ranges: Sequence[tuple[int, int]]) -> Array:
        """What these columns hold for the rows in `ranges`: an array of shape (columns, rows, *shape), maybe a view."""
        kept, chosen = self.outputs[output], _chosen(tuple(columns))
        if _are_long(ranges):
            return np.concatenate([kept[chosen, start : start + count] for start, count in ranges], axis=1)
        if isinstance(chosen, slice) and len(ranges) > 1:
            # A few times quicker than an index.
            return kept[chosen].take(slots_of(ranges), axis=1)
        return kept[_index(chosen, ranges)]

    def give_back(self, columns: Iterable[int]) -> None:
        """Nobody needs what these columns hold: their memory is free."""
        for kept, outputs in zip(self._kept, self.outputs, strict=True):
            size = outputs[0].nbytes
            for column in columns:
                start = aligned(column * size, mmap.PAGESIZE)
                end = (column + 1) * size // mmap.PAGESIZE * mmap.PAGESIZE
                if end > start:
                    kept.madvise(mmap.MADV_DONTNEED, start, end - start)


@lru_cache(maxsize=CACHED_CHOICES)
def _chosen(columns: tuple[int, ...]) -> Chosen:
    """What selects these columns; a slice, and so without a copy, where they lie side by side in order."""
    first = columns[0]
    if columns == tuple(range(first, first + len(columns))):
        return slice(first, first + len(columns))
    return np.array(columns, np.int64)


def _are_long(ranges: Sequence[tuple[int, int]]) -> bool:
    """Whether there are several, and each is worth a copy of its own."""
    return len(ranges) > 1 and count_of(ranges) >= LONG_RANGE * len(ranges)


def _index(chosen: Chosen, ranges: Sequence[tuple[int, int]]) -> tuple[Chosen, slice | Slots]:
    """What selects these rows of the chosen columns."""
    if len(ranges) == 1:
        start, count = ranges[0]
        return chosen, slice(start, start + count)
    where = slots_of(ranges)
    return (chosen, where) if isinstance(chosen, slice) else (chosen[:, None], where)


def count_of(ranges: Sequence[tuple[int, int]]) -> int:
    """How many slots the ranges have."""
    return sum([count for _, count in ranges])


def slots_of(ranges: Sequence[tuple[int, int]]) -> Slots:
    """Every slot in the ranges, in order."""
    if count_of(ranges) == len(ranges):
        return np.array([start for start, _ in ranges], np.int64)
    return np.concatenate([np.arange(start, start + count) for start, count in ranges])


def slots_within(max_bytes: int, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], columns: int) -> int:
    """How many slots a store of `max_bytes` has: inputs and kept outputs together. At least one."""
    row = sum(spec.row_bytes for spec in inputs) + columns * sum(spec.row_bytes for spec in outputs)
    return max(1, min(max_bytes // row, (1 << 32) - 1))
