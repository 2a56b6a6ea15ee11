"""Datatypes and shapes of rows, and arrays over buffers without a copy.

Datatype names are those of the Open Inference Protocol V2, section "Tensor Data Types". `BYTES` has no fixed row
size and is not served. `BF16` has no numpy dtype: its rows are carried as `uint16` bit patterns.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from ensemble_contract.errors import InvalidPlan

if TYPE_CHECKING:
    from collections.abc import Buffer  # type: ignore[attr-defined,unused-ignore]

NUMPY_DTYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "UINT8": np.dtype("<u1"),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "INT8": np.dtype("<i1"),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP16": np.dtype("<f2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
    "BF16": np.dtype("<u2"),
}

FLOATING = frozenset({"FP16", "FP32", "FP64", "BF16"})

MAX_RANK = 16
MAX_ROW_BYTES = 1 << 31


class TensorSpec(msgspec.Struct, frozen=True, rename="camel"):
    """One input or output of a model: its name, V2 datatype and the shape of one row (without the batch)."""

    name: str
    datatype: str
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        """Refuse what has no fixed row size.

        Raises InvalidPlan naming the tensor.
        """
        if not self.name:
            raise InvalidPlan("a tensor has no name")
        if self.datatype not in NUMPY_DTYPES:
            raise InvalidPlan(
                f"tensor {self.name!r}: datatype {self.datatype[:80]!r} is not one of {', '.join(NUMPY_DTYPES)}"
            )
        if len(self.shape) > MAX_RANK or any(d < 1 for d in self.shape):
            shown = list(self.shape[: MAX_RANK + 1])
            raise InvalidPlan(
                f"tensor {self.name!r}: shape {shown} must have at most {MAX_RANK} dimensions, all positive"
            )
        if self.row_bytes > MAX_ROW_BYTES:
            raise InvalidPlan(
                f"tensor {self.name!r}: a row of {self.row_bytes} bytes is over the limit of {MAX_ROW_BYTES}"
            )

    @property
    def dtype(self) -> np.dtype[Any]:
        """The numpy dtype of the carried bytes (uint16 for BF16)."""
        return NUMPY_DTYPES[self.datatype]

    @property
    def row_elements(self) -> int:
        """Elements of one row."""
        return math.prod(self.shape)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.row_elements * self.dtype.itemsize

    @property
    def carried(self) -> TensorSpec:
        """How an output travels to the gateway: FP16 and BF16 as FP32, which loses nothing; others as they are."""
        if self.datatype in ("FP16", "BF16"):
            return TensorSpec(self.name, "FP32", self.shape)
        return self


def rows_of(buffer: Buffer, spec: TensorSpec, rows: int) -> np.ndarray[Any, np.dtype[Any]]:
    """An array of shape (rows, *spec.shape) over `buffer`, without a copy.

    Raises ValueError if the buffer does not hold exactly that many rows.
    """
    array = np.frombuffer(buffer, dtype=spec.dtype)
    if array.size != rows * spec.row_elements:
        raise ValueError(f"{spec.name}: {array.size} elements are not {rows} rows of {spec.row_elements}")
    return array.reshape(rows, *spec.shape)


def bf16_to_fp32(bits: np.ndarray[Any, np.dtype[Any]]) -> np.ndarray[Any, np.dtype[Any]]:
    """FP32 values of BF16 bit patterns (uint16), exactly."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def fp32_to_bf16(values: np.ndarray[Any, np.dtype[Any]]) -> np.ndarray[Any, np.dtype[Any]]:
    """BF16 bit patterns (uint16) nearest to FP32 values, ties to even; NaN stays NaN (IEEE 754, section 4.3.1)."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), np.uint32(0x7FC0), rounded).astype(np.uint16)
