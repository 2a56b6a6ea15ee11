"""Rows in the host's memory, gathered into one contiguous batch. numpy only.

A batch is always a copy: a model that writes to its input must not change rows that other members still have to see.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from typing import Any

import numpy as np

from ensemble_contract.layout import LONG_RANGE, StoreLayout
from ensemble_contract.tensors import TensorSpec
from ensemble_contract.wire import RowRanges

Array = np.ndarray[Any, np.dtype[Any]]


class HostRows:
    """Slots of rows over given memory: a gateway's store, or a cache of the worker's own."""

    def __init__(self, layout: StoreLayout, memory: memoryview) -> None:
        self.slots = layout.slots
        self._arrays = layout.arrays(memory)
        self._buffers = [np.empty((0, *spec.shape), spec.dtype) for spec in layout.inputs]

    @staticmethod
    def cache(inputs: Sequence[TensorSpec], slots: int) -> HostRows:
        """Rows in anonymous memory, which is taken page by page as slots are used."""
        layout = StoreLayout(tuple(inputs), slots)
        return HostRows(layout, memoryview(mmap.mmap(-1, layout.total_bytes)))

    def zeros(self) -> list[Array]:
        """Every slot as a batch; of a cache not yet used, zeros."""
        return [slots.copy() for slots in self._arrays]

    def put(self, ranges: RowRanges, arrays: Sequence[Array]) -> None:
        """Copy rows into these slots."""
        for slots, array in zip(self._arrays, arrays, strict=True):
            at = 0
            for start, count in zip(ranges.starts, ranges.counts, strict=True):
                slots[start : start + count] = array[at : at + count]
                at += count

    def view(self, ranges: RowRanges) -> list[Array]:
        """The rows of these ranges as new arrays."""
        where = slots_of(ranges)
        return [slots[where] for slots in self._arrays]

    def gather(self, ranges: RowRanges) -> list[Array]:
        """The rows of these ranges in one buffer an input, which the next call uses again."""
        rows = ranges.rows
        if rows > len(self._buffers[0]):
            self._buffers = [np.empty((rows, *buffer.shape[1:]), buffer.dtype) for buffer in self._buffers]
        batch = [buffer[:rows] for buffer in self._buffers]
        if len(ranges.starts) == 1 or rows >= LONG_RANGE * len(ranges.starts):
            for slots, buffer in zip(self._arrays, batch, strict=True):
                at = 0
                for start, count in zip(ranges.starts, ranges.counts, strict=True):
                    buffer[at : at + count] = slots[start : start + count]
                    at += count
        else:
            where = slots_of(ranges)
            for slots, buffer in zip(self._arrays, batch, strict=True):
                # Slots were checked: "clip" only spares numpy a copy of the output.
                np.take(slots, where, axis=0, out=buffer, mode="clip")
        return batch


def slots_of(ranges: RowRanges) -> Array:
    """Every slot in the ranges, in order."""
    starts = np.array(ranges.starts, np.int64)
    if ranges.rows == len(starts):
        return starts
    counts = np.array(ranges.counts, np.int64)
    offsets: Array = np.repeat(starts - (np.cumsum(counts) - counts), counts)
    return np.arange(ranges.rows) + offsets
