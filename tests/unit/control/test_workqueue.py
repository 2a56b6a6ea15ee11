"""The queue: each key once, never twice at a time, first come first served, later when told so."""

from __future__ import annotations

import asyncio
import random
from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from ensemble_operator.control.workqueue import Backlog, WorkQueue


def drained(backlog: Backlog[str], now: float) -> list[str]:
    taken = []
    while (key := backlog.take(now)) is not None:
        taken.append(key)
        backlog.done(key)
    return taken


def test_first_come_first_served_and_once() -> None:
    backlog: Backlog[str] = Backlog()
    for key in ("a", "b", "a", "c", "b"):
        backlog.add(key, 0)
    assert backlog.depth == 3
    assert drained(backlog, 0) == ["a", "b", "c"]


def test_a_key_added_while_worked_on_is_served_once_more_and_not_before() -> None:
    backlog: Backlog[str] = Backlog()
    backlog.add("a", 0)
    assert backlog.take(0) == "a"
    backlog.add("a", 1)
    backlog.add("a", 2)
    assert backlog.take(2) is None
    backlog.done("a")
    assert drained(backlog, 2) == ["a"]


def test_a_key_due_while_worked_on_is_served_afterwards() -> None:
    backlog: Backlog[str] = Backlog()
    backlog.add("a", 0)
    assert backlog.take(0) == "a"
    backlog.add_at("a", 1)
    assert backlog.take(5) is None
    backlog.done("a")
    assert backlog.take(5) == "a"


def test_later_means_not_sooner_and_the_soonest_counts() -> None:
    backlog: Backlog[str] = Backlog()
    backlog.add_at("a", 10)
    backlog.add_at("a", 5)
    backlog.add_at("a", 7)
    assert backlog.next_due() == 5
    assert backlog.take(4.9) is None
    assert drained(backlog, 5) == ["a"]
    assert backlog.next_due() is None


def test_to_be_served_now_forgets_what_was_for_later() -> None:
    backlog: Backlog[str] = Backlog()
    backlog.add_at("a", 10)
    backlog.add("a", 0)
    assert drained(backlog, 0) == ["a"]
    assert drained(backlog, 20) == []


def test_delays_double_to_a_limit_and_start_anew_after_success() -> None:
    backlog: Backlog[str] = Backlog(first_backoff_s=1, max_backoff_s=5)
    delays = []
    for _ in range(5):
        delays.append(backlog.add_failed("a", 0))
        assert drained(backlog, 100) == ["a"]
    assert delays == [1, 2, 4, 5, 5]
    backlog.succeeded("a")
    assert backlog.add_failed("a", 0) == 1


def test_dropped_is_gone_until_added() -> None:
    backlog: Backlog[str] = Backlog()
    backlog.add("a", 0)
    backlog.add_at("b", 1)
    backlog.drop("a")
    backlog.drop("b")
    assert drained(backlog, 10) == []
    backlog.add("b", 11)
    assert drained(backlog, 11) == ["b"]


def test_how_long_the_first_waits() -> None:
    backlog: Backlog[str] = Backlog()
    assert backlog.oldest_wait_s(5) == 0
    backlog.add("a", 1)
    backlog.add("b", 4)
    assert backlog.oldest_wait_s(5) == 4


class BacklogMachine(RuleBasedStateMachine):
    """Whatever happens: no key is worked on twice at once, and none that was added is lost."""

    def __init__(self) -> None:
        super().__init__()
        self.backlog: Backlog[int] = Backlog()
        self.now = 0.0
        self.working: set[int] = set()
        # Key -> when it must be served by, if somebody takes.
        self.owed: dict[int, float] = {}

    @rule(key=st.integers(0, 4))
    def add(self, key: int) -> None:
        self.backlog.add(key, self.now)
        self.owed[key] = self.now

    @rule(key=st.integers(0, 4), delay_s=st.integers(0, 5))
    def add_later(self, key: int, delay_s: int) -> None:
        self.backlog.add_at(key, self.now + delay_s)
        self.owed[key] = min(self.owed.get(key, 1e9), self.now + delay_s)

    @rule(seconds=st.integers(1, 4))
    def time_passes(self, seconds: int) -> None:
        self.now += seconds

    @rule()
    def take(self) -> None:
        key = self.backlog.take(self.now)
        if key is None:
            assert not [k for k, at in self.owed.items() if at <= self.now and k not in self.working]
            return
        assert key not in self.working
        assert self.owed.pop(key) <= self.now
        self.working.add(key)

    @rule(data=st.data())
    def done(self, data: st.DataObject) -> None:
        if self.working:
            key = data.draw(st.sampled_from(sorted(self.working)))
            self.working.discard(key)
            self.backlog.done(key)

    @invariant()
    def counts(self) -> None:
        assert self.backlog.working == len(self.working)


TestBacklogMachine = BacklogMachine.TestCase
TestBacklogMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


async def test_workers_run_side_by_side_but_never_two_on_one_key() -> None:
    running: Counter[int] = Counter()
    most, served = 0, Counter[int]()

    async def work(key: int) -> None:
        nonlocal most
        running[key] += 1
        assert running[key] == 1
        most = max(most, running.total())
        await asyncio.sleep(0.001 * random.random())
        running[key] -= 1
        served[key] += 1

    queue = WorkQueue(work, workers=4)
    async with asyncio.timeout(20), asyncio.TaskGroup() as group:
        group.create_task(queue.run())
        for _ in range(200):
            queue.add(random.randrange(10))
            await asyncio.sleep(0)
        while queue.backlog.depth or queue.backlog.working:
            await asyncio.sleep(0.005)
        assert await queue.close(5)
    assert most == 4
    assert set(served) == set(range(10))


async def test_a_key_for_later_is_served_without_being_added_again() -> None:
    served = asyncio.Event()

    async def work(key: str) -> None:
        served.set()

    queue = WorkQueue(work, workers=1)
    async with asyncio.timeout(10), asyncio.TaskGroup() as group:
        group.create_task(queue.run())
        queue.add_after("a", 0.05)
        await served.wait()
        await queue.close(1)


async def test_closing_waits_for_what_runs_and_starts_nothing() -> None:
    release, ended = asyncio.Event(), []

    async def work(key: str) -> None:
        await release.wait()
        ended.append(key)

    queue = WorkQueue(work, workers=1)
    async with asyncio.timeout(10), asyncio.TaskGroup() as group:
        group.create_task(queue.run())
        queue.add("a")
        queue.add("b")
        while not queue.backlog.working:
            await asyncio.sleep(0)
        asyncio.get_running_loop().call_later(0.05, release.set)
        assert await queue.close(5)
    assert ended == ["a"]


async def test_closing_cancels_what_does_not_end_in_time() -> None:
    async def work(key: str) -> None:
        await asyncio.Event().wait()

    queue = WorkQueue(work, workers=1)
    async with asyncio.timeout(10), asyncio.TaskGroup() as group:
        group.create_task(queue.run())
        queue.add("a")
        while not queue.backlog.working:
            await asyncio.sleep(0)
        assert not await queue.close(0.05)


async def test_pausing_cancels_what_runs_and_serves_it_again_on_return() -> None:
    began: list[str] = []
    release = asyncio.Event()

    async def work(key: str) -> None:
        began.append(key)
        await release.wait()

    queue = WorkQueue(work, workers=2)
    async with asyncio.timeout(10), asyncio.TaskGroup() as group:
        group.create_task(queue.run())
        queue.add("a")
        while not began:
            await asyncio.sleep(0)
        queue.pause()
        queue.add("b")
        while queue.backlog.working:
            await asyncio.sleep(0)
        await asyncio.sleep(0.02)
        assert began == ["a"]
        release.set()
        queue.resume()
        while len(began) < 3:
            await asyncio.sleep(0)
        assert sorted(began) == ["a", "a", "b"]
        await queue.close(1)


async def test_work_that_raises_is_not_swallowed() -> None:
    async def work(key: str) -> None:
        raise KeyError(key)

    queue = WorkQueue(work, workers=1)
    queue.add("a")
    with pytest.raises(ExceptionGroup) as caught:
        async with asyncio.timeout(10):
            await queue.run()
    assert caught.value.subgroup(KeyError) is not None
