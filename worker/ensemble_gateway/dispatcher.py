"""The dispatcher: which rows of which member go to which worker next, and when a request is finished.

Pure: fed with events and a clock, it returns the batches to send and the requests to answer; sockets are elsewhere.
Each member has a queue of entries (a request's contiguous rows). Whenever a lane is open it is given the next rows
of one of its members: those of the oldest request, and among its members the one with the most work left, so that the
longest member of a request starts first. A request's rows are spread over the lanes that are open, in equal parts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count

from ensemble_contract.wire import State
from ensemble_gateway.deadlines import Deadlines
from ensemble_gateway.lanes import Instance, Lane, lanes_of
from ensemble_gateway.queues import Entry, Failure, Queues, Request, bits

# Parts of a request that are spread over lanes take at least so long: below, sending costs more than it gains.
MIN_PART_S = 0.0003


@dataclass(slots=True, eq=False)
class Batch:
    """Rows on their way through one instance."""

    id: int
    lane: Lane
    instance: Instance
    entries: list[Entry]
    rows: int
    expected_s: float
    dispatched_at: float
    waited_s: float

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """The slots of its rows, in order."""
        return [(entry.start, entry.rows) for entry in self.entries]


class Dispatcher:
    """Queues, lanes and requests in flight of one ensemble with `members` (name, digest) in column order."""

    def __init__(self, members: list[tuple[str, str]], max_delay_s: float = 0.0) -> None:
        self._names = [name for name, _ in members]
        self._index = {pair: column for column, pair in enumerate(members)}
        self._max_delay_s = max_delay_s
        self._queues = Queues(len(members))
        self._hosts: list[list[Lane]] = [[] for _ in members]
        self._alive = 0
        self._lanes: dict[str, list[Lane]] = {}
        self._batches: dict[int, Batch] = {}
        self._ids = count(1)
        self._seqs = count(1)
        self.deadlines: Deadlines[Request] = Deadlines()

    # -- what the caller asks -------------------------------------------------------------------------------------

    def alive(self, member: int) -> bool:
        """Whether the member has a live instance."""
        return bool(self._alive >> member & 1)

    def waiting_rows(self, member: int) -> int:
        """Rows queued for a member, not yet with a worker."""
        return self._queues.waiting[member]

    def waiting_entries(self, member: int) -> int:
        """Parts of requests queued for a member."""
        return self._queues.entries(member)

    def in_flight(self, worker: str) -> int:
        """Batches with a worker."""
        return sum(len(lane.batches) for lane in self._lanes.get(worker, ()))

    def instances(self) -> Iterator[tuple[str, Instance]]:
        """Every live instance with its worker."""
        for worker, lanes in self._lanes.items():
            for lane in lanes:
                for instance in lane.instances.values():
                    yield worker, instance

    def overdue(self, now: float) -> list[str]:
        """Workers whose oldest batch takes far too long."""
        return [worker for worker, lanes in self._lanes.items() if any(lane.overdue(now) for lane in lanes)]

    def next_at(self) -> float | None:
        """When `expire` has something to do."""
        return self.deadlines.next_at()

    # -- events ---------------------------------------------------------------------------------------------------

    def admit(self, request: Request, deadline: float, now: float) -> None:
        """Queue a request's rows for the members it wants."""
        request.seq = next(self._seqs)
        request.admitted_at = now
        request.tick = self.deadlines.add(request, deadline)
        self._queues.add(request)

    def update(self, state: State) -> list[Request]:
        """A worker says what it can run; returns requests that are finished because a member is gone."""
        before = self._lanes.get(state.worker, [])
        known = {instance.id: instance for lane in before for instance in lane.instances.values()}
        lanes = lanes_of(state, self._index, known)
        for lane in lanes:
            _inherit(lane, before)
        orphaned = [batch for lane in before for batch in lane.batches.values() if batch.lane is lane]
        self._replace(state.worker, lanes)
        for batch in orphaned:
            del self._batches[batch.id]
            self._requeue(batch, ())
        return self._finish_without_dead() if orphaned or before else []

    def lost(self, worker: str) -> list[Request]:
        """A worker is gone: the batch that each lane was running is blamed, all its rows are queued again."""
        lanes = self._replace(worker, [])
        finished: list[Request] = []
        for lane in lanes:
            for position, batch in enumerate(list(lane.batches.values())):
                del self._batches[batch.id]
                finished += self._requeue(batch, (worker,) if position == 0 else ())
        return finished + self._finish_without_dead()

    def take(self, batch_id: int, now: float) -> Batch | None:
        """The batch that a worker has finished or failed; None when it was given up before."""
        batch = self._batches.pop(batch_id, None)
        if batch is not None:
            batch.lane.finish(batch, now)
        return batch

    def settle(self, batch: Batch, compute_s: float) -> list[Request]:
        """A batch's outputs are kept; returns the requests that are finished by it."""
        batch.instance.latency.observe(batch.rows, compute_s)
        member = batch.instance.member
        bit = 1 << member
        finished = []
        for entry in batch.entries:
            request = entry.request
            if request.closed:
                continue
            if entry.rows != request.rows:
                left = request.left = request.left or {}
                left[member] = left.get(member, request.rows) - entry.rows
                if left[member]:
                    continue
            request.done |= bit
            if self._complete(request):
                finished.append(request)
        return finished

    def retry(self, batch: Batch, *, blame: bool) -> list[Request]:
        """A worker gave a batch back: its rows go elsewhere; `blame` if they may be the reason."""
        return self._requeue(batch, (batch.lane.worker,) if blame else ())

    def fail(self, batch: Batch, cause: str) -> list[Request]:
        """A worker could not run a batch. Rows of several requests are tried once more, each request's alone."""
        first = batch.entries[0].request
        if any(entry.request is not first for entry in batch.entries):
            self._queues.put_back(batch.instance.member, [entry._replace(alone=True) for entry in batch.entries])
            return []
        member = batch.instance.member
        return [first] if self._member_failed(first, member, f"worker {batch.lane.worker}: {cause}") else []

    def expire(self, now: float) -> list[Request]:
        """Requests whose deadline has passed: with a quorum of answers they are answered, else they fail."""
        finished = []
        for request in self.deadlines.due(now):
            if request.done.bit_count() < request.quorum:
                request.failure = self._late(request, now)
            self._close(request)
            finished.append(request)
        return finished

    def cancel(self, request: Request) -> None:
        """The client has left."""
        if not request.closed:
            self._close(request)

    def assign(self, now: float) -> list[Batch]:
        """The batches to send now."""
        self._queues.spread()
        batches: list[Batch] = []
        while (choice := self._choose(now)) is not None:
            batches.append(self._cut(*choice, now))
        return batches

    # -- finishing ------------------------------------------------------------------------------------------------

    def _complete(self, request: Request) -> bool:
        """Close a request that has all it can get; False while it waits for a member."""
        pending = request.wanted & ~(request.done | request.failed)
        if pending & self._alive:
            return False
        if pending and request.done.bit_count() < request.quorum:
            return False
        if request.done.bit_count() < request.quorum:
            causes = "; ".join(f"member {self._names[m]}: {text}" for m, text in (request.causes or {}).items())
            request.failure = Failure(500, causes)
        self._close(request)
        return True

    def _close(self, request: Request) -> None:
        request.closed = True
        self.deadlines.remove(request, request.tick)
        if request.done != request.wanted:
            self._queues.forget(request)

    def _member_failed(self, request: Request, member: int, cause: str) -> bool:
        if request.closed:
            return False
        request.failed |= 1 << member
        request.causes = {**(request.causes or {}), member: cause}
        return self._complete(request)

    def _finish_without_dead(self) -> list[Request]:
        return [request for request in list(self.deadlines) if self._complete(request)]

    def _late(self, request: Request, now: float) -> Failure:
        pending = request.wanted & ~request.done
        names = ", ".join(self._names[m] for m in bits(pending))
        dead = [self._names[m] for m in bits(pending & ~self._alive)]
        waited = f"{now - request.admitted_at:.3f} s"
        if dead:
            return Failure(503, f"no live instance of {', '.join(dead)} after {waited}; still waiting for: {names}")
        have = request.done.bit_count()
        return Failure(504, f"{have} of the {request.quorum} members needed answered in {waited}; missing: {names}")

    def _requeue(self, batch: Batch, lost: tuple[str, ...]) -> list[Request]:
        """Queue a batch's rows again; rows that lose their second worker fail."""
        member = batch.instance.member
        finished, again = [], []
        for entry in batch.entries:
            if lost and entry.lost:
                cause = f"its rows lost two workers, {entry.lost[0]} and {lost[0]}"
                if self._member_failed(entry.request, member, cause):
                    finished.append(entry.request)
            else:
                again.append(entry._replace(lost=entry.lost + lost, alone=entry.alone or bool(lost)))
        self._queues.put_back(member, again)
        return finished

    # -- assignment -----------------------------------------------------------------------------------------------

    def _replace(self, worker: str, lanes: list[Lane]) -> list[Lane]:
        before = self._lanes.pop(worker, [])
        if lanes:
            self._lanes[worker] = lanes
        self._hosts = [[] for _ in self._names]
        for hosted in self._lanes.values():
            for lane in hosted:
                for member in lane.instances:
                    self._hosts[member].append(lane)
        self._alive = sum(1 << member for member, hosts in enumerate(self._hosts) if hosts)
        return before

    def _choose(self, now: float) -> tuple[Lane, Instance, int] | None:
        """The next lane to fill, with which instance and how many rows; None when nothing can be given out."""
        if not any(self._queues.waiting):
            return None
        lanes = [lane for hosted in self._lanes.values() for lane in hosted if lane.open(now)]
        lanes.sort(key=lambda lane: lane.backlog(now))
        for lane in lanes:
            instance = self._neediest(lane, now)
            if instance is not None:
                rows = self._part(instance, now)
                if not self._better_elsewhere(lane, instance, rows, now):
                    return lane, instance, rows
        return None

    def _neediest(self, lane: Lane, now: float) -> Instance | None:
        """The instance whose member waits with the oldest rows, and with the most work among equals."""
        best: Instance | None = None
        best_key = (0, 0.0)
        for member, instance in lane.instances.items():
            waiting = self._queues.waiting[member]
            head = self._queues.head(member) if waiting else None
            if head is None:
                continue
            young = now - head.request.admitted_at < self._max_delay_s
            if young and waiting < instance.batch_size:
                continue
            key = (head.request.seq, -instance.latency.expect(self._queues.waiting[member]))
            if best is None or key < best_key:
                best, best_key = instance, key
        return best

    def _part(self, instance: Instance, now: float) -> int:
        """How many rows to give: an equal part for each open lane, none over the batch size, none not worth sending."""
        waiting = self._queues.waiting[instance.member]
        takers = sum(1 for lane in self._hosts[instance.member] if lane.open(now))
        parts = -(-waiting // instance.batch_size)
        if takers > 1:
            spread = -(-parts // takers) * takers
            if instance.latency.expect(-(-waiting // spread)) >= MIN_PART_S:
                parts = spread
        return -(-waiting // parts)

    def _better_elsewhere(self, lane: Lane, instance: Instance, rows: int, now: float) -> bool:
        """Whether a lane of another device class would be done with all waiting rows before this one with its part."""
        done = lane.backlog(now) + instance.latency.expect(rows)
        waiting = self._queues.waiting[instance.member]
        return any(
            other.backlog(now) + other.instances[instance.member].latency.expect(waiting) < done
            for other in self._hosts[instance.member]
            if other.device_class != lane.device_class
        )

    def _cut(self, lane: Lane, instance: Instance, rows: int, now: float) -> Batch:
        """Make a batch of the oldest rows of a member."""
        entries = self._queues.cut(instance.member, rows)
        rows = sum(entry.rows for entry in entries)
        waited = sum(now - entry.request.admitted_at for entry in entries)
        batch = Batch(next(self._ids), lane, instance, entries, rows, instance.latency.expect(rows), now, waited)
        self._batches[batch.id] = batch
        lane.start(batch, now)
        return batch


def _inherit(lane: Lane, before: list[Lane]) -> None:
    """Take over the batches of the lane that this one replaces, where its instance still lives."""
    living = {instance.id for instance in lane.instances.values()}
    for old in before:
        for batch in old.batches.values():
            if batch.instance.id in living:
                batch.lane = lane
                lane.batches[batch.id] = batch
                lane.busy_until = max(lane.busy_until, old.busy_until)
