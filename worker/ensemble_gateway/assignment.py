"""Assignment: which waiting rows become batches now, and for which lanes.

Rows of the oldest request go first, and among its members those of the one with the most work left. Pure: the clock is
an argument; `placement` says which lane gets how many rows.
"""

from __future__ import annotations

from heapq import heapify, heappop, heapreplace
from itertools import count
from math import inf

from ensemble_gateway.batches import FUSE_FULL_S, FUSE_S, Batch, fair_share_s, fuse, is_efficient
from ensemble_gateway.lanes import Instance
from ensemble_gateway.placement import Lanes, Offer
from ensemble_gateway.queues import Queues, bits

# The sequence number of a member's oldest request, minus the seconds of its waiting work, and the member.
Need = tuple[int, float, int]


class Assigner:
    """Makes batches of what waits in `queues` for the `lanes` that are open; `batches` has those under way by id.

    Rows that do not fill a batch may wait `max_delay_s` for others. `next_at` is when `assign` has something to do that
    no event announces.
    """

    def __init__(self, queues: Queues, lanes: Lanes, max_delay_s: float) -> None:
        self.max_delay_s = max_delay_s
        self.batches: dict[int, Batch] = {}
        self.next_at = inf
        self._queues = queues
        self._lanes = lanes
        self._ids = count(1)

    def assign(self, now: float) -> list[Batch]:
        """The batches to send now."""
        queues, lanes = self._queues, self._lanes
        queues.spread()
        batches: list[Batch] = []
        self.next_at = inf
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
            if offer is None or (self.max_delay_s and self._early(member, waiting, offer, now)):
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
            self.next_at = min(self.next_at, lanes.next_opening())
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
        until = head.admitted_at + self.max_delay_s
        if until > now:
            self.next_at = min(self.next_at, until)
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
        most_s = FUSE_FULL_S if is_efficient(instance, rows, expected_s) else FUSE_S
        if expected_s < most_s and len(lane.instances) > 1:
            share_s = fair_share_s(total_s, 1 + self._lanes.idle_beside(lane, instance.member))
            hosts = self._lanes.hosts
            instances, expected_s = fuse(self._queues, hosts, lane, instance, entries, rows, share_s, most_s)
        batch = Batch(next(self._ids), lane, instances, entries, rows, expected_s, now, waited)
        self.batches[batch.id] = batch
        self._lanes.start(batch, now)
        return batch
