"""From `spec.planning` to the options of a search. Pure."""

from __future__ import annotations

from typing import Literal, cast

from ensemble_operator.allocation.options import PlanOptions
from ensemble_operator.api import Planning


def options_of(planning: Planning, copies: int = PlanOptions().copies) -> PlanOptions:
    """How the resource wants to be planned; `copies` are the instances that every member shall have if they fit.

    Raises InvalidProblem if its fields do not go together.
    """
    return PlanOptions(
        objective=cast("Literal['throughput', 'devices']", planning.objective),
        target_rows_per_s=planning.target_throughput,
        strategy=cast("Literal['greedy', 'greedy-paper', 'exact']", planning.strategy),
        max_iterations=planning.max_iterations,
        max_neighbours=planning.max_neighbours,
        seed=planning.seed,
        copies=copies,
    )
