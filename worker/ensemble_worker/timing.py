"""How long a batch takes: of one size alone, or in turns with a smaller one whose time is known.

A machine that does other things may be a fifth slower for a second, which is more than what most batch sizes differ by.
So two sizes are compared as they meet the same moments, and their times are told as if all moments were the first
one's.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

MIN_RUNS, MAX_RUNS = 3, 1000
SIZE_S = 0.25
# How long, at least, one size has its turn: its first batch finds the caches as the other one left them.
TURN_S = 0.005

Run = Callable[[], object]
Clock = Callable[[], float]


class Timing(NamedTuple):
    """Seconds of a batch; `spread` is from the 10th to the 90th percentile of all that ran, over their median."""

    latency_s: float
    spread: float


def alone(run: Run, clock: Clock = time.perf_counter) -> Timing:
    """Repeat a batch for a quarter of a second, at least three times: the median."""
    latencies: list[float] = []
    deadline = clock() + SIZE_S
    while len(latencies) < MIN_RUNS or (clock() < deadline and len(latencies) < MAX_RUNS):
        latencies.append(_timed(run, clock))
    return Timing(statistics.median(latencies), _spread(latencies))


def in_turns(run: Run, known: Run, known_s: float, clock: Clock = time.perf_counter) -> Timing:
    """Repeat both, as long in all, with at least three turns each: `known_s`, times the median of their ratios."""
    latencies: list[float] = []
    ratios: list[float] = []
    deadline = clock() + SIZE_S
    while len(ratios) < MIN_RUNS or clock() < deadline:
        before, now = _turn(known, clock), _turn(run, clock)
        ratios.append(statistics.median(now) / statistics.median(before))
        latencies += now
    return Timing(known_s * statistics.median(ratios), _spread(latencies))


def _turn(run: Run, clock: Clock) -> list[float]:
    deadline = clock() + TURN_S
    latencies = [_timed(run, clock)]
    while clock() < deadline:
        latencies.append(_timed(run, clock))
    return latencies


def _timed(run: Run, clock: Clock) -> float:
    before = clock()
    run()
    return clock() - before


def _spread(latencies: list[float]) -> float:
    low, middle, high = np.percentile(latencies, [10, 50, 90])
    return float((high - low) / middle)
