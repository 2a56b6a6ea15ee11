"""Rows to tensors and tensors to rows: datatypes, padding to a fixed batch, activations."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from ensemble_contract.tensors import TensorSpec
from ensemble_worker.errors import InvalidModel

Array = np.ndarray[Any, np.dtype[Any]]

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "UINT8": torch.uint8,
    "UINT16": torch.uint16,
    "UINT32": torch.uint32,
    "UINT64": torch.uint64,
    "INT8": torch.int8,
    "INT16": torch.int16,
    "INT32": torch.int32,
    "INT64": torch.int64,
    "FP16": torch.float16,
    "FP32": torch.float32,
    "FP64": torch.float64,
    "BF16": torch.bfloat16,
}
DATATYPES = {dtype: name for name, dtype in DTYPES.items()}

# Numbers of FP32 in the largest vector register, and how many numbers it takes for turning them to be worth it.
VECTOR = 16
WORTH_TURNING = 512


def describe(dtype: torch.dtype, shape: Sequence[int]) -> str:
    """A tensor in the words of a resource: datatype and shape."""
    return f"{DATATYPES.get(dtype, dtype)} {list(shape)}"


def importer(spec: TensorSpec) -> Callable[[Array], torch.Tensor]:
    """The function that makes a tensor over an array's memory."""
    if spec.datatype == "BF16":
        return lambda array: torch.from_numpy(array).view(torch.bfloat16)
    return torch.from_numpy


def host_array(tensor: torch.Tensor) -> Array:
    """The array over a host tensor's memory that `importer` would read."""
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def padded(make: Callable[[Array], torch.Tensor], spec: TensorSpec, batch: int) -> Callable[[Array], torch.Tensor]:
    """`make`, with rows copied into a buffer of `batch` rows; those of earlier batches, or zeros, follow them."""
    buffer = torch.zeros(batch, *spec.shape, dtype=DTYPES[spec.datatype])

    def fill(array: Array) -> torch.Tensor:
        buffer[: len(array)] = make(array)
        return buffer

    return fill


def copied(make: Callable[[Array], torch.Tensor]) -> Callable[[Array], torch.Tensor]:
    """`make`, into memory of its own."""
    return lambda array: make(array).clone()


def activated(spec: TensorSpec, activation: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """The function that applies the activation and gives the carried datatype: in FP32, in FP64 for FP64.

    Raises InvalidModel for an activation of integers.
    """
    carried = DTYPES[spec.carried.datatype]
    if activation == "none":
        return lambda y: y.to(carried)
    if not carried.is_floating_point:
        raise InvalidModel(
            f"output {spec.name!r} is {spec.datatype}: the activation {activation!r} needs floating outputs"
        )
    if activation == "softmax":
        if not spec.shape:
            raise InvalidModel(f"output {spec.name!r} has no class dimension: softmax needs one")
        return lambda y: _softmax(y, carried)
    return lambda y: torch.sigmoid(y.to(carried))


def _softmax(y: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Probabilities over the last axis, in `dtype`.

    On CPUs PyTorch computes a last axis that is shorter than a vector register one number at a time; along another axis
    it computes many rows at once, which pays for turning them.
    """
    if y.is_cuda or y.dim() < 2 or y.shape[-1] >= VECTOR or y.numel() < WORTH_TURNING:
        return torch.softmax(y, -1, dtype=dtype)
    return torch.softmax(y.transpose(-1, -2).contiguous(), -2, dtype=dtype).transpose(-1, -2)


def exporter(spec: TensorSpec, activation: str, *, owned: bool) -> Callable[[torch.Tensor], Array]:
    """The function that makes a host array of an output. `owned`: the array never shares memory with an input."""
    activate = activated(spec, activation)
    if owned or activation != "none":
        return lambda y: activate(y).contiguous().numpy()
    return lambda y: activate(y).clone(memory_format=torch.contiguous_format).numpy()


def unpacker(result: Any, names: Sequence[str]) -> Callable[[Any], Sequence[torch.Tensor]]:
    """The function that takes results apart that are like `result`: a tensor, a sequence, or a dict of tensors.

    A dict is read in the order of the declared `names` where it has them. Raises InvalidModel for anything else.
    """
    if isinstance(result, torch.Tensor):
        return lambda y: (y,)
    if isinstance(result, dict) and all(isinstance(y, torch.Tensor) for y in result.values()):
        keys = list(names) if set(names) == set(result) else list(result)
        if len(keys) == 1:
            return lambda y: (y[keys[0]],)
        return operator.itemgetter(*keys)
    if isinstance(result, (tuple, list)) and result and all(isinstance(y, torch.Tensor) for y in result):
        return lambda y: y
    raise InvalidModel(
        f"the model gives {type(result).__name__}: it must give a tensor, or a tuple, list or dict of tensors"
    )


def trial_inputs(specs: Sequence[TensorSpec], rows: int, seed: int, *, small: bool) -> list[torch.Tensor]:
    """Random rows: normal values, all of UINT8 (pixels), and other integers of 0 and 1, which most tables have.

    `small` keeps UINT8 to 0 and 1 too.
    """
    generator = torch.Generator().manual_seed(seed)
    made = []
    for spec in specs:
        shape, dtype = (rows, *spec.shape), DTYPES[spec.datatype]
        if dtype.is_floating_point:
            made.append(torch.randn(shape, generator=generator).to(dtype))
        else:
            top = 256 if spec.datatype == "UINT8" and not small else 2
            made.append(torch.randint(0, top, shape, generator=generator).to(dtype))
    return made


def shares_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors lie in one storage."""
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
