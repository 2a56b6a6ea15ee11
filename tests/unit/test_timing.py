"""How long batches take, on a machine that is a clock of our own."""

from __future__ import annotations

import math

import pytest

from ensemble_worker.timing import MAX_RUNS, SIZE_S, TURN_S, Run, alone, in_turns


class Machine:
    """Runs batches of any cost; `slower_from_s` on, each takes so many times as long."""

    def __init__(self, slower_from_s: float = math.inf, factor: float = 1.0) -> None:
        self.now = 100.0
        self.runs: list[float] = []
        self._slower_from = self.now + slower_from_s
        self._factor = factor

    def __call__(self) -> float:
        return self.now

    def batch(self, seconds: float) -> Run:
        def run() -> None:
            self.runs.append(seconds)
            self.now += seconds * (self._factor if self.now >= self._slower_from else 1.0)

        return run


def test_alone_is_the_median_for_as_long_as_a_size_has() -> None:
    machine = Machine(slower_from_s=0.9 * SIZE_S, factor=2.0)
    timed = alone(machine.batch(0.01), machine)
    assert timed.latency_s == pytest.approx(0.01)
    assert machine.now - 100.0 == pytest.approx(SIZE_S, abs=0.021)


def test_slow_batches_run_three_times_and_quick_ones_not_for_ever() -> None:
    slow = Machine()
    assert alone(slow.batch(2.0), slow).latency_s == pytest.approx(2.0)
    assert len(slow.runs) == 3
    quick = Machine()
    alone(quick.batch(1e-6), quick)
    assert len(quick.runs) == MAX_RUNS


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.3, 10.0])
@pytest.mark.parametrize(("small_s", "large_s"), [(0.04, 0.3), (1e-4, 5e-4), (0.004, 0.002)])
def test_a_machine_that_has_become_slower_or_faster_changes_nothing(
    small_s: float, large_s: float, factor: float
) -> None:
    first = Machine()
    known_s = alone(first.batch(small_s), first).latency_s
    machine = Machine(slower_from_s=0.0, factor=factor)
    timed = in_turns(machine.batch(large_s), machine.batch(small_s), known_s, machine)
    assert timed.latency_s == pytest.approx(large_s)


def test_neither_does_a_moment_in_the_middle() -> None:
    machine = Machine(slower_from_s=0.6 * SIZE_S, factor=3.0)
    timed = in_turns(machine.batch(0.02), machine.batch(0.01), 0.01, machine)
    assert timed.latency_s == pytest.approx(0.02)


def test_each_has_a_turn_as_long_as_the_other() -> None:
    machine = Machine()
    in_turns(machine.batch(4e-4), machine.batch(1e-4), 1e-4, machine)
    small, large = machine.runs.count(1e-4) * 1e-4, machine.runs.count(4e-4) * 4e-4
    assert small == pytest.approx(large, rel=0.1)
    assert small + large == pytest.approx(SIZE_S, abs=2 * TURN_S + 1e-3)


def test_large_batches_have_three_turns_with_one_each() -> None:
    machine = Machine()
    in_turns(machine.batch(1.0), machine.batch(0.3), 0.3, machine)
    assert machine.runs == [0.3, 1.0] * 3


def test_the_spread_is_that_of_what_ran() -> None:
    steady = Machine()
    assert alone(steady.batch(0.01), steady).spread == pytest.approx(0.0, abs=1e-9)
    shaken = Machine(slower_from_s=SIZE_S / 2, factor=2.0)
    assert in_turns(shaken.batch(0.01), shaken.batch(0.01), 0.01, shaken).spread > 0.5
