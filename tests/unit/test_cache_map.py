"""Which rows a worker has: never the wrong one for a batch on its way, whatever is freed, reused and evicted."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ensemble_gateway.links import cache as cache_module
from ensemble_gateway.links.cache import FEW_ROWS, WINDOW, CacheMap, Placement, ranges_of
from ensemble_gateway.rowstore import slots_of

SLOTS = 12


def placed(cache: CacheMap, *ranges: tuple[int, int]) -> Placement:
    placement = cache.place(ranges)
    assert placement is not None
    return placement


@pytest.mark.parametrize(
    ("slots", "ranges"),
    [
        ([], []),
        ([4], [(4, 1)]),
        ([4, 5, 6], [(4, 3)]),
        ([4, 6, 5], [(4, 1), (6, 1), (5, 1)]),
        ([0, 1, 3, 4, 5, 2], [(0, 2), (3, 3), (2, 1)]),
    ],
)
def test_ranges_of(slots: list[int], ranges: list[tuple[int, int]]) -> None:
    assert ranges_of(np.array(slots, np.int64)) == ranges


def test_a_row_goes_once() -> None:
    cache = CacheMap(100, 10)
    first = placed(cache, (40, 3), (7, 1))
    assert first.missing_store == [(40, 3), (7, 1)]
    assert sum(count for _, count in first.missing_cache) == 4
    second = placed(cache, (7, 1), (41, 1))
    assert (second.missing_store, second.missing_cache) == ([], [])
    assert second.rows == [(first.pinned[3], 1), (first.pinned[1], 1)]


def test_a_forgotten_row_is_put_again() -> None:
    cache = CacheMap(100, 10)
    cache.unpin(placed(cache, (5, 2)).pinned)
    cache.forget([(5, 1)])
    assert placed(cache, (5, 2)).missing_store == [(5, 1)]


def test_pinned_rows_are_not_evicted() -> None:
    cache = CacheMap(100, 4)
    first = placed(cache, (0, 3))
    assert cache.place([(10, 2)]) is None
    assert placed(cache, (0, 3)).missing_store == [], "a refusal loses nothing"
    cache.unpin(first.pinned)
    assert cache.place([(10, 2)]) is None, "the second batch still reads them"
    cache.unpin(first.pinned)
    assert placed(cache, (10, 2)).missing_store == [(10, 2)]


def test_what_came_first_is_evicted_first() -> None:
    cache = CacheMap(100, 4)
    for slot in range(6):
        cache.unpin(placed(cache, (slot, 1)).pinned)
    assert [slot for slot in (5, 4, 3, 2) if placed(cache, (slot, 1)).missing_store == []] == [5, 4, 3, 2]


def test_room_of_a_freed_row_is_not_used_while_a_batch_reads_it() -> None:
    cache = CacheMap(100, 2)
    running = placed(cache, (0, 1))
    cache.forget([(0, 1)])
    again = placed(cache, (0, 1))
    assert again.missing_store == [(0, 1)], "the slot has another row now"
    assert again.pinned[0] != running.pinned[0]
    assert cache.place([(1, 1)]) is None
    cache.unpin(running.pinned)
    assert placed(cache, (1, 1)).pinned[0] == running.pinned[0]


def test_more_room_than_the_store_costs_nothing() -> None:
    cache = CacheMap(4, (1 << 32) - 1)
    assert placed(cache, (0, 4)).missing_cache == [(0, 4)]


def test_eviction_from_a_large_cache_is_quick() -> None:
    """A cache of a million rows that is always full: each batch costs about what it costs in a small one."""
    rows = 1 << 20
    cache = CacheMap(2 * rows, rows)
    cache.unpin(placed(cache, (0, rows)).pinned)
    began = time.process_time()
    for batch in range(500):
        cache.unpin(placed(cache, (rows + batch * 128, 128)).pinned)
    assert time.process_time() - began < 1.0
    assert rows > 100 * WINDOW


class WorkerWithCache(RuleBasedStateMachine):
    """A store whose slots hold ever new rows, and a worker's cache that holds what it was told to."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = CacheMap(SLOTS, 7)
        self.serial = 0
        self.store = [self._fresh() for _ in range(SLOTS)]
        self.worker: dict[int, int] = {}
        self.running: list[tuple[Placement, list[int]]] = []

    @initialize(few=st.sampled_from([0, 2, FEW_ROWS]))
    def rows_that_are_few(self, few: int) -> None:
        """Batches of few and of many rows are looked at in different ways, and meet in one cache."""
        cache_module.FEW_ROWS = few

    def teardown(self) -> None:
        cache_module.FEW_ROWS = FEW_ROWS

    def _fresh(self) -> int:
        self.serial += 1
        return self.serial

    @rule(slots=st.lists(st.integers(0, SLOTS - 1), min_size=1, max_size=7, unique=True))
    def send(self, slots: Sequence[int]) -> None:
        before = {int(row) for placement, _ in self.running for row in placement.pinned}
        placement = self.cache.place(ranges_of(np.array(slots, np.int64)))
        if placement is None:
            assert self.running, "only rows on their way can fill the cache"
            return
        puts = zip(slots_of(placement.missing_cache), slots_of(placement.missing_store), strict=True)
        for cached, slot in puts:
            assert int(cached) not in before, "a row was put where a batch still reads"
            self.worker[int(cached)] = self.store[int(slot)]
        assert [int(s) for s in slots_of(placement.rows)] == [int(s) for s in placement.pinned]
        self.running.append((placement, [self.store[slot] for slot in slots]))

    @precondition(lambda self: self.running)
    @rule(choice=st.integers(0, 1000))
    def answer(self, choice: int) -> None:
        placement, _ = self.running.pop(choice % len(self.running))
        self.cache.unpin(placement.pinned)

    @rule(start=st.integers(0, SLOTS - 1), count=st.integers(1, 4))
    def free_and_reuse(self, start: int, count: int) -> None:
        count = min(count, SLOTS - start)
        self.cache.forget([(start, count)])
        for slot in range(start, start + count):
            self.store[slot] = self._fresh()

    @invariant()
    def batches_read_their_own_rows(self) -> None:
        for placement, rows in self.running:
            assert [self.worker[int(cached)] for cached in placement.pinned] == rows

    @precondition(lambda self: not self.running)
    @rule()
    def nothing_leaks(self) -> None:
        placement = self.cache.place([(0, 7)])
        assert placement is not None
        self.cache.unpin(placement.pinned)
        for cached, slot in zip(placement.pinned, range(7), strict=True):
            self.worker[int(cached)] = self.store[slot]


TestWorkerWithCache = WorkerWithCache.TestCase
