"""Batches: rows on their way through a lane, and which members of the lane run them together. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING

from ensemble_gateway.lanes import Instance, Lane
from ensemble_gateway.queues import Entry, Queues, Request

if TYPE_CHECKING:
    from ensemble_gateway.placement import Hosts

# Members of one lane that wait with the same rows run as one batch while it is expected to take no longer than this:
# sending, waking and answering cost as much as a tiny network.
FUSE_S = 0.001
# And so long with this share of the rows that they may have, or more, where a row costs at most so many times what it
# costs in a full batch: such a batch would hardly become more efficient by waiting for more.
FUSE_FULL_S = 0.008
LARGE_SHARE = 1 / 4
EFFICIENT = 1.5
# Where other lanes are idle, they share such work in equal parts of at least this: below, a message costs more than it
# gains.
SHARE_S = 0.00015


@dataclass(slots=True, eq=False)
class Batch:
    """Rows on their way through one instance, or through several of one lane. `waited_s` is summed over its entries."""

    id: int
    lane: Lane
    instances: tuple[Instance, ...]
    entries: list[Entry]
    rows: int
    expected_s: float
    dispatched_at: float
    waited_s: float

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """The slots of its rows, in order."""
        return [(start, rows) for _, start, rows, _, _ in self.entries]


def is_efficient(instance: Instance, rows: int, expected_s: float) -> bool:
    """Whether `rows` rows, expected to take so long, are many and run about as efficiently as a full batch."""
    size = instance.batch_size
    if rows < LARGE_SHARE * size:
        return False
    return rows >= size or expected_s * size <= EFFICIENT * rows * instance.latency.expect(size)


def fair_share_s(work_s: float, lanes: int) -> float:
    """How much of so much waiting work one of so many lanes should take, as they could share it; all, if none can."""
    parts = min(lanes, int(work_s / SHARE_S))
    return work_s / parts if parts > 1 else inf


def fuse(
    queues: Queues,
    hosts: Sequence[Hosts],
    lane: Lane,
    first: Instance,
    entries: list[Entry],
    rows: int,
    share_s: float,
    most_s: float,
) -> tuple[tuple[Instance, ...], float]:
    """The lane's instances that run these `rows` rows in one go, and the seconds expected of them all.

    They are `first` and the members that wait with the same rows, whose rows are taken from their queues: as many as
    come nearest to `share_s`, and take no longer than `most_s`; in the order of their ids. `hosts` is by member.
    """
    expected_s = first.latency.expect(rows)
    instances = [first]
    if entries[0].alone:
        return (first,), expected_s
    work_s = hosts[first.member].work_s(lane, first, rows)
    waiting = [
        instance
        for member, instance in lane.instances.items()
        if instance is first or (queues.waiting[member] >= rows and rows <= instance.batch_size)
    ]
    # As many as come near the share, and fit the limit, if all are like the first.
    share = share_s / work_s + 0.5 if work_s else inf
    fitting = most_s / expected_s if expected_s else inf
    for instance in _beside(first, waiting, int(min(share, fitting, len(waiting)))):
        more_s = instance.latency.expect(rows)
        if expected_s + more_s > most_s:
            continue
        member = instance.member
        more_work_s = hosts[member].work_s(lane, instance, rows)
        # By half of it: what is expected is never exact, and equal parts shall stay equal.
        if work_s + more_work_s / 2 > share_s:
            continue
        if queues.cut_same(member, entries):
            instances.append(instance)
            expected_s += more_s
            work_s += more_work_s
    if len(instances) > 1:
        instances.sort(key=lambda instance: instance.id)
    return tuple(instances), expected_s


def _beside(first: Instance, waiting: list[Instance], many: int) -> list[Instance]:
    """The others of `waiting`, in the order in which they should go with `first`, where about so many go together.

    Workers run neighbours as one: where all go in parts of so many, each part and what it leaves lie side by side; so
    does a part of fewer.
    """
    at = waiting.index(first)
    begin = at // many * many if many > 1 else at
    return waiting[begin:at][::-1] + waiting[at + 1 :] + waiting[:begin][::-1]


def completed(request: Request, rows: int, instances: Sequence[Instance]) -> int:
    """The members, as bits, that have answered all rows of a request with these `rows` of it."""
    left = request.left = request.left or {}
    whole = 0
    for instance in instances:
        member = instance.member
        left[member] = left.get(member, request.rows) - rows
        if not left[member]:
            whole |= 1 << member
    return whole
