"""One queue of ensembles to look at: each at most once in it, and never worked on twice at once.

`Backlog` decides and is pure: fed with a clock. `WorkQueue` waits and runs the workers.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import itertools
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

KeyT = TypeVar("KeyT")

FIRST_BACKOFF_S, MAX_BACKOFF_S = 0.5, 60.0


class Backlog(Generic[KeyT]):
    """Keys that wait, keys that are worked on, keys for later. First come, first served.

    A key that is added while it is worked on is served once more afterwards.
    """

    def __init__(self, first_backoff_s: float = FIRST_BACKOFF_S, max_backoff_s: float = MAX_BACKOFF_S) -> None:
        self._first_backoff_s = first_backoff_s
        self._max_backoff_s = max_backoff_s
        # Key -> since when it waits.
        self._waiting: OrderedDict[KeyT, float] = OrderedDict()
        self._working: set[KeyT] = set()
        self._again: dict[KeyT, float] = {}
        # A key's time in `_due` counts; other entries of the heap are from before it changed.
        self._due: dict[KeyT, float] = {}
        self._heap: list[tuple[float, int, KeyT]] = []
        self._order = itertools.count()
        self._failures: dict[KeyT, int] = {}

    def add(self, key: KeyT, now: float) -> None:
        """Serve it as soon as possible."""
        self._due.pop(key, None)
        if key in self._working:
            self._again.setdefault(key, now)
        else:
            self._waiting.setdefault(key, now)

    def add_at(self, key: KeyT, at: float) -> None:
        """Serve it at a time, unless it is served sooner anyway. Waiting already: nothing changes."""
        if key in self._waiting or key in self._again or self._due.get(key, at + 1) <= at:
            return
        self._due[key] = at
        heapq.heappush(self._heap, (at, next(self._order), key))

    def add_failed(self, key: KeyT, now: float, spread: float = 1.0) -> float:
        """Serve it after a delay that doubles with each failure, and is returned; `spread` scales it."""
        failures = self._failures.get(key, 0)
        self._failures[key] = failures + 1
        delay_s: float = min(self._max_backoff_s, self._first_backoff_s * 2.0 ** min(failures, 30)) * spread
        self.add_at(key, now + delay_s)
        return delay_s

    def succeeded(self, key: KeyT) -> None:
        """Its failures are forgotten."""
        self._failures.pop(key, None)

    def drop(self, key: KeyT) -> None:
        """It is gone: not served again, unless it is added anew."""
        for waiting in (self._waiting, self._again, self._due, self._failures):
            waiting.pop(key, None)

    def take(self, now: float) -> KeyT | None:
        """The next key to work on; None if none is due."""
        self._fall_due(now)
        if not self._waiting:
            return None
        key, _ = self._waiting.popitem(last=False)
        # What was for later is served now; whoever wants it later again says so afterwards.
        self._due.pop(key, None)
        self._working.add(key)
        return key

    def done(self, key: KeyT) -> None:
        """The work on it is over."""
        self._working.discard(key)
        since = self._again.pop(key, None)
        if since is not None:
            self._due.pop(key, None)
            self._waiting.setdefault(key, since)

    def next_due(self) -> float | None:
        """When the next key for later is due; None if there is none."""
        while self._heap and self._due.get(self._heap[0][2]) != self._heap[0][0]:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else None

    @property
    def depth(self) -> int:
        """Keys that wait for a worker."""
        return len(self._waiting) + len(self._again)

    @property
    def working(self) -> int:
        """Keys that are worked on."""
        return len(self._working)

    def oldest_wait_s(self, now: float) -> float:
        """For how long the first key has waited for a worker."""
        return max(0.0, now - next(iter(self._waiting.values()), now))

    def _fall_due(self, now: float) -> None:
        while (at := self.next_due()) is not None and at <= now:
            _, _, key = heapq.heappop(self._heap)
            del self._due[key]
            if key in self._working:
                self._again.setdefault(key, at)
            else:
                self._waiting.setdefault(key, at)


class WorkQueue(Generic[KeyT]):
    """Runs `work` for keys, as many at a time as there are workers. Belongs to one event loop.

    `spread` gives factors around 1, so that what fails together is not tried again together.
    """

    def __init__(
        self,
        work: Callable[[KeyT], Awaitable[None]],
        workers: int,
        spread: Callable[[], float] = lambda: 1.0,
    ) -> None:
        self.backlog: Backlog[KeyT] = Backlog()
        self._work = work
        self._workers = workers
        self._spread = spread
        self._changed = asyncio.Event()
        self._running: dict[asyncio.Task[None], KeyT] = {}
        self._closing = False
        self._paused = False

    def add(self, key: KeyT) -> None:
        """Serve it as soon as possible; once, however often it is added."""
        self.backlog.add(key, self._now())
        self._changed.set()

    def add_after(self, key: KeyT, delay_s: float) -> None:
        """Serve it after a delay, unless it is served sooner."""
        self.backlog.add_at(key, self._now() + delay_s)
        self._changed.set()

    def add_rate_limited(self, key: KeyT) -> float:
        """Serve it after a delay that grows with its failures; the delay in seconds."""
        delay_s = self.backlog.add_failed(key, self._now(), self._spread())
        self._changed.set()
        return delay_s

    def forget(self, key: KeyT) -> None:
        """It succeeded: the next failure starts with the shortest delay again."""
        self.backlog.succeeded(key)

    def drop(self, key: KeyT) -> None:
        """It is gone."""
        self.backlog.drop(key)

    def pause(self) -> None:
        """Cancel what runs, to be served again, and start nothing until `resume`."""
        self._paused = True
        for task, key in self._running.items():
            task.cancel()
            self.backlog.add(key, self._now())

    def resume(self) -> None:
        """Go on."""
        self._paused = False
        self._changed.set()

    async def run(self) -> None:
        """Hand keys to workers until `close`, or the work raises."""
        async with asyncio.TaskGroup() as group:
            while not self._closing:
                self._changed.clear()
                while self._may_start() and (key := self.backlog.take(self._now())) is not None:
                    task = group.create_task(self._work_on(key), name=f"reconcile {key}")
                    self._running[task] = key
                    task.add_done_callback(self._ended)
                await self._wait()

    async def close(self, deadline_s: float) -> bool:
        """Start nothing more and wait for what runs; what has not ended in time is cancelled, and False returned."""
        self._closing = True
        self._changed.set()
        if not self._running:
            return True
        _, late = await asyncio.wait(set(self._running), timeout=deadline_s)
        for task in late:
            task.cancel()
        return not late

    async def _work_on(self, key: KeyT) -> None:
        await self._work(key)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self.backlog.done(self._running.pop(task))
        self._changed.set()

    def _may_start(self) -> bool:
        return not (self._paused or self._closing) and len(self._running) < self._workers

    async def _wait(self) -> None:
        due = self.backlog.next_due()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(None if due is None else max(0.0, due - self._now())):
                await self._changed.wait()

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()
