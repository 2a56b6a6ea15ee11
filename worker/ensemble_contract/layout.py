"""Where things lie in memory: rows in the store, outputs in a batch's result. The same sums on both sides of a link."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ensemble_contract.tensors import TensorSpec

ALIGNMENT = 64
PAGE = 4096
# Where ranges have so many rows each, on average, one copy a range is quicker than one index of all their rows.
LONG_RANGE = 16


def aligned(size: int, to: int = ALIGNMENT) -> int:
    """`size` rounded up to a multiple of `to`."""
    return -(-size // to) * to


@dataclass(frozen=True, slots=True)
class StoreLayout:
    """The row store: one region an input, each of `slots` rows, each region on a page of its own."""

    inputs: tuple[TensorSpec, ...]
    slots: int

    @property
    def offsets(self) -> tuple[int, ...]:
        """Where each input's region begins, in bytes."""
        starts, at = [], 0
        for spec in self.inputs:
            starts.append(at)
            at = aligned(at + self.slots * spec.row_bytes, PAGE)
        return tuple(starts)

    @property
    def total_bytes(self) -> int:
        """Bytes of the whole store."""
        return aligned(self.offsets[-1] + self.slots * self.inputs[-1].row_bytes, PAGE)

    def arrays(self, memory: memoryview) -> list[np.ndarray[Any, np.dtype[Any]]]:
        """One array an input, of shape (slots, *shape), over the store's memory."""
        return [
            np.frombuffer(memory, spec.dtype, self.slots * spec.row_elements, offset).reshape(self.slots, *spec.shape)
            for spec, offset in zip(self.inputs, self.offsets, strict=True)
        ]


def result_offsets(outputs: Sequence[TensorSpec], rows: int) -> tuple[list[int], int]:
    """Where each output of a batch of `rows` begins, relative to the result's offset, and the bytes of them all."""
    starts, at = [], 0
    for spec in outputs:
        starts.append(at)
        at = aligned(at + rows * spec.row_bytes)
    return starts, at
