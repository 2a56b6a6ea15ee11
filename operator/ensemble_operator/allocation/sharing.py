"""How the lines of a connected part of a matrix share their time: a linear program, and its dual for the prices.

With n_d devices in line d, c_d the time that one of them has, and y, w, v the prices of a row, of a line's time and of
an instance's, the dual of the program in `throughput` is

    min sum_d n_d (c_d w_d + sum_m v(d, m))   such that   w_d + v(d, m) >= r(d, m) y_m,   sum_m y_m = 1,   all >= 0

A search needs it of every neighbour, and the time itself of few, so each is solved without the other. v matters only
where instances that share a device overlap (c_d > 1).

Speeds may differ by many orders of magnitude, and a solver's tolerances are absolute: a member's time is counted in
what its fastest cell needs for the rows of the slowest member, whose fastest cell is the measure of rows/s.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, OptimizeResult, milp
from scipy.sparse import csr_array

from ensemble_operator.allocation.errors import NotSolved
from ensemble_operator.allocation.tables import Floats, Ints


@dataclass(frozen=True, slots=True)
class Scale:
    """The measures of a program: `rows_per_s` of throughput, and of each member its time (1 for the slowest)."""

    rows_per_s: float
    times: Floats

    @classmethod
    def of(cls, rates: Floats) -> Scale:
        """The scale of rates of shape (..., members), each member with one above 0."""
        fastest = rates.reshape(-1, rates.shape[-1]).max(axis=0)
        slowest = float(fastest.min())
        return cls(slowest, slowest / fastest)


def priced(rates: Floats, counts: Ints, limits: Floats) -> tuple[float, Floats]:
    """Rows/s of the part and the price of each member; `rates` (lines, members), `counts` and `limits` (lines).

    Raises NotSolved.
    """
    scale, (lines, members) = Scale.of(rates), rates.shape
    line, member = np.nonzero(rates)
    overlaps = limits[line] > 1
    extra = members + lines + np.cumsum(overlaps) - 1
    worth = -rates[line, member] * scale.times[member] / scale.rows_per_s
    # A row for every cell (y, w and, where instances overlap, v), then the sum; as they are kept, for speed.
    columns = np.stack([member, members + line, extra], axis=1)
    entries = np.stack([worth, np.ones_like(worth), np.ones_like(worth)], axis=1)
    kept = np.stack([np.ones_like(overlaps), np.ones_like(overlaps), overlaps], axis=1)
    ends = np.cumsum(kept.sum(axis=1))
    system = csr_array(
        (
            np.append(entries[kept], scale.times),
            np.append(columns[kept], np.arange(members)),
            np.concatenate([[0], ends, [ends[-1] + members]]),
        ),
        shape=(len(line) + 1, members + lines + int(overlaps.sum())),
    )
    cost = np.concatenate([np.zeros(members), counts * limits, counts[line[overlaps]]])
    lower = np.append(np.zeros(len(line)), 1.0)
    found = _solved(cost, LinearConstraint(system, lb=lower), Bounds(lb=0))
    prices = np.clip(found.x[:members], 0, None) * scale.times
    return float(found.fun * scale.rows_per_s), prices / prices.sum()


def shared(rates: Floats, counts: Ints, limits: Floats) -> Floats:
    """The time that every cell takes at the part's own rows/s, in devices, shape (lines, members).

    Raises NotSolved.
    """
    scale, (lines, members) = Scale.of(rates), rates.shape
    line, member = np.nonzero(rates)
    cell = np.arange(len(line))
    answered = rates[line, member] * scale.times[member] / scale.rows_per_s
    entries = np.concatenate([answered, -np.ones(members), -scale.times[member]])
    at_row = np.concatenate([member, np.arange(members), members + line])
    at_column = np.concatenate([cell, np.full(members, len(cell)), cell])
    system = csr_array((entries, (at_row, at_column)), shape=(members + lines, len(cell) + 1))
    cost = np.zeros(len(cell) + 1)
    cost[-1] = -1
    most = np.where(limits > 1, counts, np.inf)[line] / scale.times[member]
    # No member answers more than the part's rows/s: of equal optima, one without time that nobody needs.
    lower = np.concatenate([np.zeros(members), -counts * limits])
    upper = np.concatenate([np.zeros(members), np.full(lines, np.inf)])
    found = _solved(cost, LinearConstraint(system, lb=lower, ub=upper), Bounds(0, np.append(most, np.inf)))
    times = np.zeros_like(rates)
    times[line, member] = np.clip(found.x[:-1], 0, None) * scale.times[member]
    return times


def _solved(cost: Floats, constraint: LinearConstraint, bounds: Bounds) -> OptimizeResult:
    # `milp` reads its input in half the time of `linprog`. Programs of this size are solved before presolving pays.
    found = milp(cost, bounds=bounds, constraints=constraint, options={"presolve": False})
    if found.status != 0:
        raise NotSolved(f"the linear program of a matrix has no optimum: {found.message}")
    return found
