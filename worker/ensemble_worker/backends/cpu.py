"""Batches on a CPU device: arrays in, arrays out, nothing copied that need not be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ensemble_contract.tensors import TensorSpec
from ensemble_worker.backends.fitting import Fitted
from ensemble_worker.backends.stacking import Stack
from ensemble_worker.backends.tensors import copied, exporter, importer, padded

Array = np.ndarray[Any, np.dtype[Any]]


class CpuPredictor:
    """A member on a CPU device; see `ensemble_worker.predictor.Predictor`. One batch at a time."""

    def __init__(
        self,
        fitted: Fitted,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
        activation: str,
        batch_size: int,
    ) -> None:
        self.batch_size = batch_size
        self.fixed_batch = fitted.fixed_batch
        self.form = fitted.form
        self.fitted = fitted
        # What must be equal for two members to run as one.
        self.likeness = _likeness(fitted, activation, inputs, outputs)
        self._call = fitted.call
        self._unpack = fitted.unpack
        self._imports = [(i, self._importer(inputs[i], fitted)) for i in fitted.input_order]
        owned = not fitted.shares_inputs and fitted.fixed_batch is None
        exports = [exporter(spec, activation, owned=owned) for spec in outputs]
        self._exports = list(zip(fitted.output_order, exports, strict=True))
        self._row_bytes = [spec.carried.row_bytes for spec in outputs]

    def run(self, inputs: Sequence[Array]) -> list[Array]:
        """Outputs of a batch; see `Predictor.run`."""
        # Threads of a worker are in this mode all the time: to enter it takes as long as a small layer.
        if not torch.is_inference_mode_enabled():
            with torch.inference_mode():
                return self.run(inputs)
        rows = len(inputs[0])
        results = self._unpack(self._call(*self.tensors(inputs)))
        if self.fixed_batch is not None:
            results = [result[:rows] for result in results]
        return self.arrays(results, rows)

    def tensors(self, inputs: Sequence[Array]) -> list[torch.Tensor]:
        """The model's inputs, in its order."""
        return [make(inputs[i]) for i, make in self._imports]

    def arrays(self, results: Sequence[torch.Tensor], rows: int) -> list[Array]:
        """The outputs that are declared, of the model's; `rows` is how many there must be.

        Raises RuntimeError if there are more or fewer.
        """
        arrays = [export(results[j]) for j, export in self._exports]
        for array, row_bytes in zip(arrays, self._row_bytes, strict=True):
            if array.nbytes != rows * row_bytes:
                raise RuntimeError(f"the model gave {array.nbytes} bytes for {rows} rows of {row_bytes}")
        return arrays

    @staticmethod
    def _importer(spec: TensorSpec, fitted: Fitted) -> Any:
        make = importer(spec)
        if fitted.fixed_batch is not None:
            return padded(make, spec, fitted.fixed_batch)
        return copied(make) if fitted.modifies_inputs else make


class CpuStack:
    """Members on a CPU device whose models are alike: those that stand side by side here run as one."""

    def __init__(self, members: Sequence[CpuPredictor]) -> None:
        self._first = members[0]
        self._stack = Stack([member.fitted.layers for member in members if member.fitted.layers is not None])

    def run(self, inputs: Sequence[Array], first: int, end: int) -> list[Array]:
        """The outputs of the members from `first` to before `end`, each of shape (end - first, rows, *shape).

        What an output has of a member is as its predictor's `run` gives it.
        """
        if not torch.is_inference_mode_enabled():
            with torch.inference_mode():
                return self.run(inputs, first, end)
        alike = self._first
        results = self._stack.run(alike.tensors(inputs), first, end)
        return alike.arrays(results, (end - first) * len(inputs[0]))


def _likeness(
    fitted: Fitted, activation: str, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]
) -> tuple[object, ...] | None:
    if fitted.layers is None:
        return None
    declared = activation, tuple(inputs), tuple(outputs)
    return fitted.layers.architecture, declared, fitted.input_order, fitted.output_order
