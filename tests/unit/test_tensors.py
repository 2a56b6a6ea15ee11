"""Datatypes, shapes and the bytes of rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from ensemble_contract.errors import InvalidPlan
from ensemble_contract.tensors import MAX_ROW_BYTES, NUMPY_DTYPES, TensorSpec, bf16_to_fp32, fp32_to_bf16, rows_of


@pytest.mark.parametrize(
    ("datatype", "size"),
    [
        ("BOOL", 1), ("UINT8", 1), ("UINT16", 2), ("UINT32", 4), ("UINT64", 8), ("INT8", 1), ("INT16", 2),
        ("INT32", 4), ("INT64", 8), ("FP16", 2), ("FP32", 4), ("FP64", 8), ("BF16", 2),
    ],
)  # fmt: skip
def test_row_bytes(datatype: str, size: int) -> None:
    spec = TensorSpec("x", datatype, (3, 5))
    assert (spec.row_elements, spec.row_bytes) == (15, 15 * size)
    assert spec.dtype.byteorder in "<|=" or size == 1
    assert TensorSpec("x", datatype, ()).row_bytes == size


def test_every_datatype_is_tested() -> None:
    assert len(NUMPY_DTYPES) == 13


@pytest.mark.parametrize(
    ("name", "datatype", "shape", "text"),
    [
        ("", "FP32", (1,), "has no name"),
        ("x", "BYTES", (1,), "tensor 'x': datatype 'BYTES' is not one of BOOL, UINT8"),
        ("x", "fp32", (1,), "datatype 'fp32'"),
        ("x", "FP32", (3, 0), r"shape \[3, 0\] must have at most 16 dimensions, all positive"),
        ("x", "FP32", (-1,), r"shape \[-1\]"),
        ("x", "FP32", (1,) * 17, "at most 16 dimensions"),
        ("x", "FP32", (1 << 30,), f"a row of {1 << 32} bytes is over the limit of {MAX_ROW_BYTES}"),
        ("x", "UINT8", (1 << 62,) * 16, "over the limit"),
    ],
)
def test_tensors_that_cannot_be_served(name: str, datatype: str, shape: tuple[int, ...], text: str) -> None:
    with pytest.raises(InvalidPlan, match=text):
        TensorSpec(name, datatype, shape)


@pytest.mark.parametrize(
    ("datatype", "carried"), [("FP16", "FP32"), ("BF16", "FP32"), ("FP64", "FP64"), ("INT8", "INT8")]
)
def test_half_precision_is_carried_as_fp32(datatype: str, carried: str) -> None:
    assert TensorSpec("y", datatype, (2,)).carried == TensorSpec("y", carried, (2,))


def test_rows_are_views() -> None:
    buffer = bytearray(np.arange(12, dtype=np.float32).tobytes())
    rows = rows_of(buffer, TensorSpec("x", "FP32", (2, 2)), 3)
    assert rows.shape == (3, 2, 2)
    buffer[:4] = np.float32(99).tobytes()
    assert rows[0, 0, 0] == 99


@pytest.mark.parametrize("size", [0, 4, 44, 47, 49, 96])
def test_rows_of_another_size(size: int) -> None:
    with pytest.raises(ValueError, match=r"elements are not 3 rows of 4|buffer size must be a multiple"):
        rows_of(bytes(size), TensorSpec("x", "FP32", (2, 2)), 3)


def test_every_bf16_value_survives() -> None:
    """All 65,536 patterns, against torch."""
    bits = np.arange(1 << 16, dtype=np.uint16)
    values = bf16_to_fp32(bits)
    reference = torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16).float().numpy()
    np.testing.assert_array_equal(values, reference)
    back = fp32_to_bf16(values)
    number = ~np.isnan(values)
    np.testing.assert_array_equal(back[number], bits[number])
    assert np.isnan(bf16_to_fp32(back[~number])).all()


@given(arrays.arrays(np.float32, st.integers(1, 50), elements=st.floats(width=32)))
def test_rounding_is_torchs(values: np.ndarray[tuple[int], np.dtype[np.float32]]) -> None:
    reference = torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    ours = fp32_to_bf16(values)
    number = ~np.isnan(values)
    np.testing.assert_array_equal(ours[number], reference[number])
    assert np.isnan(bf16_to_fp32(ours[~number])).all()
