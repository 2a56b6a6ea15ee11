"""What waits: requests in flight, and for each member a queue of the rows that no worker has been given yet.

Entries of requests that are finished already are left where they are and skipped, so that finishing costs nothing; when
they become many they are swept out. Pure.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Any, NamedTuple

# Entries of finished requests that may lie in the queues before they are swept out.
SWEEP_AT = 4096


class Failure(NamedTuple):
    """Why a request gets no answer: an HTTP status and a message."""

    status: int
    message: str


class Request:
    """A request in flight. `wanted`, `done` and `failed` are sets of members as bits; `sink` belongs to the caller."""

    __slots__ = (
        "admitted_at", "causes", "closed", "done", "failed", "failure",
        "left", "quorum", "ranges", "rows", "seq", "sink", "tick", "wanted",
    )  # fmt: skip

    def __init__(self, rows: int, ranges: tuple[tuple[int, int], ...], wanted: int, quorum: int, sink: Any) -> None:
        self.rows = rows
        self.ranges = ranges
        self.wanted = wanted
        self.quorum = quorum
        self.sink = sink
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
    """Contiguous rows of a request, waiting for one member. `lost` names the workers that were lost while running them;
    `alone` keeps them apart from other requests' rows, because something in their last batch failed.
    """

    request: Request
    start: int
    rows: int
    lost: tuple[str, ...] = ()
    alone: bool = False


class Queues:
    """One queue of entries a member; requests for every member are handed to all of them at once, as late as possible."""

    def __init__(self, members: int) -> None:
        self.waiting = [0] * members
        self._queues: list[deque[Entry]] = [deque() for _ in range(members)]
        self._everyone = (1 << members) - 1
        self._fresh: list[Entry] = []
        self._stale = 0

    def add(self, request: Request) -> None:
        """Queue a request's rows for every member that it wants."""
        entries = [Entry(request, start, rows) for start, rows in request.ranges]
        if request.wanted == self._everyone:
            self._fresh.extend(entries)
            return
        self.spread()
        for member in bits(request.wanted):
            self._queues[member].extend(entries)
            self.waiting[member] += request.rows

    def spread(self) -> None:
        """Hand the newest requests to all members."""
        if not self._fresh:
            return
        rows = sum(entry.rows for entry in self._fresh)
        for member, queue in enumerate(self._queues):
            queue.extend(self._fresh)
            self.waiting[member] += rows
        self._fresh = []

    def put_back(self, member: int, entries: Iterable[Entry]) -> None:
        """Queue entries again, before all others, in their order."""
        for entry in reversed(list(entries)):
            if not entry.request.closed:
                self._queues[member].appendleft(entry)
                self.waiting[member] += entry.rows

    def head(self, member: int) -> Entry | None:
        """The oldest entry that still waits."""
        queue = self._queues[member]
        while queue:
            entry = queue[0]
            if not entry.request.closed:
                return entry
            queue.popleft()
            self.waiting[member] -= entry.rows
        return None

    def cut(self, member: int, rows: int) -> list[Entry]:
        """Take `rows` rows from the head, fewer where the next entry has to be alone or the rest is of finished requests."""
        queue = self._queues[member]
        entries: list[Entry] = []
        while rows and queue:
            entry = queue[0]
            if entry.alone and entries:
                break
            if entry.request.closed:
                queue.popleft()
                self.waiting[member] -= entry.rows
                continue
            if entry.rows > rows:
                queue[0] = entry._replace(start=entry.start + rows, rows=entry.rows - rows)
                entry = entry._replace(rows=rows)
            else:
                queue.popleft()
            entries.append(entry)
            self.waiting[member] -= entry.rows
            rows -= entry.rows
            if entry.alone:
                break
        return entries

    def entries(self, member: int) -> int:
        """How many entries wait for a member."""
        return sum(1 for entry in self._queues[member] if not entry.request.closed) + len(self._fresh)

    def forget(self, request: Request) -> None:
        """A request was finished before all its rows were answered: what is left of it becomes stale."""
        self._stale += len(request.ranges)
        if self._stale <= SWEEP_AT:
            return
        self._stale = 0
        self._fresh = [entry for entry in self._fresh if not entry.request.closed]
        for member, queue in enumerate(self._queues):
            kept = deque(entry for entry in queue if not entry.request.closed)
            self._queues[member] = kept
            self.waiting[member] = sum(entry.rows for entry in kept)


def bits(mask: int) -> list[int]:
    """The members in a set of members."""
    return [position for position in range(mask.bit_length()) if mask >> position & 1]
