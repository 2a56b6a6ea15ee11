"""The objective `devices`: the fewest devices whose plan sustains a throughput."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from ensemble_operator.allocation.errors import DoesNotFit, InvalidProblem
from ensemble_operator.allocation.matrix import Matrix
from ensemble_operator.allocation.options import PlanOptions
from ensemble_operator.allocation.problem import Problem
from ensemble_operator.allocation.program import Assignment, Groups, Limits, fewest_devices
from ensemble_operator.allocation.strategies import Evaluate, Goal, Outcome, most
from ensemble_operator.allocation.tables import Ints
from ensemble_operator.allocation.throughput import rows_per_s

# A trial has this share of a plan's descents, and those of clusters with many devices fewer still.
_TRIAL = 0.6
_MOST_DESCENTS_X_DEVICES = 1000
# Between a number that is too small and one that is enough.
_HALVINGS = 3
# Where the members do not even fit, so large a share of devices more is asked for.
_WITHOUT_A_PLAN = 0.1


def fewest(problem: Problem, options: PlanOptions, evaluate: Evaluate | None = None) -> tuple[Outcome, int]:
    """A plan over the fewest devices that reach the target, and the proven least number of devices.

    The program over pools says how many devices of each pool are needed at least; those listed first are planned. A
    plan that misses the target says in proportion how many more to ask for, and between too few and enough the number
    is halved. Where even all devices are too few, the plan is the one with the largest throughput, and the least
    number is one more than there are. Raises DoesNotFit.
    """
    asked = _Asked(problem, options, evaluate)
    least = asked.least()
    enough, too_few, at_least = None, least - 1, 1
    while at_least <= len(problem.devices) and (trial := asked.trial(at_least)) is not None:
        if trial.reaches:
            enough = trial
            break
        too_few = trial.devices
        at_least = too_few + max(1, math.ceil(too_few * min(1.0, trial.missing)))
        # All of them are tried before more than all are asked for.
        at_least = min(at_least, len(problem.devices)) if too_few < len(problem.devices) else at_least
    for _ in range(_HALVINGS):
        if enough is None or enough.devices - too_few <= 1:
            break
        trial = asked.trial((enough.devices + too_few) // 2)
        if trial is None or trial.devices >= enough.devices:
            break
        enough, too_few = (trial, too_few) if trial.reaches else (enough, trial.devices)
    if enough is not None and enough.outcome is not None:
        return replace(enough.outcome, tried=(*asked.tried, *enough.outcome.tried)), least
    outcome = most(problem, options, evaluate)
    missed = f"all {len(problem.devices)} devices: {_verdict(problem, outcome, options.target_rows_per_s)}"
    return replace(outcome, tried=(*asked.tried, missed, *outcome.tried)), least


@dataclass(frozen=True, slots=True)
class _Trial:
    """A plan over so many devices; `missing` is the share of the target that it lacks, beyond what it has."""

    devices: int
    outcome: Outcome | None
    missing: float

    @property
    def reaches(self) -> bool:
        return self.missing <= 0


class _Asked:
    """The question, and what has been tried of it."""

    def __init__(self, problem: Problem, options: PlanOptions, evaluate: Evaluate | None) -> None:
        self._problem, self._evaluate = problem, evaluate
        self._options = replace(options, max_iterations=_descents(options, len(problem.devices)))
        self._groups, self._limits = Groups.pooled(problem.tables), Limits(time_s=options.time_limit_s)
        self.tried: list[str] = []

    def least(self) -> int:
        """The proven least number of devices; one more than there are if all are too few."""
        target = self._options.target_rows_per_s
        found = fewest_devices(self._problem.tables, self._groups, self._limits, target)
        least = math.ceil(found.bound - 1e-6) if math.isfinite(found.bound) else len(self._problem.devices) + 1
        self.tried.append(f"proven for {target:.6g} rows/s: at least {least} devices")
        return least

    def trial(self, at_least: int) -> _Trial | None:
        """The plan over the devices that the program takes when it must take so many; None if none are enough."""
        problem, target = self._problem, self._options.target_rows_per_s
        found = fewest_devices(problem.tables, self._groups, self._limits, target, at_least)
        if found.used is None:
            return None
        used = np.rint(found.used).astype(np.int64)
        outcome = self._over(found, used)
        self.tried.append(f"{_listed(problem, used)}: {_verdict(problem, outcome, target)}")
        reached = _reached(problem, outcome) if outcome is not None else 0.0
        return _Trial(int(used.sum()), outcome, target / reached - 1 if reached else _WITHOUT_A_PLAN)

    def _over(self, found: Assignment, used: Ints) -> Outcome | None:
        """The plan over the first devices of each pool, as a matrix over all; None if the members do not fit there."""
        problem, evaluate = self._problem, self._evaluate
        kept = sorted(d for pool, count in zip(problem.tables.pools, used, strict=True) for d in pool.devices[:count])
        part = _part(problem, kept)
        if part is None:
            return None

        def over_all(matrix: Matrix) -> Matrix:
            sizes = np.zeros((len(problem.devices), len(problem.members)), dtype=np.int64)
            sizes[kept] = matrix.sizes
            return Matrix.of(problem, sizes)

        measure = None if evaluate is None else lambda matrix: evaluate(over_all(matrix))
        goal = Goal(self._options.target_rows_per_s, _of_part(problem, part, found, used))
        try:
            outcome = most(part, self._options, measure, goal)
        except DoesNotFit:
            return None
        return replace(outcome, matrix=over_all(outcome.matrix))


def _descents(options: PlanOptions, devices: int) -> int:
    """Descents of a trial; the paper's greedy counts steps, of which it needs all."""
    if options.strategy == "greedy-paper" or not options.max_iterations:
        return options.max_iterations
    return max(1, min(math.ceil(options.max_iterations * _TRIAL), _MOST_DESCENTS_X_DEVICES // devices))


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


def _of_part(problem: Problem, part: Problem, found: Assignment, used: Ints) -> Assignment:
    """What the program found for the pools that it uses and the batch sizes that are run there."""
    if found.instances is None or found.times is None:
        return found
    taken, levels = used > 0, [problem.tables.level(size) for size in part.tables.sizes]
    return replace(found, instances=found.instances[taken][:, :, levels], times=found.times[taken][:, :, levels])


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
