"""Batches on a GPU: a stream for each instance, pinned staging, rows uploaded once for all members of the device."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ensemble_contract.tensors import TensorSpec
from ensemble_contract.wire import RowRanges
from ensemble_worker.backends.fitting import Fitted
from ensemble_worker.backends.tensors import DTYPES, activated, importer
from ensemble_worker.errors import DeviceLost
from ensemble_worker.gather import slots_of

Array = np.ndarray[Any, np.dtype[Any]]

# After these the CUDA context is unusable (CUDA Runtime API, cudaError_t: "sticky" errors).
STICKY_WORDS = (
    "illegal memory access",
    "device-side assert",
    "unspecified launch failure",
    "hardware stack error",
    "illegal instruction",
    "misaligned address",
    "invalid program counter",
    "uncorrectable ecc",
    "device is lost",
    "fallen off the bus",
)


def as_lost(error: Exception, device: torch.device | str) -> Exception:
    """The error to raise for one of CUDA: DeviceLost if no later call on the device can succeed, else the same."""
    text = str(error).lower()
    if any(words in text for words in STICKY_WORDS):
        return DeviceLost(f"{device} cannot be used again by this process: {str(error).splitlines()[0]}")
    return error


class DeviceRows:
    """Rows on a GPU in slots: uploaded once through pinned memory, read by the streams of all co-located members."""

    def __init__(self, device: torch.device, inputs: Sequence[TensorSpec], slots: int) -> None:
        self.slots = slots
        self._device = device
        self._inputs = list(inputs)
        self._imports = [importer(spec) for spec in inputs]
        self._held = [torch.zeros(slots, *s.shape, dtype=DTYPES[s.datatype], device=device) for s in inputs]
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._uploaded = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._lock = threading.Lock()
        self._staging: list[torch.Tensor] = []
        self._staging_rows = 0

    def put(self, ranges: RowRanges, arrays: Sequence[Array]) -> None:
        """Upload rows of each input into these slots. Returns when the arrays may be reused. Raises DeviceLost."""
        rows = ranges.rows
        with self._lock, torch.inference_mode():
            try:
                # The staging buffers are free once the upload before has left them.
                self._uploaded.synchronize()
                self._grow_staging(rows)
                with torch.cuda.stream(self._stream):
                    places = self._places(ranges)
                    for held, staging, make, array in zip(
                        self._held, self._staging, self._imports, arrays, strict=True
                    ):
                        staging[:rows].copy_(make(array))
                        held.index_copy_(0, places, staging[:rows].to(self._device, non_blocking=True))
                    self._uploaded.record(self._stream)
            except RuntimeError as error:
                raise as_lost(error, self._device) from error

    def gather(self, ranges: RowRanges) -> list[torch.Tensor]:
        """The rows of these slots on the current stream, which waits for the last upload. Raises DeviceLost."""
        with torch.inference_mode():
            try:
                torch.cuda.current_stream(self._device).wait_event(self._uploaded)
                places = self._places(ranges)
                return [held.index_select(0, places) for held in self._held]
            except RuntimeError as error:
                raise as_lost(error, self._device) from error

    def _places(self, ranges: RowRanges) -> torch.Tensor:
        """The slots as an index on the device."""
        return torch.from_numpy(slots_of(ranges)).pin_memory().to(self._device, non_blocking=True)

    def _grow_staging(self, rows: int) -> None:
        if rows > self._staging_rows:
            self._staging_rows = max(rows, 2 * self._staging_rows)
            self._staging = [_pinned(self._staging_rows, spec) for spec in self._inputs]


class CudaPredictor:
    """A member on a GPU; see `ensemble_worker.predictor.Predictor`. One batch at a time, on a stream of its own.

    `run` waits for its own stream only: give each instance a thread, and instances overlap.
    """

    def __init__(
        self,
        fitted: Fitted,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
        activation: str,
        batch_size: int,
        device: torch.device,
    ) -> None:
        self.batch_size = batch_size
        self.fixed_batch = fitted.fixed_batch
        self.form = fitted.form
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._device = device
        self._fitted = fitted
        self._imports = [importer(spec) for spec in inputs]
        rows = fitted.fixed_batch or batch_size
        self._staging = [_pinned(rows, spec) for spec in inputs]
        self._batches = [torch.zeros(rows, *s.shape, dtype=DTYPES[s.datatype], device=device) for s in inputs]
        self._activations = [activated(spec, activation) for spec in outputs]
        self._results = [_pinned(rows, spec.carried) for spec in outputs]
        self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]

    def run(self, inputs: Sequence[Array | torch.Tensor]) -> list[Array]:
        """Outputs of a batch, in arrays of their own; see `Predictor.run`."""
        rows = len(inputs[0])
        fitted = self._fitted
        try:
            # Rows gathered on the caller's stream must be there before this stream reads them.
            self.stream.wait_stream(torch.cuda.current_stream(self._device))
            with torch.inference_mode(), torch.cuda.device(self._device), torch.cuda.stream(self.stream):
                tensors = [self._upload(i, inputs[i], rows) for i in fitted.input_order]
                results = fitted.unpack(fitted.call(*tensors))
                for activate, place, host in zip(self._activations, fitted.output_order, self._results, strict=True):
                    host[:rows].copy_(activate(results[place][:rows]), non_blocking=True)
                self._done.record(self.stream)
                self._done.synchronize()
        except RuntimeError as error:
            raise as_lost(error, self._device) from error
        return [host[:rows].numpy().copy() for host in self._results]

    def _upload(self, index: int, given: Array | torch.Tensor, rows: int) -> torch.Tensor:
        """The rows on the device, in a buffer that the next batch reuses; the stream keeps the order."""
        batch = self._batches[index]
        if isinstance(given, torch.Tensor):
            # Its memory is another stream's: the allocator must not reuse it before this one has read it.
            given.record_stream(self.stream)
            if self.fixed_batch is None:
                return given
            batch[:rows].copy_(given, non_blocking=True)
            return batch
        staging = self._staging[index]
        staging[:rows].copy_(self._imports[index](given))
        batch[:rows].copy_(staging[:rows], non_blocking=True)
        return batch if self.fixed_batch is not None else batch[:rows]


def _pinned(rows: int, spec: TensorSpec) -> torch.Tensor:
    return torch.zeros(rows, *spec.shape, dtype=DTYPES[spec.datatype], pin_memory=True)
