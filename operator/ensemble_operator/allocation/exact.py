"""The optimum by mixed-integer programming over single devices, where that is small enough to solve."""

from __future__ import annotations

import numpy as np

from ensemble_operator.allocation.matrix import Matrix
from ensemble_operator.allocation.problem import Problem
from ensemble_operator.allocation.program import Groups, Limits, most_rows_per_s
from ensemble_operator.allocation.throughput import rows_per_s

# Possible instances (devices x members x batch sizes) up to which a solution within seconds can be hoped for.
MAX_CELLS = 6_000


def exact(problem: Problem, limits: Limits, ceiling_rows_per_s: float = np.inf) -> tuple[Matrix | None, float]:
    """The best matrix that the program finds within its limits, and the bound that it proves.

    The matrix is None, and the bound infinite, where the program is too large; the matrix alone is None where there is
    none or the time did not suffice.
    """
    tables = problem.tables
    if not is_small(problem):
        return None, np.inf
    found = most_rows_per_s(tables, Groups.single(tables), limits, ceiling_rows_per_s)
    if found.instances is None:
        return None, found.bound
    levels = np.where(found.instances.max(axis=2) > 0.5, found.instances.argmax(axis=2), 0)
    matrix = Matrix.of(problem, np.asarray(tables.sizes)[levels])
    return (matrix if rows_per_s(problem, matrix) > 0 else None), found.bound


def is_small(problem: Problem) -> bool:
    """Whether the program over single devices is worth trying."""
    tables = problem.tables
    return int(np.count_nonzero(tables.rates[tables.pool_of])) <= MAX_CELLS
