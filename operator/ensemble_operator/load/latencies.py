"""Latencies in a histogram of fixed size: a long run takes no more memory than a short one. Pure."""

from __future__ import annotations

import math

import numpy as np

LEAST_S = 1e-6
# Neighbouring buckets: a percentile is off by at most half of this.
GROWTH = 1.005
_LOG_GROWTH = math.log(GROWTH)
_BUCKETS = math.ceil(math.log(1e10) / _LOG_GROWTH) + 1


class Latencies:
    """Seconds from a microsecond to hours, each counted in a bucket 0.5% wide."""

    def __init__(self) -> None:
        self._counts = [0] * _BUCKETS
        self.count = 0
        self.total_s = 0.0
        self.longest_s = 0.0

    def add(self, latency_s: float) -> None:
        """Count one."""
        bucket = int(math.log(max(latency_s, LEAST_S) / LEAST_S) / _LOG_GROWTH)
        self._counts[min(bucket, _BUCKETS - 1)] += 1
        self.count += 1
        self.total_s += latency_s
        self.longest_s = max(self.longest_s, latency_s)

    def percentile_s(self, percent: float) -> float:
        """The latency that `percent` of them do not exceed; 0 when there is none."""
        if not self.count:
            return 0.0
        rank = max(1, math.ceil(self.count * percent / 100))
        bucket = int(np.searchsorted(np.cumsum(self._counts), rank))
        return min(self.longest_s, LEAST_S * math.exp((bucket + 0.5) * _LOG_GROWTH))
