"""The row store: fixed-size slots for input rows, and beside them the outputs that members have answered.

Decides which slots a request gets; touches memory, but no socket. Slots are freed in any order, and are given out low
before high so that an idle store stays small. Outputs lie in columns, one a member, so that the outputs of all members
for a range of rows are one strided block, ready to be combined.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

import numpy as np

from ensemble_contract.layout import StoreLayout
from ensemble_contract.tensors import TensorSpec

Array = np.ndarray[Any, np.dtype[Any]]
Ranges = tuple[tuple[int, int], ...]

# Runs of at least this many free slots are kept for bulk requests; single rows prefer what lies between.
LONG_RUN = 64
# So many long runs are looked at for one that holds a whole request.
LOOK_AT = 16


class SlotAllocator:
    """Free slots as runs that merge with their neighbours; pure bookkeeping, O(1) for a run."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
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
    """Rows of requests in flight: inputs over the given memory, outputs in private, lazily touched columns."""

    def __init__(self, layout: StoreLayout, memory: memoryview, outputs: Sequence[TensorSpec], columns: int) -> None:
        self.layout = layout
        self.allocator = SlotAllocator(layout.slots)
        self._memory = memory
        self._inputs = layout.arrays(memory)
        self._offsets = layout.offsets
        self.output_specs = tuple(outputs)
        self._row_bytes = tuple(spec.row_bytes for spec in layout.inputs)
        self.outputs = [np.empty((columns, layout.slots, *spec.shape), spec.dtype) for spec in outputs]
        self.bytes_per_row = sum(self._row_bytes) + columns * sum(spec.row_bytes for spec in outputs)

    @property
    def used_rows(self) -> int:
        """Rows admitted and not yet freed."""
        return self.layout.slots - self.allocator.free_slots

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
        """Store outputs of members, each of shape (len(columns), rows, *shape), for the rows in `ranges`, in order."""
        if len(ranges) == 1:
            start, count = ranges[0]
            for kept, result in zip(self.outputs, results, strict=True):
                for column, of_member in zip(columns, result, strict=True):
                    kept[column, start : start + count] = of_member
            return
        where = slots_of(ranges)
        for kept, result in zip(self.outputs, results, strict=True):
            for column, of_member in zip(columns, result, strict=True):
                kept[column, where] = of_member

    def stack(self, output: int, columns: Sequence[int], ranges: Sequence[tuple[int, int]]) -> Array:
        """What these columns hold for the rows in `ranges`: an array of shape (columns, rows, *shape), maybe a view."""
        kept = self.outputs[output]
        everything = len(columns) == len(kept) and all(at == column for at, column in enumerate(columns))
        if len(ranges) == 1:
            start, count = ranges[0]
            block = kept[:, start : start + count]
            return block if everything else block[list(columns)]
        where = slots_of(ranges)
        return kept[:, where] if everything else kept[np.array(columns)[:, None], where]


def slots_of(ranges: Sequence[tuple[int, int]]) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Every slot in the ranges, in order."""
    if all(count == 1 for _, count in ranges):
        return np.array([start for start, _ in ranges], np.int64)
    return np.concatenate([np.arange(start, start + count) for start, count in ranges])


def slots_within(max_bytes: int, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], columns: int) -> int:
    """How many slots a store of `max_bytes` has: inputs and kept outputs together. At least one."""
    row = sum(spec.row_bytes for spec in inputs) + columns * sum(spec.row_bytes for spec in outputs)
    return max(1, min(max_bytes // row, (1 << 32) - 1))
