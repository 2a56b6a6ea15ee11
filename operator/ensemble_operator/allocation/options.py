"""How to plan: the fields of `spec.planning` that concern the search."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ensemble_operator.allocation.errors import InvalidProblem


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """What to look for, how, and how hard.

    `target_rows_per_s` is for the objective `devices`. `time_limit_s` bounds each solution of the mixed-integer
    program. `copies` is how many instances every member shall have where memory allows, for when a device is lost; it
    never costs throughput, and `greedy-paper` ignores it.
    """

    objective: Literal["throughput", "devices"] = "throughput"
    target_rows_per_s: float = 0.0
    strategy: Literal["greedy", "greedy-paper", "exact"] = "greedy"
    max_iterations: int = 10
    max_neighbours: int = 100
    seed: int = 0
    time_limit_s: float = 5.0
    copies: int = 2

    def __post_init__(self) -> None:
        """Refuse what cannot be meant.

        Raises InvalidProblem.
        """
        faults = []
        if self.objective not in ("throughput", "devices"):
            faults.append(f"objective {self.objective!r} is neither throughput nor devices")
        if self.strategy not in ("greedy", "greedy-paper", "exact"):
            faults.append(f"strategy {self.strategy!r} is none of greedy, greedy-paper, exact")
        if not 0 <= self.target_rows_per_s < float("inf"):
            faults.append(f"target throughput {self.target_rows_per_s} must be a finite number of rows/s, at least 0")
        if self.objective == "devices" and not self.target_rows_per_s > 0:
            faults.append("objective devices needs a target throughput above 0 rows/s")
        if self.max_iterations < 0 or self.max_neighbours < 1:
            faults.append("max iterations must be at least 0 and max neighbours at least 1")
        if self.seed < 0:
            faults.append(f"seed {self.seed} must be at least 0")
        if faults:
            raise InvalidProblem(faults)
