"""The dispatcher: which rows of which member go to which worker next, and when a request is finished.

Pure: fed with events and a clock, it returns the batches to send and the requests to answer; sockets are elsewhere.
Each member has a queue of entries (a request's contiguous rows). Whenever a lane is open, rows are given out: those of
the oldest request first, and among its members those of the one with the most work left, so that the longest member of
a request starts first. `placement` says which lane gets how many.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from heapq import heapify, heappop, heapreplace
from itertools import count
from math import inf

from ensemble_contract.wire import State
from ensemble_gateway.batches import FUSE_S, Batch, completed, fuse, fuse_limit_s
from ensemble_gateway.deadlines import Deadlines
from ensemble_gateway.lanes import Instance, Lane, lanes_of
from ensemble_gateway.placement import Lanes, Offer
from ensemble_gateway.queues import Failure, Queues, Request, bits

# The sequence number of a member's oldest request, minus the seconds of its waiting work, and the member.
Need = tuple[int, float, int]


class Dispatcher:
    """Queues, lanes and requests in flight of one ensemble with `members` (name, digest) in column order."""

    def __init__(self, members: list[tuple[str, str]], max_delay_s: float = 0.0) -> None:
        self._names = [name for name, _ in members]
        self._index = {pair: column for column, pair in enumerate(members)}
        self._max_delay_s = max_delay_s
        self._queues = Queues(len(members))
        self._lanes = Lanes(len(members))
        self._batches: dict[int, Batch] = {}
        self._ids = count(1)
        self._seqs = count(1)
        self._assign_at = inf
        self.deadlines: Deadlines[Request] = Deadlines()

    # -- what the caller asks -------------------------------------------------------------------------------------

    def alive(self, member: int) -> bool:
        """Whether the member has a live instance."""
        return bool(self._lanes.alive >> member & 1)

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
        at = self.deadlines.next_at()
        return at if self._assign_at == inf or (at is not None and at <= self._assign_at) else self._assign_at

    # -- events ---------------------------------------------------------------------------------------------------

    def admit(self, request: Request, deadline: float, now: float) -> None:
        """Queue a request's rows for the members it wants."""
        request.seq = next(self._seqs)
        request.admitted_at = now
        request.tick = self.deadlines.add(request, deadline)
        self._queues.add(request)

    def update(self, state: State) -> list[Request]:
        """A worker says what it can run; returns requests that are finished because a member is gone."""
        before = self._lanes.by_worker.get(state.worker, [])
        known = {instance.id: instance for lane in before for instance in lane.instances.values()}
        lanes = lanes_of(state, self._index, known)
        for lane in lanes:
            for old in before:
                lane.inherit(old)
        orphaned = [batch for lane in before for batch in lane.batches.values() if batch.lane is lane]
        alive = self._lanes.alive
        self._lanes.replace(state.worker, lanes)
        for batch in sorted(orphaned, key=lambda batch: batch.id, reverse=True):
            del self._batches[batch.id]
            self._requeue(batch, ())
        return self._finish_without_dead(alive)

    def lost(self, worker: str) -> list[Request]:
        """A worker is gone: the batch that each lane was running is blamed, all its rows are queued again."""
        return self._lose(worker, None)

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
            instance.latency.observe(batch.rows, seconds)
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
                request.failure = self._late(request, now)
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
            request.failure = Failure(500, self._causes(request))
        else:
            pending = possible & ~request.done
            if pending & self._lanes.alive or (pending and request.done.bit_count() < request.quorum):
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

    def _causes(self, request: Request) -> str:
        return "; ".join(f"member {self._names[m]}: {text}" for m, text in (request.causes or {}).items())

    def _late(self, request: Request, now: float) -> Failure:
        pending = request.wanted & ~(request.done | request.failed)
        names = ", ".join(self._names[m] for m in bits(pending))
        dead = [self._names[m] for m in bits(pending & ~self._lanes.alive)]
        waited = f"{now - request.admitted_at:.3f} s"
        failed = f"; {self._causes(request)}" if request.causes else ""
        if dead:
            text = f"no live instance of {', '.join(dead)} after {waited}; still waiting for: {names}{failed}"
            return Failure(503, text)
        have = request.done.bit_count()
        text = f"{have} of the {request.quorum} members needed answered in {waited}; missing: {names}{failed}"
        return Failure(504, text)

    def _lose(self, worker: str, blamed: Lane | None) -> list[Request]:
        """A worker's rows are queued again; the first batch of each lane is blamed, except where one was already."""
        alive = self._lanes.alive
        lanes = self._lanes.replace(worker, [])
        guilty = {next(iter(lane.batches), 0) for lane in lanes if lane is not blamed}
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

    # -- assignment -----------------------------------------------------------------------------------------------

    def assign(self, now: float) -> list[Batch]:
        """The batches to send now."""
        queues, lanes = self._queues, self._lanes
        queues.spread()
        batches: list[Batch] = []
        self._assign_at = inf
        if not queues.members:
            return batches
        lanes.ripen(now)
        needs = [need for member in bits(queues.members & lanes.open) if (need := self._need(member))]
        total_s = 0.0
        for need in needs:
            total_s -= need[1]
        heapify(needs)
        while needs:
            _, work_s, member = needs[0]
            waiting = queues.waiting[member]
            offer = lanes.offer(member, waiting, -work_s / total_s if total_s > -work_s else 1.0, now)
            if offer is None or (self._max_delay_s and self._early(member, waiting, offer, now)):
                heappop(needs)
                continue
            batch = self._cut(offer, total_s, now)
            batches.append(batch)
            if len(batch.instances) > 1:
                needs, total_s = self._needs_after(batch, needs, total_s)
                continue
            need = self._need(member) if queues.waiting[member] else None
            total_s += work_s
            if need:
                total_s -= need[1]
            if need and lanes.open >> member & 1:
                heapreplace(needs, need)
            else:
                heappop(needs)
        lanes.end_round()
        if queues.members:
            self._assign_at = min(self._assign_at, lanes.next_opening())
        return batches

    def _needs_after(self, batch: Batch, needs: list[Need], total_s: float) -> tuple[list[Need], float]:
        """The needs when a batch of several members has been given out; who was passed over is not asked again."""
        ran = {instance.member for instance in batch.instances}
        left = []
        for need in needs:
            if need[2] in ran:
                total_s += need[1]
            else:
                left.append(need)
        for member in ran:
            rest = self._need(member) if self._queues.waiting[member] else None
            if rest:
                total_s -= rest[1]
                if self._lanes.open >> member & 1:
                    left.append(rest)
        heapify(left)
        return left, total_s

    def _need(self, member: int) -> Need | None:
        """How much a member needs a lane, the smaller the more: by its oldest request, then by its work."""
        head = self._queues.head(member)
        reference = self._lanes.hosts[member].reference
        if head is None or reference is None:
            return None
        return head.seq, -reference.expect(self._queues.waiting[member]), member

    def _early(self, member: int, waiting: int, offer: Offer, now: float) -> bool:
        """Whether the rows may wait a little for others, and do not fill a batch yet."""
        head = self._queues.head(member)
        if head is None or waiting >= offer[1].batch_size:
            return False
        until = head.admitted_at + self._max_delay_s
        if until > now:
            self._assign_at = min(self._assign_at, until)
        return until > now

    def _cut(self, offer: Offer, total_s: float, now: float) -> Batch:
        """Make a batch of the oldest rows of a member, and of others that wait with the same where it is brief."""
        lane, instance, rows = offer
        entries = self._queues.cut(instance.member, rows)
        if len(entries) > 1:
            rows = sum([entry.rows for entry in entries])
            waited = len(entries) * now - sum([entry.request.admitted_at for entry in entries])
        else:
            entry = entries[0]
            rows, waited = entry.rows, now - entry.request.admitted_at
        instances: tuple[Instance, ...] = (instance,)
        expected_s = instance.latency.expect(rows)
        if expected_s < FUSE_S and len(lane.instances) > 1:
            limit_s = fuse_limit_s(total_s, 1 + self._lanes.idle_beside(lane, instance.member))
            instances, expected_s = fuse(self._queues, lane, instance, entries, limit_s)
        batch = Batch(next(self._ids), lane, instances, entries, rows, expected_s, now, waited)
        self._batches[batch.id] = batch
        self._lanes.start(batch, now)
        return batch
