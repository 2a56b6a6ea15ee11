"""The door to torch: a member's model loaded on a device, checked against what is declared, run on batches of rows."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import logging
import os
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import psutil
import torch
from torch import fx

from ensemble_contract.plan import ModelSource
from ensemble_contract.tensors import TensorSpec
from ensemble_worker.backends import forms
from ensemble_worker.backends.cpu import CpuPredictor
from ensemble_worker.backends.cuda import CudaPredictor, DeviceRows, as_lost
from ensemble_worker.backends.fitting import Fitted, check_batch, fit
from ensemble_worker.backends.loaded import Loaded
from ensemble_worker.chosen_forms import ChosenForms
from ensemble_worker.devices import Device
from ensemble_worker.errors import DeviceLost, InvalidArchive, InvalidModel, ModelError, OutOfMemory

log = logging.getLogger(__name__)

Array = np.ndarray[Any, np.dtype[Any]]
# Longer batches are run once more only when they are asked for: their first run is not much slower than the next.
WARM_UP_S = 0.1
# M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_ARENA_MAX of malloc.h.
MALLOC_OPTIONS = {-3: 1 << 30, -1: (1 << 31) - 1, -8: 1}
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


def prepare_cpu(cores: Sequence[int], *, pin: bool, threads: int = 0) -> None:
    """Give torch `threads`, else as many as `cores`, once per process and before the first load.

    `pin` keeps them on these cores.
    """
    if pin:
        os.sched_setaffinity(0, cores)
    _keep_freed_memory()
    torch.set_num_threads(threads or max(1, len(cores)))
    if torch.get_num_interop_threads() != 1:
        torch.set_num_interop_threads(1)
    prepare_thread()


def prepare_thread() -> None:
    """Have a thread compute as `prepare_cpu` says: called first in every thread of our own that runs models.

    OpenMP keeps its number of threads, and the processor its treatment of denormals, for each thread apart. A thread
    that has not asked torch may use as many as the machine has cores, all on the one core of its device.
    """
    torch.get_num_threads()
    torch.set_flush_denormal(True)


@contextlib.contextmanager
def running_models() -> Iterator[None]:
    """What a thread of our own that only runs models does it in: prepared, and in inference mode once for all batches.

    A predictor enters that mode itself where it finds itself outside, which takes as long as a small layer.
    """
    prepare_thread()
    with torch.inference_mode():
        yield


@dataclass(frozen=True, slots=True)
class Model:
    """A member in memory, checked against what is declared, its execution chosen: makes predictors of any batch."""

    source: ModelSource
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    device: Device
    fitted: Fitted

    @property
    def form(self) -> str:
        """How the model is executed."""
        return self.fitted.form

    def at(self, batch_size: int) -> Predictor:
        """A predictor that is warmed up at `batch_size` rows; all predictors of a model share its weights.

        Raises as `read` does.
        """
        fitted = self.fitted
        with _as_model_errors(self.source, self.device, batch_size), torch.inference_mode():
            check_batch(fitted.fixed_batch, fitted.max_batch, batch_size)
            arguments = (fitted, self.inputs, self.outputs, self.source.activation, batch_size)
            predictor: Predictor
            if self.device.kind == "cpu" or fitted.on_host:
                predictor = CpuPredictor(*arguments)
            else:
                predictor = CudaPredictor(*arguments, _torch_device(self.device))
            _warm_up(predictor, fitted)
        return_freed_memory()
        return predictor


def read(
    path: Path,
    source: ModelSource,
    inputs: tuple[TensorSpec, ...],
    outputs: tuple[TensorSpec, ...],
    device: Device,
    batch_size: int,
    preferred_form: str = "",
) -> Model:
    """Load a member, check it against the declared tensors, and choose its execution, `preferred_form` if it agrees.

    A model that does not say which batches it takes must take `batch_size` rows. Raises ModelError (OutOfMemory if
    memory is what lacks) naming the member, its URI and the cause, and DeviceLost if the device cannot be used again.
    """
    with _as_model_errors(source, device, batch_size), torch.inference_mode():
        loaded = _load_file(path, source.format, device)
        place = torch.device("cpu") if loaded.on_host else _torch_device(device)
        fitted = fit(loaded, inputs, outputs, place, batch_size, preferred_form)
    return Model(source, inputs, outputs, device, fitted)


def load(
    path: Path,
    source: ModelSource,
    inputs: tuple[TensorSpec, ...],
    outputs: tuple[TensorSpec, ...],
    device: Device,
    batch_size: int,
    cache_dir: Path | None = None,
) -> Predictor:
    """`read_known` a member and warm it up at `batch_size` rows.

    Raises as `read` does.
    """
    return read_known(path, source, inputs, outputs, device, batch_size, cache_dir).at(batch_size)


def read_known(
    path: Path,
    source: ModelSource,
    inputs: tuple[TensorSpec, ...],
    outputs: tuple[TensorSpec, ...],
    device: Device,
    batch_size: int,
    cache_dir: Path | None = None,
) -> Model:
    """`read` a member; with a `cache_dir`, in the form that was measured before.

    Raises as `read` does.
    """
    known = ChosenForms(cache_dir).recall(source, device) if cache_dir is not None else ""
    model = read(path, source, inputs, outputs, device, batch_size, known)
    log.info("member %s: %s, %s", source.name, device.name, model.form)
    return model


def memory_in_use(device: Device) -> int:
    """Bytes that this process holds: on a GPU what torch has reserved there, else what is resident."""
    if device.kind == "cuda":
        return torch.cuda.memory_reserved(device.index)
    return int(psutil.Process().memory_info().rss)


def overhead_bytes(device: Device) -> int:
    """Bytes of the device that a worker takes before it has a member; on a GPU its context, which this makes."""
    if device.kind == "cuda":
        torch.ones(1, device=_torch_device(device)).add_(1)
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(device.index)
        return total - free
    return memory_in_use(device)


def release_memory(device: Device) -> None:
    """Give back the memory of models that nobody refers to any more; cycles in their graphs are found first."""
    gc.collect()
    if device.kind == "cuda":
        torch.cuda.empty_cache()
    return_freed_memory()


def why_unusable(device: Device) -> str:
    """Why torch cannot use a GPU that the driver shows; empty where it can, and for CPUs."""
    if device.kind != "cuda":
        return ""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA: use a worker image with a CUDA build of torch"
    try:
        if torch.cuda.device_count() > device.index:
            torch.zeros(1, device=_torch_device(device))
            return ""
        cause = "it sees fewer GPUs"
    except RuntimeError as error:
        cause = str(error).splitlines()[0]
    return f"torch {torch.__version__} (CUDA {torch.version.cuda}) cannot use it: {cause}"


def rehearse(model_format: str) -> None:
    """Make torch keep what it keeps from the first model of a format on, which a process pays for once."""
    if model_format == "onnx":
        return
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.LazyLinear(8))
    rows = torch.ones(2, 3, 8, 8)
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module(rows)
        scripted = torch.jit.script(fx.symbolic_trace(module.eval()))
        for form in forms.compiled(lambda: scripted, torch.device("cpu")):
            call = form.make([rows])
            for _ in range(2):
                call(rows)


def device_rows(device: Device, inputs: Sequence[TensorSpec], slots: int) -> DeviceRows:
    """Slots for rows on a GPU, which `Predictor.run` takes as they are gathered. Raises DeviceLost."""
    try:
        return DeviceRows(_torch_device(device), inputs, slots)
    except RuntimeError as error:
        raise as_lost(error, device.name) from error


@contextlib.contextmanager
def _as_model_errors(source: ModelSource, device: Device, batch_size: int) -> Iterator[None]:
    """Whatever goes wrong with a model inside, as a ModelError that names it."""
    try:
        yield
    except (InvalidArchive, InvalidModel) as error:
        raise ModelError(source.name, source.uri, str(error)) from error
    except OSError as error:
        raise ModelError(source.name, source.uri, f"cannot be read: {error}", may_pass=True) from error
    except (MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            # Memory may be free later: another instance leaves, or measuring ends.
            raise OutOfMemory(
                source.name, source.uri, f"does not fit in memory with {batch_size} rows: {error}", may_pass=True
            ) from error
        lost = as_lost(error, device.name)
        if isinstance(lost, DeviceLost):
            raise lost from error
        raise ModelError(source.name, source.uri, f"fails on {batch_size} rows: {error}") from error


def _keep_freed_memory() -> None:
    """Have the C library use the memory of one batch again for the next (mallopt(3), glibc).

    By default it maps every large tensor anew, and a batch of images spends as long on page faults as on its layers.
    One arena, because tensors that one thread frees are what another allocates. `return_freed_memory` still works.
    """
    with contextlib.suppress(AttributeError, OSError):
        libc = ctypes.CDLL(None)
        for option, value in MALLOC_OPTIONS.items():
            libc.mallopt(option, value)


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


def _warm_up(predictor: Predictor, fitted: Fitted) -> None:
    """Run the planned batch and one row, twice if that is quick: TorchScript, cuDNN and allocators settle at first.

    Rows in shared memory are read-only arrays; torch warns about them once per process, which happens here.
    """
    arrays = fitted.arrays(predictor.batch_size)
    started = time.perf_counter()
    for rows in (predictor.batch_size, 1) * 2:
        if time.perf_counter() - started > WARM_UP_S:
            return
        batch = [array[:rows] for array in arrays]
        for array in batch:
            array.setflags(write=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            results = predictor.run(batch)
        if any(len(result) != rows for result in results):
            raise InvalidModel(f"gives {[len(r) for r in results]} rows for {rows}")
