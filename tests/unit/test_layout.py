"""Where rows and results lie: the same sums on both sides, nothing overlaps, everything is aligned."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ensemble_contract.layout import ALIGNMENT, PAGE, StoreLayout, aligned, result_offsets
from ensemble_contract.tensors import NUMPY_DTYPES, TensorSpec

SPECS = st.lists(
    st.builds(
        TensorSpec,
        name=st.text(min_size=1, max_size=3),
        datatype=st.sampled_from(sorted(NUMPY_DTYPES)),
        shape=st.lists(st.integers(1, 7), max_size=3).map(tuple),
    ),
    min_size=1,
    max_size=4,
).map(tuple)


@pytest.mark.parametrize(
    ("size", "to", "wanted"), [(0, 64, 0), (1, 64, 64), (64, 64, 64), (65, 64, 128), (1, 4096, 4096)]
)
def test_aligned(size: int, to: int, wanted: int) -> None:
    assert aligned(size, to) == wanted


def test_golden_store() -> None:
    layout = StoreLayout((TensorSpec("image", "FP32", (3, 224, 224)), TensorSpec("flag", "BOOL", ())), 10)
    assert layout.offsets == (0, 6_021_120)
    assert layout.total_bytes == 6_025_216


def test_golden_results() -> None:
    outputs = (TensorSpec("y", "FP32", (1000,)), TensorSpec("n", "INT64", (1,)), TensorSpec("b", "BOOL", ()))
    assert result_offsets(outputs, 3) == ([0, 12_032, 12_096], 12_160)


@given(inputs=SPECS, slots=st.integers(1, 300))
def test_every_region_of_the_store_is_its_own(inputs: tuple[TensorSpec, ...], slots: int) -> None:
    layout = StoreLayout(inputs, slots)
    memory = bytearray(layout.total_bytes)
    arrays = layout.arrays(memoryview(memory))
    assert layout.total_bytes % PAGE == 0
    assert all(offset % PAGE == 0 for offset in layout.offsets)
    for number, (array, spec) in enumerate(zip(arrays, inputs, strict=True), start=1):
        assert array.shape == (slots, *spec.shape)
        array.view(np.uint8)[...] = number
    for number, array in enumerate(arrays, start=1):
        assert (array.view(np.uint8) == number).all()


@given(outputs=SPECS, rows=st.integers(1, 300))
def test_results_do_not_overlap(outputs: tuple[TensorSpec, ...], rows: int) -> None:
    starts, size = result_offsets(outputs, rows)
    ends = [start + rows * spec.row_bytes for start, spec in zip(starts, outputs, strict=True)]
    assert all(start % ALIGNMENT == 0 for start in starts)
    assert all(end <= after for end, after in zip(ends, [*starts[1:], size], strict=True))
    assert size < sum(rows * spec.row_bytes for spec in outputs) + ALIGNMENT * len(outputs)
