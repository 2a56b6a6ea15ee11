"""Placement: which open lane gets a member's next rows, and how many.

Rows go where they are expected to be done first; many rows are spread so that the lanes finish together. What a choice
costs does not grow with the number of lanes: few hosts of a member are all compared, of many a sample.
Pure: the clock is an argument.
"""

from __future__ import annotations

from collections.abc import Iterable
from heapq import heappop, heappush
from itertools import count, islice
from math import ceil, inf
from typing import TYPE_CHECKING

from ensemble_gateway.lanes import Instance, Lane, Latency

if TYPE_CHECKING:
    from ensemble_gateway.batches import Batch

# A lane that is expected to be free sooner than this is given its next batch already: it never waits for the network.
HORIZON_S = 0.005
# Parts of a request that are spread over lanes take at least so long: below, sending costs more than it gains.
MIN_PART_S = 0.0003
# A part may cost a device at most so many times what its rows cost within a batch of all.
MAX_PART_COST = 2.0
# An open lane is left idle only where a busy one is expected to be done in less than this share of its time. A lane
# with less than this share of the fastest one's speed is slow, and never gets the odd row.
CLEARLY = 0.75
# Of members with more hosts than this, only so many of them are compared.
FEW = 8
# Parts of rows are computed with an error below this.
_ROUNDED = 1e-6

Host = tuple[Lane, Instance]
Offer = tuple[Lane, Instance, int]


class Hosts:
    """Who can run a member: its lanes by device class, and those open apart.

    `few` lists them where they are few. `reference` is what all lanes of one class, `reference_class`, have measured:
    members are compared by it. What a single lane has measured depends on what it was given: members that run together
    take less than one by itself, and shares that followed from it would stay unequal.
    """

    __slots__ = ("by_class", "few", "open", "reference", "reference_class")

    def __init__(self) -> None:
        self.by_class: dict[str, dict[Lane, Instance]] = {}
        self.open: dict[str, dict[Lane, Instance]] = {}
        self.few: list[Host] = []
        self.reference: Latency | None = None
        self.reference_class = ""

    def add(self, lane: Lane, instance: Instance) -> None:
        """A lane that is not open yet."""
        self.by_class.setdefault(lane.device_class, {})[lane] = instance
        lane.listed.append((self.open.setdefault(lane.device_class, {}), instance))
        self._look_over()

    def remove(self, lane: Lane) -> None:
        """A lane that is closed goes."""
        lanes = self.by_class[lane.device_class]
        instance = lanes.pop(lane)
        lane.listed = [place for place in lane.listed if place[1] is not instance]
        if not lanes:
            del self.by_class[lane.device_class], self.open[lane.device_class]
        self._look_over()

    def sample(self) -> list[tuple[Host, float]]:
        """Some hosts of each class, open and busy, each with how many it stands for."""
        chosen: list[tuple[Host, float]] = []
        for name, lanes in self.by_class.items():
            free = self.open[name]
            some = list(islice(free.items(), FEW // 2))
            chosen += [(host, len(free) / len(some)) for host in some]
            busy = [host for host in islice(lanes.items(), FEW) if not host[0].open]
            chosen += [(host, (len(lanes) - len(free)) / len(busy)) for host in busy]
        return chosen

    def work_s(self, lane: Lane, instance: Instance, rows: int) -> float:
        """The seconds that rows of this host count as where lanes share work, alike on all of the reference's class."""
        latency = self.reference if lane.device_class == self.reference_class else None
        return (latency or instance.latency).expect(rows)

    def _look_over(self) -> None:
        first = next(iter(self.by_class.items()), None)
        if first is None:
            self.reference = None
        elif self.reference is None or self.reference_class not in self.by_class:
            self.reference_class, lanes = first
            instance = next(iter(lanes.values()))
            self.reference = Latency(instance.batch_size, instance.latency.expect(instance.batch_size))
        few = sum(map(len, self.by_class.values())) <= FEW
        self.few = [host for lanes in self.by_class.values() for host in lanes.items()] if few else []


class Lanes:
    """All lanes of all workers. `alive` and `open` are sets of members, as bits: with a host, with an open host."""

    def __init__(self, members: int) -> None:
        self.by_worker: dict[str, list[Lane]] = {}
        self.alive = 0
        self.open = 0
        self.hosts = [Hosts() for _ in range(members)]
        self._opening: list[tuple[float, int, Lane]] = []
        self._order = count()
        self._reserved: list[Lane] = []
        self._parts: dict[int, int] = {}

    def grow(self) -> None:
        """One more member, without a host."""
        self.hosts.append(Hosts())

    # -- lanes come, go, start and finish -------------------------------------------------------------------------

    def replace(self, worker: str, lanes: list[Lane]) -> list[Lane]:
        """A worker has these lanes from now on; returns those it had. Those with batches open at the next `ripen`."""
        before = self.by_worker.pop(worker, [])
        for lane in before:
            self._set_open(lane, is_open=False)
            lane.opens_at = inf
            for member in lane.instances:
                self._remove(lane, member)
        if lanes:
            self.by_worker[worker] = lanes
        for lane in lanes:
            for member, instance in lane.instances.items():
                self.hosts[member].add(lane, instance)
                self.alive |= 1 << member
            self._look(lane, -inf)
        return before

    def drop(self, lane: Lane, instance: Instance) -> None:
        """An instance does not exist: its lane runs the others only."""
        hosted = lane.instances.get(instance.member)
        # By id: a State may have told it again, with another batch size, while the batch ran.
        if lane in self.by_worker.get(lane.worker, ()) and hosted is not None and hosted.id == instance.id:
            was_open = lane.open
            self._set_open(lane, is_open=False)
            self._remove(lane, instance.member)
            del lane.instances[instance.member]
            self._set_open(lane, is_open=was_open)

    def start(self, batch: Batch, now: float) -> None:
        """A batch is given to its lane."""
        batch.lane.start(batch, now)
        self._look(batch.lane, now)

    def finish(self, batch: Batch, now: float) -> None:
        """A batch is no longer with its lane."""
        batch.lane.finish(batch, now)
        self._look(batch.lane, now)

    def observe(self, lane: Lane, instance: Instance, rows: int, seconds: float) -> None:
        """A batch of `rows` took this long on an instance of the lane."""
        instance.latency.observe(rows, seconds)
        hosts = self.hosts[instance.member]
        if hosts.reference is not None and lane.device_class == hosts.reference_class:
            hosts.reference.observe(rows, seconds)

    def ripen(self, now: float) -> None:
        """Open the lanes that are expected to be free soon."""
        opening = self._opening
        while opening and opening[0][0] <= now:
            opens_at, _, lane = heappop(opening)
            if lane.opens_at == opens_at:
                self._look(lane, now)

    def next_opening(self) -> float:
        """When the next lane opens without being freed before; infinity when none will."""
        opening = self._opening
        while opening and opening[0][2].opens_at != opening[0][0]:
            heappop(opening)
        return opening[0][0] if opening else inf

    def _remove(self, lane: Lane, member: int) -> None:
        self.hosts[member].remove(lane)
        if not self.hosts[member].by_class:
            self.alive &= ~(1 << member)

    def _look(self, lane: Lane, now: float) -> None:
        """Whether the lane may be given another batch now, and if not, from when on."""
        held = len(lane.batches)
        if not held:
            opens_at = -inf
        elif held < lane.credits:
            opens_at = lane.busy_until - HORIZON_S
            if opens_at > now and opens_at != lane.opens_at:
                heappush(self._opening, (opens_at, next(self._order), lane))
        else:
            opens_at = inf
        lane.opens_at = opens_at
        if lane.open != (opens_at <= now):
            self._set_open(lane, is_open=not lane.open)

    def _set_open(self, lane: Lane, *, is_open: bool) -> None:
        if lane.open == is_open:
            return
        lane.open = is_open
        if is_open:
            for lanes, instance in lane.listed:
                lanes[lane] = instance
                self.open |= 1 << instance.member
            return
        for lanes, instance in lane.listed:
            del lanes[lane]
            if not lanes and not any(self.hosts[instance.member].open.values()):
                self.open &= ~(1 << instance.member)

    # -- choosing -------------------------------------------------------------------------------------------------

    def offer(self, member: int, waiting: int, share: float, now: float) -> Offer | None:
        """Which lane gets how many of a member's waiting rows; None where they had better wait for a busy lane.

        `share` is what part of all waiting work these rows are: lanes that run several members need not divide the rows
        of each to finish together, only those of the last. Rows that wait for a lane are its work until the round ends.
        """
        hosts = self.hosts[member]
        if not self.open >> member & 1:
            return None
        few = hosts.few
        if len(few) == 1:
            lane, instance = few[0]
            return lane, instance, _even(waiting, instance.batch_size)
        if few:
            level = None if waiting == 1 else _level([(host, 1.0) for host in few], waiting, share, now)
            return level or self._soonest(few, waiting, now)
        if len(hosts.open) == 1:
            (opened,) = hosts.open.values()
            lane, instance = _unused(opened)
            part = self._parts.get(member)
            if part is None:
                part = self._parts[member] = ceil(waiting / (len(opened) * _share_of(lane, share)))
            rows = _even(min(waiting, part), instance.batch_size)
            return lane, instance, _worthwhile(instance, rows, waiting)
        sample = hosts.sample()
        return _level(sample, waiting, share, now) or self._soonest([host for host, _ in sample], waiting, now)

    def idle_beside(self, lane: Lane, member: int) -> int:
        """How many other lanes with nothing to do can run a member; at most as many as are compared."""
        hosts = self.hosts[member]
        if hosts.few:
            return sum([not other.batches for other, _ in hosts.few if other is not lane])
        some = (other for lanes in hosts.open.values() for other in islice(lanes, FEW))
        return min(FEW, sum([not other.batches for other in some if other is not lane]))

    def end_round(self) -> None:
        """All that waits has been offered."""
        for lane in self._reserved:
            lane.reserved_s = 0.0
        self._reserved.clear()
        self._parts.clear()

    def _soonest(self, hosts: Iterable[Host], waiting: int, now: float) -> Offer | None:
        """A batch for the open lane that is done with it first, unless a busy one is done clearly sooner."""
        best, best_at, busy, busy_at = None, inf, None, inf
        for host in hosts:
            lane, instance = host
            at = instance.latency.expect(min(waiting, instance.batch_size))
            if lane.batches:
                at += abs(lane.busy_until - now) + lane.reserved_s
            if lane.open:
                if at < best_at:
                    best, best_at = host, at
            elif at < busy_at:
                busy, busy_at = host, at
        if best is None:
            return None
        if busy is not None and busy_at < CLEARLY * best_at:
            busy[0].reserved_s += busy[1].latency.expect(min(waiting, busy[1].batch_size))
            self._reserved.append(busy[0])
            return None
        return best[0], best[1], _even(waiting, best[1].batch_size)


def _unused(lanes: dict[Lane, Instance]) -> Host:
    """The first lane without a batch, of a few; those passed over go to the end, so that an idle one is found soon."""
    for _ in range(min(FEW, len(lanes))):
        lane = next(iter(lanes))
        if not lane.batches:
            break
        lanes[lane] = lanes.pop(lane)
    lane = next(iter(lanes))
    return lane, lanes[lane]


def _level(hosts: list[tuple[Host, float]], waiting: int, share: float, now: float) -> Offer | None:
    """The open lane with the largest part when all work is poured over the hosts until they are done at the same time.

    A host counts as often as it stands for others. None where no open lane has a part.
    """
    poured: list[tuple[float, int, float, float, Lane, Instance]] = []
    fastest = 0.0
    for (lane, instance), stands_for in hosts:
        rows = min(waiting, instance.batch_size)
        speed = rows / (instance.latency.expect(rows) or 1e-9)
        if speed > fastest:
            fastest = speed
        poured.append((lane.backlog(now) + lane.reserved_s, len(poured), speed, stands_for, lane, instance))
    poured.sort()
    level, total_speed, left = 0.0, 0.0, float(waiting)
    for backlog, _, speed, stands_for, lane, _ in poured:
        done = (backlog - level) * total_speed
        if done >= left:
            break
        left, level, total_speed = left - done, backlog, total_speed + speed * stands_for * _share_of(lane, share)
    level += left / total_speed
    slow = CLEARLY * fastest
    best, best_rows, best_speed = None, 0, 0.0
    for backlog, _, speed, _, lane, instance in poured:
        if backlog < level and lane.open:
            part = speed * (level - backlog)
            rows = int(part + _ROUNDED) if speed < slow else ceil(part - _ROUNDED)
            if rows > best_rows and (speed >= slow or rows >= waiting or rows >= MIN_PART_S * speed):
                best, best_rows, best_speed = (lane, instance), rows, speed
    if best is None:
        return None
    lane, instance = best
    rows = _even(min(best_rows, waiting), instance.batch_size)
    if best_rows < waiting < best_rows + MIN_PART_S * best_speed:
        # What is left would be too small a part.
        rows = _even(waiting, instance.batch_size)
    return lane, instance, rows if best_speed < slow else _worthwhile(instance, rows, waiting)


def _share_of(lane: Lane, share: float) -> float:
    """How much of a lane's time a member can have: all of it where the lane runs nothing else."""
    return share if len(lane.instances) > 1 else 1.0


def _worthwhile(instance: Instance, rows: int, waiting: int) -> int:
    """`rows`, or a batch out of all that wait where so small a part costs too much."""
    whole = _even(waiting, instance.batch_size)
    if rows >= whole:
        return rows
    part_s = instance.latency.expect(rows)
    if part_s < MIN_PART_S or part_s * whole > MAX_PART_COST * rows * instance.latency.expect(whole):
        return whole
    return rows


def _even(rows: int, batch_size: int) -> int:
    """The size of the first of the fewest, equal batches that hold so many rows."""
    return rows if rows <= batch_size else -(-rows // -(-rows // batch_size))
