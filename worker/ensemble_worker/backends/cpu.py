"""Batches on a CPU device: arrays in, arrays out, nothing copied that need not be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ensemble_contract.tensors import TensorSpec
from ensemble_worker.backends.fitting import Fitted
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
        tensors = [make(inputs[i]) for i, make in self._imports]
        results = self._unpack(self._call(*tensors))
        if self.fixed_batch is not None:
            results = [result[:rows] for result in results]
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
