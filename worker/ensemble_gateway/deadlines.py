"""Deadlines of requests in flight: a wheel of 10 ms ticks, so that adding and removing one costs a set operation."""

from __future__ import annotations

from collections.abc import Iterator
from heapq import heappop, heappush
from typing import Generic, TypeVar

TICK_S = 0.01

T = TypeVar("T")


class Deadlines(Generic[T]):
    """Items by the tick of their deadline."""

    def __init__(self) -> None:
        self._by_tick: dict[int, set[T]] = {}
        self._ticks: list[int] = []

    def __iter__(self) -> Iterator[T]:
        for items in self._by_tick.values():
            yield from items

    def add(self, item: T, deadline: float) -> int:
        """Add an item; returns its tick, which `remove` wants back."""
        tick = int(deadline / TICK_S) + 1
        items = self._by_tick.get(tick)
        if items is None:
            self._by_tick[tick] = {item}
            heappush(self._ticks, tick)
        else:
            items.add(item)
        return tick

    def remove(self, item: T, tick: int) -> None:
        """Remove an item; its tick may have passed."""
        items = self._by_tick.get(tick)
        if items is not None:
            items.discard(item)

    def due(self, now: float) -> list[T]:
        """The items whose deadline has passed; they are removed."""
        found: list[T] = []
        while self._ticks and self._ticks[0] * TICK_S <= now:
            found.extend(self._by_tick.pop(heappop(self._ticks)))
        return found

    def next_at(self) -> float | None:
        """When the earliest item is due; None when there is none. Empty ticks on the way are dropped."""
        while self._ticks:
            tick = self._ticks[0]
            if self._by_tick[tick]:
                return tick * TICK_S
            del self._by_tick[heappop(self._ticks)]
        return None
