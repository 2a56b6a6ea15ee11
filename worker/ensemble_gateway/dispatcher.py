"""The dispatcher: which rows of which member go to which worker next, and when a request is finished.

Pure: fed with events and a clock, it returns the batches to send and the requests to answer; sockets are elsewhere.
Each member has a queue of entries (a request's contiguous rows). Whenever a lane is open, rows are given out: those of
the oldest request first, and among its members those of the one with the most work left, so that the longest member of
a request starts first. `placement` says which lane gets how many.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from itertools import count
from math import inf

from ensemble_contract.wire import State
from ensemble_gateway.assignment import Assigner
from ensemble_gateway.batches import Batch, completed
from ensemble_gateway.columns import Columns, Version
from ensemble_gateway.deadlines import Deadlines
from ensemble_gateway.failures import causes, too_late
from ensemble_gateway.lanes import Instance, Lane, lanes_of
from ensemble_gateway.placement import Lanes
from ensemble_gateway.queues import Failure, Queues, Request


class Dispatcher:
    """Queues, lanes and requests in flight of one ensemble; it starts with `members` (name, digest) in column order."""

    def __init__(self, members: Sequence[Version] = (), max_delay_s: float = 0.0) -> None:
        self._columns = Columns()
        self._queues = Queues(0)
        self._lanes = Lanes(0)
        self._states: dict[str, State] = {}
        self._expected = 0
        self._seqs = count(1)
        self._assigner = Assigner(self._queues, self._lanes, max_delay_s)
        self._batches = self._assigner.batches
        # The batches to send now.
        self.assign = self._assigner.assign
        self.deadlines: Deadlines[Request] = Deadlines()
        self.prefer(self.columns_of(members), max_delay_s)

    # -- which versions are served --------------------------------------------------------------------------------

    def room_for(self, members: Sequence[Version]) -> bool:
        """Whether each of these versions has a column, or can have one."""
        return self._columns.room_for(members)

    def columns_of(self, members: Sequence[Version]) -> tuple[int, ...]:
        """The columns of these versions, new ones for those that have none; workers that run these are looked at."""
        new = dict.fromkeys(version for version in members if version not in self._columns.of)
        for version in new:
            if self._columns.add(version) == len(self._lanes.hosts):
                self._queues.grow()
                self._lanes.grow()
        for state in list(self._states.values()):
            if any((live.member, live.digest) in new for live in state.instances):
                self.update(state)
        return tuple([self._columns.of[version] for version in members])

    def prefer(self, columns: Sequence[int], max_delay_s: float) -> None:
        """Most requests will want all of these columns from now on, and no others; rows may wait so long for others."""
        self._assigner.max_delay_s = max_delay_s
        self._queues.set_everyone(sum(1 << column for column in columns))

    def expect(self, columns: Sequence[int]) -> None:
        """Requests shall wait for these members within their deadlines, quorum or not, until they have been live."""
        self._expected = sum(1 << column for column in columns) & ~self._lanes.alive

    def keep_only(self, columns: Collection[int]) -> list[int]:
        """Drop all other columns but those of which a batch is under way; returns the dropped ones."""
        gone = [column for column in self._columns.of.values() if column not in columns]
        if gone:
            busy = {instance.member for batch in self._batches.values() for instance in batch.instances}
            gone = [column for column in gone if column not in busy]
        if not gone:
            return []
        self._columns.drop(gone)
        self._expected &= ~sum(1 << column for column in gone)
        for worker, lanes in list(self._lanes.by_worker.items()):
            if any(column in lane.instances for lane in lanes for column in gone):
                self.update(self._states[worker])
        return gone

    # -- what the caller asks -------------------------------------------------------------------------------------

    def alive(self, member: int) -> bool:
        """Whether the member has a live instance."""
        return bool(self._lanes.alive >> member & 1)

    def missing(self, columns: Sequence[int], workers: Collection[str] | None = None) -> int:
        """How many of these columns have no live instance, or, with `workers`, none on any of these."""
        wanted = sum(1 << column for column in columns)
        alive = self._lanes.alive
        if workers is not None and not wanted & ~alive and not self._lanes.by_worker.keys() <= set(workers):
            known = [self._lanes.by_worker.get(worker, ()) for worker in workers]
            alive = 0
            for column in {column for lanes in known for lane in lanes for column in lane.instances}:
                alive |= 1 << column
        return (wanted & ~alive).bit_count()

    def hosts(self, member: int) -> int:
        """How many live instances a member has."""
        return sum(map(len, self._lanes.hosts[member].by_class.values()))

    def states(self) -> dict[str, State]:
        """What each connected worker has said that it can run."""
        return dict(self._states)

    def waiting_rows(self, member: int) -> int:
        """Rows queued for a member, not yet with a worker."""
        return self._queues.waiting[member]

    def waiting_entries(self, member: int) -> int:
        """Parts of requests queued for a member."""
        return self._queues.entries(member)

    def in_flight(self, worker: str) -> int:
        """Batches with a worker."""
        return sum(len(lane.batches) for lane in self._lanes.by_worker.get(worker, ()))

    def instances(self) -> Iterator[tuple[str, Instance]]:
        """Every live instance with its worker."""
        for worker, lanes in self._lanes.by_worker.items():
            for lane in lanes:
                for instance in lane.instances.values():
                    yield worker, instance

    def overdue(self, now: float) -> list[str]:
        """Workers whose oldest batch takes far too long."""
        workers = self._lanes.by_worker.items()
        return [worker for worker, lanes in workers if any(lane.overdue(now) for lane in lanes)]

    def next_at(self) -> float | None:
        """When `expire` or `assign` has something to do that no event announces."""
        at, assign_at = self.deadlines.next_at(), self._assigner.next_at
        return at if assign_at == inf or (at is not None and at <= assign_at) else assign_at

    # -- events ---------------------------------------------------------------------------------------------------

    def admit(self, request: Request, deadline: float, now: float) -> None:
        """Queue a request's rows for the members it wants."""
        request.seq = next(self._seqs)
        request.admitted_at = now
        request.tick = self.deadlines.add(request, deadline)
        self._queues.add(request)

    def update(self, state: State) -> list[Request]:
        """A worker says what it can run; returns requests that are finished because a member is gone."""
        self._states[state.worker] = state
        before = self._lanes.by_worker.get(state.worker, [])
        known = {instance.id: instance for lane in before for instance in lane.instances.values()}
        lanes = lanes_of(state, self._columns.of, known)
        for lane in lanes:
            for old in before:
                lane.inherit(old)
        orphaned = [batch for lane in before for batch in lane.batches.values() if batch.lane is lane]
        alive = self._lanes.alive
        self._lanes.replace(state.worker, lanes)
        for batch in sorted(orphaned, key=lambda batch: batch.id, reverse=True):
            del self._batches[batch.id]
            self._requeue(batch, ())
        self._expected &= ~self._lanes.alive
        return self._finish_without_dead(alive)

    def lost(self, worker: str, *, blame: bool = True, well_until: float = inf) -> list[Request]:
        """A worker is gone and all its rows are queued again.

        With `blame`, what each lane was running may be why, unless it was given out after `well_until`.
        """
        self._states.pop(worker, None)
        return self._lose(worker, None, well_until if blame else -inf)

    def take(self, batch_id: int, now: float) -> Batch | None:
        """The batch that a worker has finished or failed; None when it was given up before."""
        batch = self._batches.pop(batch_id, None)
        if batch is not None:
            self._lanes.finish(batch, now)
        return batch

    def settle(self, batch: Batch, compute_s: Sequence[float]) -> list[Request]:
        """A batch's outputs are kept; returns the requests that are finished by it. `compute_s` is by instance."""
        ran = 0
        for instance, seconds in zip(batch.instances, compute_s, strict=True):
            self._lanes.observe(batch.lane, instance, batch.rows, seconds)
            ran |= 1 << instance.member
        finished = []
        for request, _, rows, _, _ in batch.entries:
            if request.closed:
                continue
            whole = ran if rows == request.rows else completed(request, rows, batch.instances)
            if not whole:
                continue
            done = request.done = request.done | whole
            if done != request.wanted:
                # The usual case, told apart without a call: it waits for other members.
                if not request.failed and request.wanted & ~done & self._lanes.alive:
                    continue
                if not self._complete(request):
                    continue
            else:
                self._close(request)
            finished.append(request)
        return finished

    def retry(self, batch: Batch, *, blame: bool) -> list[Request]:
        """A worker gave a batch back: its rows go elsewhere.

        With `blame` they may be the reason that its device is lost, and the worker gets nothing more. Without, it has
        no such instance, and that one gets nothing more.
        """
        if blame:
            return self._requeue(batch, (batch.lane.worker,)) + self._lose(batch.lane.worker, batch.lane)
        if len(batch.instances) > 1:
            # It does not say which: each by itself, the others live on.
            return self.fail(batch, "")
        alive = self._lanes.alive
        self._lanes.drop(batch.lane, batch.instances[0])
        return self._requeue(batch, ()) + self._finish_without_dead(alive)

    def fail(self, batch: Batch, cause: str) -> list[Request]:
        """A worker could not run a batch. One of several requests or members is tried again, each by itself."""
        first = batch.entries[0].request
        if len(batch.instances) > 1 or any(entry.request is not first for entry in batch.entries):
            alone = [entry._replace(alone=True) for entry in batch.entries]
            for instance in batch.instances:
                self._queues.put_back(instance.member, alone)
            return []
        member = batch.instances[0].member
        return [first] if self._member_failed(first, member, f"worker {batch.lane.worker}: {cause}") else []

    def expire(self, now: float) -> list[Request]:
        """Requests whose deadline has passed: with a quorum of answers they are answered, else they fail."""
        finished = []
        for request in self.deadlines.due(now):
            if request.done.bit_count() < request.quorum:
                request.failure = too_late(request, now, self._columns.names, self._lanes.alive)
            self._close(request)
            finished.append(request)
        return finished

    def cancel(self, request: Request) -> None:
        """The client has left."""
        if not request.closed:
            self._close(request)

    # -- finishing ------------------------------------------------------------------------------------------------

    def _complete(self, request: Request) -> bool:
        """Close a request that has all it can get, or too little whatever comes; False while it waits for a member."""
        possible = request.wanted & ~request.failed
        if possible.bit_count() < request.quorum:
            request.failure = Failure(500, causes(request, self._columns.names))
        else:
            pending = possible & ~request.done
            if pending & (self._lanes.alive | self._expected) or (
                pending and request.done.bit_count() < request.quorum
            ):
                return False
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

    def _finish_without_dead(self, alive_before: int) -> list[Request]:
        """Requests that waited for nothing but members that are dead now."""
        if not alive_before & ~self._lanes.alive:
            return []
        return [request for request in list(self.deadlines) if self._complete(request)]

    def _lose(self, worker: str, blamed: Lane | None, well_until: float = inf) -> list[Request]:
        """A worker's rows are queued again.

        The first batch of each lane is blamed, except where one was already, and for what came after `well_until`.
        """
        alive = self._lanes.alive
        lanes = self._lanes.replace(worker, [])
        first = [next(iter(lane.batches.values()), None) for lane in lanes if lane is not blamed]
        guilty = {batch.id for batch in first if batch is not None and batch.dispatched_at <= well_until}
        finished: list[Request] = []
        # The newest first, because each goes to the head of its queue.
        for batch in sorted([b for lane in lanes for b in lane.batches.values()], key=lambda b: b.id, reverse=True):
            del self._batches[batch.id]
            finished += self._requeue(batch, (worker,) if batch.id in guilty else ())
        return finished + self._finish_without_dead(alive)

    def _requeue(self, batch: Batch, lost: tuple[str, ...]) -> list[Request]:
        """Queue a batch's rows again; rows that lose their second worker fail."""
        finished = []
        for instance in batch.instances:
            member, again = instance.member, []
            for entry in batch.entries:
                if lost and entry.lost:
                    cause = f"its rows lost two workers, {entry.lost[0]} and {lost[0]}"
                    if self._member_failed(entry.request, member, cause):
                        finished.append(entry.request)
                else:
                    again.append(entry._replace(lost=entry.lost + lost, alone=entry.alone or bool(lost)))
            self._queues.put_back(member, again)
        return finished
