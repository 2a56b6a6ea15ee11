"""Whether the members fit on the devices at all, as a program: for when worst-fit decreasing finds no room.

Every member once, where and with the batch size that takes least memory: x(d, m) is 1 for one device d of each m, and
sum_m w(d, m) x(d, m) <= usable_d. Nothing is optimised, so the first solution ends the search, and it is the same
however fast the machine: a limit decides only whether there is one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from ensemble_operator.allocation.matrix import Matrix
from ensemble_operator.allocation.memory import is_feasible
from ensemble_operator.allocation.problem import Problem

# Devices x members up to which a solution within seconds can be hoped for.
MAX_PLACES = 10_000
# With it, what is given up is mostly the same on any machine.
MAX_NODES = 20_000


@dataclass(frozen=True, slots=True)
class Packing:
    """A matrix; without one it is proven that there is none, or `undecided` says what did not suffice to find out."""

    matrix: Matrix | None
    undecided: str = ""


def packed(problem: Problem, time_s: float) -> Packing:
    """A feasible matrix with one instance of every member, looked for so long."""
    tables = problem.tables
    needs = np.where(tables.rates > 0, tables.needs, np.inf)[tables.pool_of]
    level = needs.argmin(axis=2)
    least = needs.min(axis=2)
    if not np.isfinite(least).any(axis=0).all():
        return Packing(None)
    device, member = np.nonzero(np.isfinite(least))
    if len(device) > MAX_PLACES:
        return Packing(None, f"{len(device)} possible places are too many to try")
    place = np.arange(len(device))
    usable = np.array([pool.usable_bytes for pool in tables.pools], dtype=np.float64)[tables.pool_of].clip(min=1)
    share = least[device, member] / usable[device]
    once = csr_array((np.ones(len(place)), (member, place)), shape=(least.shape[1], len(place)))
    room = csr_array((share, (device, place)), shape=(least.shape[0], len(place)))
    found = milp(
        np.zeros(len(place)),
        integrality=np.ones(len(place)),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(once, 1, 1), LinearConstraint(room, ub=1)],
        options={"time_limit": time_s, "node_limit": MAX_NODES},
    )
    if found.status == 2:
        return Packing(None)
    given_up = Packing(None, f"no placement was found in {time_s:g} s or {MAX_NODES:,} steps of the program")
    if found.x is None:
        return given_up
    chosen = found.x > 0.5
    sizes = np.zeros(least.shape, dtype=np.int64)
    sizes[device[chosen], member[chosen]] = np.asarray(tables.sizes)[level[device[chosen], member[chosen]]]
    matrix = Matrix.of(problem, sizes)
    # The solver's tolerance may be a few bytes more than there are.
    return Packing(matrix) if is_feasible(problem, matrix) else given_up
