"""Rows in host memory: put into slots, gathered from ranges, always as a copy."""

from __future__ import annotations

from array import array

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ensemble_contract.layout import StoreLayout
from ensemble_contract.tensors import TensorSpec
from ensemble_contract.wire import RowRanges
from ensemble_worker.gather import HostRows, slots_of

SLOTS = 40
INPUTS = (TensorSpec("x", "FP32", (2, 3)), TensorSpec("flag", "BOOL", ()), TensorSpec("half", "BF16", (2,)))
RANGES = st.lists(
    st.integers(0, SLOTS - 1).flatmap(lambda start: st.tuples(st.just(start), st.integers(1, SLOTS - start))),
    min_size=1,
    max_size=8,
)


def ranges_of(pairs: list[tuple[int, int]]) -> RowRanges:
    starts, counts = [start for start, _ in pairs], [count for _, count in pairs]
    return RowRanges(array("I", starts), array("I", counts), sum(counts))


def slots(pairs: list[tuple[int, int]]) -> list[int]:
    return [slot for start, count in pairs for slot in range(start, start + count)]


def filled() -> tuple[HostRows, list[np.ndarray[tuple[int, ...], np.dtype[np.generic]]]]:
    rng = np.random.default_rng(1)
    arrays = [
        rng.normal(size=(SLOTS, 2, 3)).astype(np.float32),
        rng.random(SLOTS) < 0.5,
        rng.integers(0, 1 << 16, (SLOTS, 2)).astype(np.uint16),
    ]
    rows = HostRows.cache(INPUTS, SLOTS)
    rows.put(ranges_of([(0, SLOTS)]), arrays)
    return rows, arrays


@given(RANGES)
def test_slots_of(pairs: list[tuple[int, int]]) -> None:
    assert slots_of(ranges_of(pairs)).tolist() == slots(pairs)


@given(st.lists(RANGES, min_size=1, max_size=4))
def test_gather(batches: list[list[tuple[int, int]]]) -> None:
    """Larger and smaller batches after one another share a buffer, and see their own rows only."""
    rows, arrays = filled()
    for pairs in batches:
        gathered = rows.gather(ranges_of(pairs))
        for got, held, spec in zip(gathered, arrays, INPUTS, strict=True):
            assert got.flags.c_contiguous
            assert got.shape == (len(slots(pairs)), *spec.shape)
            np.testing.assert_array_equal(got, held[slots(pairs)])
        for got, held in zip(rows.view(ranges_of(pairs)), arrays, strict=True):
            np.testing.assert_array_equal(got, held[slots(pairs)])


def test_a_model_that_writes_to_its_input_changes_no_row() -> None:
    rows, arrays = filled()
    for pairs in ([(3, 4)], [(3, 1), (9, 2)]):
        rows.gather(ranges_of(pairs))[0][...] = -1
    np.testing.assert_array_equal(rows.gather(ranges_of([(0, SLOTS)]))[0], arrays[0])


def test_put_into_some_slots_leaves_the_others() -> None:
    rows, arrays = filled()
    new = [np.ones((3, *spec.shape), spec.dtype) for spec in INPUTS]
    rows.put(ranges_of([(7, 1), (20, 2)]), new)
    for got, held in zip(rows.gather(ranges_of([(0, SLOTS)])), arrays, strict=True):
        held[[7, 20, 21]] = 1
        np.testing.assert_array_equal(got, held)


def test_a_store_of_a_gateway_is_seen_as_it_changes() -> None:
    layout = StoreLayout(INPUTS, SLOTS)
    memory = memoryview(bytearray(layout.total_bytes))
    rows = HostRows(layout, memory.toreadonly())
    layout.arrays(memory)[0][5] = 7
    assert (rows.gather(ranges_of([(5, 1)]))[0] == 7).all()


def test_an_unused_cache_is_zeros() -> None:
    zeros = HostRows.cache(INPUTS, 3).zeros()
    assert [array.shape for array in zeros] == [(3, 2, 3), (3,), (3, 2)]
    assert not any(array.any() for array in zeros)
