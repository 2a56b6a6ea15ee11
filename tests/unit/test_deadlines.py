"""Deadlines against a naive list of (deadline, item)."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from ensemble_gateway.deadlines import TICK_S, Deadlines


class DeadlinesMachine(RuleBasedStateMachine):
    """Items are added, removed, and fall due as the clock goes on."""

    def __init__(self) -> None:
        super().__init__()
        self.deadlines: Deadlines[int] = Deadlines()
        self.model: dict[int, tuple[float, int]] = {}
        self.now = 50.0
        self.added = 0

    @rule(after_s=st.floats(-0.05, 0.5))
    def add(self, after_s: float) -> None:
        self.added += 1
        tick = self.deadlines.add(self.added, self.now + after_s)
        self.model[self.added] = (self.now + after_s, tick)

    @rule(which=st.integers(0, 1 << 16))
    def remove(self, which: int) -> None:
        if not self.model:
            return
        item = list(self.model)[which % len(self.model)]
        _, tick = self.model.pop(item)
        self.deadlines.remove(item, tick)
        self.deadlines.remove(item, tick)

    @rule(seconds=st.floats(0, 0.2))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        due = self.deadlines.due(self.now)
        assert len(due) == len(set(due))
        for item in due:
            assert self.model.pop(item)[0] <= self.now, "never early"
        for deadline, _ in self.model.values():
            assert deadline > self.now - 2 * TICK_S, "late by two ticks at most"

    @rule()
    def sleep_until_next(self) -> None:
        at = self.deadlines.next_at()
        if at is not None and at > self.now:
            self.now = at
            due = self.deadlines.due(self.now)
            assert due, "when the time that it named has come, something is due"
            for item in due:
                assert self.model.pop(item)[0] <= self.now, "never early"

    @invariant()
    def holds_what_was_added(self) -> None:
        assert sorted(self.deadlines) == sorted(self.model)
        assert (self.deadlines.next_at() is None) == (not self.model)


DeadlinesMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=50, deadline=None)
TestDeadlines = DeadlinesMachine.TestCase


@given(st.floats(0, 1e12))
def test_an_item_is_due_at_the_time_that_is_named(deadline: float) -> None:
    deadlines: Deadlines[str] = Deadlines()
    deadlines.add("a", deadline)
    at = deadlines.next_at()
    assert at is not None
    assert deadline <= at * (1 + 1e-15)
    assert at <= deadline * (1 + 1e-15) + TICK_S
    assert deadlines.due(at) == ["a"]
    assert deadlines.next_at() is None
