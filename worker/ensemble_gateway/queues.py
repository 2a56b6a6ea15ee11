"""What waits: requests in flight, and for each member a queue of the rows that no worker has been given yet.

Entries of requests that are finished already are left where they are and skipped, so that finishing costs nothing; when
they become many they are swept out. Pure.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from operator import is_
from typing import Any, NamedTuple

# The queues are swept when finished requests may have left more than this, and a part of all that waits.
SWEEP_AT = 64
SWEEP_SHARE = 8


class Failure(NamedTuple):
    """Why a request gets no answer: an HTTP status and a message."""

    status: int
    message: str


class Request:
    """A request in flight. `wanted`, `done` and `failed` are sets of members as bits.

    `sink` and `owner` belong to the caller.
    """

    __slots__ = (
        "admitted_at", "causes", "closed", "done", "failed", "failure", "left",
        "owner", "quorum", "ranges", "rows", "seq", "sink", "tick", "wanted",
    )  # fmt: skip

    def __init__(
        self, rows: int, ranges: tuple[tuple[int, int], ...], wanted: int, quorum: int, sink: Any, owner: Any = None
    ) -> None:
        self.rows = rows
        self.ranges = ranges
        self.wanted = wanted
        self.quorum = quorum
        self.sink = sink
        self.owner = owner
        self.done = 0
        self.failed = 0
        self.closed = False
        self.failure: Failure | None = None
        self.causes: dict[int, str] | None = None
        self.left: dict[int, int] | None = None
        self.seq = 0
        self.tick = 0
        self.admitted_at = 0.0


class Entry(NamedTuple):
    """Contiguous rows of a request, waiting for one member.

    `lost` names the workers that were lost while running them; `alone` keeps them apart from other requests' rows,
    because something in their last batch failed.
    """

    request: Request
    start: int
    rows: int
    lost: tuple[str, ...] = ()
    alone: bool = False


class Queues:
    """One queue of entries a member; requests for everyone are handed to all of them at once, as late as possible.

    Everyone is all members at first, and then those of the plan that most requests are for.

    `waiting` counts rows by member, `members` is the set of members for which any wait, as bits; both may count rows of
    finished requests that were not swept out yet.
    """

    def __init__(self, members: int) -> None:
        self.waiting = [0] * members
        self.members = 0
        self._queues: list[deque[Entry]] = [deque() for _ in range(members)]
        self._everyone = (1 << members) - 1
        self._all = list(range(members))
        self._fresh: list[Entry] = []
        self._fresh_rows = 0
        self._stale = 0
        self._alone = 0

    def grow(self) -> None:
        """One more member, whom no request wants yet."""
        self.waiting.append(0)
        self._queues.append(deque())

    def set_everyone(self, members: int) -> None:
        """Most requests want these members from now on."""
        self.spread()
        self._everyone, self._all = members, bits(members)

    def add(self, request: Request) -> None:
        """Queue a request's rows for every member that it wants."""
        if request.wanted == self._everyone:
            for start, rows in request.ranges:
                self._fresh.append(Entry(request, start, rows))
            self._fresh_rows += request.rows
            return
        self.spread()
        entries = [Entry(request, start, rows) for start, rows in request.ranges]
        for member in bits(request.wanted):
            self._queues[member].extend(entries)
            self.waiting[member] += request.rows
        self.members |= request.wanted

    def spread(self) -> None:
        """Hand the newest requests to all members."""
        if not self._fresh:
            return
        rows, waiting = self._fresh_rows, self.waiting
        for member in self._all:
            self._queues[member].extend(self._fresh)
            waiting[member] += rows
        self.members |= self._everyone
        self._fresh, self._fresh_rows = [], 0

    def put_back(self, member: int, entries: Sequence[Entry]) -> None:
        """Queue entries again, before all others, in their order."""
        for entry in reversed(entries):
            if not entry.request.closed:
                self._queues[member].appendleft(entry)
                self._alone += entry.alone
                self._count(member, entry.rows)

    def head(self, member: int) -> Request | None:
        """The request whose rows have waited for longest."""
        queue = self._queues[member]
        while queue:
            request = queue[0].request
            if not request.closed:
                return request
            self._drop(member)
        return None

    def cut(self, member: int, rows: int) -> list[Entry]:
        """Take `rows` rows from the head; fewer where an entry has to be alone, or the rest is of finished requests."""
        queue = self._queues[member]
        if not (self._stale or self._alone):
            return self._cut_plain(member, rows)
        entries: list[Entry] = []
        while rows and queue:
            entry = queue[0]
            if entry.request.closed:
                self._drop(member)
                continue
            if entry.alone and entries:
                break
            if entry.rows > rows:
                entry = self._split(member, rows)
            else:
                self._drop(member)
            entries.append(entry)
            rows -= entry.rows
            if entry.alone:
                break
        return entries

    def cut_same(self, member: int, entries: Sequence[Entry]) -> bool:
        """Take exactly these rows from the head of another member's queue; nothing, and False, if it differs."""
        queue = self._queues[member]
        if len(queue) < len(entries):
            return False
        if not self._alone and len(queue) == len(entries) and all(map(is_, entries, queue)):
            # Requests for everyone that came since the last batches: the usual case.
            queue.clear()
            self._count(member, -self.waiting[member])
            return True
        last = len(entries) - 1
        for position, (entry, other) in enumerate(zip(entries, queue, strict=False)):
            if entry is other:
                continue
            same = entry.request is other.request and entry.start == other.start and not other.alone
            if not same or other.rows < entry.rows or (other.rows > entry.rows and position < last):
                return False
        for entry in entries:
            if queue[0].rows > entry.rows:
                self._split(member, entry.rows)
            else:
                self._drop(member)
        return True

    def entries(self, member: int) -> int:
        """How many entries wait for a member."""
        fresh = len(self._fresh) if self._everyone >> member & 1 else 0
        return sum(1 for entry in self._queues[member] if not entry.request.closed) + fresh

    def forget(self, request: Request) -> None:
        """A request was finished before all its rows were answered: what is left of it becomes stale."""
        self._stale += len(request.ranges) * request.wanted.bit_count()
        if self._stale > SWEEP_AT and self._stale * SWEEP_SHARE > sum(map(len, self._queues)) + len(self._fresh):
            self._sweep()

    def _cut_plain(self, member: int, rows: int) -> list[Entry]:
        """Where nothing is stale and nothing has to be alone: the usual case, and the hot one."""
        queue = self._queues[member]
        waiting = self.waiting[member]
        if rows >= waiting:
            entries = list(queue)
            queue.clear()
            self._count(member, -waiting)
            return entries
        entries, left = [], rows
        while left:
            if queue[0].rows > left:
                entries.append(self._split(member, left))
                return entries
            entry = queue.popleft()
            entries.append(entry)
            left -= entry.rows
            self.waiting[member] -= entry.rows
        return entries

    def _split(self, member: int, rows: int) -> Entry:
        """Take the first rows of the first entry; the rest stays."""
        queue = self._queues[member]
        request, start, have, lost, alone = queue[0]
        queue[0] = Entry(request, start + rows, have - rows, lost, alone)
        self._count(member, -rows)
        return Entry(request, start, rows, lost, alone)

    def _drop(self, member: int) -> None:
        entry = self._queues[member].popleft()
        self._alone -= entry.alone
        self._count(member, -entry.rows)

    def _count(self, member: int, rows: int) -> None:
        self.waiting[member] += rows
        if self.waiting[member]:
            self.members |= 1 << member
        else:
            self.members &= ~(1 << member)

    def _sweep(self) -> None:
        self._fresh = [entry for entry in self._fresh if not entry.request.closed]
        self._fresh_rows = sum(entry.rows for entry in self._fresh)
        self._stale = self._alone = 0
        for member, queue in enumerate(self._queues):
            kept = deque(entry for entry in queue if not entry.request.closed)
            self._queues[member] = kept
            self._alone += sum(entry.alone for entry in kept)
            self._count(member, sum(entry.rows for entry in kept) - self.waiting[member])


def bits(mask: int) -> list[int]:
    """The members in a set of members, in order."""
    found = []
    while mask:
        lowest = mask & -mask
        found.append(lowest.bit_length() - 1)
        mask ^= lowest
    return found
