"""A simulated world around the dispatcher: workers with latencies and losses, clients, a clock made by hand.

`Ledger` keeps its own books of every row given out and answered, and checks each effect of the dispatcher against
them. `World` moves a ledger through time: batches travel, run one after another in each lane, and are answered.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import count

from ensemble_contract.wire import LiveInstance, State
from ensemble_gateway.dispatcher import Batch, Dispatcher
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
            lane, member = batch.lane, batch.instance.member
            assert batch.id not in self.running
            assert lane.instances[member] is batch.instance, "a lane gets only what it hosts"
            assert 1 <= batch.rows <= batch.instance.batch_size
            assert batch.rows == sum(entry.rows for entry in batch.entries)
            assert batch.ranges == [(entry.start, entry.rows) for entry in batch.entries]
            assert 1 <= len(lane.batches) <= lane.credits
            assert len(batch.entries) == 1 or not any(entry.alone for entry in batch.entries)
            self.running[batch.id] = batch
            for row in _rows_of(batch):
                assert row[0] in self.open, "rows of a finished request are not given out"
                assert row[0].wanted >> member & 1
                assert row not in self.given, "a row is never given twice at once to a member"
                self.given.add(row)
        return batches

    def answer(self, batch: Batch, compute_s: float) -> list[Request]:
        """A worker answers a batch."""
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

    def lose(self, worker: str) -> list[Request]:
        """A worker is gone."""
        self._give_up(worker)
        return self._end(self.dispatcher.lost(worker))

    def update(self, state: State) -> list[Request]:
        """A worker says what it can run: batches of instances that it has no more are given up."""
        living = {live.id for live in state.instances}
        for batch in list(self.running.values()):
            if batch.lane.worker == state.worker and batch.instance.id not in living:
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
    member = batch.instance.member
    return [
        (entry.request, member, slot)
        for entry in batch.entries
        for slot in range(entry.start, entry.start + entry.rows)
    ]


@dataclass(eq=False)
class Device:
    """A simulated worker. `seconds` says by member how long a batch of so many rows takes."""

    name: str
    seconds: dict[int, Callable[[int], float]]
    batch_size: int = 64
    serial: bool = True
    device_class: str = "cpu"
    credits: int = 2
    up: bool = False
    first_id: int = 0
    free_at: dict[int, float] = field(default_factory=dict)
    busy_s: float = 0.0

    def state(self, members: list[Pair], first_id: int, hosted: Iterable[int] | None = None) -> State:
        """What it says of itself; ids are `first_id` plus the member."""
        self.first_id = first_id
        chosen = self.seconds if hosted is None else hosted
        live = tuple(
            LiveInstance(first_id + m, *members[m], self.batch_size, self.seconds[m](self.batch_size)) for m in chosen
        )
        return State(self.name, 1, live, self.serial, self.credits, device_class=self.device_class)


def affine(fixed_s: float, row_s: float = 0.0) -> Callable[[int], float]:
    """Seconds of a batch that costs something by itself and something for each row."""
    return lambda rows: fixed_s + row_s * rows


# What becomes of a batch at its worker: "answer", "fail", "lose" (the worker dies of it) or "hang".
Fate = Callable[[Batch], str]


class World:
    """Devices that run a ledger's batches; `restart_s` after a loss a device is back."""

    def __init__(
        self,
        members: int,
        devices: list[Device],
        *,
        round_trip_s: float = 0.00025,
        max_delay_s: float = 0.0,
        fate: Fate = lambda _: "answer",
        restart_s: float = 1.0,
        on_end: Callable[[Request], None] = lambda _: None,
    ) -> None:
        self.ledger = Ledger(members, max_delay_s=max_delay_s)
        self.devices = {device.name: device for device in devices}
        self.began = self.ledger.now
        self.batches = 0
        self._round_trip_s = round_trip_s
        self._fate = fate
        self._restart_s = restart_s
        self._on_end = on_end
        self._events: list[tuple[float, int, Callable[[], list[Request]]]] = []
        self._order = count()
        self._ids = count(1, 1000)
        for device in devices:
            self._rise(device)
        self._turn([])

    @property
    def elapsed_s(self) -> float:
        """Simulated time since the beginning."""
        return self.ledger.now - self.began

    def after(self, delay_s: float, what: Callable[[], object]) -> None:
        """Let something happen later."""

        def happen() -> list[Request]:
            what()
            return []

        self._schedule(delay_s, happen)

    def run(self, for_s: float = 1000.0, max_events: int = 200_000) -> None:
        """Go on until no request is open and nothing is to happen, or for so long."""
        until = self.ledger.now + for_s
        for _ in range(max_events):
            wake = self.ledger.dispatcher.next_at()
            event_at = self._events[0][0] if self._events else None
            if not self.ledger.open and event_at is None:
                return
            at = min(t for t in (wake, event_at, until) if t is not None)
            self.ledger.now = max(self.ledger.now, at)
            if at >= until:
                return
            if event_at is not None and event_at <= at:
                self._turn(heappop(self._events)[2]())
            else:
                self._turn(self.ledger.expire())
        raise AssertionError(f"the world does not come to rest within {max_events} events")

    def check_overdue(self) -> None:
        """Reset the workers that take far too long, every half second, as the gateway does."""

        def check() -> list[Request]:
            ended = [r for name in self.ledger.dispatcher.overdue(self.ledger.now) for r in self._fall(name)]
            if self.ledger.open:
                self._schedule(0.5, check)
            return ended

        self._schedule(0.5, check)

    def lose(self, name: str) -> list[Request]:
        """A worker dies, and is back later."""
        return self._fall(name)

    def _schedule(self, delay_s: float, what: Callable[[], list[Request]]) -> None:
        heappush(self._events, (self.ledger.now + delay_s, next(self._order), what))

    def _rise(self, device: Device) -> list[Request]:
        device.up = True
        device.free_at = {}
        return self.ledger.update(device.state(self.ledger.members, next(self._ids)))

    def _fall(self, name: str) -> list[Request]:
        device = self.devices[name]
        if not device.up:
            return []
        device.up = False
        self._schedule(self._restart_s, lambda: self._rise(device))
        return self.ledger.lose(name)

    def _turn(self, ended: list[Request]) -> None:
        for batch in self.ledger.assign():
            self.batches += 1
            self._send(batch)
        for request in ended:
            self._on_end(request)

    def _send(self, batch: Batch) -> None:
        device = self.devices[batch.lane.worker]
        now, way_s = self.ledger.now, self._round_trip_s / 2
        key = 0 if device.serial else batch.instance.id
        takes_s = device.seconds[batch.instance.member](batch.rows)
        ends = max(now + way_s, device.free_at.get(key, 0.0)) + takes_s
        device.free_at[key] = ends
        fate = self._fate(batch)
        if fate == "hang":
            device.free_at[key] = float("inf")
        elif ends < float("inf"):
            self._schedule(ends + way_s - now, lambda: self._arrive(batch, fate, takes_s))

    def _arrive(self, batch: Batch, fate: str, takes_s: float) -> list[Request]:
        if self.ledger.running.get(batch.id) is not batch:
            return []
        self.devices[batch.lane.worker].busy_s += takes_s
        if fate == "lose":
            return self._fall(batch.lane.worker)
        if fate == "fail":
            return self.ledger.fail(batch, "it did not like these rows")
        return self.ledger.answer(batch, takes_s)
