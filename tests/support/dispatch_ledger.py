"""A ledger around the dispatcher: it keeps its own books of every row given out and answered, and checks each effect.

What it is told are the events that links and clients cause; the clock is its attribute `now`.
"""

from __future__ import annotations

from collections import Counter
from math import inf

from ensemble_contract.wire import LiveInstance, State
from ensemble_gateway.batches import FUSE_FULL_S, FUSE_S, Batch
from ensemble_gateway.dispatcher import Dispatcher
from ensemble_gateway.lanes import Lane
from ensemble_gateway.queues import Request, bits
from ensemble_gateway.rowstore import SlotAllocator

Pair = tuple[str, str]


class Ledger:
    """A dispatcher whose every effect is checked: what is given out, to whom, and how each request ends."""

    def __init__(self, members: int, *, slots: int = 1 << 16, max_delay_s: float = 0.0) -> None:
        self.members: list[Pair] = [(f"m{index}", f"digest{index}") for index in range(members)]
        self.everyone = (1 << members) - 1
        self.dispatcher = Dispatcher(self.members, max_delay_s)
        self.allocator = SlotAllocator(slots)
        self.now = 100.0
        self.running: dict[int, Batch] = {}
        self.given: set[tuple[Request, int, int]] = set()
        self.answered: Counter[tuple[Request, int]] = Counter()
        self.open: set[Request] = set()
        self.ended: dict[Request, float] = {}
        self.lost_by: dict[tuple[Request, int, int], list[str]] = {}

    def admit(
        self, rows: int = 1, *, wanted: int | None = None, quorum: int | None = None, timeout_s: float = 30.0
    ) -> Request | None:
        """A client asks; None when the store is full."""
        ranges = self.allocator.take(rows)
        if ranges is None:
            return None
        wanted = self.everyone if wanted is None else wanted
        request = Request(rows, ranges, wanted, wanted.bit_count() if quorum is None else quorum, None)
        self.dispatcher.admit(request, self.now + timeout_s, self.now)
        self.open.add(request)
        return request

    def cancel(self, request: Request) -> None:
        """The client leaves."""
        self.dispatcher.cancel(request)
        if request in self.open:
            self._release(request)

    def assign(self) -> list[Batch]:
        """Give out what the dispatcher wants to give out now."""
        batches = self.dispatcher.assign(self.now)
        for batch in batches:
            lane = batch.lane
            assert batch.id not in self.running
            assert batch.instances
            assert len({one.member for one in batch.instances}) == len(batch.instances)
            for one in batch.instances:
                assert lane.instances[one.member] is one, "a lane gets only what it hosts"
                assert 1 <= batch.rows <= one.batch_size
            assert batch.rows == sum(entry.rows for entry in batch.entries)
            assert batch.ranges == [(entry.start, entry.rows) for entry in batch.entries]
            assert 1 <= len(lane.batches) <= lane.credits
            if any(entry.alone for entry in batch.entries):
                assert len(batch.entries) == len(batch.instances) == 1
            if len(batch.instances) > 1:
                first = batch.instances[0]
                pace = first.latency.expect(batch.rows) / batch.rows
                full_pace = first.latency.expect(first.batch_size) / first.batch_size
                is_full = batch.rows == first.batch_size
                is_as_good = 4 * batch.rows >= first.batch_size and pace <= 1.5 * full_pace * 1.001
                assert batch.expected_s <= (FUSE_FULL_S if is_full or is_as_good else FUSE_S) * 1.001
            self.running[batch.id] = batch
            for row in _rows_of(batch):
                assert row[0] in self.open, "rows of a finished request are not given out"
                assert row[0].wanted >> row[1] & 1
                assert row not in self.given, "a row is never given twice at once to a member"
                self.given.add(row)
        return batches

    def answer(self, batch: Batch, *compute_s: float) -> list[Request]:
        """A worker answers a batch; each of its instances took so long."""
        taken = self.dispatcher.take(batch.id, self.now)
        assert taken is batch
        self._take_back(batch)
        for request, member, _ in _rows_of(batch):
            self.answered[request, member] += 1
        return self._end(self.dispatcher.settle(batch, compute_s))

    def fail(self, batch: Batch, cause: str) -> list[Request]:
        """A worker could not run a batch."""
        assert self.dispatcher.take(batch.id, self.now) is batch
        self._take_back(batch)
        return self._end(self.dispatcher.fail(batch, cause))

    def device_lost(self, batch: Batch) -> list[Request]:
        """A worker says that this batch cost it its device."""
        assert self.dispatcher.take(batch.id, self.now) is batch
        self._take_back(batch)
        self._blame(batch)
        self._give_up(batch.lane.worker, but=batch.lane)
        return self._end(self.dispatcher.retry(batch, blame=True))

    def unknown(self, batch: Batch) -> list[Request]:
        """A worker says that it has no such instance."""
        assert self.dispatcher.take(batch.id, self.now) is batch
        self._take_back(batch)
        return self._end(self.dispatcher.retry(batch, blame=False))

    def lose(self, worker: str, well_until: float = inf) -> list[Request]:
        """A worker is gone; what it was given after `well_until` is not why."""
        self._give_up(worker)
        return self._end(self.dispatcher.lost(worker, well_until=well_until))

    def update(self, state: State) -> list[Request]:
        """A worker says what it can run: batches of instances that it has no more are given up."""
        living = {live.id for live in state.instances}
        for batch in list(self.running.values()):
            if batch.lane.worker == state.worker and any(one.id not in living for one in batch.instances):
                self._take_back(batch)
        return self._end(self.dispatcher.update(state))

    def expire(self) -> list[Request]:
        """The clock has gone on."""
        late = self.dispatcher.expire(self.now)
        for request in late:
            assert request.failure is None or request.failure.status in (503, 504)
        return self._end(late)

    def check_poison(self) -> None:
        """Rows that lost two workers are not given out any more."""
        for (request, member, _), workers in self.lost_by.items():
            assert len(workers) < 2 or request not in self.open or request.failed >> member & 1

    def _lost_twice(self, request: Request, member: int, text: str) -> bool:
        lost = [names for row, names in self.lost_by.items() if row[:2] == (request, member) and len(names) >= 2]
        return any(f"{names[0]} and {names[1]}" in text for names in lost)

    def _give_up(self, worker: str, but: Lane | None = None) -> None:
        blamed: set[Lane] = set() if but is None else {but}
        for batch in list(self.running.values()):
            if batch.lane.worker == worker:
                if batch.lane not in blamed:
                    blamed.add(batch.lane)
                    self._blame(batch)
                self._take_back(batch)

    def _blame(self, batch: Batch) -> None:
        for row in _rows_of(batch):
            self.lost_by.setdefault(row, []).append(batch.lane.worker)

    def _take_back(self, batch: Batch) -> None:
        del self.running[batch.id]
        self.given.difference_update(_rows_of(batch))

    def _end(self, requests: list[Request]) -> list[Request]:
        for request in requests:
            done = bits(request.done)
            if request.failure is None:
                assert len(done) >= request.quorum
            else:
                assert len(done) < request.quorum
                assert request.failure.message
            for member in bits(request.wanted):
                complete = self.answered[request, member] == request.rows
                assert complete == (member in done), "an answer names exactly the members that are done"
            assert not request.done & ~request.wanted
            for member, text in (request.causes or {}).items():
                assert request.failed >> member & 1
                if "lost two workers" in text:
                    assert self._lost_twice(request, member, text)
            self._release(request)
        return requests

    def _release(self, request: Request) -> None:
        assert request.closed
        assert request in self.open, "a request ends exactly once"
        self.open.remove(request)
        self.ended[request] = self.now
        self.allocator.give(request.ranges)


def _rows_of(batch: Batch) -> list[tuple[Request, int, int]]:
    return [
        (entry.request, one.member, slot)
        for one in batch.instances
        for entry in batch.entries
        for slot in range(entry.start, entry.start + entry.rows)
    ]


def member_of(batch: Batch) -> int:
    """The only member of a batch."""
    (instance,) = batch.instances
    return instance.member


def hosting(
    ledger: Ledger,
    worker: str,
    *members: int,
    size: int = 8,
    serial: bool = True,
    first_id: int = 1,
    row_s: float = 0.01,
) -> None:
    """A worker with these members, each taking `row_s` for a row."""
    live = tuple(LiveInstance(first_id + m, *ledger.members[m], size, row_s * size) for m in members)
    ledger.update(State(worker, 1, live, serial, 2))


def admitted(
    ledger: Ledger, rows: int = 1, *, wanted: int | None = None, quorum: int | None = None, timeout_s: float = 30.0
) -> Request:
    """A request for which there is room."""
    request = ledger.admit(rows, wanted=wanted, quorum=quorum, timeout_s=timeout_s)
    assert request is not None
    return request


def given(batches: list[Batch]) -> list[tuple[str, int, int]]:
    """Worker, member and rows of each batch."""
    return [(batch.lane.worker, member_of(batch), batch.rows) for batch in batches]


def given_together(batches: list[Batch]) -> list[tuple[str, tuple[int, ...], int]]:
    """Worker, members in order and rows of each batch."""
    return [(batch.lane.worker, tuple(sorted(one.member for one in batch.instances)), batch.rows) for batch in batches]
