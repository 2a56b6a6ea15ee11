"""The mixed-integer program over all matrices: exact for single devices, a relaxation for devices taken together.

A *group* is some interchangeable devices of a pool. For every group g, member m and batch size b there is a number of
instances y (integer) and their device time f <= y. With rates r and memory needs w:

    T <= sum_{g,b} r f  for every m         sum_{m,b} f <= c_g u_g        sum_{m,b} w y <= usable_g u_g
    sum_{g,b} y >= 1    for every m         sum_b y <= u_g  for every m   u_g <= devices of the group

u_g is the number of devices used. For a group of one device this is the problem itself, co-location included. For a
group of many it forgets which device of the group holds what, so its optimum is a bound; it stays small however many
devices there are. Maximise T with u_g fixed, or minimise sum u_g with T at least a target.

Where T is known to be at most a ceiling, no instance needs more time than the ceiling takes: f <= y ceiling / r. The
relaxation is much tighter with it, and its optimum is the next, lower ceiling. Rows/s and time are measured as
`sharing.Scale` says.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from ensemble_operator.allocation.sharing import Scale
from ensemble_operator.allocation.tables import Bools, Floats, Ints, Tables

# A relaxation that fell by less than this share of itself will not fall much further.
_WORTHWHILE = 1e-3
_MAX_ROUNDS = 20


@dataclass(frozen=True, slots=True)
class Groups:
    """Devices taken together: the pool of each group and how many devices it has."""

    pools: Ints
    devices: Ints

    @classmethod
    def pooled(cls, tables: Tables) -> Groups:
        """One group a pool."""
        return cls(np.arange(len(tables.pools)), np.array([len(pool.devices) for pool in tables.pools]))

    @classmethod
    def single(cls, tables: Tables) -> Groups:
        """One group a device, in the order of the problem."""
        return cls(tables.pool_of, np.ones(len(tables.pool_of), dtype=np.int64))


@dataclass(frozen=True, slots=True)
class Limits:
    """When to stop. `integral` false solves the linear relaxation. A node limit makes the result repeatable."""

    integral: bool = True
    time_s: float = 10.0
    nodes: int = 1_000_000
    relative_gap: float = 1e-4


@dataclass(frozen=True, slots=True)
class Assignment:
    """What the program found. `bound` is proven for the objective: at most T, or at least so many devices.

    `instances` and `times` have shape (groups, members, levels), `used` (groups); all None when nothing was found in
    time. `rows_per_s` is then 0. `complete` says that no limit cut the solution short, so that it is repeatable.
    """

    complete: bool
    bound: float
    rows_per_s: float
    instances: Floats | None
    times: Floats | None
    used: Floats | None


class _Columns:
    """Where the variables are: y and f of every cell, u and z of every group, T. z says that a device is shared."""

    def __init__(self, tables: Tables, groups: Groups) -> None:
        self.rates = tables.rates[groups.pools]
        self.needs = tables.needs[groups.pools]
        self.cells = np.argwhere(self.rates > 0)
        self.group, self.member, self.level = self.cells.T
        count, self.groups = len(self.cells), len(groups.pools)
        self.members = tables.member_count
        self.y = np.arange(count)
        self.f = count + np.arange(count)
        self.u = 2 * count + np.arange(self.groups)
        self.z = self.u + self.groups
        self.total = int(self.z[-1]) + 1
        self.count = self.total + 1

    def rows(self, number: int, *entries: tuple[Ints, Ints, Floats | float]) -> csr_array:
        """A matrix of `number` rows from triples (row, column, value)."""
        at_row = np.concatenate([row for row, _, _ in entries])
        at_column = np.concatenate([column for _, column, _ in entries])
        values = np.concatenate([np.broadcast_to(value, row.shape) for row, _, value in entries])
        return csr_array((values, (at_row, at_column)), shape=(number, self.count))


def most_rows_per_s(tables: Tables, groups: Groups, limits: Limits, ceiling_rows_per_s: float = np.inf) -> Assignment:
    """The largest throughput of the groups' devices, all of which may be used. The ceiling is one known before."""
    return _solve(tables, groups, limits, None, ceiling_rows_per_s)


def relaxed(tables: Tables, groups: Groups) -> Assignment:
    """The linear relaxation, with ceilings that are lowered as long as that helps."""
    limits = Limits(integral=False)
    found = most_rows_per_s(tables, groups, limits)
    for _ in range(_MAX_ROUNDS):
        lower = most_rows_per_s(tables, groups, limits, found.bound)
        if not lower.bound < found.bound * (1 - _WORTHWHILE):
            break
        found = lower
    return found


def fewest_devices(
    tables: Tables, groups: Groups, limits: Limits, target_rows_per_s: float, at_least: int = 0
) -> Assignment:
    """The fewest devices, but `at_least` so many, with at least a throughput.

    `bound` is infinite if even all are too few.
    """
    return _solve(tables, groups, limits, target_rows_per_s, target_rows_per_s, at_least)


def _solve(
    tables: Tables,
    groups: Groups,
    limits: Limits,
    target_rows_per_s: float | None,
    ceiling_rows_per_s: float,
    at_least: int = 0,
) -> Assignment:
    columns = _Columns(tables, groups)
    if not (columns.rates > 0).any(axis=(0, 2)).all():
        return Assignment(True, 0.0 if target_rows_per_s is None else np.inf, 0.0, None, None, None)
    scale = Scale.of(columns.rates.swapaxes(1, 2))
    own = scale.times[columns.member]
    factors = np.array([pool.colocation for pool in tables.pools])[groups.pools]
    shares = (groups.devices == 1) & (factors != 1)
    cost, lower, upper = np.zeros(columns.count), np.zeros(columns.count), np.full(columns.count, np.inf)
    upper[columns.y] = groups.devices[columns.group]
    upper[columns.f] = groups.devices[columns.group] / own
    upper[columns.u] = groups.devices
    upper[columns.z] = shares
    if target_rows_per_s is None:
        lower[columns.u] = groups.devices
        cost[columns.total] = -1
    else:
        lower[columns.total] = target_rows_per_s / scale.rows_per_s
        cost[columns.u] = 1
    whole = np.zeros(columns.count)
    whole[columns.y] = whole[columns.u] = whole[columns.z] = limits.integral
    found = milp(
        cost,
        integrality=whole,
        bounds=Bounds(lower, upper),
        constraints=[
            *_throughput(columns, scale, ceiling_rows_per_s),
            *_devices(tables, groups, columns),
            *_sharing(columns, own, factors, shares),
            LinearConstraint(columns.rows(1, (np.zeros_like(columns.u), columns.u, 1.0)), lb=at_least),
        ],
        options={"time_limit": limits.time_s, "node_limit": limits.nodes, "mip_rel_gap": limits.relative_gap},
    )
    return _assignment(columns, found, scale, target_rows_per_s)


def _throughput(columns: _Columns, scale: Scale, ceiling_rows_per_s: float) -> list[LinearConstraint]:
    """Every member answers all rows and has an instance; instances have no more time than devices."""
    members, c = np.arange(columns.members), columns
    rates, own = c.rates[c.group, c.member, c.level], scale.times[c.member]
    answered = c.rows(
        c.members, (c.member, c.f, rates * own / scale.rows_per_s), (members, np.full(c.members, c.total), -1.0)
    )
    placed = c.rows(c.members, (c.member, c.y, 1.0))
    most_time = np.minimum(1.0, ceiling_rows_per_s / rates)
    timed = c.rows(len(c.y), (c.y, c.y, most_time), (c.y, c.f, -own))
    return [LinearConstraint(answered, lb=0), LinearConstraint(placed, lb=1), LinearConstraint(timed, lb=0)]


def _devices(tables: Tables, groups: Groups, columns: _Columns) -> list[LinearConstraint]:
    """Memory of the devices used, and one instance of a member on a device at most."""
    c = columns
    usable = np.array([pool.usable_bytes for pool in tables.pools], dtype=np.float64)[groups.pools].clip(min=1)
    shares = c.needs[c.group, c.member, c.level] / usable[c.group]
    every = np.arange(c.groups)
    memory = c.rows(c.groups, (c.group, c.y, shares), (every, c.u, -1.0))
    pairs = np.arange(c.groups * c.members)
    apart = c.rows(len(pairs), (c.group * c.members + c.member, c.y, 1.0), (pairs, c.u[pairs // c.members], -1.0))
    return [LinearConstraint(memory, ub=0), LinearConstraint(apart, ub=0)]


def _sharing(columns: _Columns, own: Floats, factors: Floats, shares: Bools) -> list[LinearConstraint]:
    """Device time: the class's co-location factor for a device known to be shared, else the most it can be.

    `own` is what the time of every cell is measured in.
    """
    c, every = columns, np.arange(columns.groups)
    alone = np.where(shares, 1.0, np.maximum(factors, 1.0))
    gain = np.where(shares, factors - 1, 0.0)
    time = c.rows(c.groups, (c.group, c.f, own), (every, c.u, -alone), (every, c.z, -gain))
    # z must be 1 for several instances where sharing costs time, and may be 1 only for several where it gains.
    at_most_one = c.rows(c.groups, (c.group, c.y, 1.0), (every, c.z, -float(c.members)))
    at_least_two = c.rows(c.groups, (c.group, c.y, 1.0), (every, c.z, -2.0))
    upper = np.where(shares & (factors < 1), 1.0, np.inf)
    return [LinearConstraint(time, ub=0), LinearConstraint(at_most_one, ub=upper), LinearConstraint(at_least_two, lb=0)]


def _assignment(columns: _Columns, found: object, scale: Scale, target_rows_per_s: float | None) -> Assignment:
    status, solution = found.status, found.x  # type: ignore[attr-defined]
    dual = getattr(found, "mip_dual_bound", None)
    proven = found.fun if dual is None and status == 0 else dual  # type: ignore[attr-defined]
    if target_rows_per_s is None:
        bound = np.inf if proven is None else -proven * scale.rows_per_s
    else:
        bound = np.inf if status == 2 else 0.0 if proven is None else proven
    if solution is None:
        return Assignment(status != 1, float(bound), 0.0, None, None, None)
    shape = columns.rates.shape
    instances, times = np.zeros(shape), np.zeros(shape)
    instances[tuple(columns.cells.T)] = solution[columns.y]
    times[tuple(columns.cells.T)] = solution[columns.f] * scale.times[columns.member]
    reached = float(solution[columns.total] * scale.rows_per_s)
    return Assignment(status != 1, float(bound), reached, instances, times, solution[columns.u])
