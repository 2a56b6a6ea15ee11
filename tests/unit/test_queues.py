"""The queues against naive lists of rows."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from ensemble_gateway.queues import SWEEP_AT, Entry, Queues, Request, bits

MEMBERS = 3
PICK = st.integers(0, 1 << 16)


class QueuesMachine(RuleBasedStateMachine):
    """The model is, for each member, the rows that wait, in order: (request, slot, alone)."""

    def __init__(self) -> None:
        super().__init__()
        self.queues = Queues(MEMBERS)
        self.model: list[list[tuple[Request, int, bool]]] = [[] for _ in range(MEMBERS)]
        self.taken: list[tuple[int, list[Entry]]] = []
        self.requests: list[Request] = []
        self.slot = 0

    @rule(parts=st.lists(st.integers(1, 6), min_size=1, max_size=3), wanted=st.sampled_from([7, 7, 1, 4, 5]))
    def add(self, parts: list[int], wanted: int) -> None:
        ranges = []
        for rows in parts:
            ranges.append((self.slot, rows))
            self.slot += rows + 1
        request = Request(sum(parts), tuple(ranges), wanted, 1, None)
        self.requests.append(request)
        self.queues.add(request)
        for member in bits(wanted):
            self.model[member] += [(request, start + row, False) for start, rows in ranges for row in range(rows)]

    @rule()
    def spread(self) -> None:
        self.queues.spread()

    @rule(which=PICK)
    def close(self, which: int) -> None:
        if not self.requests:
            return
        request = self.requests.pop(which % len(self.requests))
        request.closed = True
        self.queues.forget(request)
        self.model = [[row for row in rows if row[0] is not request] for rows in self.model]

    @rule(member=st.integers(0, MEMBERS - 1), rows=st.integers(1, 12))
    def cut(self, member: int, rows: int) -> None:
        self.queues.spread()
        entries = self.queues.cut(member, rows)
        got = [(entry.request, entry.start + row, entry.alone) for entry in entries for row in range(entry.rows)]
        model = self.model[member]
        assert got == model[: len(got)], "the oldest rows, in order, of no finished request"
        assert len(got) <= rows
        if any(alone for _, _, alone in got):
            assert len(entries) == 1
        elif len(got) < rows and len(got) < len(model):
            assert model[len(got)][2], "fewer only before an entry that has to be alone"
        del model[: len(got)]
        if entries:
            self.taken.append((member, entries))

    @rule(first=st.integers(0, MEMBERS - 1), second=st.integers(0, MEMBERS - 1), rows=st.integers(1, 12))
    def cut_same(self, first: int, second: int, rows: int) -> None:
        """What one member's queue begins with is taken from another's too, if that begins with the very same."""
        self.queues.spread()
        entries = self.queues.cut(first, rows)
        if not entries:
            return
        got = [(entry.request, entry.start + row, entry.alone) for entry in entries for row in range(entry.rows)]
        del self.model[first][: len(got)]
        self.taken.append((first, entries))
        if first == second or entries[0].alone:
            return
        before = self.queues.waiting[second]
        if self.queues.cut_same(second, entries):
            assert self.model[second][: len(got)] == got
            del self.model[second][: len(got)]
            assert self.queues.waiting[second] == before - len(got)
            self.taken.append((second, entries))
        else:
            assert self.queues.waiting[second] == before, "nothing is taken"

    @rule(which=PICK, alone=st.booleans())
    def put_back(self, which: int, alone: bool) -> None:
        if not self.taken:
            return
        member, entries = self.taken.pop(which % len(self.taken))
        again = [entry._replace(alone=entry.alone or alone) for entry in entries]
        self.queues.put_back(member, again)
        rows = [
            (entry.request, entry.start + row, entry.alone)
            for entry in again
            if not entry.request.closed
            for row in range(entry.rows)
        ]
        self.model[member] = rows + self.model[member]

    @rule(member=st.integers(0, MEMBERS - 1))
    def head(self, member: int) -> None:
        self.queues.spread()
        model = self.model[member]
        assert self.queues.head(member) is (model[0][0] if model else None)

    @invariant()
    def counts(self) -> None:
        for member, rows in enumerate(self.model):
            waiting = self.queues.waiting[member]
            assert bool(self.queues.members >> member & 1) == bool(waiting)
            assert waiting + self.queues._fresh_rows >= len(rows), "never fewer than there are"


QueuesMachine.TestCase.settings = settings(max_examples=200, stateful_step_count=50, deadline=None)
TestQueues = QueuesMachine.TestCase


def test_an_entry_that_would_have_to_be_alone_ends_no_batch_once_its_request_is_finished() -> None:
    queues = Queues(1)
    lonely, *others = (Request(1, ((slot, 1),), 1, 1, None) for slot in range(3))
    for request in (others[0], lonely, others[1]):
        queues.add(request)
    queues.spread()
    first, second, third = queues.cut(0, 3)
    queues.put_back(0, [first, second._replace(alone=True), third])
    lonely.closed = True
    queues.forget(lonely)
    assert [entry.request for entry in queues.cut(0, 2)] == others


def test_entries_that_have_to_be_alone_are_cut_alone_and_in_order() -> None:
    queues = Queues(1)
    first, second, third = (Request(2, ((10 * index, 2),), 1, 1, None) for index in range(3))
    for request in (first, second, third):
        queues.add(request)
    queues.spread()
    entries = queues.cut(0, 4)
    queues.put_back(0, [entries[0], entries[1]._replace(alone=True)])
    cuts = []
    while queues.waiting[0]:
        cuts.append([(entry.start, entry.rows) for entry in queues.cut(0, 3)])
    assert cuts == [[(0, 2)], [(10, 2)], [(20, 2)]]
    assert queues.members == 0
    assert queues._alone == 0, "the usual, faster way is open again"


def whole(number: int, rows: int = 4) -> Request:
    return Request(rows, ((10 * number, rows),), 0b11, 2, None)


def queued(*requests: Request) -> Queues:
    queues = Queues(2)
    for request in requests:
        queues.add(request)
    queues.spread()
    return queues


@pytest.mark.parametrize("rows", [2, 4, 6, 8, 10])
def test_the_same_rows_are_taken_from_two_members_whatever_a_cut_divides(rows: int) -> None:
    queues = queued(whole(0), whole(1), whole(2))
    assert queues.cut_same(1, queues.cut(0, rows))
    assert queues.waiting == [12 - rows] * 2
    assert queues.cut(0, 12) == queues.cut(1, 12), "the rest is the same too"
    assert queues.members == 0


def test_heads_that_were_divided_differently_are_not_the_same() -> None:
    for mine, others in ((2, 1), (1, 2)):
        queues = queued(whole(0), whole(1))
        queues.cut(0, mine)
        queues.cut(1, others)
        assert not queues.cut_same(1, queues.cut(0, 2))
        assert queues.waiting == [8 - mine - 2, 8 - others]


def test_a_head_that_ends_sooner_is_not_the_same() -> None:
    queues = queued(whole(0), whole(1))
    first, second = queues.cut(1, 8)
    queues.put_back(1, [first._replace(rows=2), first._replace(start=2, rows=2), second])
    assert not queues.cut_same(1, queues.cut(0, 8))
    assert queues.waiting == [0, 8]


def test_rows_that_have_to_be_alone_are_not_the_same() -> None:
    queues = queued(whole(0), whole(1))
    first, *_ = queues.cut(1, 4)
    queues.put_back(1, [first._replace(alone=True)])
    assert not queues.cut_same(1, queues.cut(0, 4))
    assert queues.waiting == [4, 8]


def test_rows_of_another_request_or_of_one_that_was_closed_are_not_the_same() -> None:
    closed, living = whole(0), whole(1)
    queues = queued(closed, living)
    queues.cut(0, 4)
    closed.closed = True
    queues.forget(closed)
    entries = queues.cut(0, 4)
    assert [entry.request for entry in entries] == [living]
    assert not queues.cut_same(1, entries)
    assert queues.head(1) is living, "its head is dropped when it is looked at"
    assert queues.cut_same(1, entries)


@pytest.mark.parametrize("spread", [True, False])
def test_finished_requests_are_swept_out_when_they_are_many(spread: bool) -> None:
    queues = Queues(2)
    requests = [Request(2, ((2 * index, 2),), 0b11, 2, None) for index in range(4 * SWEEP_AT)]
    for request in requests:
        queues.add(request)
    if spread:
        queues.spread()
    for request in requests[1:]:
        request.closed = True
        queues.forget(request)
    queues.spread()
    assert queues.waiting[0] <= 2 + 2 * SWEEP_AT
    assert queues.entries(0) == queues.entries(1) == 1
    assert queues.head(1) is requests[0]


def test_sweeping_costs_little_for_each_of_many_that_leave() -> None:
    queues = Queues(1)
    requests = [Request(1, ((index, 1),), 1, 1, None) for index in range(20_000)]
    for request in requests:
        queues.add(request)
    sweeps = 0
    for request in requests[::2]:
        request.closed = True
        fresh = queues._fresh
        queues.forget(request)
        sweeps += queues._fresh is not fresh  # what was swept is a new list
    assert 1 <= sweeps < 30


def test_bits_are_the_members_of_a_set() -> None:
    assert bits(0) == []
    assert bits(0b1011) == [0, 1, 3]
    assert bits(1 << 63) == [63]
