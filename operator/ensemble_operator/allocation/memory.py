"""Feasibility: on every device the instances fit under the capacity less headroom and overhead.

A matrix whose members all have an instance and that fits is feasible; the two are asked apart, because a search
passes through matrices that lack a member.
"""

from __future__ import annotations

import numpy as np

from ensemble_operator.allocation.errors import MIB
from ensemble_operator.allocation.matrix import Matrix
from ensemble_operator.allocation.problem import Problem
from ensemble_operator.allocation.tables import Bools, Floats, Ints


def levels_of(problem: Problem, matrix: Matrix) -> Ints:
    """The matrix in levels (see `tables`); -1 where a batch size is none of the problem's."""
    sizes = np.asarray(problem.tables.sizes)
    levels = np.searchsorted(sizes, matrix.sizes).clip(max=len(sizes) - 1)
    return np.where(sizes[levels] == matrix.sizes, levels, -1)


def used_bytes(problem: Problem, matrix: Matrix) -> Floats:
    """Bytes that the instances add on every device; infinite where an instance has no profile."""
    tables, levels = problem.tables, levels_of(problem, matrix)
    members = np.arange(len(problem.members))
    needs = tables.needs[tables.pool_of[:, None], members[None, :], levels]
    return np.asarray(np.where(levels < 0, np.inf, needs).sum(axis=1))


def free_bytes(problem: Problem, matrix: Matrix) -> Floats:
    """Bytes left on every device; negative where too much is placed."""
    usable = np.array([d.usable_bytes(problem.headroom) for d in problem.devices], dtype=np.float64)
    return usable - used_bytes(problem, matrix)


def fits(problem: Problem, matrix: Matrix) -> bool:
    """Whether no device holds more than it can. An empty device fits even where the overhead alone is too much."""
    return not overfull(problem, matrix).any()


def overfull(problem: Problem, matrix: Matrix) -> Bools:
    """For every device whether it holds more than it can."""
    return np.asarray((free_bytes(problem, matrix) < 0) & matrix.sizes.any(axis=1))


def is_feasible(problem: Problem, matrix: Matrix) -> bool:
    """Whether every member has an instance and no device holds more than it can."""
    return bool(matrix.sizes.any(axis=0).all()) and fits(problem, matrix)


def faults(problem: Problem, matrix: Matrix) -> tuple[str, ...]:
    """What makes a matrix infeasible, one sentence each; empty when it is feasible."""
    unplaced = np.flatnonzero(~matrix.sizes.any(axis=0))
    found = [f"member {matrix.members[member]!r} has no instance" for member in unplaced]
    free = free_bytes(problem, matrix)
    for device in np.flatnonzero(overfull(problem, matrix)):
        name = matrix.devices[device]
        if np.isinf(free[device]):
            found.append(f"device {name!r} holds an instance that has no profile there")
        else:
            found.append(f"device {name!r} holds {-int(free[device] // MIB)} MiB too much")
    return tuple(found)
