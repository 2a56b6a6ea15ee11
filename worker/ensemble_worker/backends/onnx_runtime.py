"""ONNX files, run by onnxruntime (the optional extra `onnx`). Its own parser reads them; nothing in one is Python."""

from __future__ import annotations

import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ensemble_contract.errors import ContractError
from ensemble_contract.tensors import TensorSpec
from ensemble_worker.backends.loaded import Loaded
from ensemble_worker.devices import Device
from ensemble_worker.errors import InvalidArchive, InvalidModel
from ensemble_worker.signature import Signature

DATATYPES = {
    "tensor(bool)": "BOOL", "tensor(uint8)": "UINT8", "tensor(uint16)": "UINT16", "tensor(uint32)": "UINT32",
    "tensor(uint64)": "UINT64", "tensor(int8)": "INT8", "tensor(int16)": "INT16", "tensor(int32)": "INT32",
    "tensor(int64)": "INT64", "tensor(float16)": "FP16", "tensor(float)": "FP32", "tensor(double)": "FP64",
}  # fmt: skip


def load(path: Path, device: Device) -> Loaded:
    """Load an ONNX file; on a GPU with the CUDA provider if this onnxruntime has it.

    Raises InvalidModel if onnxruntime is not installed or the model has no batch, InvalidArchive if it cannot be read.
    """
    session = _session(path, device.thread_count, device.index if device.kind == "cuda" else None)
    names = [given.name for given in session.get_inputs()]

    def call(*tensors: torch.Tensor) -> list[torch.Tensor]:
        feeds = {name: tensor.numpy() for name, tensor in zip(names, tensors, strict=True)}
        return [torch.from_numpy(array) for array in session.run(None, feeds)]

    return Loaded(call, _signature(session), "onnxruntime", on_host=True)


def signature(path: Path) -> Signature:
    """What an ONNX file says of its inputs and outputs. Raises as `load` does."""
    return _signature(_session(path, 1, None))


def _runtime() -> types.ModuleType:
    try:
        import onnxruntime
    except ImportError as error:
        raise InvalidModel("ONNX models need onnxruntime: pip install 'ensemble-operator[onnx]'") from error
    found: types.ModuleType = onnxruntime
    return found


def _session(path: Path, threads: int, gpu: int | None) -> Any:
    runtime = _runtime()
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    providers: list[Any] = ["CPUExecutionProvider"]
    if gpu is not None and "CUDAExecutionProvider" in runtime.get_available_providers():
        providers.insert(0, ("CUDAExecutionProvider", {"device_id": gpu}))
    try:
        return runtime.InferenceSession(str(path), options, providers=providers)
    except Exception as error:  # onnxruntime's errors share no base class but Exception.
        raise InvalidArchive(f"onnxruntime {runtime.__version__} cannot read it: {error}") from error


def _signature(session: Any) -> Signature:
    inputs, outputs = session.get_inputs(), session.get_outputs()
    for given in [*inputs, *outputs]:
        if not given.shape:
            raise InvalidModel(f"tensor {given.name!r} has no batch dimension")
    batches = {given.shape[0] if isinstance(given.shape[0], int) else None for given in inputs}
    if len(batches) != 1:
        raise InvalidModel("the inputs do not share one batch dimension")
    fixed = batches.pop()
    return Signature(_specs(inputs), _specs(outputs), dynamic_batch=fixed is None, fixed_batch=fixed)


def _specs(tensors: Sequence[Any]) -> tuple[TensorSpec, ...] | None:
    specs = []
    for tensor in tensors:
        shape = tensor.shape[1:]
        if tensor.type not in DATATYPES:
            raise InvalidModel(f"tensor {tensor.name!r} is a {tensor.type}, which cannot be served")
        if not all(isinstance(size, int) for size in shape):
            return None
        try:
            specs.append(TensorSpec(tensor.name, DATATYPES[tensor.type], tuple(shape)))
        except ContractError as error:
            raise InvalidModel(str(error)) from error
    return tuple(specs)
