"""The objective `devices`: the fewest devices whose plan sustains a throughput."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from ensemble_operator.allocation.errors import DoesNotFit, InvalidProblem
from ensemble_operator.allocation.matrix import Matrix
from ensemble_operator.allocation.options import PlanOptions
from ensemble_operator.allocation.problem import Problem
from ensemble_operator.allocation.program import Groups, Limits, fewest_devices
from ensemble_operator.allocation.strategies import Evaluate, Outcome, most
from ensemble_operator.allocation.tables import Ints
from ensemble_operator.allocation.throughput import rows_per_s


def fewest(problem: Problem, options: PlanOptions, evaluate: Evaluate | None = None) -> tuple[Outcome, int]:
    """A plan over the fewest devices that reach the target, and the proven least number of devices.

    The program over pools says how many devices of each pool are needed at least; those listed first are planned, and
    while their plan misses the target, one more is asked for. Where even all devices are too few, the plan is the one
    with the largest throughput, and the least number is one more than there are. Raises DoesNotFit.
    """
    tables, target = problem.tables, options.target_rows_per_s
    groups, limits = Groups.pooled(tables), Limits(time_s=options.time_limit_s)
    tried: list[str] = []
    least, at_least = 0, 1
    while at_least <= len(problem.devices):
        found = fewest_devices(tables, groups, limits, target, at_least)
        if not tried:
            least = _whole(found.bound, len(problem.devices))
            tried.append(f"proven for {target:.6g} rows/s: at least {least} devices")
        if found.used is None:
            break
        used = np.rint(found.used).astype(np.int64)
        outcome = _over(problem, options, evaluate, used)
        tried.append(f"{_listed(problem, used)}: {_verdict(problem, outcome, target)}")
        if outcome is not None and _reached(problem, outcome) >= target:
            return replace(outcome, tried=(*tried, *outcome.tried)), least
        at_least = int(used.sum()) + 1
    outcome = most(problem, options, evaluate)
    missed = f"all {len(problem.devices)} devices: {_verdict(problem, outcome, target)}"
    return replace(outcome, tried=(*tried, missed, *outcome.tried)), least


def _whole(bound: float, devices: int) -> int:
    return math.ceil(bound - 1e-6) if math.isfinite(bound) else devices + 1


def _over(problem: Problem, options: PlanOptions, evaluate: Evaluate | None, used: Ints) -> Outcome | None:
    """The plan over the first devices of each pool, as a matrix over all; None if the members do not fit there."""
    kept = sorted(d for pool, count in zip(problem.tables.pools, used, strict=True) for d in pool.devices[:count])
    part = _part(problem, kept)
    if part is None:
        return None

    def over_all(matrix: Matrix) -> Matrix:
        sizes = np.zeros((len(problem.devices), len(problem.members)), dtype=np.int64)
        sizes[kept] = matrix.sizes
        return Matrix.of(problem, sizes)

    measure = None if evaluate is None else lambda matrix: evaluate(over_all(matrix))
    try:
        outcome = most(part, options, measure, goal_rows_per_s=options.target_rows_per_s)
    except DoesNotFit:
        return None
    return replace(outcome, matrix=over_all(outcome.matrix))


def _part(problem: Problem, kept: list[int]) -> Problem | None:
    """The problem over some of its devices; None if a member has no profile there."""
    devices = tuple(problem.devices[d] for d in kept)
    classes = {d.device_class for d in devices}
    names = {m.name for m in problem.members}
    known = [p for p in problem.profiles if p.device_class in classes and p.member in names]
    sizes = tuple(size for size in problem.batch_sizes if any(p.batch_size == size for p in known))
    try:
        return replace(problem, devices=devices, batch_sizes=sizes)
    except InvalidProblem:
        return None


def _reached(problem: Problem, outcome: Outcome) -> float:
    measured = outcome.measured_rows_per_s
    return rows_per_s(problem, outcome.matrix) if measured is None else measured


def _verdict(problem: Problem, outcome: Outcome | None, target: float) -> str:
    if outcome is None:
        return "the members do not fit"
    reached = _reached(problem, outcome)
    return f"{reached:.6g} rows/s, " + ("enough" if reached >= target else f"{target - reached:.6g} too few")


def _listed(problem: Problem, used: Ints) -> str:
    pools = zip(problem.tables.pools, used, strict=True)
    return " + ".join(f"{count} x {pool.device_class}" for pool, count in pools if count)
