"""The searches: `greedy_paper`, the bounded greedy of the paper, and `greedy`, ours, which follows the bottleneck.

Both start from a feasible layout and only ever get better. Both are deterministic for a seed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from ensemble_operator.allocation.exchanges import exchanges, repacked
from ensemble_operator.allocation.layout import Layout, Line, line_rates
from ensemble_operator.allocation.matrix import Matrix
from ensemble_operator.allocation.memory import is_feasible
from ensemble_operator.allocation.moves import Move, Surroundings, together
from ensemble_operator.allocation.problem import Problem
from ensemble_operator.allocation.tables import Tables
from ensemble_operator.allocation.throughput import Memo, Solution, solve, times_of

Score = Callable[[Matrix], float]


# A smaller share of a member's rows than this is none: the solver's tolerance.
_IDLE = 1e-9
# Throughputs that differ by less than this share are the same.
_SAME = 1e-9
# Descents from a worse start than these end lower than those from a disturbed best.
_STARTS = 3
# What another descent adds at most, as a share: from other starts it rarely ends higher by more.
_ANOTHER_DESCENT = 0.02


class SearchStopped(Exception):
    """Raised by a score to end the search, which then keeps the best so far."""


@dataclass(slots=True)
class Trace:
    """What a search did: how much it scored, the best score after each improvement, and the layouts it solved.

    `parts` are solved programs to be used again.
    """

    evaluations: int = 0
    steps: list[float] = field(default_factory=list)
    solved: dict[Layout, float] = field(default_factory=dict)
    parts: Memo = field(default_factory=dict)


def greedy_paper(
    problem: Problem, start: Matrix, score: Score, max_iterations: int, max_neighbours: int, seed: int, trace: Trace
) -> tuple[Matrix, float]:
    """Bounded greedy (arXiv 2208.14049, algorithm 2): the best matrix and its score.

    Neighbours differ in one cell. At most `max_neighbours` of them, drawn without replacement, are scored per step,
    those that lack a member or do not fit as 0; the best is taken if it improves; at most `max_iterations` steps.
    """
    draw = np.random.default_rng(seed)
    sizes = (0, *problem.batch_sizes)
    best, best_score = start, 0.0
    neighbour, neighbour_score = start, 0.0
    try:
        trace.evaluations += 1
        best_score = neighbour_score = score(start)
        for _ in range(max_iterations):
            count = best.sizes.size * (len(sizes) - 1)
            for index in draw.choice(count, size=min(max_neighbours, count), replace=False):
                candidate = _one_cell_away(best, sizes, int(index))
                trace.evaluations += 1
                found = score(candidate) if is_feasible(problem, candidate) else 0.0
                if found > neighbour_score:
                    neighbour, neighbour_score = candidate, found
            if neighbour_score <= best_score:
                break
            best, best_score = neighbour, neighbour_score
            trace.steps.append(best_score)
    except SearchStopped:
        pass
    return neighbour, neighbour_score


def _one_cell_away(matrix: Matrix, sizes: tuple[int, ...], index: int) -> Matrix:
    """The index-th neighbour: a cell in row-major order, with one of the sizes that it does not hold."""
    cell, choice = divmod(index, len(sizes) - 1)
    device, member = divmod(cell, len(matrix.members))
    others = [size for size in sizes if size != matrix.sizes[device, member]]
    return matrix.with_cell(device, member, others[choice])


@dataclass(frozen=True, slots=True)
class _Point:
    layout: Layout
    solution: Solution

    @property
    def rank(self) -> tuple[float, ...]:
        """What is compared: the slowest part first, then the next, so that equal bottlenecks can fall one by one."""
        return tuple(float(f"{rate:.9g}") for rate in np.sort(self.solution.reach))


@dataclass(frozen=True, slots=True)
class Effort:
    """How far a search goes: it ends at `goal_rows_per_s`, or when descents times neighbours layouts are solved.

    With `all_or_nothing`, less than the goal is of no use, and it also ends where the goal is out of reach.
    """

    goal_rows_per_s: float
    max_iterations: int = 10
    max_neighbours: int = 100
    seed: int = 0
    all_or_nothing: bool = False

    def left(self, trace: Trace) -> int:
        """Layouts that may still be solved, of as many as the paper's greedy would score."""
        return max(0, self.max_iterations * self.max_neighbours - trace.evaluations)

    def is_in_reach(self, rows_per_s: float) -> bool:
        """Whether another descent may reach the goal where the best so far reaches so much."""
        return not self.all_or_nothing or rows_per_s >= self.goal_rows_per_s * (1 - _ANOTHER_DESCENT)


class _Pace:
    """What a descent gains by solving layouts."""

    def __init__(self, effort: Effort, trace: Trace, point: _Point) -> None:
        self._effort = effort
        self._solved, self._reached = trace.evaluations, point.solution.rows_per_s

    def suffices(self, trace: Trace, point: _Point) -> bool:
        """Whether the goal is reached, at the pace of the last neighbours, with what is left of the effort."""
        effort, reached = self._effort, point.solution.rows_per_s
        solved = trace.evaluations - self._solved
        if not effort.all_or_nothing or solved < effort.max_neighbours:
            return True
        gained = reached - self._reached
        self._solved, self._reached = trace.evaluations, reached
        return reached + gained / solved * effort.left(trace) >= effort.goal_rows_per_s


def greedy(tables: Tables, starts: list[Layout], effort: Effort, trace: Trace) -> Layout:
    """The best layout found by descents from the best three starts, best first, then from disturbed bests.

    A descent takes the best neighbour that follows the bottleneck, until none improves. There are at most
    `max_iterations` descents; with 0 the best start is returned as it is.
    """
    draw = np.random.default_rng(effort.seed)
    points = sorted(
        (_solved(tables, layout, trace) for layout in dict.fromkeys(starts)), key=lambda p: p.rank, reverse=True
    )
    points = points[:_STARTS]
    best = points[0]
    for iteration in range(effort.max_iterations):
        if best.solution.rows_per_s >= effort.goal_rows_per_s or not effort.left(trace):
            break
        if iteration and not effort.is_in_reach(best.solution.rows_per_s):
            break
        fresh = points[iteration] if iteration < len(points) else _solved(tables, _other(tables, best, draw), trace)
        point = _descend(tables, fresh, effort, trace)
        if point.rank > best.rank:
            best = point
            trace.steps.append(best.solution.rows_per_s)
    return best.layout


def _descend(tables: Tables, point: _Point, effort: Effort, trace: Trace) -> _Point:
    pace = _Pace(effort, trace, point)
    while point.solution.rows_per_s < effort.goal_rows_per_s and effort.left(trace) and pace.suffices(trace, point):
        neighbour = _best_neighbour(tables, point, effort.max_neighbours, trace)
        if neighbour is None:
            break
        point = neighbour
    return point


def _best_neighbour(tables: Tables, point: _Point, max_neighbours: int, trace: Trace) -> _Point | None:
    """The best of the neighbours, of which only those are solved that no known prices rule out.

    Exchanges between devices are tried only where nothing simpler helps.
    """
    around = Surroundings(tables, point.layout, point.solution)
    moves = around.moves(max_neighbours)
    if len(moves) > 1:
        moves = [together(moves), *moves]
    return _best_of(moves, around, point, trace) or _first_of(exchanges(around, max_neighbours), around, point, trace)


def _best_of(moves: list[Move], around: Surroundings, point: _Point, trace: Trace) -> _Point | None:
    """The best neighbour: those that may be best first, each with the lowest bound that any prices so far give it.

    Once one has a higher throughput, those that can only have the same are passed over.
    """
    bounds, best = around.bounds(moves), point
    least = bounds.at(point.solution.prices)
    enough = point.solution.rows_per_s * (1 - _SAME)
    while moves and least.max() >= enough:
        index = int(least.argmax())
        least[index] = -np.inf
        layout = point.layout.changed(moves[index].changes)
        if not layout.instances().all():
            continue
        found = _solved(around.tables, layout, trace)
        if found.rank > best.rank:
            best = found
            if best.rank[0] > point.rank[0]:
                enough = best.solution.rows_per_s * (1 + _SAME)
        np.minimum(least, bounds.at(found.solution.prices), out=least)
    return best if best is not point else None


def _first_of(moves: list[Move], around: Surroundings, point: _Point, trace: Trace) -> _Point | None:
    """The first exchange that is better, of those that the prices do not rule out."""
    bounds = around.bounds(moves).at(point.solution.prices)
    for move, bound in zip(moves, bounds, strict=True):
        if bound >= point.solution.rows_per_s * (1 - _SAME):
            found = _solved(around.tables, point.layout.changed(move.changes), trace)
            if found.rank > point.rank:
                return found
    return None


def _solved(tables: Tables, layout: Layout, trace: Trace) -> _Point:
    solution = solve(tables, layout, trace.parts)
    trace.evaluations += 1
    trace.solved[layout] = solution.rows_per_s
    return _Point(layout, solution)


def _other(tables: Tables, best: _Point, draw: np.random.Generator) -> Layout:
    """Another layout to descend from: the best one disturbed, or packed anew where it has nothing to spare."""
    disturbed = _disturbed(best.layout, draw)
    return repacked(tables, best.layout, draw) if disturbed == best.layout else disturbed


def _disturbed(layout: Layout, draw: np.random.Generator) -> Layout:
    """The layout with a third of its shared members' instances gone, at most one a device: room for another order."""
    spare = layout.instances()
    lines = []
    for line in layout.lines:
        row = list(line.row)
        removable = [m for m, level in enumerate(row) if level and spare[m] > line.devices]
        if removable and draw.random() < 1 / 3:
            member = int(draw.choice(removable))
            spare[member] -= line.devices
            row[member] = 0
        lines.append(Line(line.pool, tuple(row), line.devices))
    return Layout.of(lines)


def without_idle(tables: Tables, layout: Layout) -> Layout:
    """The layout without the instances that its throughput does not need, which would only take turns from others."""
    pools, levels, _ = layout.arrays()
    answered = times_of(tables, layout) * line_rates(tables, pools, levels)
    busy = answered > _IDLE * answered.sum(axis=0)
    lines = (
        Line(line.pool, tuple(int(level) for level in np.where(busy[at], line.row, 0)), line.devices)
        for at, line in enumerate(layout.lines)
    )
    fewer = Layout.of(lines)
    enough = solve(tables, layout).rows_per_s * (1 - _SAME)
    return fewer if solve(tables, fewer).rows_per_s >= enough else layout
