"""What a matrix is worth: the rows/s of the whole ensemble, by a linear program, and the prices that explain it.

An instance (device d, member m, batch b) answers at most r(d, m, b) rows/s when it has the device to itself. With
f(d, m) the share of d's time that m gets, the throughput of the ensemble is

    max T   such that   sum_d r(d, m) f(d, m) >= T       for every member m        (price: y_m)
                        sum_m f(d, m) <= c_d, 0 <= f <= 1  for every device d

where c_d is 1 for a single instance and the class's co-location factor for several. By duality, for *any* prices
y >= 0 that sum to 1, T is at most the sum over devices of what a device can earn: the best use of its time when a row
of member m is worth y_m. So the prices of one matrix bound every other one, without solving it (see `greedy`).

Devices that hold the same row share one line of the program. Parts of the matrix that share no member are solved
apart, most of them in closed form; the slowest part is the bottleneck.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from ensemble_operator.allocation.layout import Layout, layout_of, line_rates
from ensemble_operator.allocation.matrix import Matrix
from ensemble_operator.allocation.memory import is_feasible
from ensemble_operator.allocation.problem import Problem
from ensemble_operator.allocation.sharing import priced, shared
from ensemble_operator.allocation.tables import Bools, Floats, Ints, Tables


@dataclass(frozen=True, slots=True)
class Solution:
    """The optimum of the program. `prices` and `reach` have shape (members).

    `prices` sum to 1 and are 0 off the bottleneck. `reach` has, for every member, the rows/s that its part of the
    matrix could answer; its least value is `rows_per_s`.
    """

    rows_per_s: float
    prices: Floats
    reach: Floats


def rows_per_s(problem: Problem, matrix: Matrix) -> float:
    """Rows/s that pass all members; 0 for an infeasible matrix. Raises NotSolved."""
    if not is_feasible(problem, matrix):
        return 0.0
    return solve(problem.tables, layout_of(problem, matrix)).rows_per_s


Memo = dict[tuple[bytes, bytes, bytes], tuple[float, Floats]]


def solve(tables: Tables, layout: Layout, memo: Memo | None = None) -> Solution:
    """The throughput of a layout whose members all have an instance; otherwise 0 rows/s and no prices.

    `memo` remembers the parts that needed a program: neighbours in a search share most of theirs. Raises NotSolved.
    """
    pools, levels, counts = layout.arrays()
    rates = line_rates(tables, pools, levels)
    limits = time_limits(tables, pools, rates)
    members = rates.shape[1]
    reach, prices = np.zeros(members), np.zeros(members)
    if not (rates > 0).any(axis=0).all():
        return Solution(0.0, prices, reach)
    slowest = np.inf
    for line_part, member_part in _parts(rates > 0):
        part = np.ix_(line_part, member_part)
        given = rates[part], counts[line_part], limits[line_part]
        rate, part_prices = _solve_part(*given, {} if memo is None else memo)
        reach[member_part] = rate
        if rate < slowest:
            slowest = rate
            prices[:] = 0
            prices[member_part] = part_prices
    return Solution(float(slowest), prices, reach)


def times_of(tables: Tables, layout: Layout) -> Floats:
    """The device time that each line's instances need for their part's own rows/s, in devices: (lines, members).

    Raises NotSolved.
    """
    pools, levels, counts = layout.arrays()
    rates = line_rates(tables, pools, levels)
    limits, times = time_limits(tables, pools, rates), np.zeros_like(rates)
    for line_part, member_part in _parts(rates > 0):
        part = np.ix_(line_part, member_part)
        times[part] = _times_of_part(rates[part], counts[line_part], limits[line_part])
    return times


def time_limits(tables: Tables, pools: Ints, rates: Floats) -> Floats:
    """The device time that a device's instances get together, in devices, for every line."""
    factors = np.array([pool.colocation for pool in tables.pools])[pools]
    return np.where(np.count_nonzero(rates, axis=-1) > 1, factors, 1.0)


def earnings(rates: Floats, limits: Floats, prices: Floats) -> Floats:
    """What one device of each line earns at best when a row of member m is worth prices[m]; rates (..., members)."""
    worth = rates * prices
    if (limits <= 1).all():
        return np.asarray(limits * worth.max(axis=-1))
    best_first = -np.sort(-worth, axis=-1)
    hours = np.clip(limits[..., None] - np.arange(worth.shape[-1]), 0, 1)
    return np.asarray((best_first * hours).sum(axis=-1))


def _parts(placed: Bools) -> list[tuple[Ints, Ints]]:
    """Lines and members of the parts of a matrix that share neither; lines that hold nothing are in none."""
    lines, members = placed.shape
    at_line, at_member = np.nonzero(placed)
    graph = coo_array((np.ones(len(at_line)), (at_line, lines + at_member)), shape=(lines + members,) * 2)
    count, labels = connected_components(graph.tocsr(), directed=False)
    found = ((np.flatnonzero(labels[:lines] == i), np.flatnonzero(labels[lines:] == i)) for i in range(count))
    return [(line_part, member_part) for line_part, member_part in found if member_part.size]


def _solve_part(rates: Floats, counts: Ints, limits: Floats, memo: Memo) -> tuple[float, Floats]:
    """Rows/s and prices of a connected part."""
    if rates.shape[1] == 1:
        return float(counts @ rates[:, 0]), np.ones(1)
    if rates.shape[0] == 1 and limits[0] <= 1:
        cost = 1 / rates[0]
        return float(counts[0] * limits[0] / cost.sum()), cost / cost.sum()
    key = rates.tobytes(), counts.tobytes(), limits.tobytes()
    if key not in memo:
        memo[key] = priced(rates, counts, limits)
    return memo[key]


def _times_of_part(rates: Floats, counts: Ints, limits: Floats) -> Floats:
    """Device time in a connected part."""
    if rates.shape[1] == 1:
        return np.asarray(counts[:, None], dtype=np.float64)
    if rates.shape[0] == 1 and limits[0] <= 1:
        cost = 1 / rates[0]
        return np.asarray(counts[0] * limits[0] * cost / cost.sum())[None, :]
    return shared(rates, counts, limits)
