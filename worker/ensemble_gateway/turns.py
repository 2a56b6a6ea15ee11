"""When the gateway's next turn begins: when something has come, or at a time that it has set.

A batch costs the gateway and a worker a few hundred microseconds, however small it is, and a client's requests are read
one by one: those that come close together are given out together. Nothing waits for a request that may never come: a
turn begins as soon as the event loop has found none.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable

# So long a turn is put off while requests keep coming, and up to so many rows: then a batch is worth its cost.
GATHER_S = 0.0005
GATHER_ROWS = 64
# uvloop's clock and timers know whole milliseconds, and round: a timer that came too early would be set again at once,
# and so on until the millisecond is over.
TICK_S = 0.001


class Turns:
    """Calls `turn` after something has come, on the running loop; `clock` counts seconds."""

    def __init__(self, turn: Callable[[], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._loop = asyncio.get_running_loop()
        self._turn = turn
        self._clock = clock
        self._waking = False
        self._rows = 0
        self._seen = 0
        self._latest = 0.0

    def wake(self, rows: int = 0) -> None:
        """Something has come, maybe a request of so many rows."""
        self._rows += rows
        if not self._waking:
            self._waking = True
            self._seen = 0
            self._latest = self._clock() + GATHER_S
            self._loop.call_soon(self._look)

    def _look(self) -> None:
        """Let the loop read sockets once more if requests have come since the last look."""
        if self._seen < self._rows < GATHER_ROWS and self._clock() < self._latest:
            self._seen = self._rows
            self._loop.call_soon(self._look)
            return
        self._waking, self._rows = False, 0
        self._turn()


class Alarm:
    """Calls `ring`, on the running loop, when the earliest time has come that it was set to since; never before it."""

    def __init__(self, ring: Callable[[], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._ring = ring
        self._handle: asyncio.TimerHandle | None = None
        self._at = math.inf

    def set(self, at: float) -> None:
        """Ring at this time of the loop's clock, unless it rings earlier anyway."""
        if at >= self._at:
            return
        self.stop()
        self._at = at
        ticks = math.ceil((at - self._loop.time()) / TICK_S)
        self._handle = self._loop.call_later(ticks * TICK_S, self._rung)

    def stop(self) -> None:
        """Forget the time."""
        if self._handle is not None:
            self._handle.cancel()
        self._handle, self._at = None, math.inf

    def _rung(self) -> None:
        self._handle, self._at = None, math.inf
        self._ring()
