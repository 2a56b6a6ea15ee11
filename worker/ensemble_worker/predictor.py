"""The door to torch: a member's model loaded on a device, checked against what is declared, run on batches of rows."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from ensemble_contract.plan import ModelSource
from ensemble_contract.tensors import TensorSpec
from ensemble_worker.backends.cpu import CpuPredictor
from ensemble_worker.backends.cuda import CudaPredictor, as_lost
from ensemble_worker.backends.fitting import Fitted, fit
from ensemble_worker.backends.loaded import Loaded
from ensemble_worker.backends.tensors import host_array
from ensemble_worker.devices import Device
from ensemble_worker.errors import DeviceLost, InvalidArchive, InvalidModel, ModelError, OutOfMemory

log = logging.getLogger(__name__)

Array = np.ndarray[Any, np.dtype[Any]]
OUT_OF_MEMORY_WORDS = (
    "out of memory",
    "can't allocate memory",
    "bad_alloc",
    "failed to allocate memory",
    "cannot allocate",
)


class Predictor(Protocol):
    """A member on a device, ready to run batches of up to `batch_size` rows.

    `fixed_batch` is the only batch that the model takes (smaller ones are padded), None if it takes any. `form` names
    how the model is executed.
    """

    batch_size: int
    fixed_batch: int | None
    form: str

    def run(self, inputs: Sequence[Any]) -> list[Array]:
        """Outputs of a batch: C-contiguous host arrays in the `TensorSpec.carried` datatype, the activation applied.

        `inputs`: for each declared input an array of shape (rows, *shape), C-contiguous, BF16 as uint16 bits; on GPUs
        also tensors of `DeviceRows.gather`. Raises DeviceLost if the device cannot be used again, RuntimeError if the
        model fails on these rows.
        """
        ...


def prepare_cpu(cores: Sequence[int], *, pin: bool) -> None:
    """Give torch as many threads as `cores`, once per process and before the first load; `pin` keeps them there."""
    if pin:
        os.sched_setaffinity(0, cores)
    torch.set_num_threads(max(1, len(cores)))
    if torch.get_num_interop_threads() != 1:
        torch.set_num_interop_threads(1)
    torch.set_flush_denormal(True)


def load(
    path: Path,
    source: ModelSource,
    inputs: tuple[TensorSpec, ...],
    outputs: tuple[TensorSpec, ...],
    device: Device,
    batch_size: int,
) -> Predictor:
    """Load a member, check it against the declared tensors, choose its execution and warm it up at `batch_size` rows.

    Raises ModelError (OutOfMemory if memory is what lacks) naming the member, its URI and the cause, and
    DeviceLost if the device cannot be used again.
    """
    try:
        with torch.inference_mode():
            loaded = _load_file(path, source.format, device)
            place = torch.device("cpu") if loaded.on_host else _torch_device(device)
            fitted = fit(loaded, inputs, outputs, place, batch_size)
            del loaded
            predictor = _predictor(fitted, inputs, outputs, source.activation, device, batch_size)
            _warm_up(predictor, fitted)
    except (InvalidArchive, InvalidModel) as error:
        raise ModelError(source.name, source.uri, str(error)) from error
    except OSError as error:
        raise ModelError(source.name, source.uri, f"cannot be read: {error}") from error
    except (MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise OutOfMemory(
                source.name, source.uri, f"does not fit in memory with {batch_size} rows: {error}"
            ) from error
        lost = as_lost(error, device.name)
        if isinstance(lost, DeviceLost):
            raise lost from error
        raise ModelError(source.name, source.uri, f"fails on {batch_size} rows: {error}") from error
    return_freed_memory()
    log.info("member %s: %s, %s, batches of %d rows", source.name, device.name, predictor.form, batch_size)
    return predictor


def return_freed_memory() -> None:
    """Give pages that the C library keeps after large allocations back to the machine (malloc_trim(3), glibc)."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def is_out_of_memory(error: Exception) -> bool:
    """Whether torch or Python says that memory is exhausted; on CPUs torch has no error type for it."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error).lower()
    return any(words in text for words in OUT_OF_MEMORY_WORDS)


def _torch_device(device: Device) -> torch.device:
    return torch.device("cpu") if device.kind == "cpu" else torch.device("cuda", device.index)


def _load_file(path: Path, model_format: str, device: Device) -> Loaded:
    """Call the format's backend; each imports what only it needs."""
    if model_format == "torch-export":
        from ensemble_worker.backends import torch_export

        return torch_export.load(path, _torch_device(device))
    if model_format == "torchscript":
        from ensemble_worker.backends import torchscript

        return torchscript.load(path, _torch_device(device))
    if model_format == "onnx":
        from ensemble_worker.backends import onnx_runtime

        return onnx_runtime.load(path, device)
    raise InvalidModel(f"format {model_format!r} is not one of torch-export, torchscript, onnx")


def _predictor(
    fitted: Fitted,
    inputs: tuple[TensorSpec, ...],
    outputs: tuple[TensorSpec, ...],
    activation: str,
    device: Device,
    batch_size: int,
) -> Predictor:
    if device.kind == "cpu" or fitted.on_host:
        return CpuPredictor(fitted, inputs, outputs, activation, batch_size)
    return CudaPredictor(fitted, inputs, outputs, activation, batch_size, _torch_device(device))


def _warm_up(predictor: Predictor, fitted: Fitted) -> None:
    """Run the planned batch and one row, twice each: TorchScript, cuDNN and allocators settle in their first runs.

    Rows in shared memory are read-only arrays; torch warns about them once per process, which happens here.
    """
    trial = dict(zip(fitted.input_order, fitted.trial, strict=True))
    arrays = [host_array(trial[i]) for i in range(len(trial))]
    for rows in (predictor.batch_size, 1) * 2:
        batch = [array[:rows] for array in arrays]
        for array in batch:
            array.setflags(write=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            results = predictor.run(batch)
        if any(len(result) != rows for result in results):
            raise InvalidModel(f"gives {[len(r) for r in results]} rows for {rows}")
