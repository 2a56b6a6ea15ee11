"""A simulated world around the dispatcher: workers with latencies and losses, clients, a clock made by hand.

`World` moves a ledger through time: batches travel, run one after another in each lane, and are answered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import count

from ensemble_contract.wire import LiveInstance, State
from ensemble_gateway.batches import Batch
from ensemble_gateway.queues import Request
from tests.support.dispatch_ledger import Ledger, Pair


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
    """Devices that run a ledger's batches; `restart_s` after a loss a device is back.

    `message_s` is how long the gateway, which does one thing at a time, is busy with a batch: half of it before the
    batch leaves, half when it comes back.
    """

    def __init__(
        self,
        members: int,
        devices: list[Device],
        *,
        round_trip_s: float = 0.00025,
        message_s: float = 0.0,
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
        self._message_s = message_s
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
                self._turn(self._happen())
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

    def _happen(self) -> list[Request]:
        """The next event, and those that came while the gateway was busy with it: they share a turn."""
        ended = heappop(self._events)[2]()
        while self._message_s and self._events and self._events[0][0] <= self.ledger.now:
            ended += heappop(self._events)[2]()
        return ended

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
            self.ledger.now += self._message_s / 2
            self._send(batch)
        for request in ended:
            self._on_end(request)

    def _send(self, batch: Batch) -> None:
        device = self.devices[batch.lane.worker]
        now, way_s = self.ledger.now, self._round_trip_s / 2
        key = 0 if device.serial else batch.instances[0].id
        takes_s = [device.seconds[one.member](batch.rows) for one in batch.instances]
        ends = max(now + way_s, device.free_at.get(key, 0.0)) + sum(takes_s)
        device.free_at[key] = ends
        fate = self._fate(batch)
        if fate == "hang":
            device.free_at[key] = float("inf")
        elif ends < float("inf"):
            self._schedule(ends + way_s - now, lambda: self._arrive(batch, fate, takes_s))

    def _arrive(self, batch: Batch, fate: str, takes_s: list[float]) -> list[Request]:
        if self.ledger.running.get(batch.id) is not batch:
            return []
        self.ledger.now += self._message_s / 2
        self.devices[batch.lane.worker].busy_s += sum(takes_s)
        if fate == "lose":
            return self._fall(batch.lane.worker)
        if fate == "fail":
            return self.ledger.fail(batch, "it did not like these rows")
        return self.ledger.answer(batch, *takes_s)
