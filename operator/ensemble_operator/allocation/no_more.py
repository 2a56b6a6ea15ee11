"""Why a plan has no further instance: of the members that limit it, and on the devices that it leaves unused.

What another instance could bring is bounded by prices (see `throughput`): so much more than now its device would earn.
"""

from __future__ import annotations

import numpy as np

from ensemble_operator.allocation.errors import MIB
from ensemble_operator.allocation.matrix import Matrix
from ensemble_operator.allocation.memory import free_bytes, levels_of
from ensemble_operator.allocation.problem import Problem
from ensemble_operator.allocation.tables import Floats, Ints
from ensemble_operator.allocation.throughput import earnings, time_limits

# Less than this share of the throughput is nothing.
_NOTHING = 1e-6


class NoMore:
    """The reasons of one matrix. `prices` are the members', `rows_per_s` the throughput."""

    def __init__(self, problem: Problem, matrix: Matrix, prices: Floats, rows_per_s: float) -> None:
        self._problem, self._prices, self._rows_per_s = problem, prices, rows_per_s
        tables = problem.tables
        self._levels = levels_of(problem, matrix)
        self._free = free_bytes(problem, matrix)
        able = tables.rates > 0
        # Devices that hold the same are asked about once: the first of them stands for them.
        rows = np.column_stack([tables.pool_of, self._levels])
        _, first, inverse = np.unique(rows, axis=0, return_index=True, return_inverse=True)
        self._like = first[inverse.ravel()]
        self._gains: dict[tuple[int, int], float] = {}
        # By pool and member: the least bytes of an instance, and its batch size.
        needs = np.where(able, tables.needs, np.inf)
        self._needs, self._least = needs.min(axis=2), needs.argmin(axis=2)

    def of_member(self, member: int) -> str:
        """Why the member has no instance on another device."""
        tables, name = self._problem.tables, self._problem.members[member].name
        needs = self._needs[tables.pool_of, member]
        others = np.unique(self._like[(self._levels[:, member] == 0) & np.isfinite(needs)])
        if not others.size:
            return f"{name}: has an instance on every device that can run it"
        lacking = needs[others] - self._free[others]
        nearest = int(others[lacking.argmin()])
        if lacking.min() > 0:
            size = tables.sizes[self._least[tables.pool_of[nearest], member]]
            return (
                f"{name}: no other device has room: it needs {_mib_up(needs[nearest])} MiB at batch size {size}, and "
                f"{self._problem.devices[nearest].name}, which lacks least, has {_mib(self._free[nearest])} MiB free"
            )
        roomy = others[lacking <= 0]
        gains = np.array([self._gain(device, member) for device in roomy])
        device = self._problem.devices[int(roomy[gains.argmax()])].name
        if gains.max() <= _NOTHING * self._rows_per_s:
            return f"{name}: {device} has room for it, but its time is worth as much to what it holds"
        return f"{name}: {device} has room for it, which brings at most {gains.max():.3g} rows/s more"

    def of_unused(self, device: int) -> str:
        """Why nothing is on the device."""
        needs = self._needs[self._problem.tables.pool_of[device]]
        if not np.isfinite(needs).any():
            return "unused: no member can run here"
        limiting = np.flatnonzero((self._prices > 0) & np.isfinite(needs))
        if not limiting.size:
            return "unused: no member that limits the ensemble can run here"
        gain = max(self._gain(device, int(member)) for member in limiting)
        return f"unused: an instance here brings at most {gain:.3g} rows/s more"

    def _gain(self, device: int, member: int) -> float:
        """Rows/s that the throughput could rise by at most with the member on a device that has room for it."""
        key = int(self._like[device]), member
        if key not in self._gains:
            self._gains[key] = self._computed_gain(*key)
        return self._gains[key]

    def _computed_gain(self, device: int, member: int) -> float:
        tables = self._problem.tables
        pool, row = tables.pool_of[device], self._levels[device]
        rates = tables.rates[pool, np.arange(len(row)), row]
        fits = np.flatnonzero((tables.rates[pool, member] > 0) & (tables.needs[pool, member] <= self._free[device]))
        more = rates.copy()
        more[member] = tables.rates[pool, member, fits].max(initial=0.0)
        before, after = self._earned(pool, rates), self._earned(pool, more)
        return after - before

    def _earned(self, pool: Ints, rates: Floats) -> float:
        limits = time_limits(self._problem.tables, np.array([pool]), rates[None, :])
        return float(earnings(rates[None, :], limits, self._prices)[0])


def _mib(size: float) -> int:
    return int(max(size, 0) // MIB)


def _mib_up(size: float) -> int:
    return -int(-size // MIB)
