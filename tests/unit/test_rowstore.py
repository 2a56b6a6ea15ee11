"""The row store against naive models: a set of free slots, and plain numpy arrays."""

from __future__ import annotations

import itertools
import mmap
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from ensemble_contract.layout import LONG_RANGE, StoreLayout
from ensemble_contract.tensors import TensorSpec
from ensemble_gateway.rowstore import LONG_RUN, Ranges, RowStore, SlotAllocator, slots_of, slots_within

SLOTS = 4 * LONG_RUN + 3


def slots_in(ranges: Ranges) -> list[int]:
    return [slot for start, count in ranges for slot in range(start, start + count)]


class AllocatorMachine(RuleBasedStateMachine):
    """Requests of all sizes come and go; the model is the set of slots that are free."""

    def __init__(self) -> None:
        super().__init__()
        self.allocator = SlotAllocator(SLOTS)
        self.free = set(range(SLOTS))
        self.held: list[Ranges] = []

    @rule(rows=st.one_of(st.just(1), st.integers(1, 12), st.integers(1, SLOTS + 2)))
    def take(self, rows: int) -> None:
        ranges = self.allocator.take(rows)
        assert (ranges is None) == (rows > len(self.free)), "only a full store refuses"
        if ranges is not None:
            slots = slots_in(ranges)
            assert len(slots) == len(set(slots)) == rows
            assert self.free.issuperset(slots), "no slot is given out twice"
            self.free.difference_update(slots)
            self.held.append(ranges)

    @rule(which=st.integers(0, 1 << 16))
    def give(self, which: int) -> None:
        if not self.held:
            return
        ranges = self.held.pop(which % len(self.held))
        self.allocator.give(ranges)
        self.free.update(slots_in(ranges))

    @invariant()
    def counts(self) -> None:
        assert self.allocator.free_slots == len(self.free)

    def teardown(self) -> None:
        for ranges in self.held:
            self.allocator.give(ranges)
        assert self.allocator.take(SLOTS) == ((0, SLOTS),), "freed runs merge until the store is one run again"


AllocatorMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)
TestAllocator = AllocatorMachine.TestCase


def test_bulk_requests_get_one_range_while_single_rows_take_what_lies_between() -> None:
    allocator = SlotAllocator(1000)
    singles = [allocator.take(1) for _ in range(10)]
    assert singles == [((slot, 1),) for slot in range(10)], "low slots first"
    allocator.give(((3, 1), (5, 1)))
    assert allocator.take(500) == ((10, 500),)
    assert {allocator.take(1), allocator.take(1)} == {((3, 1),), ((5, 1),)}


def test_a_fragmented_store_gives_many_ranges_rather_than_none() -> None:
    allocator = SlotAllocator(64)
    for _ in range(64):
        assert allocator.take(1) is not None
    allocator.give([(slot, 1) for slot in range(0, 64, 2)])
    ranges = allocator.take(32)
    assert ranges is not None
    assert sorted(slots_in(ranges)) == list(range(0, 64, 2))
    assert allocator.take(1) is None


@pytest.mark.parametrize("rows", [0, -1])
def test_no_rows_are_refused(rows: int) -> None:
    with pytest.raises(ValueError, match="at least one"):
        SlotAllocator(8).take(rows)


# -- contents ---------------------------------------------------------------------------------------------------------

INPUTS = (TensorSpec("image", "UINT8", (3, 2)), TensorSpec("meta", "FP32", ()), TensorSpec("ids", "INT64", (5,)))
OUTPUTS = (TensorSpec("classes", "FP32", (4,)), TensorSpec("box", "FP64", (2, 2)))
COLUMNS = 5


def make_store(slots: int) -> RowStore:
    layout = StoreLayout(INPUTS, slots)
    return RowStore(layout, memoryview(bytearray(layout.total_bytes)), OUTPUTS, COLUMNS)


@st.composite
def some_ranges(draw: st.DrawFn, slots: int) -> Ranges:
    """Ranges that do not overlap, in any order."""
    cuts = sorted(draw(st.sets(st.integers(0, slots), min_size=2, max_size=12)))
    pieces = [(a, b - a) for a, b in itertools.pairwise(cuts)]
    chosen = draw(st.lists(st.sampled_from(pieces), min_size=1, unique=True))
    if draw(st.booleans()):
        chosen = [(start, 1) for start, _ in chosen]
    return tuple(chosen)


@dataclass
class NaiveStore:
    """One array an input, and one an output and column, by slot."""

    inputs: list[np.ndarray] = field(default_factory=list)
    outputs: list[np.ndarray] = field(default_factory=list)


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_rows_are_where_a_naive_store_has_them(data: st.DataObject) -> None:
    slots = 8 * LONG_RANGE
    store = make_store(slots)
    random = np.random.default_rng(data.draw(st.integers(0, 1 << 32)))
    naive = NaiveStore(
        [np.zeros((slots, *spec.shape), spec.dtype) for spec in INPUTS],
        [np.zeros((COLUMNS, slots, *spec.shape), spec.dtype) for spec in OUTPUTS],
    )
    for output, kept in zip(store.outputs, naive.outputs, strict=True):
        output[:] = kept
    for _ in range(data.draw(st.integers(1, 6))):
        ranges = data.draw(some_ranges(slots))
        where = slots_in(ranges)
        rows = [random.integers(0, 200, (len(where), *spec.shape)).astype(spec.dtype) for spec in INPUTS]
        store.write(ranges, [memoryview(array.tobytes()) for array in rows])
        for mine, array in zip(naive.inputs, rows, strict=True):
            mine[where] = array
        columns = data.draw(st.lists(st.integers(0, COLUMNS - 1), min_size=1, max_size=COLUMNS, unique=True))
        shape = (len(columns), len(where))
        results = [random.normal(size=(*shape, *spec.shape)).astype(spec.dtype) for spec in OUTPUTS]
        store.keep(columns, ranges, results)
        for mine, array in zip(naive.outputs, results, strict=True):
            for column, of_member in zip(columns, array, strict=True):
                mine[column, where] = of_member
    ranges = data.draw(some_ranges(slots))
    where = slots_in(ranges)
    for read, mine in zip(store.read(ranges), naive.inputs, strict=True):
        assert read.flags.c_contiguous
        np.testing.assert_array_equal(read, mine[where])
    columns = data.draw(st.lists(st.integers(0, COLUMNS - 1), min_size=1, max_size=COLUMNS, unique=True))
    for index, kept in enumerate(naive.outputs):
        np.testing.assert_array_equal(store.stack(index, columns, ranges), kept[columns][:, where])
        np.testing.assert_array_equal(store.stack(index, range(COLUMNS), ranges), kept[:, where])


def test_what_was_read_does_not_change_with_the_store() -> None:
    store = make_store(8)
    store.write(((0, 2),), [memoryview(bytes(2 * spec.row_bytes)) for spec in INPUTS])
    read = store.read([(0, 2)])
    store.write(((0, 2),), [memoryview(b"\x01" * (2 * spec.row_bytes)) for spec in INPUTS])
    assert not any(array.any() for array in read)


@pytest.mark.parametrize("ranges", [[(2, 3)], [(2, 1), (5, 2)]])
def test_outputs_of_more_or_fewer_members_than_columns_are_refused(ranges: list[tuple[int, int]]) -> None:
    store = make_store(8)
    for members in (1, 3):
        results = [np.zeros((members, 3, *spec.shape), spec.dtype) for spec in OUTPUTS]
        with pytest.raises(ValueError, match=rf"outputs of {members} members for 2 columns"):
            store.keep([0, 4], ranges, results)


@pytest.mark.parametrize("ranges", [[(2, 40)], [(2, 1), (5, 2)], [(2, 20), (40, 20)]])
def test_outputs_of_more_or_fewer_rows_are_refused(ranges: list[tuple[int, int]]) -> None:
    store = make_store(64)
    rows = sum(count for _, count in ranges)
    for wrong in (1, rows - 1, rows + 1):
        results = [np.zeros((2, wrong, *spec.shape), spec.dtype) for spec in OUTPUTS]
        with pytest.raises(ValueError, match=rf"of {wrong} rows for {rows}"):
            store.keep([0, 1], ranges, results)


def test_a_buffer_of_the_wrong_size_or_number_is_refused() -> None:
    store = make_store(8)
    good = [memoryview(bytes(2 * spec.row_bytes)) for spec in INPUTS]
    with pytest.raises(ValueError, match=r"shorter|longer"):
        store.write(((0, 2),), good[:2])
    with pytest.raises(ValueError, match=r"assignment|structure"):
        store.write(((0, 2),), [good[0][:-1], *good[1:]])


def test_used_rows_and_bytes_count_inputs_and_kept_outputs() -> None:
    store = make_store(16)
    row = 6 + 4 + 40 + COLUMNS * (16 + 32)
    assert store.bytes_per_row(COLUMNS) == row
    assert store.used_rows == 0
    ranges = store.allocator.take(5)
    assert ranges is not None
    assert store.used_rows == 5
    store.allocator.give(ranges)
    assert store.used_rows == 0
    assert slots_within(10 * row, INPUTS, OUTPUTS, COLUMNS) == 10
    assert slots_within(10 * row - 1, INPUTS, OUTPUTS, COLUMNS) == 9
    assert slots_within(1, INPUTS, OUTPUTS, COLUMNS) == 1, "a store holds at least one row"


def test_slots_of_ranges_are_in_order() -> None:
    assert slots_of([(7, 2), (1, 3)]).tolist() == [7, 8, 1, 2, 3]
    assert slots_of([(9, 1), (4, 1)]).tolist() == [9, 4]


def test_no_more_slots_than_the_limit_are_given_out() -> None:
    allocator = SlotAllocator(10)
    ranges = allocator.take(6)
    assert ranges is not None
    allocator.limit(4)
    assert allocator.take(1) is None
    allocator.give([(ranges[0][0], 3)])
    assert allocator.take(1) is not None
    assert allocator.take(1) is None
    allocator.limit(100)
    assert allocator.capacity == 10
    assert allocator.take(6) is not None
    assert allocator.take(1) is None


def test_the_memory_of_a_column_is_given_back() -> None:
    slots, width = 4096, 256
    layout = StoreLayout((TensorSpec("x", "FP32", ()),), slots)
    store = RowStore(layout, memoryview(bytearray(layout.total_bytes)), (TensorSpec("y", "FP32", (width,)),), 128)
    kept = store.outputs[0]
    before = resident_bytes()
    kept[1:4] = 1
    assert resident_bytes() - before > 3 * kept[0].nbytes * 0.9
    store.give_back([1, 3])
    assert resident_bytes() - before < 2 * kept[0].nbytes
    assert not kept[1].any()
    assert kept[2].all()


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE
