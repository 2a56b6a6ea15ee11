"""How fast this processor is just now: shared machines compute a third as fast at one hour as at another."""

from __future__ import annotations

import statistics
import time

ADDITIONS = 1_000_000
# What these additions take on the machine that limits in seconds are meant for.
REFERENCE_S = 0.03


def slowness() -> float:
    """How many times longer than there Python computes here and now; at least 1: a faster machine gets no less time."""
    return max(1.0, statistics.median(_additions_s() for _ in range(5)) / REFERENCE_S)


def _additions_s() -> float:
    began = time.process_time()
    total = 0
    for number in range(ADDITIONS):
        total += number
    return time.process_time() - began
