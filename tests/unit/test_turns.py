"""Turns on a real event loop, with a clock of our own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from ensemble_gateway.turns import GATHER_ROWS, GATHER_S, Turns


class Clock:
    """Stands still unless it is moved."""

    def __init__(self) -> None:
        self.now = 7.0

    def __call__(self) -> float:
        return self.now


class Asked:
    """Requests that come one in each iteration of the loop, and how many had come when each turn began."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.turns = Turns(lambda: self.began.append(self.came), self.clock)
        self.came = 0
        self.began: list[int] = []

    async def come(self, requests: int, rows: int = 1, before: Callable[[], None] = lambda: None) -> None:
        for _ in range(requests):
            before()
            self.came += 1
            self.turns.wake(rows)
            await asyncio.sleep(0)

    async def end(self) -> None:
        for _ in range(5):
            await asyncio.sleep(0)


async def test_one_request_waits_for_no_other() -> None:
    asked = Asked()
    await asked.come(1)
    assert asked.began == []
    await asyncio.sleep(0)
    assert asked.began == [1]
    await asked.end()
    assert asked.began == [1]


async def test_requests_that_keep_coming_are_given_out_together() -> None:
    asked = Asked()
    await asked.come(10)
    await asked.end()
    assert asked.began == [10]
    await asked.come(3)
    await asked.end()
    assert asked.began == [10, 13]


async def test_all_of_one_iteration_are_given_out_together() -> None:
    asked = Asked()
    for _ in range(20):
        asked.turns.wake(100)
    await asked.end()
    assert asked.began == [0]


async def test_enough_rows_wait_for_no_more() -> None:
    asked = Asked()
    await asked.come(10, rows=GATHER_ROWS)
    await asked.end()
    assert asked.began == list(range(1, 11))
    asked.began.clear()
    await asked.come(6, rows=GATHER_ROWS // 2)
    await asked.end()
    assert asked.began == [12, 14, 16]


async def test_a_stream_without_end_is_given_out_in_time() -> None:
    asked = Asked()

    def tick() -> None:
        asked.clock.now += GATHER_S / 3.5

    await asked.come(20, before=tick)
    assert asked.began == [5, 10, 15, 20]


async def test_what_has_no_rows_waits_for_nothing() -> None:
    asked = Asked()
    for _ in range(3):
        asked.turns.wake()
        await asyncio.sleep(0)
        assert asked.began.pop() == 0
