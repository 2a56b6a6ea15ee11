"""The front door: a problem and options in, a plan with its distance from the bound and its explanation out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ensemble_operator.allocation.explain import Bottleneck, Explanation, explain
from ensemble_operator.allocation.fewest import fewest
from ensemble_operator.allocation.matrix import Matrix
from ensemble_operator.allocation.options import PlanOptions
from ensemble_operator.allocation.problem import Problem
from ensemble_operator.allocation.strategies import Evaluate, most
from ensemble_operator.allocation.throughput import rows_per_s

Clock = Callable[[], float]


@dataclass(frozen=True, slots=True)
class Plan:
    """A matrix and what is known of it.

    `predicted_rows_per_s` is the model's throughput; no matrix over the devices used exceeds `bound_rows_per_s`; `gap`
    is the share of the bound that is missing. `measured_rows_per_s` is what `evaluate` said, where it was given.
    Under the objective `devices`, `device_bound` is the proven fewest devices, and `shortfall_rows_per_s` is by how
    much the target is missed when all devices are too few.
    """

    matrix: Matrix
    predicted_rows_per_s: float
    bound_rows_per_s: float
    gap: float
    bottleneck: Bottleneck
    explanation: Explanation
    evaluations: int
    seconds: float
    measured_rows_per_s: float | None = None
    device_bound: int = 0
    shortfall_rows_per_s: float = 0.0


def plan(problem: Problem, options: PlanOptions, *, evaluate: Evaluate | None = None, clock: Clock) -> Plan:
    """The plan for a problem.

    `evaluate` measures a matrix (rows/s): every candidate of `greedy-paper`, the best candidates of the others. It may
    raise SearchStopped, and the best so far is kept. `clock` gives seconds. Raises DoesNotFit when the members do not
    fit on the devices, and NotSolved if the solver fails on a well-formed program.
    """
    started = clock()
    device_bound = 0
    if options.objective == "devices":
        outcome, device_bound = fewest(problem, options, evaluate)
    else:
        outcome = most(problem, options, evaluate)
    predicted = rows_per_s(problem, outcome.matrix)
    # What is found may be above what was proven, by the solver's tolerance.
    bound = max(outcome.bound_rows_per_s, predicted)
    explanation = explain(problem, outcome.matrix, outcome.tried)
    return Plan(
        matrix=outcome.matrix,
        predicted_rows_per_s=predicted,
        bound_rows_per_s=bound,
        gap=1 - predicted / bound,
        bottleneck=explanation.bottleneck,
        explanation=explanation,
        evaluations=outcome.evaluations,
        seconds=clock() - started,
        measured_rows_per_s=outcome.measured_rows_per_s,
        device_bound=device_bound,
        shortfall_rows_per_s=max(0.0, options.target_rows_per_s - predicted),
    )
