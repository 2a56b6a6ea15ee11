"""Rows that gateways have put on a worker (across pods): in slots of a fixed size, gathered into batches."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from typing import Any

import numpy as np

from ensemble_contract.tensors import TensorSpec

Array = np.ndarray[Any, np.dtype[Any]]


class HostRows:
    """Rows of a CPU worker: for each input an array of slots, in a mapping whose pages exist once written."""

    def __init__(self, inputs: Sequence[TensorSpec], slots: int) -> None:
        self._arrays = [self._slots(spec, slots) for spec in inputs]

    def put(self, slots: Array, arrays: Sequence[Array]) -> None:
        """Write row i of each input into slot `slots[i]`; `arrays` are as wide as the inputs' rows, in their order."""
        for held, array in zip(self._arrays, arrays, strict=True):
            held[slots] = array

    def gather(self, slots: Array) -> list[Array]:
        """The rows of `slots`, input by input, copied into arrays of their own."""
        return [held.take(slots, axis=0) for held in self._arrays]

    @staticmethod
    def _slots(spec: TensorSpec, slots: int) -> Array:
        memory = mmap.mmap(-1, max(1, slots * spec.row_bytes))
        return np.frombuffer(memory, dtype=spec.dtype, count=slots * spec.row_elements).reshape(slots, *spec.shape)
