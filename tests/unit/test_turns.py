"""Turns on a real event loop, with a clock of our own, and the alarm on both loops, with theirs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
import uvloop

from ensemble_gateway.turns import GATHER_ROWS, GATHER_S, Alarm, Turns

# Of a clock that counts seconds since the machine was started.
ROUNDING_S = 1e-9


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


async def rung(*after_s: float, until_s: float = 1.0) -> list[float]:
    """When an alarm has rung that was set so, in seconds from now; it is stopped by a timer, however late both are."""
    loop = asyncio.get_running_loop()
    now = loop.time()
    rings: list[float] = []
    alarm = Alarm(lambda: rings.append(loop.time() - now))
    loop.call_later(until_s, alarm.stop)
    for each_s in after_s:
        alarm.set(now + each_s)
    await asyncio.sleep(max(after_s) + 0.05)
    return rings


@pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop])
@pytest.mark.parametrize("after_s", [-1.0, 0.0, 0.0001, 0.0004, 0.001, 0.0054, 0.0056, 0.0212])
def test_an_alarm_rings_once_and_never_too_early(loop: Callable[[], asyncio.AbstractEventLoop], after_s: float) -> None:
    with asyncio.Runner(loop_factory=loop) as runner:
        rings = runner.run(rung(after_s))
    assert len(rings) == 1
    assert rings[0] >= after_s - ROUNDING_S


@pytest.mark.parametrize("until_s", [0.09, 1.0])
def test_an_alarm_rings_at_the_earliest_of_its_times_and_no_more(until_s: float) -> None:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        rings = runner.run(rung(0.2, 0.02, 0.1, until_s=until_s))
    assert len(rings) == 1
    assert rings[0] >= 0.02 - ROUNDING_S


async def test_an_alarm_that_is_stopped_does_not_ring_and_can_be_set_again() -> None:
    loop = asyncio.get_running_loop()
    rings: list[int] = []
    alarm = Alarm(lambda: rings.append(1))
    alarm.set(loop.time() + 0.01)
    alarm.stop()
    await asyncio.sleep(0.03)
    assert rings == []
    alarm.set(loop.time() + 0.5)
    alarm.set(loop.time())
    await asyncio.sleep(0.03)
    assert rings == [1]
    alarm.stop()
