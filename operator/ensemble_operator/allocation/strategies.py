"""The strategies for the largest throughput: starts, search, bound, further copies, measured candidates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from ensemble_operator.allocation.errors import DoesNotFit
from ensemble_operator.allocation.exact import exact, is_small
from ensemble_operator.allocation.greedy import Effort, SearchStopped, Trace, greedy, greedy_paper, without_idle
from ensemble_operator.allocation.layout import Layout, layout_of, matrix_of
from ensemble_operator.allocation.matrix import Matrix
from ensemble_operator.allocation.options import PlanOptions
from ensemble_operator.allocation.packing import packed
from ensemble_operator.allocation.problem import Problem
from ensemble_operator.allocation.program import Assignment, Groups, Limits, most_rows_per_s, relaxed
from ensemble_operator.allocation.rounding import rounded
from ensemble_operator.allocation.throughput import rows_per_s
from ensemble_operator.allocation.worstfit import BatchSizeOf, fill, preferred_batch_size, worst_fit

Evaluate = Callable[[Matrix], float]

# Less than this share of the bound left to gain is less than profiles are true.
CLOSE_ENOUGH = 5e-3
# Up to so many cells a completely filled matrix is one of the starts.
MAX_FILLED_CELLS = 5_000
# Throughputs that differ by less are the same but for rounding.
_SAME = 1e-10


@dataclass(frozen=True, slots=True)
class Outcome:
    """A matrix, the bound of any over the same devices, and how it was found."""

    matrix: Matrix
    bound_rows_per_s: float
    evaluations: int
    tried: tuple[str, ...]
    measured_rows_per_s: float | None = None


@dataclass(frozen=True, slots=True)
class Goal:
    """Rows/s that are enough, and what reaches them where devices of a pool are taken together."""

    rows_per_s: float
    near: Assignment


@dataclass(slots=True)
class _Search:
    """One search: what it works on, the rows/s that end it, the bound, and what it has tried so far."""

    problem: Problem
    options: PlanOptions
    evaluate: Evaluate | None
    bound: float = np.inf
    goal: float = np.inf
    all_or_nothing: bool = False
    trace: Trace = field(default_factory=Trace)
    tried: list[str] = field(default_factory=list)

    @property
    def limits(self) -> Limits:
        return Limits(time_s=self.options.time_limit_s)

    def note(self, what: str) -> None:
        self.tried.append(what)


def most(problem: Problem, options: PlanOptions, evaluate: Evaluate | None = None, goal: Goal | None = None) -> Outcome:
    """The largest throughput, or the first that reaches the goal. Raises DoesNotFit and NotSolved."""
    search = _Search(problem, options, evaluate)
    start = _first_feasible(search)
    groups = Groups.pooled(problem.tables)
    loose = relaxed(problem.tables, groups)
    # The bound of a program that time cut off is another on a slower machine, the relaxation's is the same.
    search.bound, search.goal = loose.bound, loose.bound * (1 - CLOSE_ENOUGH)
    if goal is None:
        near = most_rows_per_s(problem.tables, groups, search.limits, loose.bound)
        search.bound = min(search.bound, near.bound)
    else:
        near = goal.near
        search.goal, search.all_or_nothing = goal.rows_per_s, True
    search.note(f"bound over all matrices: {search.bound:.6g} rows/s")
    if options.strategy == "greedy-paper":
        matrix, measured = _by_paper(search, start)
    else:
        matrix = _by_greedy(search, _starts(problem, start, [loose, near]))
        if options.strategy == "exact":
            matrix = _by_program(search, matrix)
        matrix, measured = _by_measurement(search, _with_copies(search, matrix))
    return Outcome(matrix, search.bound, search.trace.evaluations, tuple(search.tried), measured)


def _first_feasible(search: _Search) -> Matrix:
    """Worst-fit decreasing, or what the program finds where that rule does not. Raises DoesNotFit."""
    try:
        matrix = worst_fit(search.problem)
        search.note(f"worst-fit decreasing: {rows_per_s(search.problem, matrix):.6g} rows/s")
    except DoesNotFit as error:
        packing = packed(search.problem, search.options.time_limit_s)
        if packing.undecided:
            raise error.left_undecided(packing.undecided) from None
        if packing.matrix is None:
            raise
        matrix = packing.matrix
        search.note("worst-fit decreasing finds no room for every member; the mixed-integer program does")
    return matrix


def _by_paper(search: _Search, start: Matrix) -> tuple[Matrix, float | None]:
    problem, options = search.problem, search.options
    score = search.evaluate or (lambda matrix: rows_per_s(problem, matrix))
    effort = options.max_iterations, options.max_neighbours, options.seed
    matrix, best = greedy_paper(problem, start, score, *effort, search.trace)
    search.note(f"greedy-paper: {best:.6g} rows/s, {_effort(search.trace)}")
    # Stopped before anything was measured, the start is kept, and nothing is known of it.
    return matrix, best or None if search.evaluate else None


def _by_greedy(search: _Search, starts: list[Layout]) -> Matrix:
    problem, options = search.problem, search.options
    effort = Effort(search.goal, options.max_iterations, options.max_neighbours, options.seed, search.all_or_nothing)
    best = greedy(problem.tables, starts, effort, search.trace)
    reached = search.trace.solved[best]
    search.note(f"greedy: {reached:.6g} rows/s, {_effort(search.trace)}")
    return matrix_of(problem, without_idle(problem.tables, best))


def _starts(problem: Problem, start: Matrix, assignments: list[Assignment]) -> list[Layout]:
    """The feasible start, the same with its memory filled, and what the program over pools says, made whole."""
    tables = problem.tables
    starts = [layout_of(problem, start)]
    if start.sizes.size <= MAX_FILLED_CELLS:
        starts.append(layout_of(problem, fill(problem, start)))
    # An incomplete solution depends on how fast this machine is, and the same seed shall give the same matrix.
    return starts + [layout for found in assignments if found.complete for layout in rounded(tables, found)]


def _by_program(search: _Search, matrix: Matrix) -> Matrix:
    """The better of the matrix and the program's, with the program's bound where that is lower."""
    problem = search.problem
    if search.all_or_nothing and not search.evaluate and rows_per_s(problem, matrix) >= search.goal:
        return matrix
    if not is_small(problem):
        search.note("exact: too many possible instances for the program; the greedy's matrix is kept")
        return matrix
    found, bound = exact(problem, search.limits, search.bound)
    search.bound = min(search.bound, bound)
    score = rows_per_s(problem, found) if found else 0.0
    search.note(f"exact: {score:.6g} rows/s, proven to be at most {bound:.6g}")
    return found if found and score > rows_per_s(problem, matrix) else matrix


def _with_copies(search: _Search, matrix: Matrix) -> Matrix:
    """With so many instances of every member as wanted, as far as memory allows and throughput does not fall.

    Copies take as large batches as the plan's instance on such a device, for requests are divided among them alike; or
    the preferred ones, if there is room for more copies then.
    """
    problem = search.problem
    enough = rows_per_s(problem, matrix) * (1 - _SAME)
    rules = _as_planned(problem, matrix), preferred_batch_size(problem)
    filled = (fill(problem, matrix, rule, search.options.copies) for rule in rules)
    able = [with_copies for with_copies in filled if rows_per_s(problem, with_copies) >= enough]
    best = max(able, key=lambda with_copies: with_copies.instance_count, default=matrix)
    if best != matrix:
        added = best.instance_count - matrix.instance_count
        search.note(f"further copies, for when a device is busy or lost: {added}")
    return best


def _as_planned(problem: Problem, matrix: Matrix) -> BatchSizeOf:
    """The largest batch of a member's instances on devices of a class; where it has none, the preferred one."""
    planned: dict[tuple[str, str], int] = {}
    for device, row in zip(problem.devices, matrix.sizes, strict=True):
        for member, size in zip(problem.members, row, strict=True):
            key = member.name, device.device_class
            planned[key] = max(planned.get(key, 0), int(size))
    prefer = preferred_batch_size(problem)
    return lambda member, device_class: planned.get((member, device_class), 0) or prefer(member, device_class)


def _by_measurement(search: _Search, matrix: Matrix) -> tuple[Matrix, float | None]:
    """The best of the plan, the same with its memory filled, and the search's best matrices, as measured."""
    if search.evaluate is None:
        return matrix, None
    best, best_score = matrix, None
    try:
        for candidate in _candidates(search, matrix):
            score = search.evaluate(candidate)
            search.note(f"measured: {score:.6g} rows/s; the model says {rows_per_s(search.problem, candidate):.6g}")
            if best_score is None or score > best_score:
                best, best_score = candidate, score
    except SearchStopped:
        search.note("measuring was stopped; the best so far is kept")
    return best, best_score


def _candidates(search: _Search, matrix: Matrix) -> list[Matrix]:
    """At most `max_iterations` matrices worth measuring, and at least the plan itself."""
    problem, solved = search.problem, search.trace.solved
    count = max(1, search.options.max_iterations)
    likely = sorted(solved, key=lambda layout: -solved[layout])[:count]
    matrices = [matrix, fill(problem, matrix), *(matrix_of(problem, layout) for layout in likely)]
    return list(dict.fromkeys(matrices))[:count]


def _effort(trace: Trace) -> str:
    count = len(trace.steps)
    return f"{trace.evaluations} matrices scored, {count} improvement{'' if count == 1 else 's'}"
